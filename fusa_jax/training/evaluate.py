"""Every slice of a split exactly once -> a table of slices -> numbers, files and pictures of a test."""

import logging
import math
import pathlib
from collections.abc import Callable, Collection, Mapping

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
from fusa_jax.training import datasets, input_pipeline


class Scorer:
  """Scores the slices of a split on a mesh, in batches of any size; compiled once."""

  def __init__(self, task: tasks.Task, mesh: jax.sharding.Mesh, batch_size: int, flips: bool = False):
    self._mesh, self._batch_size = mesh, meshes.fitting_batch(mesh, batch_size)

    def run(variables, batch, temperature):
      logits = task.logits(variables, batch['image'], flips)
      highest = logits.reshape(len(logits), -1).max(axis=1)
      counts = histogram.count(logits, task.kind.truth(batch), temperature)
      score = jax.nn.sigmoid(highest / temperature)
      return counts | {'score': score, 'logit': highest, 'index': batch['index']}

    # Every host gets every row: a few thousand numbers each.
    self._run = hosts.compiled_together(jax.jit(run, out_shardings=meshes.replicated(mesh)))

  def table(
    self, variables: dict, split: datasets.Split, temperature: float = 1.0, progress: bool = False
  ) -> dict[str, np.ndarray]:
    """The table of slices, in the split's order.

    Its columns: those of `results.COLUMNS`, with the counts at threshold 0.5; `logit`, the highest of the slice, by
    which slices are ranked (probabilities near 0 and 1 round to the same number); and those of `histogram.count`.
    """
    columns, seen = {}, np.zeros(len(split), np.int64)
    steps = math.ceil(len(split) / self._batch_size)
    batches = input_pipeline.test_batches(split, self._mesh, batch_size=self._batch_size)
    divisor = jax.device_put(np.float32(temperature), meshes.replicated(self._mesh))
    for batch in tqdm.tqdm(batches, total=steps, desc='Evaluating', unit='batch', disable=not progress, leave=False):
      rows = jax.device_get(self._run(variables, batch, divisor))
      index = rows.pop('index')
      real = index >= 0
      seen[index[real]] += 1
      for key, values in rows.items():
        if key not in columns:
          columns[key] = np.zeros((len(split), *values.shape[1:]), values.dtype)
        columns[key][index[real]] = values[real]
    assert (seen == 1).all(), 'a slice was read more or less than once'
    broken = int((~np.isfinite(columns['logit'])).sum())
    if broken:
      raise UserError(
        f'evaluate: the model gives {broken} of {len(split)} slices a logit that is not finite; train again with a '
        'lower train.learning_rate'
      )
    columns['logit'] = columns['logit'].astype(np.float64) / temperature
    table = {'patient': split.patient, 'slice': split.slice, 'label': split.label.astype(np.int64), **columns}
    return table | histogram.counts_at(columns['histogram'], histogram.HALF)


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

  # ---- the operating point: the validation fold's or, on other data than the run's own, the one it has
  split, point = check_unseen(workdir, dataset), operating_point.load_point(workdir)
  if point.step != step:
    point = operating_point.OperatingPoint(step=step)
  own = split is None or split['validation'] == dataset.patients()['validation']
  flips, lungs = (config.evaluate.get(key, False) if own else getattr(point, key) for key in ('flips', 'lungs'))
  scorer = Scorer(task, mesh, batch_size, flips)
  if own:
    if dataset.validation is not None:
      point = operating_point.choose(
        scorer.table(variables, dataset.validation, progress=hosts.is_main()),
        step=step,
        score=task.kind.OVERLAP,
        target_sensitivity=config.evaluate.get('target_sensitivity'),
        fit_temperature=config.evaluate.get('fit_temperature', False),
      )
    point = point.changed(flips=flips, lungs=lungs)
    if config.evaluate.get('fit_smallest') and dataset.validation is not None:
      validated = _scanned(dataset.validation, scans or {})
      check_scans(config, validated)
      run = _predictor(config, step, variables, point, mesh)
      point = operating_point.choose_smallest(point, [_true_volumes(run, scans[name]) for name in validated])
    if hosts.is_main():
      point.save(workdir)

  # ---- the test fold
  table = scorer.table(variables, dataset.test, point.temperature, progress=hosts.is_main())
  chosen = histogram.counts_at(table['histogram'], point.bin)
  table |= {f'{key}_chosen': values for key, values in chosen.items()}
  volumes = None
  scanned = _scanned(dataset.test, scans or {})
  if scanned and config.task == 'segmentation':
    volumes = score_volumes(_predictor(config, step, variables, point, mesh), scans, scanned)
  result = results.numbers(task.kind, table, config.evaluate.get('prevalences', ()))
  result['operating_point'] = point.about() | result['operating_point']
  size = sum(x.size for x in jax.tree.leaves(variables['params']))
  result |= {
    'step': step,
    'parameters': size,
    'dataset': dataset.name,
    'values': dataset.values,
    'split': results.BY_PATIENT if dataset.by_patient else results.BY_SLICE,
    'commit': provenance.commit(),
  }
  if volumes:
    result['volumes'] = masks.summary(volumes)
  if hosts.is_main():
    results.clear_test(workdir / 'test')
    _draw(config, task, variables, dataset, table, point, workdir / 'test' / 'figures')
    results.write_test(workdir / 'test', table, result, volumes)
    logging.info('test fold %s, step %d: %s', config.data.fold, step, results.one_line(task.kind, result))
  return result


def _predictor(config, step, variables, point, mesh):
  network = trained.Network(config, step, variables, point.temperature)
  return predictor.Predictor(trained.create([network], point.flips), point, mesh)


def _scanned(split, scans):
  """The patients of a split whose scans are at hand, in its order; pictures and loose slices are no scans."""
  return [patient for patient in dict.fromkeys(split.patient.tolist()) if patient in scans]


def check_scans(config: ml_collections.ConfigDict, scans: Collection[str] | None) -> None:
  """Raises a UserError where config.evaluate asks for what needs scans, and there are none."""
  if config.evaluate.get('fit_smallest') and not scans:
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


def _draw(config, task, variables, dataset, table, point, folder):
  """Overlays of some slices, computed on one device of this process alone."""
  variables = jax.tree.map(lambda x: x.addressable_data(0), variables)
  how = point.temperature, point.flips
  probabilities = jax.jit(lambda variables, slices: task.probabilities(variables, slices, *how))
  shown = window.black_and_white(config.data['values'], config.data.window)
  for row in tqdm.tqdm(figures.telling_slices(table, config.evaluate.num_overlays), desc='Drawing', leave=False):
    example = dataset.test.source[row]
    predicted = None
    if config.task == 'segmentation':
      predicted = np.asarray(probabilities(variables, example['image'][None])[0] >= point.threshold)
    title = f'{results.overlay_title(task.kind, table, row)}, threshold {point.threshold:.3f}'
    path = folder / results.overlay_name(table, row)
    mask = example['mask'] if dataset.masks else None
    figures.write_overlay(path, example['image'], mask, predicted, shown, config.data['values'], title)
