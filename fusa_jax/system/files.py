"""Files that are either whole or absent, and one line where one cannot be written."""

import contextlib
import csv
import hashlib
import json
import math
import os
import pathlib
import shutil
from collections.abc import Iterable, Iterator
from typing import Any

from fusa_jax.system.errors import UserError, one_line


@contextlib.contextmanager
def writing(path: pathlib.Path) -> Iterator[None]:
  """Around what writes `path`: the system's refusal (a full disk, no permission) becomes a UserError that says so."""
  try:
    yield
  except OSError as error:
    reason = error.strerror or error
    raise UserError(f'{path}: cannot be written ({reason}); free space there, or name another folder') from error


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """Gives a name to write to; on leaving, that file becomes `path` in one step. On an error nothing is left.

  The name ends as `path` does (libraries choose a format by it) and lies in the same folder (a rename is atomic only
  within a file system).

  Raises:
    UserError: the system refuses to write there.
  """
  path = pathlib.Path(path)
  partial = path.with_name(f'.{os.getpid()}.{path.name}')
  with writing(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
      yield partial
      os.replace(partial, path)
    finally:
      partial.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """Gives a folder to fill; on leaving, it becomes `path` in one step. On an error nothing is left.

  Raises:
    UserError: there is something already; the system refuses to write there.
  """
  path = pathlib.Path(path).absolute()
  if path.exists() and (not path.is_dir() or any(path.iterdir())):
    raise UserError(f'{path}: is there already; name a new folder, or delete this one')
  partial = path.with_name(f'.{os.getpid()}.{path.name}')
  with writing(path):
    try:
      partial.mkdir(parents=True)
      yield partial
      os.replace(partial, path)
    finally:
      shutil.rmtree(partial, ignore_errors=True)


def sha256(content: bytes) -> str:
  return hashlib.sha256(content).hexdigest()


def read_json(path: pathlib.Path, advice: str) -> Any:
  """What a JSON file holds.

  Args:
    path: of the file.
    advice: what to do where it cannot be read or is damaged.

  Raises:
    UserError: it is missing, cannot be read or is damaged.
  """
  try:
    return json.loads(path.read_text())
  except FileNotFoundError:
    raise UserError(f'{path}: missing; {advice}') from None
  except OSError as error:
    raise UserError(f'{path}: cannot be read ({error.strerror}); {advice}') from None
  except ValueError as error:  # of JSON, or of an encoding
    raise UserError(f'{path}: damaged ({one_line(error)}); {advice}') from None


def write_json(path: pathlib.Path, value: Any) -> None:
  """Writes indented JSON atomically.

  Raises:
    UserError: the system refuses to write there.
  """
  with replacing(path) as partial:
    partial.write_text(json.dumps(value, indent=2) + '\n')


def write_csv(path: pathlib.Path, rows: Iterable[dict]) -> None:
  """A table, a column for each key of the first row; what is undefined (NaN, None) is an empty cell.

  Raises:
    UserError: the system refuses to write there.
  """
  rows = list(rows)
  empty = lambda value: value is None or (isinstance(value, float) and math.isnan(value))
  with replacing(path) as partial, partial.open('w', newline='') as file:
    writer = csv.DictWriter(file, rows[0])
    writer.writeheader()
    writer.writerows({name: '' if empty(value) else value for name, value in row.items()} for row in rows)
