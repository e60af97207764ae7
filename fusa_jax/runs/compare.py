"""Compares two runs on the same test patients, overall and patient by patient."""

import logging
import pathlib
from collections.abc import Sequence

import numpy as np

from fusa_jax import tasks
from fusa_jax.measures import crossed, exclusive, metrics, patients, statistics
from fusa_jax.runs import result_files, results, run_config
from fusa_jax.runs.split import TEST
from fusa_jax.system.errors import UserError


def default_output(workdir: pathlib.Path, against: pathlib.Path) -> pathlib.Path:
  """Returns the default file of a comparison: test/against-FOLDER-NAME.json in the first run."""
  return workdir / TEST / f'against-{"-".join(against.resolve().parts[-2:])}.json'


def compare(workdir: pathlib.Path, against: pathlib.Path) -> dict:
  """Computes the differences between two runs, with intervals.

  Runs of several classes are compared class by class, under `classes`, in the classes that both have. If these are all
  classes of both, the differences of the means over the classes stand above them. Of exclusive classes, `exclusive` has
  the differences of what `measures.exclusive` says of the class with the highest probability.

  Args:
    workdir: the folder of an evaluated run or cross-validation.
    against: the folder of another one, which is subtracted.

  Returns:
    The content of the JSON file of the comparison.

  Raises:
    UserError: one of the folders holds no evaluated run, or the runs differ in task, test patients, slices or lesion
      masks, or have no class in common.
  """
  folders = workdir, against
  configs = [run_config.load_config(folder) for folder in folders]
  if configs[0].task != configs[1].task:
    raise UserError(
      f'against: {against} is for {configs[1].task}, {workdir} for {configs[0].task}; compare runs of the same task'
    )
  classes = [tasks.classes_of(config).names for config in configs]
  shared = [name for name in classes[0] if name in classes[1]]
  if not shared:
    raise UserError(
      f'against: {workdir} has the classes {", ".join(classes[0])}, {against} {", ".join(classes[1])}; compare runs '
      'with a class in common'
    )
  parts = [result_files.read_parts(folder, names) for folder, names in zip(folders, classes, strict=True)]
  tests = [result_files.read_numbers(folder) for folder in folders]
  task_type = tasks.type_of(configs[0].task)
  try:
    of_classes = {name: _of_class(task_type, [of_run[name].table for of_run in parts], tests) for name in shared}
  except UserError as error:
    raise UserError(f'against: {workdir} and {against}: {error}') from None
  # Of other classes, the digests of masks differ; that the lesions of these classes are equal is already known.
  if classes[0] == classes[1] and len({test['made_of']['data']['truth_sha256'] for test in tests}) > 1:
    raise UserError(
      f'against: {workdir} and {against} were tested with different lesion masks; evaluate both on the same data'
    )
  for name, differences in of_classes.items():
    numbers = [results.by_class(test, names)[name] for test, names in zip(tests, classes, strict=True)]
    differences['patient'] = _paired_auc(numbers, [of_run[name].patients for of_run in parts])
  result = {
    'run': str(workdir),
    'against': str(against),
    'split': tests[0]['split'],
    'made_of': dict(zip(('run', 'against'), (test['made_of'] for test in tests), strict=True)),
  }
  if len(classes[0]) == len(classes[1]) == 1:
    result |= of_classes[shared[0]]
  else:
    if set(classes[0]) == set(classes[1]):
      tables = [{name: _sorted(of_run[name].table) for name in shared} for of_run in parts]
      result |= _of_all(task_type, tables, tests)
    result[results.CLASSES] = of_classes
  logging.info('%s', report(result))
  return result


def _of_class(task_type, tables, tests):
  differences = paired(task_type, *([table] for table in tables))
  if not all(map(results.scores_slices, tests)):
    # Labels are of patients: the differences of slices would count inherited labels.
    differences |= {'numbers': {}, 'per_patient': None}
  return differences


def _of_all(task_type, tables, tests):
  """Returns the differences of the numbers of all classes together.

  Args:
    task_type: the type of task of both.
    tables: of each run, the tables of slices of the classes, by name.
    tests: metrics.json of both.
  """
  has_slices, calls, found = all(map(results.scores_slices, tests)), {}, {}
  if all(results.EXCLUSIVE in test for test in tests):
    counted = {'slices': tables} if has_slices else {}
    of_patients = [exclusive.of_patients(of_run) for of_run in tables]
    if None not in of_patients:
      counted['patients'] = of_patients
    calls = {name: [exclusive.calls(one) for one in sides] for name, sides in counted.items()}
    found[results.EXCLUSIVE] = {name: _of_calls(*sides, name) for name, sides in calls.items()}
  if has_slices:
    sides = [[metrics.by_patient(table) for table in of_run.values()] for of_run in tables]
    statistic = [
      results.mean_statistic(task_type, *each) for each in zip(sides, calls.get('slices', (None, None)), strict=True)
    ]
    found |= {'threshold': 0.5, 'numbers': _differences(*statistic, len(sides[0][0]))}
  return found | {'intervals': statistics.method()}


def _of_calls(one, other, counted):
  """Returns the differences of the numbers of all classes, and of the accuracy of each patient, of exclusive classes.

  Args:
    one: the calls of the first run (`exclusive.Calls`).
    other: those of the second run, of the same patients in the same order.
    counted: 'slices' or 'patients'.
  """

  def statistic(calls):
    def of_weights(weights):
      values = calls.statistic(weights)
      return {name: values[name] for name in exclusive.DEFINITIONS}

    return of_weights

  gains = one.accuracy() - other.accuracy()
  score = 'slice accuracy' if counted == 'slices' else 'accuracy'
  numbers = _differences(statistic(one), statistic(other), len(one))
  return {'numbers': numbers, 'per_patient': _per_patient(score, gains)}


def _differences(one, other, count):
  """Returns each number of two statistics over `count` patients, and its difference with the interval."""
  difference = statistics.difference(one, other)
  values = [statistics.estimates(each, count) for each in (one, other, difference)]
  spread = statistics.intervals(difference, count)
  return {
    name: dict(zip(('run', 'against', 'difference'), (of[name] for of in values), strict=True))
    | {'interval': spread[name]}
    for name in values[0]
  }


def _paired_auc(tests, tables):
  """Returns the AUC of patients of both runs and their difference, for the same draws of the same patients.

  Args:
    tests: metrics.json of both.
    tables: the tables of patients of both, of the same patients; None if a test has none.
  """
  reasons = {
    name: test.get('patient', {}).get('reason') or 'its test has no numbers of patients; evaluate it again'
    for name, test, table in zip(('run', 'against'), tests, tables, strict=True)
    if table is None
  }
  empty = {'auc': None, 'interval': None}
  if reasons:
    return empty | {'reason': '; '.join(f'{name}: {reason}' for name, reason in reasons.items())}
  order = [np.argsort(table['owner']) for table in tables]
  scores = [table['score'][rows] for table, rows in zip(tables, order, strict=True)]
  label = tables[0]['label'][order[0]]
  known = np.isfinite(scores[0]) & np.isfinite(scores[1])
  about = {
    'score_name': {name: test['patient']['score_name'] for name, test in zip(('run', 'against'), tests, strict=True)},
    'patients': int(known.sum()),
    'left_out': int((~known).sum()),
  }
  if len(set(label[known].tolist())) < 2:
    return empty | about | {'reason': 'the patients are not of both kinds, so AUC is undefined'}
  sides = [patients.counted(label[known], score[known]) for score in scores]
  statistic = [side.statistic(patients.auc) for side in sides]
  difference = statistics.difference(*statistic)
  values = [statistics.estimates(one, about['patients'])['auc'] for one in (*statistic, difference)]
  interval = statistics.intervals(difference, about['patients'])['auc']
  auc = dict(zip(('run', 'against', 'difference'), values, strict=True))
  return {'auc': auc, 'interval': interval, **about, 'reason': None}


def _difference_of_tests(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> str | None:
  """Returns how the tests of two sorted tables differ; None if they are the same."""
  patients = [set(table['patient'].tolist()) for table in (one, other)]
  if patients[0] != patients[1]:
    return (
      f'{len(patients[0] - patients[1])} patients are only in the first, '
      f'{len(patients[1] - patients[0])} only in the second'
    )
  if len(one['label']) != len(other['label']) or (one['slice'] != other['slice']).any():
    return 'not the same slices'
  if (one['owner'] != other['owner']).any():
    return 'not the same scans of each patient'
  lesion = [table['tp'] + table['fn'] for table in (one, other)]
  if (one['label'] != other['label']).any() or (lesion[0] != lesion[1]).any():
    return 'not the same lesions'
  counted = [sum(table[key] for key in metrics.COUNTS) for table in (one, other)]
  if (counted[0] != counted[1]).any():
    return 'not the same pixels: one leaves out others (data.ignore_label)'
  return None


def paired(
  task_type: tasks.TaskType, one: Sequence[dict[str, np.ndarray]], other: Sequence[dict[str, np.ndarray]]
) -> dict:
  """Computes every number of two models and their difference at threshold 0.5. Both use the same draws of patients.

  A model can have several runs, for example with different seeds. Its numbers, and the scores of each patient, are then
  means over its runs. This reduces the influence of a single seed, but does not add patients.

  `per_patient` holds the mean difference of the patients' own scores, with its interval and the p-value of the
  sign-flip test. The score is Dice over the pixels of a patient; for classification, accuracy over the slices of a
  patient. Patients with an undefined score in any table are left out and counted in `left_out`.

  If both models have the same number of runs, and more than one, `with_other_runs` has the interval over patients and
  runs, the variances of the differences (`crossed.Variances`), and the difference that this design detects. Run k of
  one model is paired with run k of the other.

  Args:
    task_type: the type of task of both models.
    one: the tables of slices of the runs of the first model.
    other: the tables of slices of the runs of the second model, which is subtracted.

  Raises:
    UserError: the tables differ in patients, slices or lesions.
  """
  one, other = ([_sorted(table) for table in side] for side in (one, other))
  for table in (*one[1:], *other):
    reason = _difference_of_tests(one[0], table)
    if reason:
      raise UserError(f'the test sets differ ({reason}); evaluate both on the same fold and data')
  sides = [[metrics.by_patient(table) for table in side] for side in (one, other)]
  patients = len(sides[0][0])
  statistic = [statistics.average([each.statistic(task_type.definition) for each in side]) for side in sides]
  scores = [np.stack([task_type.patient_score(each.sums) for each in side]) for side in sides]
  gains = scores[0].mean(axis=0) - scores[1].mean(axis=0)
  return {
    'threshold': 0.5,
    'numbers': _differences(*statistic, patients),
    'per_patient': {
      **_per_patient(task_type.patient_score_name, gains),
      **(_with_other_runs(scores[0] - scores[1]) if len(one) == len(other) > 1 else {}),
    },
    'intervals': statistics.method(),
  }


def _per_patient(name, gains):
  """Returns `per_patient` of a comparison, from the difference of the scores of each patient; NaN is left out."""
  mean = lambda weights: {'difference': statistics.mean(gains, weights)}
  return {
    'score': name,
    'patients': int(np.isfinite(gains).sum()),
    'left_out': int((~np.isfinite(gains)).sum()),
    'better': int((gains > 0).sum()),
    'worse': int((gains < 0).sum()),
    **statistics.estimates(mean, len(gains)),
    'interval': statistics.mean_interval(gains, (-np.inf, np.inf)),
    'p': statistics.sign_flip_p(gains),
  }


def _with_other_runs(differences):
  """Returns the part of `per_patient` that needs several runs, from differences [runs, patients]."""
  differences = crossed.defined(differences)
  if differences.shape[1] < 2:
    return {}
  effects = crossed.variances(crossed.mean_squares(differences))
  return {
    'with_other_runs': {
      'interval': crossed.interval(differences),
      'variances': effects._asdict(),
      'detectable': crossed.detectable(effects, *differences.shape),
    }
  }


def report(result: dict) -> str:
  """Returns the comparison as a text table; of several classes, first that of the means, then one for each class."""
  if results.CLASSES in result:
    of_classes = [f'{name}\n{_table({**result, **each})}' for name, each in result[results.CLASSES].items()]
    means = ['mean over the classes', *_numbers(result['numbers'])] if 'numbers' in result else []
    for counted, differences in result.get(results.EXCLUSIVE, {}).items():
      means += [f'{counted}, class with the highest probability', *_numbers(differences['numbers'])]
      means.append(f'per patient, {per_patient_line(differences["per_patient"])}')
    return '\n'.join([*means, *of_classes])
  return _table(result)


def _numbers(numbers):
  """Returns the lines of the numbers of a comparison."""
  lines = [f'{"":24}{"run":>10}{"against":>10}{"difference":>12}  95% interval']
  for name, row in numbers.items():
    cells = [statistics.shown(row[key]) for key in ('run', 'against', 'difference')]
    lines.append('{:24}{:>10}{:>10}{:>12}  {}'.format(name, *cells, _interval(row['interval'])))
  return lines


def _table(result):
  """Returns the text table of one class."""
  lines = _numbers(result['numbers'])
  if result['per_patient']:
    lines.append(f'per patient, {per_patient_line(result["per_patient"])}{results.caveat(result)}')
  return '\n'.join([*lines, _patient_line(result['patient'])])


def _patient_line(patient):
  """Returns `patient` of a comparison as one line."""
  if patient['auc'] is None:
    return f'AUC of patients: undefined ({patient["reason"]})'
  run, against, difference = (statistics.shown(patient['auc'][key]) for key in ('run', 'against', 'difference'))
  left_out = f', {patient["left_out"]} left out' if patient['left_out'] else ''
  return (
    f'AUC of patients: {run} - {against} = {difference} {_interval(patient["interval"])} '
    f'({patient["patients"]} patients{left_out})'
  )


def per_patient_line(per_patient: dict) -> str:
  """Returns `per_patient` of a comparison as one line."""
  left_out = f', {per_patient["left_out"]} left out' if per_patient['left_out'] else ''
  difference, p = statistics.shown(per_patient['difference']), statistics.shown(per_patient['p'])
  line = (
    f'{per_patient["score"]}: {difference} {_interval(per_patient["interval"])}, sign-flip p {p} '
    f'({per_patient["patients"]} patients: {per_patient["better"]} better, {per_patient["worse"]} worse{left_out})'
  )
  others = per_patient.get('with_other_runs')
  if others:
    line += (
      f'; with other runs and patients {_interval(others["interval"])}, detectable with 80% power '
      f'{statistics.shown(others["detectable"])}'
    )
  return line


def _interval(pair):
  return '[{:+.4f}, {:+.4f}]'.format(*pair) if pair else '[undefined]'


def _sorted(table):
  """The columns of a table of slices, in the order of patients and slices; without the histograms of all slices."""
  order = np.lexsort((table['slice'], table['patient']))
  return {name: values[order] for name, values in table.items() if name != 'histogram'}
