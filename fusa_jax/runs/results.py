"""Computes numbers with intervals from a table of slices; writes and reads the files in test/ of a run."""

import csv
import functools
import io
import pathlib
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from fusa_jax.measures import metrics, patients, statistics
from fusa_jax.runs import figures
from fusa_jax.runs.split import TEST
from fusa_jax.system import own_files, paths
from fusa_jax.system.errors import UserError
from fusa_jax.system.files import remove_partials, write_csv
from fusa_jax.tasks import TaskType

COLUMNS = ('patient', 'slice', 'label', 'score', *metrics.COUNTS, 'owner')
TABLE, NUMBERS, REPORT, VOLUMES = 'table.npz', 'metrics.json', 'report.html', 'volumes.csv'
PATIENTS = 'patients.npz'
_FILES = (TABLE, 'slices.csv', 'patients.csv', PATIENTS, VOLUMES)
# The texts that describe the split of a test.
BY_PATIENT, BY_SLICE = 'by patient', 'by slice, not by patient: the patients of the slices are unknown'
# The text that says that labels are of patients.
LABELS_OF_PATIENTS = 'of patients: each slice has the label of its patient in training, so slices are not scored'
# The validation score that selects the checkpoint where labels are of patients.
PATIENT_SELECTION = 'patient_auc'
_PATIENT_NUMBERS = ('auc', 'sensitivity', 'specificity', 'ppv', 'npv')
# Numbers that do not depend on the threshold.
_WITHOUT_THRESHOLD = ('auc', 'brier', 'ece')


def summary(task_type: TaskType, table: dict[str, np.ndarray]) -> dict[str, float | int | None]:
  """Returns the numbers and counts of a table of slices at threshold 0.5, without intervals, for validation."""
  summed = metrics.by_patient(table)
  return statistics.estimates(summed.statistic(task_type.definition), len(summed)) | _counts(summed)


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
    'operating_point': {**at_chosen, **_counts(chosen), 'slices': _detection(chosen, metrics.detection, prevalences)},
  }


def without_slices(result: dict) -> dict:
  """Returns the contents of metrics.json of a cohort with labels of patients: numbers of slices are null.

  The key `labels` says so. Nobody has said which slices of a patient show the lesion.
  """

  def blank(part):
    names = {*metrics.COUNTS, *part.get('intervals', {})} - statistics.method().keys()
    empty = dict.fromkeys(names & part.keys())
    intervals = {key: None if key in names else value for key, value in part.get('intervals', {}).items()}
    return part | empty | {'intervals': intervals}

  point = result['operating_point']
  point = blank(point) | {'slices': blank(point['slices']) | {'at_prevalence': []}}
  return blank(result) | {'operating_point': point, 'labels': LABELS_OF_PATIENTS}


def scores_slices(result: dict) -> bool:
  """Whether the slices of a test have labels of their own, so that metrics.json has numbers of slices."""
  return result.get('labels') != LABELS_OF_PATIENTS


def patient_summary(table: dict[str, np.ndarray]) -> dict[str, float | None]:
  """Returns the AUC of patients with the default rule, for validation where labels are of patients."""
  of_patients = patients.table_of(table, patients.HIGHEST[0])
  counted = patients.counted(of_patients['label'], of_patients['mean_of_highest'])
  return {PATIENT_SELECTION: patients.estimate(counted, patients.auc)['auc']}


def patient_numbers(table: dict[str, np.ndarray], rule: dict, prevalences=()) -> dict:
  """Returns the part `patient` of metrics.json: the numbers of a table with one row per patient.

  Args:
    table: from `patients.with_call`.
    rule: the attributes of the rule (`PatientRule.about`); in a cross-validation, lists with the values of the folds.
    prevalences: shares of patients with lesion to compute PPV and NPV for.
  """
  known = np.isfinite(table['score'])
  label, score, positive = (table[key][known] for key in ('label', 'score', 'positive'))
  has_call = bool(np.isfinite(positive).all())
  thresholds, texts = (
    value if isinstance(value, list) else [value] for value in (rule['threshold'], rule['chosen_by'])
  )
  reasons = list(dict.fromkeys(why for why, one in zip(texts, thresholds, strict=True) if one is None))
  if not known.any():
    reasons = ['the score is unknown for all test patients']
  elif label.all() or not label.any():
    of = '' if known.all() else ' with a known score'
    which, undefined = f'no test patient{of} has a lesion', 'sensitivity'
    if label.all():
      which, undefined = f'all test patients{of} have a lesion', 'specificity'
    reasons.append(f'{which}, so AUC, {undefined}, PPV and NPV are undefined')
  numbers = {**rule, 'num_patients': len(known), 'num_with_lesion': int(table['label'].sum())}
  numbers |= {'left_out': int((~known).sum()), 'reason': '; '.join(reasons) or None}
  if not known.any():
    return numbers | dict.fromkeys(_PATIENT_NUMBERS)
  counted = patients.counted(label, score, positive == 1 if has_call else None)
  numbers |= _detection(counted, patients.detection, prevalences)
  if has_call:
    numbers |= _counts(counted)
  else:
    _undefine(numbers, _PATIENT_NUMBERS[1:])
    numbers['at_prevalence'] = []
  others = [name for name in (*patients.OF_SLICES, *patients.OF_MASKS) if name in table]
  numbers['auc_by_score'] = {}
  for name in others:
    known = np.isfinite(table[name])
    if known.any():
      of_score = patients.counted(table['label'][known], table[name][known])
      numbers['auc_by_score'][name] = _with_intervals(of_score, patients.auc)
  return numbers


def no_patient_numbers(reason: str) -> dict:
  """Returns the part `patient` of metrics.json of a test without a table of patients."""
  return {'reason': reason, **dict.fromkeys(_PATIENT_NUMBERS)}


def _undefine(numbers, names):
  for name in names:
    numbers[name] = numbers['intervals'][name] = None


def _detection(summed, definition, prevalences):
  """Numbers with intervals of `metrics.detection`, or of a definition like it, also at other prevalences."""
  at = lambda share: functools.partial(metrics.detection_at, prevalence=share)
  rows = [{'prevalence': share, **_with_intervals(summed, at(share))} for share in prevalences]
  return _with_intervals(summed, definition) | {'at_prevalence': rows}


def _with_intervals(summed, definition):
  estimates = statistics.estimates(summed.statistic(definition), len(summed))
  return {**estimates, 'intervals': summed.intervals(definition)}


def _counts(summed):
  return {key: int(summed.sums[key].sum()) for key in metrics.COUNTS}


def patient_line(result: dict) -> str:
  """Returns a line with the numbers of patients for the log: with intervals, and the reason if some are undefined."""
  numbers = result['patient']
  shown = [
    f'{name} {statistics.shown(numbers[name], (numbers.get("intervals") or {}).get(name))}'
    for name in ('auc', 'sensitivity', 'specificity')
    if numbers.get(name) is not None
  ]
  line = ', '.join(shown) + (f' ({numbers["reason"]})' if numbers['reason'] else '')
  return line.strip() + caveat(result)


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
  of_patients: dict[str, np.ndarray] | None = None,
) -> None:
  """Writes the files of a test in place of those of an earlier one; metrics.json states the digest of each.

  Args:
    folder: the folder of the test.
    table: the table of slices.
    result: the content of metrics.json.
    volumes: the rows of volumes.csv; None or [] writes none.
    pictures: functions that write pictures to a temporary path, by name.
    of_patients: the table of patients (`patients.with_call`); None if the test has none.
  """
  for each in (folder, folder / 'figures'):
    remove_partials(each)
  unknown = () if scores_slices(result) else ('label', *metrics.COUNTS)
  slices = zip(*([None] * len(table[key]) if key in unknown else table[key] for key in COLUMNS), strict=True)
  half, chosen = metrics.by_patient(table), metrics.by_patient(table, '_chosen')
  rows = metrics.patient_rows(half)
  for row, other, num_scans in zip(rows, metrics.patient_rows(chosen), half.num_scans.tolist(), strict=True):
    row |= {'dice_at_operating_point': other['dice'], 'num_scans': num_scans}
  if not scores_slices(result):
    rows = [{key: row[key] for key in ('patient', 'num_slices', 'num_scans')} for row in rows]
  if of_patients is not None:
    for row, columns in zip(rows, _patient_columns(of_patients, result['patient']['score_name']), strict=True):
      row |= columns
  writers = {
    'slices.csv': lambda path: write_csv(path, (dict(zip(COLUMNS, row, strict=True)) for row in slices)),
    'patients.csv': lambda path: write_csv(path, rows),
    TABLE: lambda path: np.savez_compressed(path, **table),
  }
  if volumes:
    writers[VOLUMES] = lambda path: write_csv(path, volumes)
  if of_patients is not None:
    writers[PATIENTS] = lambda path: np.savez_compressed(path, **of_patients)
  pictures = {**pictures, **figures.chart_writers(table, result, of_patients)}
  writers |= {f'figures/{name}': write for name, write in pictures.items()}
  files = {folder / name: write for name, write in writers.items()}
  own_files.write_together(folder / NUMBERS, result, files, _old_files(folder))
  for path in folder.glob('against-*/'):
    if not any(path.iterdir()):
      path.rmdir()


def _patient_columns(of_patients, score_name):
  """The columns that a table of patients adds to patients.csv, by row; scores of slices as probabilities."""
  names = [name for name in (*patients.OF_SLICES, *patients.OF_MASKS) if name in of_patients]
  columns = {'label': of_patients['label'].tolist()}
  columns['score'] = patients.shown(score_name, of_patients['score']).tolist()
  columns['positive'] = [int(value) if np.isfinite(value) else None for value in of_patients['positive'].tolist()]
  columns |= {name: patients.shown(name, of_patients[name]).tolist() for name in names}
  return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


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


def read_patients(workdir: pathlib.Path, test: str = TEST) -> dict[str, np.ndarray] | None:
  """Returns the table of patients that the evaluation of a run saved; None if it saved none.

  Raises:
    UserError: as `read_numbers`, or the file was changed since the test.
  """
  files, path = read_numbers(workdir, test)['files'], workdir / test / PATIENTS
  if PATIENTS not in files:
    return None
  if own_files.has_changed(path, files[PATIENTS]):
    raise UserError(
      f'{path}: was changed since the test; restore it, or replace it with --mode=evaluate --workdir={workdir} '
      '--overwrite'
    )
  with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as archive:
    return dict(archive)


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
