"""predictions.csv: a row per input of a prediction, from all processes, with what each result was made from.

Each process appends its rows to a file of its own, so that a process that is killed loses nothing. Process 0 joins
these files to predictions.csv at the start, now and then, and at the end.
"""

import contextlib
import csv
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

from fusa_jax.inference import class_numbers
from fusa_jax.scans.classes import Classes, file_name
from fusa_jax.system import files, locks, own_files
from fusa_jax.system.errors import UserError

NAME = 'predictions.csv'
# The columns of one class. Earlier versions had only the first.
_FIRST_COLUMNS = ('input', 'input_sha256', 'status', 'reason', 'lesion_ml', 'seconds', 'run_sha256')
COLUMNS = (*_FIRST_COLUMNS, 'patient_score', 'patient_positive')
# The columns that each of several classes has, with the name of the class at the end.
OF_CLASS = ('lesion_ml', 'patient_score', 'patient_positive')
# The column of exclusive classes: the class with the highest probability. NAME.json has the same key.
CALLED = 'predicted_class'
PREDICTED, REFUSED, FAILED = 'predicted', 'refused', 'failed'
_PARTS = '.predictions.*.csv'
# Seconds between two joins while the prediction runs.
_JOIN_EVERY = 30


def columns_of(classes: Classes, has_masks: bool) -> tuple[str, ...]:
  """The columns for the classes of a model. Several classes without masks have no volumes."""
  if len(classes.names) == 1:
    return COLUMNS
  shared = tuple(column for column in COLUMNS if column not in OF_CLASS)
  called = (CALLED,) if classes.exclusive else ()
  of_class = OF_CLASS if has_masks else tuple(column for column in OF_CLASS if column != 'lesion_ml')
  return *shared, *called, *(f'{column}_{file_name(name)}' for name in classes.names for column in of_class)


def row(
  place: str,
  input_sha256: str,
  status: str,
  reason: str,
  seconds: float | None,
  run_sha256: str,
  numbers: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
  """Returns the row of an input.

  Args:
    place, input_sha256, status, reason, seconds, run_sha256: the values of the columns for the input.
    numbers: its results, as NAME.json holds them; None without a result.

  Returns:
    The values by column; `Manifest.add` takes those of its own columns.
  """
  shared = place, input_sha256, status, reason, seconds, run_sha256
  found = dict(zip((column for column in COLUMNS if column not in OF_CLASS), shared, strict=True))
  found[CALLED] = (numbers or {}).get(CALLED)
  of_each = class_numbers.by_class(numbers or {})
  for name, own in of_each.items():
    patient = own.get('patient', {})
    positive = patient.get('positive')
    values = own.get('lesion_ml'), patient.get('score'), None if positive is None else int(positive)
    ending = f'_{file_name(name)}' if len(of_each) > 1 else ''
    found |= {f'{column}{ending}': value for column, value in zip(OF_CLASS, values, strict=True)}
  return found


class Manifest:
  """The rows of one prediction, and those of earlier ones in the same folder.

  Attributes:
    rows: {input: row} of this and earlier predictions. Process 0 has those of all processes after `join`.
    new_rows: the same, without the rows of earlier predictions.
  """

  def __init__(self, folder: pathlib.Path, process: int, columns: Sequence[str] = COLUMNS):
    """Opens the manifest of a folder.

    Args:
      folder: the output folder.
      process: the number of this process; process 0 reads the existing rows and joins.
      columns: the columns for the classes of the model (`columns_of`).
    """
    self._columns = tuple(columns)
    self._folder, self._is_main = folder, process == 0
    self._part = folder / _PARTS.replace('*', str(process))
    self._file, self._joined_at = None, time.monotonic()
    self._is_new = not (folder / NAME).exists()
    self.rows, self.new_rows = {}, {}
    if self._is_main:
      self.rows |= self._read(folder / NAME)

  def check_own(self) -> None:
    """Raises a UserError if predictions.csv is for other classes or another task, or was changed.

    The rows of a killed prediction for other classes are refused, too.
    """
    path = self._folder / NAME
    try:
      with path.open(newline='', encoding='utf-8') as file:
        first, *others = csv.reader(file)
      columns = tuple(first)
      is_own = _is_table(columns) and all(_is_row(cells, columns) for cells in others)
    except FileNotFoundError:
      is_own, columns = True, self._columns
    except (ValueError, csv.Error, OSError):
      is_own = False
    own_files.refuse([] if is_own else [path])
    other = [] if columns in self._readable else [path]
    for part in sorted(self._folder.glob(_PARTS)) if self._folder.is_dir() else []:
      other += [part] if any(columns not in self._readable for columns, _ in _rows(part)) else []
    if other:
      raise UserError(
        f'{other[0]}: has rows of a run with other classes or another task, and other columns; give another folder, or '
        'add --overwrite to replace it'
      )

  @property
  def _readable(self):
    """The columns of rows that this manifest can hold."""
    return (self._columns, _FIRST_COLUMNS) if self._columns == COLUMNS else (self._columns,)

  def add(self, row: dict) -> None:
    """Adds a row of this process; columns that it lacks are empty.

    Raises:
      UserError: the file cannot be written.
    """
    row = {column: row.get(column) for column in self._columns}
    with files.writing(self._part):
      if self._file is None:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._file = self._part.open('a', newline='', encoding='utf-8')
        if self._columns != COLUMNS:
          self._file.write('\n')
          csv.writer(self._file, lineterminator='\n').writerow(self._columns)
      # A row begins with a line break, so that it does not continue the line at which another process was killed.
      self._file.write('\n')
      csv.DictWriter(self._file, self._columns, lineterminator='\n').writerow(row)
      self._file.flush()
    self.new_rows[row['input']] = row
    if self._is_main and time.monotonic() - self._joined_at > _JOIN_EVERY:
      self.join()

  def join(self, at_end: bool = False) -> None:
    """Process 0: writes all rows to predictions.csv, and removes its own file; at the end, those of all processes."""
    if not self._is_main:
      return
    parts = sorted(self._folder.glob(_PARTS)) if self._folder.is_dir() else []
    for part in parts:
      self.new_rows |= self._read(part)
    for name, row in self.new_rows.items():
      # A result that was complete already keeps the time that it took.
      earlier = self.rows.get(name, row)
      same = all(row[key] == earlier[key] for key in ('input_sha256', 'run_sha256'))
      self.rows[name] = row | {'seconds': row['seconds'] or (earlier['seconds'] if same else '')}
    if parts:
      files.write_csv(self._folder / NAME, [self.rows[name] for name in sorted(self.rows)])
    self.close()
    for part in parts if at_end else [self._part]:
      part.unlink(missing_ok=True)
    self._joined_at = time.monotonic()

  def begin(self) -> None:
    """Process 0: joins what a killed prediction left, and removes its temporary files."""
    files.remove_partials(self._folder)
    self.join(at_end=True)
    self.new_rows = {}

  def remove_if_new(self) -> None:
    """Removes predictions.csv if it only has the row of an input that was refused."""
    if self._is_main and self._is_new:
      (self._folder / NAME).unlink(missing_ok=True)

  def close(self) -> None:
    if self._file is not None:
      with contextlib.suppress(OSError):  # `add` has reported a full disk
        self._file.close()
      self._file = None

  def _read(self, path):
    """The rows of a file by input; rows for other classes are left out.

    Files of earlier versions have fewer columns; the others are empty.
    """
    empty = dict.fromkeys(self._columns, '')
    return {row['input']: empty | row for columns, row in _rows(path) if columns in self._readable}


def _rows(path):
  """The rows of a file with their columns; a row that was not written to its end is left out.

  The rows of one class, which a process appends to a file of its own, have no header.
  """
  columns, rows = COLUMNS, []
  with contextlib.suppress(OSError, ValueError, csv.Error), path.open(newline='', encoding='utf-8') as file:
    for cells in csv.reader(file):
      if cells[:2] == list(COLUMNS[:2]):
        columns = tuple(cells)
      elif _is_row(cells, columns):
        rows.append((columns, dict(zip(columns, cells, strict=True))))
  return rows


def _is_table(columns):
  """Whether these are the columns of a table for any classes (`columns_of`)."""
  shared = tuple(column for column in COLUMNS if column not in OF_CLASS)
  of_classes = columns[len(shared) :]
  if columns[: len(shared)] != shared or not of_classes:
    return columns in (COLUMNS, _FIRST_COLUMNS)
  beginnings = tuple(f'{column}_' for column in OF_CLASS)
  return all(column == CALLED or column.startswith(beginnings) for column in of_classes)


def _is_row(cells, columns):
  return len(cells) == len(columns) and cells[2] in (PREDICTED, REFUSED, FAILED)


def refused(folder: pathlib.Path) -> set[str]:
  """The inputs that a prediction into the folder refused, or failed on."""
  return {row['input'] for _, row in _rows(folder / NAME) if row['status'] != PREDICTED}


def locked(folder: pathlib.Path) -> contextlib.AbstractContextManager[None]:
  """Returns a context in which no other prediction may write to the folder.

  Raises:
    UserError: another prediction writes to the folder now; or the folder cannot be written.
  """
  if folder.exists() and not folder.is_dir():
    raise UserError(f'output: {folder} is a file; give a folder')
  busy = f'output: another prediction writes to {folder} now; wait until it ends, or give another folder'
  return locks.alone(folder, 'predictions', busy)
