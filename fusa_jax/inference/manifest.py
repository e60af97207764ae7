"""predictions.csv: a row per input of a prediction, from all processes, with what each result was made from.

Each process appends its rows to a file of its own, so that a process that is killed loses nothing. Process 0 joins
these files to predictions.csv at the start, now and then, and at the end.
"""

import contextlib
import csv
import pathlib
import time

from fusa_jax.system import files, locks, own_files
from fusa_jax.system.errors import UserError

NAME = 'predictions.csv'
_FIRST_COLUMNS = ('input', 'input_sha256', 'status', 'reason', 'lesion_ml', 'seconds', 'run_sha256')
COLUMNS = (*_FIRST_COLUMNS, 'patient_score', 'patient_positive')
PREDICTED, REFUSED, FAILED = 'predicted', 'refused', 'failed'
_PARTS = '.predictions.*.csv'
# Seconds between two joins while the prediction runs.
_JOIN_EVERY = 30


class Manifest:
  """The rows of one prediction, and those of earlier ones in the same folder.

  Attributes:
    rows: {input: row} of this and earlier predictions. Process 0 has those of all processes after `join`.
    new_rows: the same, without the rows of earlier predictions.
  """

  def __init__(self, folder: pathlib.Path, process: int):
    """Opens the manifest of a folder.

    Args:
      folder: the output folder.
      process: the number of this process; process 0 reads the existing rows and joins.
    """
    self._folder, self._is_main = folder, process == 0
    self._part = folder / _PARTS.replace('*', str(process))
    self._file, self._joined_at = None, time.monotonic()
    self._is_new = not (folder / NAME).exists()
    self.rows, self.new_rows = {}, {}
    if self._is_main:
      self.rows |= self._read(folder / NAME)

  def check_own(self) -> None:
    """Raises a UserError if predictions.csv has other columns, or rows of another form: it was changed."""
    path = self._folder / NAME
    try:
      with path.open(newline='', encoding='utf-8') as file:
        first, *others = csv.reader(file)
      columns = tuple(first)
      is_own = columns in (COLUMNS, _FIRST_COLUMNS) and all(_is_row(cells, columns) for cells in others)
    except FileNotFoundError:
      return
    except (ValueError, csv.Error, OSError):
      is_own = False
    if not is_own:
      own_files.refuse([path])

  def add(self, row: dict) -> None:
    """Adds a row of this process.

    Raises:
      UserError: the file cannot be written.
    """
    with files.writing(self._part):
      if self._file is None:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._file = self._part.open('a', newline='', encoding='utf-8')
      # A row begins with a line break, so that it does not continue the line at which another process was killed.
      self._file.write('\n')
      csv.DictWriter(self._file, COLUMNS, lineterminator='\n').writerow(row)
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

  @staticmethod
  def _read(path):
    """The rows of a file by input; a row that was not written to its end is left out.

    Files of earlier versions have fewer columns; the others are empty.
    """
    with contextlib.suppress(OSError, ValueError, csv.Error), path.open(newline='', encoding='utf-8') as file:
      rows = list(csv.reader(file))
      columns = _FIRST_COLUMNS if rows and tuple(rows[0]) == _FIRST_COLUMNS else COLUMNS
      empty = dict.fromkeys(COLUMNS, '')
      return {cells[0]: empty | dict(zip(columns, cells, strict=True)) for cells in rows if _is_row(cells, columns)}
    return {}


def _is_row(cells, columns):
  return len(cells) == len(columns) and cells[2] in (PREDICTED, REFUSED, FAILED)


def refused(folder: pathlib.Path) -> set[str]:
  """The inputs that a prediction into the folder refused, or failed on."""
  rows = Manifest(folder, 0).rows
  return {name for name, row in rows.items() if row['status'] != PREDICTED}


def locked(folder: pathlib.Path) -> contextlib.AbstractContextManager[None]:
  """Returns a context in which no other prediction may write to the folder.

  Raises:
    UserError: another prediction writes to the folder now; or the folder cannot be written.
  """
  if folder.exists() and not folder.is_dir():
    raise UserError(f'output: {folder} is a file; give a folder')
  busy = f'output: another prediction writes to {folder} now; wait until it ends, or give another folder'
  return locks.alone(folder, 'predictions', busy)
