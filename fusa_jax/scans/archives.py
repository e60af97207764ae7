"""Finds files in folders and .zip archives at any depth. Archives are unpacked only while they are in use."""

import contextlib
import lzma
import os
import pathlib
import re
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Iterator

from fusa_jax.system import exits
from fusa_jax.system.errors import UserError

# How deep archives may be nested; the outermost archive counts as 1.
_DEPTH = 4
# The folders of `unpacking` that exist now.
_in_use = set()


@contextlib.contextmanager
def unpacking() -> Iterator[pathlib.Path]:
  """Makes a temporary folder for unpacked archives (see `within`), and removes it at the end.

  In a UserError raised inside, unpacked files are named ARCHIVE.zip/FILE, without the temporary folder.
  """
  with tempfile.TemporaryDirectory(prefix='fusa-jax-') as folder:
    _in_use.add(folder)
    try:
      yield pathlib.Path(folder)
    except UserError as error:
      raise UserError(re.sub(re.escape(folder) + r'/\d+/', '', str(error))) from None
    finally:
      _in_use.discard(folder)


@exits.before_leaving
def remove_unpacked() -> None:
  """Removes the folders of `unpacking` if the process exits inside it: scans contain the names of patients."""
  for folder in list(_in_use):
    # Rename the folder first: other threads may still be writing to it.
    renamed = f'{folder}.gone'
    with contextlib.suppress(OSError):
      os.rename(folder, renamed)
    for path in (renamed, folder):
      shutil.rmtree(path, ignore_errors=True)


def unpack(archive: pathlib.Path, folder: pathlib.Path, called: str = '') -> None:
  """Unpacks a .zip into a folder, and nowhere else.

  Args:
    archive: the .zip file.
    folder: the folder to unpack into.
    called: the name of the archive in errors; '' for its path.

  Raises:
    UserError: the archive is damaged or encrypted; its file names lead out of the folder; the disk is too full.
  """
  called = called or str(archive)
  try:
    with zipfile.ZipFile(archive) as packed:
      names = [pathlib.PurePosixPath(name.replace('\\', '/')) for name in packed.namelist()]
      if any(name.is_absolute() or '..' in name.parts for name in names):
        raise UserError(f'{called}: has file names that lead out of its folder; unpack it by hand if you trust it')
      size, free = sum(entry.file_size for entry in packed.infolist()), shutil.disk_usage(folder).free
      if size > 0.9 * free:
        raise UserError(
          f'{called}: needs {size / 1e9:.1f} GB unpacked, but {tempfile.gettempdir()} has {free / 1e9:.1f} GB free; '
          'set TMPDIR to a folder with more space'
        )
      packed.extractall(folder)
  except NotImplementedError as error:
    raise UserError(f'{called}: unsupported kind of .zip ({error}); unpack it by hand') from None
  except RuntimeError:  # zipfile raises it if the archive needs a password
    raise UserError(f'{called}: encrypted; unpack it by hand') from None
  except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, OSError, EOFError, ValueError) as error:
    if isinstance(error, UserError):
      raise
    raise UserError(f'{called}: cannot be unpacked ({type(error).__name__}); pack or copy it again') from None


def is_archive(path: pathlib.Path) -> bool:
  """Whether the path is a .zip file, judged by its name."""
  return path.suffix.lower() == '.zip' and path.is_file()


def within(source: pathlib.Path, unpacked: pathlib.Path) -> Iterator[pathlib.Path]:
  """Yields the file itself, or all files of a folder or .zip at any depth, sorted. Unpacks archives inside, too.

  Args:
    source: a file or a folder. Names that begin with a dot are skipped.
    unpacked: the folder for unpacked archives, from `unpacking`.

  Raises:
    UserError: as `unpack`; archives are nested too deep. Errors show only the file name of an archive in a folder,
      because exports name folders by patient.
  """
  if source.is_dir():
    for path in in_folder(source):
      yield from _unpacked(path, unpacked, path.name) if is_archive(path) else (path,)
  elif is_archive(source):
    yield from _unpacked(source, unpacked, str(source))
  else:
    yield source


def _unpacked(archive, folder, called, depth=1):
  if depth > _DEPTH:  # some archives contain themselves
    raise UserError(f'{called}: archives are nested {depth} deep; unpack it by hand')
  inside = folder / str(len(list(folder.iterdir()))) / archive.name
  inside.mkdir(parents=True)
  unpack(archive, inside, called)
  for path in in_folder(inside):
    yield from _unpacked(path, folder, path.name, depth + 1) if is_archive(path) else (path,)


def in_folder(folder: pathlib.Path) -> list[pathlib.Path]:
  """The files of a folder at any depth, sorted. Files and folders that begin with a dot are skipped."""
  visible = lambda path: not any(part.startswith('.') for part in path.relative_to(folder).parts)
  return sorted(path for path in folder.rglob('*') if visible(path) and path.is_file())
