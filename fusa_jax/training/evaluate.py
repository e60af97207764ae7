"""The protocol of a test: choose the operating point on validation patients, score the test fold, write test/."""

import logging
import pathlib
from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

import jax
import ml_collections
import numpy as np
import tqdm

from fusa_jax import tasks
from fusa_jax.inference import postprocessing, predictor, trained
from fusa_jax.measures import histogram, masks
from fusa_jax.runs import figures, operating_point, results, run_config
from fusa_jax.scans import volumes
from fusa_jax.system import hosts, meshes, provenance
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
  """Scores a run's best checkpoint on its test fold; process 0 writes test/. Gives what metrics.json holds.

  The operating point is chosen first, on the validation fold; until it is saved, the test fold is not read. On other
  data than the run was validated on, its own is kept.

  Args:
    config: of the run.
    workdir: of the run.
    data_dir: of the prepared dataset.
    scans: by patient, what reads the scan and its mask as released, where they are at hand: a segmenter's masks are
      then also compared with them as volumes, on each scan's own grid. For a run of one process.

  Raises:
    UserError: a config that does not fit the data or the devices; no checkpoint, or none that is whole; patients to be
      tested whom the run was trained or validated on; logits that are not finite.
  """
  operating_point.check(config)
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
  """What is tested, on what, and with which devices."""

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
    """The patients of a split whose scans are at hand, in its order; pictures and loose slices are not scans."""
    return [patient for patient in dict.fromkeys(split.patient.tolist()) if patient in self.scans]


def _choose_point(test):
  """The operating point, and what scores slices at it. It is saved before the test fold is read.

  It is chosen on the validation fold or, on other data than the run's own, the one that the run has.
  """
  config, workdir, dataset = test.config, test.workdir, test.dataset
  split, point = check_unseen(workdir, dataset), operating_point.load_point(workdir)
  if point.step != test.step:
    point = operating_point.OperatingPoint(step=test.step)
  own = split is None or split['validation'] == dataset.patients()['validation']
  flips, lungs = (config.evaluate[key] if own else getattr(point, key) for key in ('flips', 'lungs'))
  scorer = Scorer(test.task, test.mesh, config.train.batch_size, flips)
  if not own:
    return point, scorer
  if dataset.validation is not None:
    point = operating_point.choose(
      scorer.table(test.variables, dataset.validation, progress=hosts.is_main()),
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
  """The test fold's table of slices, and a row for each of its scans at hand; None where none is."""
  table = scorer.table(test.variables, test.dataset.test, point.temperature, progress=hosts.is_main())
  chosen = histogram.counts_at(table['histogram'], point.bin)
  table |= {f'{key}_chosen': values for key, values in chosen.items()}
  scanned = test.scanned(test.dataset.test)
  if not scanned or not test.task.type.has_masks:
    return table, None
  return table, score_volumes(test.predictor(point), test.scans, scanned)


def _numbers(test, point, table, volumes_of_scans):
  """What metrics.json holds."""
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
  """The files of test/."""
  folder = test.workdir / 'test'
  results.clear_test(folder)
  _draw(test, table, point, folder / 'figures')
  results.write_test(folder, table, result, volumes_of_scans)


def check_scans(config: ml_collections.ConfigDict, scans: Collection[str] | None) -> None:
  """Raises a UserError where config.evaluate asks for what needs scans, and there are none."""
  if config.evaluate.fit_smallest and not scans:
    raise UserError(
      'evaluate.fit_smallest: needs the scans and masks as released, on one host, and volumes, no slices; name them '
      'with data.raw_dir, or leave it out'
    )


def check_unseen(workdir: pathlib.Path, dataset: datasets.Dataset) -> dict[str, list[str]] | None:
  """The patients that the run was trained, validated and tested on, as it wrote them down.

  Raises:
    UserError: it was trained or validated on some of those to be tested now: the cohort's files have changed.
  """
  split = run_config.load_split(workdir)
  seen = sorted(set(dataset.patients()['test']) & {*split['train'], *split['validation']}) if split else []
  if seen:
    raise UserError(
      f'{workdir}: {len(seen)} of the patients to be tested were trained or validated on (as {seen[0]}): files '
      'were added to the cohort, or taken out, and its folds dealt anew; bring the old ones back, or train anew (or, '
      'if it is another cohort with the same names, rename)'
    )
  return split


def score_volumes(run: predictor.Predictor, scans, patients: list[str]) -> list[dict]:
  """A row of `masks.volume` for each patient: the run's mask against the released one."""
  rows = []
  for patient in tqdm.tqdm(patients, desc='Scoring volumes', unit='scan', leave=False):
    scan, truth = scans[patient]()
    rows.append({'case': patient, **masks.volume(run(scan).mask, truth, scan.spacing, scan.voxel_ml)})
  return rows


def _true_volumes(run, read):
  scan, truth = read()
  return postprocessing.true_volumes(run(scan).mask, truth, scan.voxel_ml)


def _draw(test, table, point, folder):
  """Overlays of some slices, computed on one device of this process alone."""
  config, task, dataset = test.config, test.task, test.dataset
  variables = jax.tree.map(lambda x: x.addressable_data(0), test.variables)
  how = point.temperature, point.flips
  probabilities = jax.jit(lambda variables, slices: task.probabilities(variables, slices, *how))
  shown = window.black_and_white(config.data.intensity, config.data.window)
  for row in tqdm.tqdm(figures.telling_slices(table, config.evaluate.num_overlays), desc='Drawing', leave=False):
    example = dataset.test.source[row]
    predictions = {}
    if task.type.has_masks:
      predictions['run'] = np.asarray(probabilities(variables, example['image'][None])[0] >= point.threshold)
    title = f'{results.overlay_title(task.type, table, row)}, threshold {point.threshold:.3f}'
    path = folder / results.overlay_name(table, row)
    mask = example['mask'] if dataset.masks else None
    figures.write_overlay(path, example['image'], mask, predictions, shown, config.data.intensity, title)
