"""Computes numbers with intervals from a table of slices; writes and reads the files in test/ of a run."""

import csv
import io
import pathlib
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from fusa_jax.measures import metrics, statistics
from fusa_jax.runs import figures
from fusa_jax.runs.split import TEST
from fusa_jax.system import own_files, paths
from fusa_jax.system.errors import UserError
from fusa_jax.system.files import remove_partials, write_csv
from fusa_jax.tasks import TaskType

COLUMNS = ('patient', 'slice', 'label', 'score', *metrics.COUNTS, 'owner')
TABLE, NUMBERS, REPORT, VOLUMES = 'table.npz', 'metrics.json', 'report.html', 'volumes.csv'
_FILES = (TABLE, 'slices.csv', 'patients.csv', VOLUMES)
# The texts that describe the split of a test.
BY_PATIENT, BY_SLICE = 'by patient', 'by slice, not by patient: the patients of the slices are unknown'
# Numbers that do not depend on the threshold.
_WITHOUT_THRESHOLD = ('auc', 'brier', 'ece')


def summary(task_type: TaskType, table: dict[str, np.ndarray]) -> dict[str, float | int | None]:
  """Returns the numbers and counts of a table of slices at threshold 0.5, without intervals, for validation."""
  patients = metrics.by_patient(table)
  return statistics.estimates(patients.statistic(task_type.definition), len(patients)) | _counts(patients)


def numbers(task_type: TaskType, table: dict[str, np.ndarray], prevalences=()) -> dict:
  """Returns the part of metrics.json that is computed from a table of slices: numbers, intervals and counts.

  Args:
    task_type: the type of task, which defines the numbers.
    table: the table of slices.
    prevalences: shares of slices with lesion to compute PPV and NPV for.
  """
  half, chosen = metrics.by_patient(table), metrics.by_patient(table, '_chosen')
  at_chosen = _with_intervals(chosen, task_type.definition)
  for name in _WITHOUT_THRESHOLD:
    at_chosen.pop(name, None)
    at_chosen['intervals'].pop(name, None)
  detection = _with_intervals(chosen, metrics.detection)
  detection['at_prevalence'] = [
    {'prevalence': share, **_with_intervals(chosen, lambda totals, at=share: metrics.detection_at(totals, at))}
    for share in prevalences
  ]
  at_half = _with_intervals(half, task_type.definition)
  return {
    **{name: value for name, value in at_half.items() if name != 'intervals'},
    **_counts(half),
    'counted': task_type.counted,
    'threshold': 0.5,
    'num_slices': len(table['label']),
    'num_patients': len(half),
    'num_scans': int(half.num_scans.sum()),
    'intervals': {**statistics.method(), **at_half['intervals']},
    'operating_point': {**at_chosen, **_counts(chosen), 'slices': detection},
  }


def _with_intervals(patients, definition):
  estimates = statistics.estimates(patients.statistic(definition), len(patients))
  return {**estimates, 'intervals': patients.intervals(definition)}


def _counts(patients):
  return {key: int(patients.sums[key].sum()) for key in metrics.COUNTS}


def one_line(task_type: TaskType, summary: dict) -> str:
  """Returns a line of scores for the log: those of the paper's table, with their intervals and the caveat if any."""
  scores = ', '.join(
    f'{name} {statistics.shown(summary[name], summary.get("intervals", {}).get(name))}' for name in task_type.shown
  )
  return scores + caveat(summary)


def caveat(result: dict) -> str:
  """Returns the warning that belongs beside every number of a test that is not on new patients; else ''."""
  split = result.get('split', BY_PATIENT)
  return '' if split == BY_PATIENT else f' (split {split})'


def check_own(folder: pathlib.Path) -> None:
  """Checks that a new test would replace only files of an earlier test that have not changed since.

  If metrics.json is missing, the earlier test was not complete, or somebody deleted the file to test again. Then the
  check allows to replace the other files.

  Raises:
    UserError: other files would be replaced, one line each. A file is in the place of the folder.
  """
  if paths.exists(folder) and not folder.is_dir():
    raise UserError(f'{folder}: is not a folder; move it away, or rename it')
  others = [folder / name for name in (*_FILES, REPORT)] if (folder / NUMBERS).exists() else []
  own_files.refuse(own_files.changed(folder / NUMBERS, others))


def write_test(
  folder: pathlib.Path,
  table: dict[str, np.ndarray],
  result: dict,
  volumes: list[dict] | None,
  pictures: Mapping[str, Callable[[pathlib.Path], None]],
) -> None:
  """Writes the files of a test in place of those of an earlier one; metrics.json states the digest of each.

  Args:
    folder: the folder of the test.
    table: the table of slices.
    result: the content of metrics.json.
    volumes: the rows of volumes.csv; None or [] writes none.
    pictures: functions that write pictures to a temporary path, by name.
  """
  for each in (folder, folder / 'figures'):
    remove_partials(each)
  slices = zip(*(table[key] for key in COLUMNS), strict=True)
  half, chosen = metrics.by_patient(table), metrics.by_patient(table, '_chosen')
  rows = metrics.patient_rows(half)
  for row, other, num_scans in zip(rows, metrics.patient_rows(chosen), half.num_scans.tolist(), strict=True):
    row |= {'dice_at_operating_point': other['dice'], 'num_scans': num_scans}
  writers = {
    'slices.csv': lambda path: write_csv(path, (dict(zip(COLUMNS, row, strict=True)) for row in slices)),
    'patients.csv': lambda path: write_csv(path, rows),
    TABLE: lambda path: np.savez_compressed(path, **table),
  }
  if volumes:
    writers[VOLUMES] = lambda path: write_csv(path, volumes)
  pictures = {**pictures, **figures.chart_writers(table, result)}
  writers |= {f'figures/{name}': write for name, write in pictures.items()}
  files = {folder / name: write for name, write in writers.items()}
  own_files.write_together(folder / NUMBERS, result, files, _old_files(folder))
  for path in folder.glob('against-*/'):
    if not any(path.iterdir()):
      path.rmdir()


def _old_files(folder):
  """Returns the paths, from the folder, of the files of an earlier test and of comparisons that used it."""
  names = [*_FILES, REPORT, *own_files.files_of(folder / NUMBERS)]
  for path in folder.glob('against-*.json'):
    record = own_files.read_record(path)
    if record and not own_files.changed(path, ()):
      names += [*record['files'], path.name]
  return names


def made_of(folder: pathlib.Path) -> dict | None:
  """Returns `made_of` of the metrics.json in a folder; None if the test in it is not complete."""
  return (_complete(folder) or {}).get('made_of')


def is_complete(folder: pathlib.Path) -> bool:
  """Whether the folder of a test has all of its files, and the table of slices is the one that metrics.json states."""
  return _complete(folder) is not None


def _complete(folder):
  """Returns the metrics.json of a complete test, else None."""
  record = own_files.read_record(folder / NUMBERS)
  if record is None or TABLE not in record['files'] or not all((folder / name).is_file() for name in record['files']):
    return None
  return None if own_files.has_changed(folder / TABLE, record['files'][TABLE]) else record


def read_numbers(workdir: pathlib.Path, test: str = TEST) -> dict:
  """Returns metrics.json of an evaluated run.

  Args:
    workdir: the folder of the run.
    test: the name of the folder of the test in it.

  Raises:
    UserError: the run was not evaluated, or its last evaluation was interrupted, or its files were changed.
  """
  record = _complete(workdir / test)
  if record is None:
    raise UserError(
      f'{workdir / test}: the run was not evaluated, or its evaluation was interrupted, or {TABLE} or {NUMBERS} was '
      f'changed or written by another version; evaluate the run with --mode=evaluate --workdir={workdir}'
    )
  return record


def read_volumes(workdir: pathlib.Path, test: str = TEST) -> list[dict]:
  """Returns the rows of volumes.csv of a test; an empty list if the evaluation had no scans and wrote none.

  Raises:
    UserError: the file was changed since the test.
  """
  path = workdir / test / VOLUMES
  if not path.exists():
    return []
  record = own_files.read_record(workdir / test / NUMBERS)
  if record and own_files.has_changed(path, record['files'].get(VOLUMES)):
    raise UserError(
      f'{path}: was changed since the test; restore it, or replace it with --mode=evaluate --workdir={workdir} '
      '--overwrite'
    )
  rows = list(csv.DictReader(io.StringIO(path.read_text())))
  number = lambda text: int(text) if text.isdigit() else float(text or 'nan')
  return [{key: value if key == 'case' else number(value) for key, value in row.items()} for row in rows]


def read_table(workdir: pathlib.Path, test: str = TEST) -> dict[str, np.ndarray]:
  """Returns the table of slices that the evaluation of a run saved.

  Raises:
    UserError: as `read_numbers`, or the file is from another version.
  """
  read_numbers(workdir, test)
  path = workdir / test / TABLE
  try:
    with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as archive:
      table = dict(archive)
    missing = {
      *COLUMNS,
      *(f'{key}_chosen' for key in metrics.COUNTS),
      'logit',
      'histogram',
      'reliability',
    } - table.keys()
    if missing:
      raise ValueError(f'it lacks {", ".join(sorted(missing))}')
    return table
  except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
    raise UserError(
      f'{path}: damaged, or from another version ({error}); write it again with --mode=evaluate --workdir={workdir}'
    ) from None


def owners_of(table: dict[str, np.ndarray], scans: Sequence[str]) -> list[str]:
  """Returns the person of each of these scans of a table of slices."""
  owners = dict(zip(table['patient'].tolist(), table['owner'].tolist(), strict=True))
  return [owners[scan] for scan in scans]


def overlay_title(task_type: TaskType, table: dict[str, np.ndarray], row: int, volumes: dict[str, dict]) -> str:
  """Returns the title of an overlay: patient, slice, and the result at the operating point.

  Args:
    task_type: the type of task of the run.
    table: the table of slices.
    row: the row of the slice in it.
    volumes: the rows of volumes.csv by patient, or {}. For a patient without lesion they give the false volume.
  """
  patient = table['patient'][row]
  title = f'patient {patient}, slice {table["slice"][row]}: {task_type.slice_result(table, row)}'
  if patient in volumes and not volumes[patient]['true_ml']:
    title += f', false volume {volumes[patient]["predicted_ml"]:.1f} mL in the scan'
  return title


def overlay_name(table: dict[str, np.ndarray], row: int) -> str:
  """Returns the file name of the overlay of a slice in test/figures/."""
  return f'{table["patient"][row]}_{table["slice"][row]:03d}.png'
