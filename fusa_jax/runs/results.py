"""A table of slices -> numbers with their intervals, and the files of a run's test/."""

import csv
import pathlib
import shutil
import zipfile
import zlib

import numpy as np

from fusa_jax.measures import metrics, statistics
from fusa_jax.runs import figures
from fusa_jax.system.errors import UserError
from fusa_jax.system.files import read_json, replacing, write_csv, write_json, writing
from fusa_jax.tasks import TaskType

COLUMNS = ('patient', 'slice', 'label', 'score', *metrics.COUNTS)
TABLE = 'table.npz'
_FILES = (TABLE, 'slices.csv', 'patients.csv', 'volumes.csv', 'report.html')
# What numbers say of the split that they come from.
BY_PATIENT, BY_SLICE = 'by patient', 'by slice, not by patient: whose the slices are is not known'
# The same at any threshold.
_OF_SCORES = ('auc', 'brier', 'ece')


def summary(task_type: TaskType, table: dict[str, np.ndarray]) -> dict[str, float | int | None]:
  """A table's numbers and counts at threshold 0.5, without intervals: what is looked at while training."""
  patients = metrics.by_patient(table)
  return statistics.estimates(patients.statistic(task_type.definition), len(patients)) | _counts(patients)


def numbers(task_type: TaskType, table: dict[str, np.ndarray], prevalences=()) -> dict:
  """All that follows from a table of slices, each number with its interval: what metrics.json holds of them."""
  half, chosen = metrics.by_patient(table), metrics.by_patient(table, '_chosen')
  at_chosen = _with_intervals(chosen, task_type.definition)
  for name in _OF_SCORES:
    at_chosen.pop(name, None)
    at_chosen['intervals'].pop(name, None)
  found = _with_intervals(chosen, metrics.detection)
  found['at_prevalence'] = [
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
    'intervals': {**statistics.method(), **at_half['intervals']},
    'operating_point': {**at_chosen, **_counts(chosen), 'slices': found},
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
  """The scores for a log: those of the paper's table, with intervals and the split's flaw where there are any."""
  scores = ', '.join(
    f'{name} {statistics.shown(summary[name], summary.get("intervals", {}).get(name))}' for name in task_type.shown
  )
  return scores + caveat(summary)


def caveat(result: dict) -> str:
  """What is to be said beside every number of a test that is not of new patients; '' of others."""
  split = result.get('split', BY_PATIENT)
  return '' if split == BY_PATIENT else f' (split {split})'


def clear_test(folder: pathlib.Path) -> None:
  """Removes a test's files before the next test's are written, so that an interrupted one leaves nothing to mistake."""
  with writing(folder):
    # First what says that a test is complete.
    for path in (folder / 'metrics.json', *(folder / name for name in _FILES), *folder.glob('against-*.json')):
      path.unlink(missing_ok=True)
  for path in (folder / 'figures', *folder.glob('against-*')):
    shutil.rmtree(path, ignore_errors=True)


def write_test(folder: pathlib.Path, table: dict[str, np.ndarray], result: dict, volumes: list[dict] | None) -> None:
  """The files of test/: metrics.json last, so that a folder with it is complete."""
  slices = zip(*(table[key] for key in COLUMNS), strict=True)
  write_csv(folder / 'slices.csv', (dict(zip(COLUMNS, row, strict=True)) for row in slices))
  half, chosen = metrics.by_patient(table), metrics.by_patient(table, '_chosen')
  rows = metrics.patient_rows(half)
  for row, other in zip(rows, metrics.patient_rows(chosen), strict=True):
    row['dice_at_operating_point'] = other['dice']
  write_csv(folder / 'patients.csv', rows)
  if volumes:
    write_csv(folder / 'volumes.csv', volumes)
  with replacing(folder / TABLE) as partial:
    np.savez_compressed(partial, **table)
  figures.write_charts(folder / 'figures', table, result)
  write_json(folder / 'metrics.json', result)


def is_complete(workdir: pathlib.Path) -> bool:
  """Whether a run's test/ has all that comparing, pooling and tables go by."""
  return all((workdir / 'test' / name).exists() for name in (TABLE, 'metrics.json'))


def check_complete(workdir: pathlib.Path) -> None:
  """Raises a UserError where a run was not evaluated, or its last evaluation was interrupted."""
  if not is_complete(workdir):
    raise UserError(
      f'{workdir / "test"}: the run was not evaluated, or its evaluation was interrupted ({TABLE} or metrics.json is '
      f'missing); evaluate the run with --mode=evaluate --workdir={workdir}'
    )


def read_numbers(workdir: pathlib.Path) -> dict:
  """What metrics.json of a complete test/ holds; raises UserError as `check_complete`, or where it is damaged."""
  check_complete(workdir)
  return read_json(workdir / 'test' / 'metrics.json', f'evaluate the run with --mode=evaluate --workdir={workdir}')


def read_volumes(workdir: pathlib.Path) -> list[dict]:
  """The rows of test/volumes.csv; none where the scans were not at hand."""
  path = workdir / 'test' / 'volumes.csv'
  if not path.exists():
    return []
  with path.open(newline='') as file:
    rows = list(csv.DictReader(file))
  number = lambda text: int(text) if text.isdigit() else float(text or 'nan')
  return [{key: value if key == 'case' else number(value) for key, value in row.items()} for row in rows]


def read_table(workdir: pathlib.Path) -> dict[str, np.ndarray]:
  """The table of slices that an evaluation left in a run's test/.

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
      raise ValueError(f'without {", ".join(sorted(missing))}')
    return table
  except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
    raise UserError(
      f'{path}: damaged, or of another version ({error}); make it again with --mode=evaluate --workdir={workdir}'
    ) from None


def overlay_title(task_type: TaskType, table: dict[str, np.ndarray], row: int) -> str:
  """Patient, slice, and the result on it at the operating point."""
  return f'patient {table["patient"][row]}, slice {table["slice"][row]}: {task_type.slice_result(table, row)}'


def overlay_name(table: dict[str, np.ndarray], row: int) -> str:
  """The file of a slice's overlay in test/figures/."""
  return f'{table["patient"][row]}_{table["slice"][row]:03d}.png'
