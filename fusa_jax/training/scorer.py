"""The slices of a split -> the table of slices that every number of a test follows from."""

import math

import jax
import numpy as np
import tqdm

from fusa_jax import tasks
from fusa_jax.measures import histogram
from fusa_jax.system import hosts, meshes
from fusa_jax.system.errors import UserError
from fusa_jax.training import datasets, input_pipeline


class Scorer:
  """Scores the slices of a split on a mesh, in batches of any size; compiled once."""

  def __init__(self, task: tasks.Task, mesh: jax.sharding.Mesh, batch_size: int, flips: bool = False):
    self._mesh, self._batch_size = mesh, meshes.fitting_batch(mesh, batch_size)

    def run(variables, batch, temperature):
      logits = task.logits(variables, batch['image'], flips)
      highest = logits.reshape(len(logits), -1).max(axis=1)
      counts = histogram.count(logits, task.type.truth(batch), temperature)
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
