"""The protocol of a test: choose the operating point on validation patients, score the test fold, write test/."""

import functools
import logging
import pathlib
from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

import jax
import ml_collections
import numpy as np

from fusa_jax import tasks
from fusa_jax.inference import postprocessing, predictor, trained
from fusa_jax.measures import masks
from fusa_jax.runs import config_checks, figures, operating_point, results, run_config
from fusa_jax.scans import volumes
from fusa_jax.system import hosts, meshes, progress, provenance
from fusa_jax.system.errors import UserError
from fusa_jax.tasks import window
from fusa_jax.training import datasets
from fusa_jax.training.scorer import Scorer


def evaluate(
  config: ml_collections.ConfigDict,
  workdir: pathlib.Path,
  data_dir: pathlib.Path,
  scans: Mapping[str, Callable[[], tuple[volumes.Scan, np.ndarray]]] | None = None,
) -> dict:
  """Tests a run's best checkpoint on its test fold and returns the contents of metrics.json; process 0 writes test/.

  It first chooses the operating point on the validation fold and saves it; only then does it read the test fold. On
  data with other validation patients than the run's, it keeps the run's operating point.

  Args:
    config: config of the run.
    workdir: folder of the run.
    data_dir: folder of the prepared dataset.
    scans: functions by patient that read the released scan and its reference mask. With them, the masks of a
      segmentation model are also compared as volumes on each scan's own grid. Only for a run of one process.

  Raises:
    UserError: the config does not fit the data or the devices. Every checkpoint is missing or damaged. The run was
      trained or validated on a test patient. A logit is not finite.
  """
  config_checks.check(config)
  mesh = meshes.create_mesh(config.mesh.data, config.mesh.space)
  batch_size = meshes.fitting_batch(mesh, config.train.batch_size)
  meshes.check_divides(mesh, batch_size, config.data.image_size)
  dataset = datasets.load_dataset_for(config, data_dir)
  task = tasks.create(config)
  step, variables = trained.load_variables(config, task, workdir, mesh)
  test = _Test(config, workdir, dataset, task, mesh, step, variables, scans or {})
  point, scorer = _choose_point(test)
  table, volumes_of_scans = _score(test, point, scorer)
  result = _numbers(test, point, table, volumes_of_scans)
  if hosts.is_main():
    _write(test, point, table, volumes_of_scans, result)
    logging.info('test fold %s, step %d: %s', config.data.fold, step, results.one_line(task.type, result))
  return result


class _Test(NamedTuple):
  """The run, its data and its devices."""

  config: ml_collections.ConfigDict
  workdir: pathlib.Path
  dataset: datasets.Dataset
  task: tasks.Task
  mesh: jax.sharding.Mesh
  step: int
  variables: dict
  scans: Mapping[str, Callable]

  def predictor(self, point: operating_point.OperatingPoint) -> predictor.Predictor:
    network = trained.Network(self.config, self.step, self.variables, point.temperature)
    return predictor.Predictor(trained.create([network], point.flips), point, self.mesh)

  def scanned(self, split: datasets.Split) -> list[str]:
    """Returns the patients of a split that have a scan, in its order. Pictures and single slices are not scans."""
    return [patient for patient in dict.fromkeys(split.patient.tolist()) if patient in self.scans]


def _choose_point(test):
  """Chooses the operating point on the validation fold and saves it; returns it with the scorer of slices.

  With other validation patients than the run's own, it returns the run's operating point.
  """
  config, workdir, dataset = test.config, test.workdir, test.dataset
  split, point = check_unseen(workdir, dataset), operating_point.load_point(workdir)
  if point.step != test.step:
    point = operating_point.OperatingPoint(step=test.step)
  own = split is None or split['validation'] == dataset.patients()['validation']
  flips, lungs = (config.evaluate[key] if own else getattr(point, key) for key in ('flips', 'lungs'))
  scorer = Scorer(test.task, test.mesh, config.train.batch_size, flips, config.train.deterministic)
  if not own:
    return point, scorer
  if dataset.validation is not None:
    point = operating_point.choose(
      scorer.table(test.variables, dataset.validation, stage='Validating'),
      step=test.step,
      score=test.task.type.overlap,
      target_sensitivity=config.evaluate.target_sensitivity,
      fit_temperature=config.evaluate.fit_temperature,
    )
  point = point.with_options(flips=flips, lungs=lungs)
  if config.evaluate.fit_smallest and dataset.validation is not None:
    validated = test.scanned(dataset.validation)
    check_scans(config, validated)
    run = test.predictor(point)
    point = operating_point.choose_smallest(point, [_true_volumes(run, test.scans[name]) for name in validated])
  if hosts.is_main():
    point.save(workdir)
  return point, scorer


def _score(test, point, scorer):
  """Returns two tables of the test fold: one of its slices, and one of its scans, or None if no scan is available."""
  table = scorer.table(test.variables, test.dataset.test, point.temperature, stage='Testing', bin=point.bin)
  scanned = test.scanned(test.dataset.test)
  if not scanned or not test.task.type.has_masks:
    return table, None
  return table, score_volumes(test.predictor(point), test.scans, scanned)


def _numbers(test, point, table, volumes_of_scans):
  """Returns the contents of metrics.json."""
  result = results.numbers(test.task.type, table, test.config.evaluate.prevalences)
  result['operating_point'] = point.about() | result['operating_point']
  result |= {
    'step': test.step,
    'parameters': sum(x.size for x in jax.tree.leaves(test.variables['params'])),
    'dataset': test.dataset.name,
    'values': test.dataset.intensity,
    'split': results.BY_PATIENT if test.dataset.by_patient else results.BY_SLICE,
    'commit': provenance.commit(),
  }
  if volumes_of_scans:
    result['volumes'] = masks.summary(volumes_of_scans)
  return result


def _write(test, point, table, volumes_of_scans, result):
  """Writes the files of test/."""
  folder = test.workdir / 'test'
  results.clear_test(folder)
  _draw(test, table, point, volumes_of_scans, folder / 'figures')
  results.write_test(folder, table, result, volumes_of_scans)


def check_scans(config: ml_collections.ConfigDict, scans: Collection[str] | None) -> None:
  """Raises a UserError if a key of config.evaluate needs scans and there are none."""
  if config.evaluate.fit_smallest and not scans:
    raise UserError(
      'evaluate.fit_smallest: needs the released scans and masks as volumes, on one host; give data.raw_dir, or leave '
      'evaluate.fit_smallest out'
    )


def check_unseen(workdir: pathlib.Path, dataset: datasets.Dataset) -> dict[str, list[str]] | None:
  """Compares the test patients with split.json of the run. Returns that file, or None if the run has none.

  Raises:
    UserError: the run was trained or validated on a test patient, because the files of the cohort changed.
  """
  split = run_config.load_split(workdir)
  seen = sorted(set(dataset.patients()['test']) & {*split['train'], *split['validation']}) if split else []
  if seen:
    raise UserError(
      f'{workdir}: the run was trained or validated on {len(seen)} of the test patients (for example {seen[0]}), '
      'because files were added to the cohort or removed; restore the files, or train again (if this is another cohort '
      'with the same names, rename its files)'
    )
  return split


def score_volumes(run: predictor.Predictor, scans, patients: list[str]) -> list[dict]:
  """Compares the run's mask with the reference mask: a row of `masks.volume` per patient."""
  rows = []
  for patient in progress.bar(patients, desc='Testing volumes', unit='scans'):
    scan, truth = scans[patient]()
    rows.append({'case': patient, **masks.volume(run(scan).mask, truth, scan)})
  return rows


def _true_volumes(run, read):
  scan, truth = read()
  return postprocessing.true_volumes(run(scan).mask, truth, scan.voxel_ml)


def _draw(test, table, point, volumes_of_scans, folder):
  """Draws some slices, computed on one device of this process alone: the other processes do not read them."""
  config, task, dataset = test.config, test.task, test.dataset
  variables = jax.tree.map(lambda x: x.addressable_data(0), test.variables)
  options = point.temperature, point.flips
  probabilities = jax.jit(lambda variables, slices: task.probabilities(variables, slices, *options))
  shown = window.black_and_white(config.data.intensity, config.data.window)
  volumes = {row['case']: row for row in volumes_of_scans or []}

  @functools.cache
  def slice_and_predictions(row):
    example = dataset.test.source[row]
    predictions = {}
    if task.type.has_masks:
      predictions['run'] = np.asarray(probabilities(variables, example['image'][None])[0] >= point.threshold)
    return example['image'], example['mask'] if dataset.masks else None, predictions

  rows = figures.telling_slices(table, config.evaluate.num_overlays)
  for row in progress.bar(rows, desc='Drawing pictures', unit='pictures'):
    values, mask, predictions = slice_and_predictions(row)
    title = f'{results.overlay_title(task.type, table, row, volumes)}, threshold {point.threshold:.3f}'
    path = folder / results.overlay_name(table, row)
    figures.write_overlay(path, values, mask, predictions, shown, config.data.intensity, title)
  typical = figures.typical_slices(table)
  if typical:
    panels = [(title, *slice_and_predictions(row)) for title, row in typical.items()]
    figures.write_overview(folder / 'overview.png', panels, shown)
