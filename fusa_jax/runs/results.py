"""The contents of metrics.json: numbers with intervals, from tables of slices, and what the log shows of them.

A run of several classes has a table of slices for each class. Its metrics.json holds, under `classes`, the numbers of
each class, as metrics.json of a run of one class has them, and above them their means over the classes.
"""

import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from fusa_jax.measures import exclusive, masks, metrics, patients, statistics
from fusa_jax.runs.operating_point import CLASSES
from fusa_jax.tasks import TaskType

EXCLUSIVE = 'exclusive'  # the key of what is known of exclusive classes together
# The texts that describe the split of a test.
BY_PATIENT, BY_SLICE = 'by patient', 'by slice, not by patient: the patients of the slices are unknown'
# The text that says that labels are of patients.
LABELS_OF_PATIENTS = 'of patients: each slice has the label of its patient in training, so slices are not scored'
# The validation score that selects the checkpoint where labels are of patients.
PATIENT_SELECTION = 'patient_auc'
_PATIENT_NUMBERS = ('auc', 'sensitivity', 'specificity', 'ppv', 'npv')
# Numbers that do not depend on the threshold.
_WITHOUT_THRESHOLD = ('auc', 'brier', 'ece')

Table = dict[str, np.ndarray]


class Part(NamedTuple):
  """What a test found for a class.

  Attributes:
    table: the table of slices.
    volumes: the rows of volumes.csv; None or [] if no scan was at hand.
    patients: the table of patients (`patients.with_call`); None if the test has none.
    pictures: functions that write pictures to a temporary path, by name.
  """

  table: Table
  volumes: list[dict] | None = None
  patients: Table | None = None
  pictures: Mapping[str, Callable[[pathlib.Path], None]] = {}


def summary(
  task_type: TaskType, tables: Mapping[str, Table], is_exclusive: bool = False
) -> dict[str, float | int | None]:
  """Returns the numbers and counts at threshold 0.5, without intervals, for validation.

  Of several classes, these are the means over the classes that a slice of the fold has, so that every step of a run
  has a mean over the same classes; and the numbers of each class as `CLASS/NAME`.

  Args:
    task_type: the type of task.
    tables: the table of slices of each class.
    is_exclusive: whether each slice has exactly one class.
  """
  summed = {name: metrics.by_patient(table) for name, table in tables.items()}
  numbers = {
    name: statistics.estimates(each.statistic(task_type.definition), len(each)) | _counts(each)
    for name, each in summed.items()
  }
  means = _with_means(numbers, lambda key: key not in metrics.COUNTS, _present(tables))
  if is_exclusive:
    calls = exclusive.calls(tables)
    values = statistics.estimates(calls.statistic, len(calls))
    means |= {name: values[own] for name, own in exclusive.IN_PLACE_OF_MEANS.items()}
  return means


def _present(tables):
  """Returns the names of the classes that a slice has; all, if no slice has any."""
  return [name for name, table in tables.items() if np.any(table['label'])] or list(tables)


def _with_means(numbers, has_mean, present):
  """Returns the numbers of the only class; of several, their means and the numbers of each class as `CLASS/NAME`.

  Args:
    numbers: of each class.
    has_mean: whether a number has a mean, by its name.
    present: the classes of the means.
  """
  if len(numbers) == 1:
    return next(iter(numbers.values()))
  means = {}
  for key in filter(has_mean, next(iter(numbers.values()))):
    values = [numbers[name][key] for name in present if numbers[name][key] is not None]
    means[key] = float(np.mean(values)) if values else None
  return means | {f'{name}/{key}': value for name, each in numbers.items() for key, value in each.items()}


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


def patient_summary(tables: Mapping[str, Table]) -> dict[str, float | None]:
  """Returns the AUC of patients with the default rule, as `summary`, for validation where labels are of patients."""

  def auc(table):
    of_patients = patients.table_of(table, patients.HIGHEST[0])
    counted = patients.counted(of_patients['label'], of_patients['mean_of_highest'])
    return patients.estimate(counted, patients.auc)['auc']

  areas = {name: {PATIENT_SELECTION: auc(table)} for name, table in tables.items()}
  return _with_means(areas, lambda _: True, _present(tables))


def with_classes(
  task_type: TaskType, numbers: Mapping[str, dict], tables: Mapping[str, Table], is_exclusive: bool = False
) -> dict:
  """Returns the contents of metrics.json for the numbers of each class: those of the only class as they are.

  Of several classes they are under `classes`. Above them are the means over the classes that define a number in this
  test (`mean_over` lists these), at threshold 0.5 and, under `operating_point`, at that of each class. Their intervals
  are of the means: in each draw, all classes have the same patients.

  Of exclusive classes, `exclusive` holds what `measures.exclusive` says of the class with the highest probability:
  `slices`, without labels of slices None; and `patients`, None if the slices of a patient have several classes.

  Args:
    task_type: the type of task.
    numbers: from `numbers`, with the additions of the test, by the name of the class.
    tables: the tables of slices of the same classes.
    is_exclusive: whether each slice has exactly one class.
  """
  if len(numbers) == 1:
    return next(iter(numbers.values()))
  first = next(iter(numbers.values()))
  of_all = {key: first[key] for key in ('counted', 'threshold', 'num_slices', 'num_patients', 'num_scans')}
  has_slices = scores_slices(first)
  calls = exclusive.calls(tables) if is_exclusive and has_slices else None
  half, chosen = _means(task_type, tables, '', calls), _means(task_type, tables, '_chosen')
  for name in _WITHOUT_THRESHOLD:
    chosen.pop(name, None)
    chosen['intervals'].pop(name, None)
  counted = {
    name: [key for key, each in numbers.items() if each[name] is not None] for name in half if name != 'intervals'
  }
  if not has_slices:  # inherited labels must not be counted in means either
    half, chosen = ({**dict.fromkeys(part), 'intervals': dict.fromkeys(part['intervals'])} for part in (half, chosen))
  together = {EXCLUSIVE: _exclusive(tables, has_slices)} if is_exclusive else {}
  return {
    **{name: value for name, value in half.items() if name != 'intervals'},
    **of_all,
    'mean_over': counted,
    'intervals': {**statistics.method(), **half['intervals']},
    'operating_point': chosen,
    CLASSES: {name: {k: v for k, v in each.items() if k not in of_all} for name, each in numbers.items()},
    **({'labels': first['labels']} if 'labels' in first else {}),
    **together,
  }


def _exclusive(tables, has_slices):
  of_patients = exclusive.of_patients(tables)
  return {
    'slices': exclusive.numbers(tables) if has_slices else None,
    'patients': None if of_patients is None else exclusive.numbers(of_patients),
    'definitions': exclusive.DEFINITIONS,
  }


def called(result: dict) -> dict[str, dict]:
  """Returns the numbers of the class with the highest probability by what they count, 'slices' or 'patients'."""
  found = result.get(EXCLUSIVE, {})
  return {counted: found[counted] for counted in ('slices', 'patients') if found.get(counted)}


def mean_statistic(
  task_type: TaskType, summed: Sequence[metrics.Patients], calls: exclusive.Calls | None = None
) -> statistics.Statistic:
  """Returns the statistic of the means over the classes that define a number.

  Args:
    task_type: the type of task.
    summed: the table of each class, summed per patient.
    calls: of exclusive classes, their calls. Accuracy, recall, precision and F1 are then of the class with the highest
      probability: a mean of the accuracies of K questions is high whatever the model does.
  """
  statistic = statistics.average_of_defined([each.statistic(task_type.definition) for each in summed], len(summed[0]))
  if calls is None:
    return statistic

  def of_calls(weights):
    values = calls.statistic(weights)
    return statistic(weights) | {name: values[own] for name, own in exclusive.IN_PLACE_OF_MEANS.items()}

  return of_calls


def _means(task_type, tables, suffix, calls=None):
  summed = [metrics.by_patient(table, suffix) for table in tables.values()]
  count = len(summed[0])
  statistic = mean_statistic(task_type, summed, calls)
  estimates, bounds = statistics.estimates(statistic, count), statistics.intervals(statistic, count)
  for name in metrics.MEANS.keys() & bounds.keys():
    scores, is_defined = metrics.MEANS[name]
    columns = [np.where(each.sums[is_defined] > 0, each.sums[scores], np.nan) for each in summed]
    columns = [values for values in columns if np.isfinite(values).any()]
    if columns:
      bounds[name] = statistics.mean_interval(statistics.average_of_means(columns), (0, 1))
  return {**estimates, 'intervals': bounds}


def with_volumes(result: dict, parts: Mapping[str, Part]) -> dict:
  """Adds the measures of the scans of each class, if there are any, to the contents of metrics.json.

  Of several classes, the averages of the classes' means and medians are above them.
  """
  first = next(iter(parts.values()))
  if not first.volumes:  # all classes have the same scans
    return result
  owners = owners_of(first.table, [row['case'] for row in first.volumes])
  if CLASSES in result:
    rows = {name: part.volumes for name, part in parts.items()}
    measures = masks.over_classes(rows, owners)
    result['volumes'] = {
      **{'num_volumes': len(first.volumes), 'measures': measures},
      **{'intervals': statistics.method(), 'definitions': masks.DEFINITIONS},
    }
  for name, part in parts.items():
    numbers = result[CLASSES][name] if CLASSES in result else result
    numbers['volumes'] = masks.summary(part.volumes, owners)
  return result


def by_class(result: dict, classes: Sequence[str]) -> dict[str, dict]:
  """Returns metrics.json as one of each class alone would be, by the name of the class.

  Args:
    result: the contents of metrics.json.
    classes: the names of the classes of the run (`tasks.classes_of`).
  """
  if CLASSES not in result:
    return dict.fromkeys(classes, result)
  shared = {key: value for key, value in result.items() if key not in (CLASSES, 'mean_over')}
  return {name: {**shared, **result[CLASSES][name]} for name in classes}


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


def lines(task_type: TaskType, result: dict) -> list[tuple[str, str]]:
  """Returns what a test shows in the log, as (what, numbers): its own numbers, and those of patients, of each class."""
  of_each = result.get(CLASSES, {'': result})
  found = []
  if scores_slices(result):
    found.append(('', one_line(task_type, result)))
    found += [(name, one_line(task_type, each)) for name, each in of_each.items() if name]
  for counted, numbers in called(result).items():
    text = ', '.join(
      f'{name} {statistics.shown(numbers[name], interval)}' for name, interval in numbers['intervals'].items()
    )
    found.append((f'class with the highest probability, {counted}', text + caveat(result)))
  for name, each in of_each.items():
    found.append((f'{name}, patients' if name else 'patients', patient_line({**result, **each})))
  return found


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
