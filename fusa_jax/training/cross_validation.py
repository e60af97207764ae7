"""Every fold in turn, each a run of its own, and all of them pooled: every patient is tested once, by a model that has
not seen it."""

import logging
import pathlib
import statistics as python_statistics
from collections.abc import Callable, Mapping

import ml_collections
import numpy as np

from fusa_jax import tasks
from fusa_jax.measures import masks
from fusa_jax.runs import operating_point, report, results, run_config
from fusa_jax.system import hosts
from fusa_jax.system.errors import UserError
from fusa_jax.training import datasets, evaluate, optimizers, train


def train_and_test(
  config: ml_collections.ConfigDict,
  workdir: pathlib.Path,
  data_dir: pathlib.Path,
  scans: Mapping[str, Callable] | None = None,
) -> dict:
  """Trains and tests a run or, of data.fold 'all', each fold's; arguments and errors as `evaluate.evaluate`."""
  evaluate.check_scans(config, scans)
  if run_config.is_cross_validation(config):
    return cross_validate(config, workdir, data_dir, scans)
  train.train(config, workdir, data_dir)
  return evaluate.evaluate(config, workdir, data_dir, scans)


def check_config(config: ml_collections.ConfigDict) -> None:
  """Raises the UserErrors that training would raise of a config alone, before any data are prepared for it."""
  operating_point.check(config)
  tasks.create(config)
  optimizers.make_optimizer(config)


def evaluate_again(config, workdir, data_dir, scans=None) -> dict:
  """Tests a trained run or, of data.fold 'all', each fold's run again, and pools; arguments as `train_and_test`."""
  if not run_config.is_cross_validation(config):
    return evaluate.evaluate(config, workdir, data_dir, scans)
  for run, one in runs(config, workdir, data_dir).items():
    evaluate.evaluate(one, run, data_dir, scans)
  return pool(config, workdir, data_dir)


def write_reports(config: ml_collections.ConfigDict, workdir: pathlib.Path, data_dir: pathlib.Path) -> None:
  """Process 0 writes the page of a run that has been tested, and those of its folds."""
  if not hosts.is_main():
    return
  folds = runs(config, workdir, data_dir) if run_config.is_cross_validation(config) else {}
  for run, one in (folds | {workdir: config}).items():
    report.write_report(run, datasets.card(data_dir, one.data.fold))
  logging.info('results: %s', workdir / 'test')


def cross_validate(
  config: ml_collections.ConfigDict,
  workdir: pathlib.Path,
  data_dir: pathlib.Path,
  scans: Mapping[str, Callable] | None = None,
) -> dict:
  """Trains and tests what is not finished, in fold0, fold1, ... of `workdir`, and pools. Arguments as `evaluate` has.

  Raises:
    UserError: as `train.train` and `evaluate.evaluate`; folds of a cohort that has changed meanwhile.
  """
  run_config.save_config(workdir, config)
  for run, one in runs(config, workdir, data_dir).items():
    if hosts.on_main(lambda run=run, one=one: is_finished(run, one)):
      run_config.save_config(run, one)  # refuses a run of another config
      continue
    logging.info('fold %d', one.data.fold)
    # The fold's earlier test had other options: remove it before the run is tested again.
    hosts.on_main(lambda run=run: results.clear_test(run / 'test'))
    train.train(one, run, data_dir)
    evaluate.evaluate(one, run, data_dir, scans)
  return pool(config, workdir, data_dir)


def is_finished(run: pathlib.Path, config: ml_collections.ConfigDict) -> bool:
  """Whether the run of a fold has been tested as config.evaluate says."""
  if not results.is_complete(run):
    return False
  tested_as, expected = (run_config.plain(one).evaluate.to_dict() for one in (run_config.load_config(run), config))
  return tested_as == expected


def runs(config: ml_collections.ConfigDict, workdir: pathlib.Path, data_dir: pathlib.Path) -> dict:
  """The config of each fold's run, by its workdir, in order of the folds."""
  found = {}
  for fold in range(len(datasets.folds(data_dir))):
    values = config.to_dict()
    values['data']['fold'] = fold
    found[workdir / f'fold{fold}'] = ml_collections.ConfigDict(values)
  return found


def pool(config: ml_collections.ConfigDict, workdir: pathlib.Path, data_dir: pathlib.Path) -> dict:
  """The folds' tables of slices as one test; process 0 writes `workdir`/test. Gives what metrics.json holds.

  Each slice counts at the operating point of its own fold's run. AUC ranks the scores of different models together. The
  folds' own numbers stand beside the pooled ones, with their spread.
  """
  return hosts.on_main(lambda: _pool(config, workdir, data_dir))


def _pool(config, workdir, data_dir):
  task_type = tasks.type_of(config.task)
  folders = list(runs(config, workdir, data_dir))
  tables = [results.read_table(run) for run in folders]
  tested = [patient for one in tables for patient in np.unique(one['patient']).tolist()]
  expected = [patient['patient'] for fold in datasets.folds(data_dir) for patient in fold]
  if sorted(tested) != sorted(expected):
    raise UserError(
      f'{workdir}: its folds do not test each patient of {data_dir} once: files were added to the cohort, or taken '
      'out; bring the old ones back, or start anew in another --workdir'
    )
  table = {name: np.concatenate([one[name] for one in tables]) for name in tables[0]}
  tests = [results.read_numbers(run) for run in folders]
  volumes = [results.read_volumes(run) for run in folders]
  # Some folds' would pass for all patients'.
  volumes = [row for rows in volumes for row in rows] if all(volumes) else []
  result = results.numbers(task_type, table, config.evaluate.prevalences)
  points = [one['operating_point'] for one in tests]
  result['operating_point'] = {
    name: [point[name] for point in points] for name in operating_point.OperatingPoint().about()
  } | result['operating_point']
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
  }
  if volumes:
    result['volumes'] = masks.summary(volumes)
  results.clear_test(workdir / 'test')
  results.write_test(workdir / 'test', table, result, volumes)
  logging.info('all %d folds, each patient once: %s', len(folders), results.one_line(task_type, result))
  for name, spread in result['over_folds'].items():
    if spread:
      logging.info('%s of single folds: %.4f to %.4f, mean %.4f, sd %.4f', name, *spread.values())
  return result


def _spread(values):
  """Lowest, highest, mean and standard deviation over the folds in which a number is defined; None without two."""
  values = [value for value in values if value is not None]
  if len(values) < 2:
    return None
  return {
    'low': min(values),
    'high': max(values),
    'mean': python_statistics.fmean(values),
    'sd': python_statistics.stdev(values),
  }
