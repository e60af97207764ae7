"""Two runs on the same test patients: what one has over the other, patient by patient."""

import logging
import pathlib
from collections.abc import Sequence

import numpy as np

from fusa_jax import tasks
from fusa_jax.measures import metrics, statistics
from fusa_jax.runs import results, run_config
from fusa_jax.system.errors import UserError
from fusa_jax.system.files import write_json


def default_output(workdir: pathlib.Path, against: pathlib.Path) -> pathlib.Path:
  """test/against-FOLDER-NAME.json of the first run."""
  return workdir / 'test' / f'against-{"-".join(against.resolve().parts[-2:])}.json'


def compare(workdir: pathlib.Path, against: pathlib.Path, output: pathlib.Path | None = None) -> dict:
  """Run minus run, with intervals; written to `output` or `default_output`.

  Args:
    workdir: of a run or a cross-validation, evaluated.
    against: of another one.
    output: of the JSON file.

  Raises:
    UserError: one of them is no evaluated run; other tasks; other test patients, slices or lesions.
  """
  configs = [run_config.load_config(folder) for folder in (workdir, against)]
  if configs[0].task != configs[1].task:
    raise UserError(f'against: {against} is of {configs[1].task}, {workdir} of {configs[0].task}; compare like tasks')
  tables = [results.read_table(folder) for folder in (workdir, against)]
  try:
    found = paired(tasks.type_of(configs[0].task), *([table] for table in tables))
  except UserError as error:
    raise UserError(f'against: {workdir} and {against}: {error}') from None
  split = results.read_numbers(workdir)['split']
  result = {'run': str(workdir), 'against': str(against), 'split': split, **found}
  write_json(output or default_output(workdir, against), result)
  logging.info('%s', report(result))
  return result


def _difference_of_tests(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> str | None:
  """In which way two tables, each sorted, are not of the same test; None where they are."""
  patients = [set(table['patient'].tolist()) for table in (one, other)]
  if patients[0] != patients[1]:
    return (
      f'{len(patients[0] - patients[1])} patients are in the first only, {len(patients[1] - patients[0])} in the second'
    )
  if len(one['label']) != len(other['label']) or (one['slice'] != other['slice']).any():
    return 'not the same slices'
  lesion = [table['tp'] + table['fn'] for table in (one, other)]
  if (one['label'] != other['label']).any() or (lesion[0] != lesion[1]).any():
    return 'not the same lesions'
  return None


def paired(
  task_type: tasks.TaskType, one: Sequence[dict[str, np.ndarray]], other: Sequence[dict[str, np.ndarray]]
) -> dict:
  """Every number of both sides and their difference, at threshold 0.5, under the same draws of patients.

  A side is the tables of one or more runs of a model, as those of several seeds: its numbers, and the score of each
  patient, are the means over them. Means have what no single seed decides, and the patients are still those that there
  are: more seeds make no more patients.

  `per_patient` is the mean over patients of the difference of their own score (Dice of their pixels; for classification
  the share of their slices that is called rightly), with its interval and the p-value of flipping signs. Patients for
  whom any of the tables leaves it undefined are left out there, and counted.

  Raises:
    UserError: the tables are not all of the same patients, slices and lesions.
  """
  one, other = ([_sorted(table) for table in side] for side in (one, other))
  for table in (*one[1:], *other):
    reason = _difference_of_tests(one[0], table)
    if reason:
      raise UserError(f'the test sets differ ({reason}); evaluate both on the same fold and data')
  sides = [[metrics.by_patient(table) for table in side] for side in (one, other)]
  patients = len(sides[0][0])
  statistic = [statistics.average([each.statistic(task_type.definition) for each in side]) for side in sides]
  difference = statistics.difference(*statistic)
  values = [statistics.estimates(s, patients) for s in (*statistic, difference)]
  spread = statistics.intervals(difference, patients)
  names = dict(zip(('run', 'against', 'difference'), values, strict=True))
  scores = [np.mean([task_type.patient_score(each.sums) for each in side], axis=0) for side in sides]
  gains = scores[0] - scores[1]
  mean = lambda weights: {'difference': statistics.mean(gains, weights)}
  return {
    'threshold': 0.5,
    'numbers': {
      name: {key: found[name] for key, found in names.items()} | {'interval': spread[name]} for name in values[0]
    },
    'per_patient': {
      'score': task_type.patient_score_name,
      'patients': int(np.isfinite(gains).sum()),
      'left_out': int((~np.isfinite(gains)).sum()),
      'better': int((gains > 0).sum()),
      'worse': int((gains < 0).sum()),
      **statistics.estimates(mean, len(gains)),
      'interval': statistics.intervals(mean, len(gains))['difference'],
      'p': statistics.sign_flip_p(gains),
    },
    'intervals': statistics.method(),
  }


def report(result: dict) -> str:
  """The comparison as a table for people."""
  lines = [f'{"":24}{"run":>10}{"against":>10}{"difference":>12}  95% interval']
  for name, row in result['numbers'].items():
    cells = [statistics.shown(row[key]) for key in ('run', 'against', 'difference')]
    lines.append('{:24}{:>10}{:>10}{:>12}  {}'.format(name, *cells, _interval(row['interval'])))
  return '\n'.join([*lines, f'per patient, {per_patient_line(result["per_patient"])}{results.caveat(result)}'])


def per_patient_line(found: dict) -> str:
  """What `paired` found of single patients, in a line."""
  left_out = f', {found["left_out"]} left out' if found['left_out'] else ''
  difference, p = statistics.shown(found['difference']), statistics.shown(found['p'])
  return (
    f'{found["score"]}: {difference} {_interval(found["interval"])}, sign-flip p {p} '
    f'({found["patients"]} patients: {found["better"]} better, {found["worse"]} worse{left_out})'
  )


def _interval(pair):
  return '[{:+.4f}, {:+.4f}]'.format(*pair) if pair else '[undefined]'


def _sorted(table):
  order = np.lexsort((table['slice'], table['patient']))
  return {name: values[order] for name, values in table.items()}
