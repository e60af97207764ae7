"""Reads lists in CSV as spreadsheets save them: `slices.csv`, `patients.csv` and `labels.csv`."""

import csv
import io
import pathlib

from data.cohorts import name_of
from fusa_jax.system.errors import UserError


def has_columns(path: pathlib.Path, columns: tuple[str, ...]) -> bool:
  """Whether a file is a list with these columns; False if it cannot be read."""
  try:
    read(path, columns)
  except UserError:
    return False
  return True


def read(path: pathlib.Path, columns: tuple[str, ...]) -> list[tuple[int, tuple[str, ...]]]:
  """The rows of a list, each with its line number.

  The text is in UTF-8 or UTF-16, separated by commas, semicolons or tabs. Capitals in the first line, blanks around
  values, other columns and empty rows do not matter.

  Args:
    path: the list.
    columns: the columns to read, in lower case.

  Raises:
    UserError: the list cannot be read, or lacks one of these columns.
  """
  try:
    content = path.read_bytes()
    text = content.decode('utf-16' if content[:2] in (b'\xff\xfe', b'\xfe\xff') else 'utf-8-sig')
    lines = [_split(text, separator) for separator in ',;\t']
  except OSError as error:
    raise UserError(f'{path}: cannot be read ({error.strerror}); check its permissions') from None
  except (UnicodeDecodeError, csv.Error) as error:
    raise UserError(f'{path}: not a CSV file in UTF-8 ({error}); save it in UTF-8, with commas') from None
  for rows in lines:
    names = [name.lower() for name in rows[0][1]] if rows else []
    if set(columns) <= set(names):
      places = [names.index(column) for column in columns]
      return [(line, tuple(row[place] if place < len(row) else '' for place in places)) for line, row in rows[1:]]
  raise UserError(f'{path}: no columns {" and ".join(columns)}; use commas, with {",".join(columns)} as first line')


def _split(text, separator):
  """The rows that are not empty, with their line numbers. Excel may write its separator (`sep=;`) above the first."""
  reader = csv.reader(io.StringIO(text, newline=''), delimiter=separator)
  rows = ((reader.line_num, [name_of(value.strip()) for value in row]) for row in reader)
  return [(line, row) for line, row in rows if any(row) and not row[0].lower().startswith('sep=')]
