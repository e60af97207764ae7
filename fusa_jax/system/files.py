"""Writes files atomically: a file is complete or absent. A failed write is an error of one line.

`replacing`, `write_json`, `write_csv` and `read_json` also take paths in a bucket (system/paths.py).
"""

import contextlib
import csv
import errno
import hashlib
import json
import math
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from typing import Any

from fusa_jax.system import paths
from fusa_jax.system.errors import UserError, one_line

# The longest name of a file, in bytes, on most file systems.
LONGEST_NAME = 255
# The names of `_partial`.
_PARTIAL = re.compile(r'\.\d+\.[0-9a-f]{16}(\.[\w.]*)?')
# What to do about errors that no free space cures.
_ADVICE = {
  errno.ENAMETOOLONG: 'give its input a shorter name',
  errno.EACCES: 'give a folder that you may write to',
  errno.EROFS: 'give a folder that you may write to',
  errno.EPERM: 'give a folder that you may write to',
}

_ELSEWHERE = 'free space there, or give another folder'


@contextlib.contextmanager
def writing(path: pathlib.Path) -> Iterator[None]:
  """Context for code that writes `path`: turns an OSError (a full disk, no permission) into a UserError."""
  try:
    yield
  except OSError as error:
    reason = error.strerror or error
    other = 'check the name of the bucket and your access to it' if paths.in_bucket(path) else _ELSEWHERE
    advice = _ADVICE.get(error.errno, other)
    raise UserError(f'{path}: cannot be written ({reason}); {advice}') from error


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """Yields a temporary path to write to; on exit, renames that file to `path` in one step. An error leaves no file.

  The temporary name has the same ending as `path`, because libraries choose a format by it. It is in the same folder,
  because a rename is atomic only within a file system. For a file in a bucket, the temporary file is local; on exit it
  is copied to the bucket, where an object appears in one step.

  Raises:
    UserError: the file cannot be written.
  """
  if paths.in_bucket(path):
    with writing(path), tempfile.TemporaryDirectory() as folder:
      partial = pathlib.Path(folder) / path.name
      yield partial
      path.write_bytes(partial.read_bytes())
    return
  path = pathlib.Path(path)
  partial = _partial(path)
  with writing(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
      yield partial
      with partial.open('rb') as file:
        os.fsync(file.fileno())  # else a power cut may leave an empty file under the final name
      os.replace(partial, path)
    finally:
      partial.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """Yields a temporary folder to fill; on exit, renames it to `path` in one step. An error leaves no folder.

  Raises:
    UserError: `path` exists and is not an empty folder, or it cannot be written.
  """
  path = pathlib.Path(path).absolute()
  if path.exists() and (not path.is_dir() or any(path.iterdir())):
    raise UserError(f'{path}: exists already; give a new folder, or delete this one')
  partial = _partial(path)
  with writing(path):
    try:
      partial.mkdir(parents=True)
      yield partial
      os.replace(partial, path)
    finally:
      shutil.rmtree(partial, ignore_errors=True)


def _partial(path):
  """A temporary name beside `path`, with its ending. It is short, because `path` may have the longest allowed name."""
  endings = next((each for each in (''.join(path.suffixes[-2:]), path.suffix) if len(each) < 20), '')
  return path.with_name(f'.{os.getpid()}.{sha256(os.fsencode(path.name))[:16]}{endings}')


def remove_partials(folder: pathlib.Path) -> None:
  """Removes the temporary files that killed processes left in a folder. Call it only while no other process writes."""
  for path in folder.glob('.*') if folder.is_dir() else ():
    if _PARTIAL.fullmatch(path.name):
      path.unlink(missing_ok=True)


def printable(text: str) -> str:
  """A file name on one line that UTF-8 can store: other bytes and control characters become escapes such as `\\xfc`."""
  text = os.fsencode(text).decode('utf-8', 'backslashreplace')
  return ''.join(sign if sign.isprintable() else sign.encode('unicode_escape').decode() for sign in text)


def sha256(content: bytes) -> str:
  return hashlib.sha256(content).hexdigest()


def sha256_of(path: pathlib.Path) -> str:
  """The SHA-256 of a file. Raises OSError if it cannot be read."""
  with path.open('rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


def read_json(path: pathlib.Path, advice: str) -> Any:
  """Reads a JSON file.

  Args:
    path: path of the file.
    advice: end of the error message: what to do if the file cannot be read.

  Raises:
    UserError: the file is missing, cannot be read, or is damaged.
  """
  try:
    return json.loads(path.read_text())
  except FileNotFoundError:
    raise UserError(f'{path}: missing; {advice}') from None
  except OSError as error:
    raise UserError(f'{path}: cannot be read ({error.strerror}); {advice}') from None
  except ValueError as error:  # invalid JSON, or an invalid encoding
    raise UserError(f'{path}: damaged ({one_line(error)}); {advice}') from None


def write_json(path: pathlib.Path, value: Any) -> None:
  """Writes indented JSON atomically.

  Raises:
    UserError: the file cannot be written.
  """
  with replacing(path) as partial:
    partial.write_text(json.dumps(value, indent=2) + '\n')


def write_csv(path: pathlib.Path, rows: Iterable[dict]) -> None:
  """Writes rows as CSV, one column per key of the first row. Undefined values (NaN, None) become empty cells.

  Raises:
    UserError: the file cannot be written.
  """
  rows = list(rows)
  empty = lambda value: value is None or (isinstance(value, float) and math.isnan(value))
  with replacing(path) as partial, partial.open('w', newline='', encoding='utf-8', errors='backslashreplace') as file:
    writer = csv.DictWriter(file, rows[0])
    writer.writeheader()
    writer.writerows({name: '' if empty(value) else value for name, value in row.items()} for row in rows)
