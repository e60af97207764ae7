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
from fusa_jax.system.errors import UserError, one_line

# How deep archives may be nested; the outermost archive counts as 1.
_DEPTH = 4
# Files and folders that operating systems leave behind, in lower case.
_LEFTOVERS = ('__macosx', 'thumbs.db', 'desktop.ini', '@eadir', '$recycle.bin', 'system volume information')
# The file that says which archive was unpacked beside it.
_ORIGIN = 'origin'
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


def within(
  source: pathlib.Path, unpacked: pathlib.Path, damaged: dict[pathlib.Path, str] | None = None
) -> Iterator[pathlib.Path]:
  """Yields the file itself, or all files of a folder or .zip at any depth, sorted. Unpacks archives inside, too.

  Args:
    source: a file or a folder; see `in_folder`.
    unpacked: the folder for unpacked archives, from `unpacking`.
    damaged: collects the archives inside `source` that cannot be unpacked, with the error. None: the first one raises.

  Raises:
    UserError: as `unpack`; archives are nested too deep. Errors show only the file name of an archive in a folder,
      because exports name folders by patient.
  """
  if source.is_dir():
    for path in in_folder(source):
      yield from _unpacked(path, unpacked, path.name, damaged) if is_archive(path) else (path,)
  elif is_archive(source):
    yield from _unpacked(source, unpacked, str(source), damaged, is_inside=False)
  else:
    yield source


def _unpacked(archive, folder, called, damaged, depth=1, is_inside=True):
  inside = folder / str(len(list(folder.iterdir()))) / archive.name
  try:
    if depth > _DEPTH:  # some archives contain themselves
      raise UserError(f'{called}: archives are nested {depth} deep; unpack it by hand')
    inside.mkdir(parents=True)
    (inside.parent / _ORIGIN).write_bytes(os.fsencode(archive))
    unpack(archive, inside, called)
  except UserError as error:
    if damaged is None or not is_inside:
      raise
    damaged[archive] = str(error)
    return
  for path in in_folder(inside):
    yield from _unpacked(path, folder, path.name, damaged, depth + 1) if is_archive(path) else (path,)


def place_of(path: pathlib.Path, source: pathlib.Path, unpacked: pathlib.Path) -> pathlib.PurePath:
  """The path of a file of `within` inside its source, with the names of the archives that it lies in."""
  if path.is_relative_to(unpacked):
    number, _, *rest = path.relative_to(unpacked).parts
    archive = pathlib.Path(os.fsdecode((unpacked / number / _ORIGIN).read_bytes()))
    return place_of(archive, source, unpacked).joinpath(*rest)
  return path.relative_to(source) if source.is_dir() else pathlib.PurePath(path.name)


def in_folder(folder: pathlib.Path) -> list[pathlib.Path]:
  """The files of a folder at any depth, sorted.

  Follows links, but not into a folder that it is inside of. Includes broken links, because reading them names them.
  Skips files and folders that begin with a dot, and those that operating systems leave behind (`__MACOSX`, Thumbs.db).

  Raises:
    UserError: a folder cannot be read.
  """

  def walk(current, above):
    real = os.path.realpath(current)
    if real in above:
      return
    try:
      entries = list(os.scandir(current))
    except OSError as error:
      raise UserError(f'{current}: the folder cannot be read ({one_line(error)}); check its permissions') from None
    for entry in entries:
      if is_leftover(entry.name):
        continue
      if entry.is_dir():
        yield from walk(entry.path, above | {real})
      elif entry.is_file() or not os.path.exists(entry.path):  # the second is a broken link
        yield pathlib.Path(entry.path)

  return sorted(walk(folder, frozenset()))


def is_leftover(name: str) -> bool:
  """Whether a file or folder is hidden, or one that operating systems leave behind, judged by its name."""
  return name.startswith('.') or name.lower() in _LEFTOVERS
