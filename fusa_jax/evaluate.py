"""Every slice of a split exactly once -> a table of slices -> the numbers of the paper's tables, and pictures."""

import csv
import json
import logging
import math
import pathlib
import subprocess

import jax
import ml_collections
import numpy as np
import tqdm

from fusa_jax import checkpoint, figures, input_pipeline, metrics, sharding, tasks
from fusa_jax.files import replacing

COLUMNS = ('patient', 'slice', 'label', 'score', 'tp', 'fp', 'fn', 'tn')


class Scorer:
  """Scores the slices of a split on a mesh, in batches of any size; compiled once."""

  def __init__(self, task: tasks.Task, mesh: jax.sharding.Mesh, batch_size: int):
    self._mesh, self._batch_size = mesh, sharding.fitting_batch(mesh, batch_size)

    def score(variables, batch):
      return {**task.kind.score(task.probabilities(variables, batch['image']), batch), 'index': batch['index']}

    # Every host gets every row: a few numbers each.
    self._score = sharding.compiled_together(jax.jit(score, out_shardings=sharding.replicated(mesh)))

  def table(self, variables: dict, split: input_pipeline.Split, progress: bool = False) -> dict[str, np.ndarray]:
    """The table of slices, a column for each of COLUMNS, in the split's order."""
    columns = {key: np.zeros(len(split), np.int64) for key in ('tp', 'fp', 'fn', 'tn')}
    columns['score'] = np.zeros(len(split), np.float64)
    seen = np.zeros(len(split), np.int64)
    steps = math.ceil(len(split) / self._batch_size)
    batches = input_pipeline.test_batches(split, self._mesh, batch_size=self._batch_size)
    for batch in tqdm.tqdm(batches, total=steps, desc='Evaluating', unit='batch', disable=not progress, leave=False):
      rows = jax.device_get(self._score(variables, batch))
      index = rows.pop('index')
      real = index >= 0
      seen[index[real]] += 1
      for key, values in rows.items():
        columns[key][index[real]] = values[real]
    assert (seen == 1).all(), 'a slice was read more or less than once'
    table = {'patient': split.patient, 'slice': split.slice, 'label': split.label.astype(np.int64), **columns}
    return {key: table[key] for key in COLUMNS}


def evaluate(config: ml_collections.ConfigDict, workdir: pathlib.Path, data_dir: pathlib.Path) -> dict:
  """Scores a run's best checkpoint on its test fold; process 0 writes test/. Gives what metrics.json holds.

  Raises:
    UserError: a config that does not fit the data or the devices; no checkpoint, or none that is whole.
  """
  mesh = sharding.create_mesh(config.mesh.data, config.mesh.space)
  batch_size = sharding.fitting_batch(mesh, config.train.batch_size)
  sharding.check_divides(mesh, batch_size, config.data.image_size)
  dataset = input_pipeline.load(data_dir, config.data.fold, config.data.image_size)
  task = tasks.create(config)
  step, variables = load_variables(config, task, workdir, mesh)
  table = Scorer(task, mesh, batch_size).table(variables, dataset.test, progress=sharding.is_main())
  summary = task.kind.summary(table)
  patients = metrics.by_patient(table)
  result = {
    **summary,
    'num_slices': len(dataset.test),
    'num_patients': len(patients),
    'step': step,
    'dataset': dataset.name,
    'commit': commit(),
  }
  if sharding.is_main():
    folder = workdir / 'test'
    _write_csv(folder / 'slices.csv', COLUMNS, zip(*table.values(), strict=True))
    _write_csv(folder / 'patients.csv', patients[0], (row.values() for row in patients))
    figures.write_scores(folder / 'figures', table)
    if config.task == 'segmentation':
      _draw(config, task, variables, dataset.test, table, folder / 'figures')
    # Last, so that a folder with metrics.json is complete.
    with replacing(folder / 'metrics.json') as partial:
      partial.write_text(json.dumps(result, indent=2) + '\n')
    logging.info('test fold %d, step %d: %s', config.data.fold, step, one_line(summary))
  return result


def _draw(config, task, variables, split, table, folder):
  """Overlays of some slices, computed on one device of this process alone."""
  variables = jax.tree.map(lambda x: x.addressable_data(0), variables)
  predict = jax.jit(task.probabilities)
  chosen = figures.telling_slices(table, config.evaluate.num_overlays)
  for row in tqdm.tqdm(chosen, desc='Drawing', unit='slice', leave=False):
    example = split.source[int(row)]
    predicted = np.asarray(predict(variables, example['image'][None])[0] >= 0.5)
    name = f'{table["patient"][row]}_{table["slice"][row]:03d}.png'
    figures.write_overlay(folder / name, example['image'], example['mask'], predicted, config.data.window)


def load_variables(config, task: tasks.Task, workdir: pathlib.Path, mesh) -> tuple[int, dict]:
  """The best checkpoint's step and variables, on all devices of the mesh.

  Raises:
    UserError: the run has no checkpoint.
  """
  init = lambda: task.init(jax.random.key(0), config.data.image_size)
  like = checkpoint.shapes(jax.eval_shape(init), sharding.replicated(mesh))
  with checkpoint.Checkpoints(workdir) as checkpoints:
    step = checkpoints.best()
    return step, checkpoints.restore(step, variables=like)['variables']


def one_line(summary: dict) -> str:
  """The scores of a summary for a log: counts left out, undefined ones as such."""
  shown = {key: value for key, value in summary.items() if value is None or isinstance(value, float)}
  return ', '.join(f'{key} {"undefined" if value is None else f"{value:.4f}"}' for key, value in shown.items())


def commit() -> str | None:
  """The commit that this code was checked out at; None outside of a repository."""
  folder = pathlib.Path(__file__).parent
  try:
    found = subprocess.run(['git', 'rev-parse', 'HEAD'], cwd=folder, capture_output=True, text=True, check=True)
  except (OSError, subprocess.CalledProcessError):
    return None
  return found.stdout.strip()


def _write_csv(path, header, rows):
  with replacing(path) as partial, partial.open('w', newline='') as file:
    writer = csv.writer(file)
    writer.writerow(header)
    writer.writerows(rows)
