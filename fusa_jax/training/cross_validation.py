"""Cross-validation: trains and tests a separate run for each fold, and pools their results.

Every patient is tested once, by a model that was not trained on this patient.
"""

import copy
import logging
import pathlib
import statistics as python_statistics
from collections.abc import Callable, Mapping

import ml_collections
import numpy as np

from fusa_jax import tasks
from fusa_jax.measures import patients
from fusa_jax.runs import config_checks, operating_point, report, result_files, results, run_config, workdir_lock
from fusa_jax.system import hosts
from fusa_jax.system.errors import UserError
from fusa_jax.training import datasets, evaluate, optimizers, train


@workdir_lock.alone_in_workdir
def train_and_test(
  config: ml_collections.ConfigDict,
  workdir: pathlib.Path,
  data_dir: pathlib.Path,
  scans: Mapping[str, Callable] | None = None,
  overwrite: bool = False,
) -> dict:
  """Trains and tests one run, or one run per fold if data.fold is 'all'. Arguments and errors: `evaluate.evaluate`."""
  evaluate.check_scans(config, scans)
  if run_config.is_cross_validation(config):
    return cross_validate(config, workdir, data_dir, scans, overwrite)
  return _train_and_test_one(config, workdir, data_dir, scans, overwrite)


def _train_and_test_one(config, workdir, data_dir, scans, overwrite):
  """Trains and tests one run, unless it is finished; returns the contents of metrics.json."""
  if evaluate.is_finished(config, workdir, data_dir, scans):
    run_config.save_config(workdir, config)  # refuses a run with another config
    logging.info('%s is finished; its test was made of these data, options and code', workdir)
    return result_files.read_numbers(workdir)
  train.train(config, workdir, data_dir)
  return evaluate.evaluate(config, workdir, data_dir, scans, overwrite)


def check_config(config: ml_collections.ConfigDict) -> None:
  """Checks a config before data are prepared for it.

  Raises:
    UserError: as training would raise for this config with any data.
  """
  config_checks.check(config)
  tasks.create(config)
  optimizers.make_optimizer(config)


@workdir_lock.alone_in_workdir
def evaluate_again(config, workdir, data_dir, scans=None, overwrite=False) -> dict:
  """Tests a trained run again; with data.fold 'all', each fold's run, and pools. Arguments: `train_and_test`."""
  if not run_config.is_cross_validation(config):
    return evaluate.evaluate(config, workdir, data_dir, scans, overwrite)
  for run, one in runs(config, workdir, data_dir).items():
    evaluate.evaluate(one, run, data_dir, scans, overwrite)
  return pool(config, workdir, data_dir, overwrite)


@workdir_lock.alone_in_workdir
def write_reports(config: ml_collections.ConfigDict, workdir: pathlib.Path, data_dir: pathlib.Path) -> pathlib.Path:
  """Writes the report of a tested run, and the reports of its folds, on process 0. Returns the folder of the test."""
  folds = runs(config, workdir, data_dir) if run_config.is_cross_validation(config) else {}
  tested = folds | {workdir: config}
  test = evaluate.test_name(*next(iter(tested.items())), data_dir)
  if hosts.is_main():
    for run, one in tested.items():
      cards = [datasets.card(data_dir, one.data.fold, number) for number in range(len(tasks.classes_of(one).names))]
      report.write_report(run, cards, test)
  return workdir / test


def cross_validate(
  config: ml_collections.ConfigDict,
  workdir: pathlib.Path,
  data_dir: pathlib.Path,
  scans: Mapping[str, Callable] | None = None,
  overwrite: bool = False,
) -> dict:
  """Trains and tests the folds that are not finished, in fold0, fold1, ... of `workdir`; then pools all folds.

  Arguments are as in `evaluate.evaluate`.

  Raises:
    UserError: as `train.train`, `evaluate.evaluate` and `pool`.
  """
  configs = runs(config, workdir, data_dir)
  for one in configs.values():  # a fold that cannot be trained is found before others are
    datasets.check_trainable(one, datasets.load_dataset_for(one, data_dir))
  run_config.save_config(workdir, config)
  for run, one in configs.items():
    logging.info('fold %d', one.data.fold)
    _train_and_test_one(one, run, data_dir, scans, overwrite)
  return pool(config, workdir, data_dir, overwrite)


def runs(config: ml_collections.ConfigDict, workdir: pathlib.Path, data_dir: pathlib.Path) -> dict:
  """Returns {workdir: config} of each fold's run, in the order of the folds."""
  configs = {}
  for fold in range(len(datasets.folds(data_dir))):
    values = config.to_dict()
    values['data']['fold'] = fold
    configs[workdir / f'fold{fold}'] = ml_collections.ConfigDict(values)
  return configs


def pool(
  config: ml_collections.ConfigDict, workdir: pathlib.Path, data_dir: pathlib.Path, overwrite: bool = False
) -> dict:
  """Pools the tables of slices of all folds as one test, and writes it to `workdir`/test on process 0.

  Counts at the operating point use each fold's own operating point. AUC ranks the scores of different models together.
  The result also holds each fold's own numbers, and their spread.

  Returns:
    The content of metrics.json.

  Raises:
    UserError: a fold is not evaluated, or the folds do not test each patient once because the cohort has changed. The
      folds were evaluated with different options, data or code. A file that this program did not write, or that was
      changed, would be replaced.
  """
  return hosts.on_main(lambda: _pool(config, workdir, data_dir, overwrite))


def _pool(config, workdir, data_dir, overwrite):
  task_type, named = tasks.type_of(config.task), tasks.classes_of(config)
  classes = named.names
  configs = runs(config, workdir, data_dir)
  folders = list(configs)
  test = evaluate.test_name(*next(iter(configs.items())), data_dir)
  if not overwrite:
    result_files.check_own(workdir / test, classes)
  tests = [result_files.read_numbers(run, test) for run in folders]
  truth = {one['patient']: one['truth'] for fold in datasets.folds(data_dir) for one in fold}
  made_of = _common_making(folders, tests, datasets.truth_sha256(truth))
  parts = [result_files.read_parts(run, classes, test) for run in folders]
  has_volumes = all(part.volumes for of_fold in parts for part in of_fold.values())
  points = {name: _points([results.by_class(one, classes)[name] for one in tests]) for name in classes}
  if result_files.made_of(workdir / test) == made_of:
    pooled, pooled_parts = result_files.read_numbers(workdir, test), result_files.read_parts(workdir, classes, test)
    # On other data than the runs' own, `made_of` does not say which operating points the folds had.
    if all(bool(part.volumes) == has_volumes for part in pooled_parts.values()) and all(
      of_class['operating_point'].get(key) == of_folds
      for name, of_class in results.by_class(pooled, classes).items()
      for key, of_folds in points[name].items()
    ):
      return pooled
  tested = [patient for one in parts for patient in np.unique(one[classes[0]].table['patient']).tolist()]
  expected = [patient['patient'] for fold in datasets.folds(data_dir) for patient in fold]
  if sorted(tested) != sorted(expected):
    raise UserError(
      f'{workdir}: the folds do not test each patient of {data_dir} once, because files were added to the cohort or '
      'removed; restore the old files, or start again in another --workdir'
    )
  numbers, pooled_parts = {}, {}
  for name in classes:
    of_folds = [results.by_class(one, classes)[name] for one in tests]
    numbers[name], pooled_parts[name] = _pool_class(
      task_type, config.evaluate.prevalences, [one[name] for one in parts], of_folds, points[name], has_volumes
    )
  tables = {name: part.table for name, part in pooled_parts.items()}
  result = results.with_classes(task_type, numbers, tables, named.exclusive)
  result |= {
    'folds': [
      {
        'fold': fold,
        'step': one['step'],
        'num_patients': one['num_patients'],
        **{name: one[name] for name in task_type.shown},
      }
      for fold, one in enumerate(tests)
    ],
    'over_folds': {name: _spread([one[name] for one in tests]) for name in task_type.shown},
    'step': [one['step'] for one in tests],
    'parameters': tests[0]['parameters'],
    **{name: tests[0][name] for name in ('dataset', 'values', 'split', 'commit')},
    'made_of': made_of,
  }
  result = results.with_volumes(result, pooled_parts)
  result_files.write_test(workdir / test, result, pooled_parts)
  for what, line in results.lines(task_type, result):
    logging.info('all %d folds, %s: %s', len(folders), what or 'each patient once', line)
  for name, spread in result['over_folds'].items():
    if spread:
      logging.info('%s of single folds: %.4f to %.4f, mean %.4f, sd %.4f', name, *spread.values())
  return result


def _points(tests):
  """Returns the attributes of the operating points of the folds, as lists, from their numbers for one class."""
  points = [one['operating_point'] for one in tests]
  names = (*operating_point.OperatingPoint().about(), 'patient')
  return {name: [point.get(name) for point in points] for name in names}


def _pool_class(task_type, prevalences, parts, tests, points, has_volumes):
  """Pools one class: returns its part of metrics.json, and what write_test needs.

  Args:
    task_type: the type of task.
    prevalences: as in `results.numbers`.
    parts: what was found in each fold.
    tests: the numbers of each fold, as metrics.json of the class alone.
    points: from `_points`.
    has_volumes: whether every fold has volumes: a part of them could be mistaken for all patients.
  """
  tables = [part.table for part in parts]
  table = {name: np.concatenate([one[name] for one in tables]) for name in tables[0]}
  volumes = [row for part in parts for row in part.volumes] if has_volumes else []
  result = results.numbers(task_type, table, prevalences)
  result['operating_point'] = points | result['operating_point']
  if not results.scores_slices(tests[0]):
    result = results.without_slices(result)
  of_patients, result['patient'] = _pool_patients(
    [part.patients for part in parts], points['patient'], prevalences, tests
  )
  return result, results.Part(table, volumes, of_patients)


def _pool_patients(tables, rules, prevalences, tests):
  """Returns the table of all patients, each called by the rule of its own fold, and their numbers.

  AUC ranks the scores of different models together. If the folds have different scores, there is no call.

  Args:
    tables: the table of patients of each fold, or None.
    rules: the rule of each fold, as in its metrics.json, or None.
    prevalences: as in `results.patient_numbers`.
    tests: the metrics.json of the folds.
  """
  if any(one is None for one in (*tables, *rules)):
    reasons = [test.get('patient', {}).get('reason') or operating_point.NO_RULE for test in tests]
    return None, results.no_patient_numbers('; '.join(dict.fromkeys(reasons)))
  shared = [name for name in tables[0] if all(name in one for one in tables)]
  table = {name: np.concatenate([one[name] for one in tables]) for name in shared}
  pooled = {name: [rule[name] for rule in rules] for name in rules[0]}
  names = set(pooled['score_name'])
  if len(names) > 1:
    why = f'not chosen: the folds have different scores of patients ({", ".join(sorted(names))})'
    pooled |= {'score_name': 'mean_of_highest', 'threshold': [None] * len(rules), 'chosen_by': [why] * len(rules)}
    table = patients.with_call(table, 'mean_of_highest', None)
  else:
    pooled['score_name'] = names.pop()
  return table, results.patient_numbers(table, pooled, prevalences)


def _common_making(folders, tests, truth_sha256):
  """Returns what the folds were made of (`made_of` in metrics.json); checkpoints are listed by fold.

  Args:
    folders: the folders of the folds.
    tests: the contents of their metrics.json.
    truth_sha256: the digest of the masks or labels of all patients.

  Raises:
    UserError: the folds differ in data, options or code.
  """
  made_of = copy.deepcopy([test['made_of'] for test in tests])
  for one in made_of:
    one['data'].pop('truth_sha256')  # of the patients of a fold
  folds = [one['options'].pop('fold') for one in made_of]
  checkpoints = [one.pop('checkpoint') for one in made_of]
  for folder, one in zip(folders, made_of, strict=True):
    differ = [key for key in one if one[key] != made_of[0][key]]
    if differ:
      raise UserError(
        f'{folder}: was tested with other {" and ".join(differ)} than {folders[0]}; rerun the command that trained '
        'the folds, or --mode=evaluate, for all of them'
      )
  common = made_of[0]
  common['data']['truth_sha256'] = truth_sha256
  common['options']['fold'] = folds
  return common | {'checkpoint': checkpoints}


def _spread(values):
  """Returns low, high, mean and standard deviation over the folds that define a number; None for fewer than two."""
  values = [value for value in values if value is not None]
  if len(values) < 2:
    return None
  return {
    'low': min(values),
    'high': max(values),
    'mean': python_statistics.fmean(values),
    'sd': python_statistics.stdev(values),
  }
