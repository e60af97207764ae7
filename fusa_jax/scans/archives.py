"""What lies in folders and .zip archives, at any depth: archives are unpacked for as long as they are looked into."""

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

# Archives in archives, counted from the outermost.
_DEPTH = 4
# Folders of `unpacking`.
_in_use = set()


@contextlib.contextmanager
def unpacking() -> Iterator[pathlib.Path]:
  """Gives a folder for what archives hold (`within`), gone afterwards; a UserError names files as ARCHIVE.zip/FILE."""
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
  """For a process that ends without leaving `unpacking`: scans name their patients."""
  for folder in list(_in_use):
    # Out of the way of threads that may still be writing to it.
    gone = f'{folder}.gone'
    with contextlib.suppress(OSError):
      os.rename(folder, gone)
    for left in (gone, folder):
      shutil.rmtree(left, ignore_errors=True)


def unpack(archive: pathlib.Path, folder: pathlib.Path, called: str = '') -> None:
  """Unpacks a .zip into a folder, and nowhere else; errors call it `called`, or by its path.

  Raises:
    UserError: damaged or encrypted; names that lead out of the folder; more than there is room for.
  """
  called = called or str(archive)
  try:
    with zipfile.ZipFile(archive) as packed:
      names = [pathlib.PurePosixPath(name.replace('\\', '/')) for name in packed.namelist()]
      if any(name.is_absolute() or '..' in name.parts for name in names):
        raise UserError(f'{called}: has names that lead out of it; unpack it by hand if you trust it')
      size, free = sum(entry.file_size for entry in packed.infolist()), shutil.disk_usage(folder).free
      if size > 0.9 * free:
        raise UserError(
          f'{called}: {size / 1e9:.1f} GB unpacked, and {tempfile.gettempdir()} has room for {free / 1e9:.1f}; set '
          'TMPDIR to a folder with more'
        )
      packed.extractall(folder)
  except NotImplementedError as error:
    raise UserError(f'{called}: packed in a way that is not known here ({error}); unpack it by hand') from None
  except RuntimeError:  # of zipfile, where a password is needed
    raise UserError(f'{called}: encrypted; unpack it by hand') from None
  except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, OSError, EOFError, ValueError) as error:
    if isinstance(error, UserError):
      raise
    raise UserError(f'{called}: cannot be unpacked ({type(error).__name__}); pack or copy it again') from None


def is_archive(path: pathlib.Path) -> bool:
  """Whether it is a .zip, by its name."""
  return path.suffix.lower() == '.zip' and path.is_file()


def within(source: pathlib.Path, unpacked: pathlib.Path) -> Iterator[pathlib.Path]:
  """A file itself, or the files of a folder or .zip, at any depth, sorted; those of archives in these, too.

  Args:
    source: a file or a folder; what begins with a dot in it is left out.
    unpacked: a folder for what archives hold, as `unpacking` gives it.

  Raises:
    UserError: as `unpack`, where archives in a folder are called by their own names: exports name folders by patient;
      archives in archives, and so on.
  """
  if source.is_dir():
    for path in in_folder(source):
      yield from _unpacked(path, unpacked, path.name) if is_archive(path) else (path,)
  elif is_archive(source):
    yield from _unpacked(source, unpacked, str(source))
  else:
    yield source


def _unpacked(archive, folder, called, depth=1):
  if depth > _DEPTH:  # there is one that holds itself
    raise UserError(f'{called}: archives in archives, {depth} deep; unpack it by hand')
  inside = folder / str(len(list(folder.iterdir()))) / archive.name
  inside.mkdir(parents=True)
  unpack(archive, inside, called)
  for path in in_folder(inside):
    yield from _unpacked(path, folder, path.name, depth + 1) if is_archive(path) else (path,)


def in_folder(folder: pathlib.Path) -> list[pathlib.Path]:
  """The files of a folder at any depth, sorted, without those that begin with a dot or lie in such a folder."""
  visible = lambda path: not any(part.startswith('.') for part in path.relative_to(folder).parts)
  return sorted(path for path in folder.rglob('*') if visible(path) and path.is_file())
