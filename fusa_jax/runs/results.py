"""Computes numbers with intervals from a table of slices; writes and reads the files in test/ of a run."""

import csv
import pathlib
import shutil
import zipfile
import zlib
from collections.abc import Sequence

import numpy as np

from fusa_jax.measures import metrics, statistics
from fusa_jax.runs import figures
from fusa_jax.system.errors import UserError
from fusa_jax.system.files import read_json, replacing, write_csv, write_json, writing
from fusa_jax.tasks import TaskType

COLUMNS = ('patient', 'slice', 'label', 'score', *metrics.COUNTS, 'owner')
TABLE = 'table.npz'
_FILES = (TABLE, 'slices.csv', 'patients.csv', 'volumes.csv', 'report.html')
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
  statistic = patients.statistic(definition)
  return {
    **statistics.estimates(statistic, len(patients)),
    'intervals': statistics.intervals(statistic, len(patients)),
  }


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


def clear_test(folder: pathlib.Path) -> None:
  """Removes the files of a test before a new one, so that an interrupted test leaves no outdated files."""
  with writing(folder):
    # metrics.json first: it marks a test as complete.
    for path in (folder / 'metrics.json', *(folder / name for name in _FILES), *folder.glob('against-*.json')):
      path.unlink(missing_ok=True)
  for path in (folder / 'figures', *folder.glob('against-*')):
    shutil.rmtree(path, ignore_errors=True)


def write_test(folder: pathlib.Path, table: dict[str, np.ndarray], result: dict, volumes: list[dict] | None) -> None:
  """Writes the files of test/. metrics.json is the last one and marks the folder as complete."""
  slices = zip(*(table[key] for key in COLUMNS), strict=True)
  write_csv(folder / 'slices.csv', (dict(zip(COLUMNS, row, strict=True)) for row in slices))
  half, chosen = metrics.by_patient(table), metrics.by_patient(table, '_chosen')
  rows = metrics.patient_rows(half)
  for row, other, num_scans in zip(rows, metrics.patient_rows(chosen), half.num_scans.tolist(), strict=True):
    row |= {'dice_at_operating_point': other['dice'], 'num_scans': num_scans}
  write_csv(folder / 'patients.csv', rows)
  if volumes:
    write_csv(folder / 'volumes.csv', volumes)
  with replacing(folder / TABLE) as partial:
    np.savez_compressed(partial, **table)
  figures.write_charts(folder / 'figures', table, result)
  write_json(folder / 'metrics.json', result)


def is_complete(workdir: pathlib.Path) -> bool:
  """Whether test/ of a run holds the files that comparison, pooling and tables read."""
  return all((workdir / 'test' / name).exists() for name in (TABLE, 'metrics.json'))


def check_complete(workdir: pathlib.Path) -> None:
  """Checks that the last evaluation of a run is complete.

  Raises:
    UserError: the run was not evaluated, or its last evaluation was interrupted.
  """
  if not is_complete(workdir):
    raise UserError(
      f'{workdir / "test"}: the run was not evaluated, or its evaluation was interrupted ({TABLE} or metrics.json is '
      f'missing); evaluate the run with --mode=evaluate --workdir={workdir}'
    )


def read_numbers(workdir: pathlib.Path) -> dict:
  """Returns metrics.json of an evaluated run.

  Raises:
    UserError: as `check_complete`, or the file is damaged.
  """
  check_complete(workdir)
  return read_json(workdir / 'test' / 'metrics.json', f'evaluate the run with --mode=evaluate --workdir={workdir}')


def read_volumes(workdir: pathlib.Path) -> list[dict]:
  """Returns the rows of test/volumes.csv; an empty list if the evaluation had no scans and wrote none."""
  path = workdir / 'test' / 'volumes.csv'
  if not path.exists():
    return []
  with path.open(newline='') as file:
    rows = list(csv.DictReader(file))
  number = lambda text: int(text) if text.isdigit() else float(text or 'nan')
  return [{key: value if key == 'case' else number(value) for key, value in row.items()} for row in rows]


def read_table(workdir: pathlib.Path) -> dict[str, np.ndarray]:
  """Returns the table of slices that the evaluation of a run saved in test/.

  Raises:
    UserError: the run was not evaluated, or the file is damaged.
  """
  check_complete(workdir)
  path = workdir / 'test' / TABLE
  try:
    with np.load(path, allow_pickle=False) as archive:
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
