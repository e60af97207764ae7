"""Computes the table of slices of a split, from which all numbers of a test are computed."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from fusa_jax import tasks
from fusa_jax.measures import histogram
from fusa_jax.system import hosts, meshes, progress
from fusa_jax.system.errors import UserError
from fusa_jax.training import datasets, input_pipeline


class Scorer:
  """Applies a model to the slices of a split on a mesh, in batches. The program is compiled only once.

  `flips` and `deterministic` are those of config.evaluate and config.train.
  """

  def __init__(
    self,
    task: tasks.Task,
    mesh: jax.sharding.Mesh,
    batch_size: int,
    flips: bool = False,
    deterministic: bool = False,
  ):
    self._mesh, self._batch_size = mesh, meshes.fitting_batch(mesh, batch_size)

    def run(variables, batch, temperature, bin):
      logits = task.logits(variables, batch['image'], flips)
      highest = logits.reshape(len(logits), -1).max(axis=1)
      counts = histogram.count(logits, task.type.truth(batch), temperature)
      score = jax.nn.sigmoid(highest / temperature)
      of_slice = counts.pop('histogram')
      is_real = (batch['index'] >= 0)[:, None, None]  # not a row that fills the last batch
      return {
        'histogram': jnp.where(is_real, of_slice, 0).sum(axis=0),
        **counts,
        **histogram.counts_at(of_slice, histogram.HALF),
        **{f'{key}_chosen': values for key, values in histogram.counts_at(of_slice, bin).items()},
        'score': score,
        'logit': highest,
        'index': batch['index'],
      }

    # Every host receives all rows; each row is 80 numbers.
    options = meshes.compiler_options(mesh, deterministic)
    jitted = jax.jit(run, out_shardings=meshes.replicated(mesh), compiler_options=options)
    self._run = hosts.compiled_together(jitted)

  def table(
    self,
    variables: dict,
    split: datasets.Split,
    temperature: float = 1.0,
    stage: str = '',
    bin: int = histogram.HALF,
  ) -> dict[str, np.ndarray]:
    """Returns the table of slices, in the order of the split.

    Its columns are those of `results.COLUMNS`, with the counts at threshold 0.5; the same counts at the operating
    point, as `tp_chosen` and so on; reliability and squared_error of `histogram.count`; and `logit`, the highest logit
    of the slice. Slices are ranked by logits, because probabilities near 0 and 1 round to the same number.
    `histogram`, int64 [1, 2, BINS], is the sum of the histograms of all slices, not a column.

    Args:
      variables: the variables of the model.
      split: the slices.
      temperature: the logits are divided by it.
      bin: the operating point, as a bin of `histogram`.
      stage: the title of the progress bar; '' shows none.

    Raises:
      UserError: a logit is not finite.
    """
    columns, seen = {}, np.zeros(len(split), np.int64)
    pooled = np.zeros((1, 2, histogram.BINS), np.int64)
    steps = math.ceil(len(split) / self._batch_size)
    batches = input_pipeline.test_batches(split, self._mesh, batch_size=self._batch_size)
    options = jax.device_put((np.float32(temperature), np.int32(bin)), meshes.replicated(self._mesh))
    show = bool(stage) and hosts.is_main()
    for batch in progress.bar(batches, total=steps, desc=stage, unit='batches', show=show):
      rows = jax.device_get(self._run(variables, batch, *options))
      index = rows.pop('index')
      pooled += rows.pop('histogram')
      real = index >= 0
      seen[index[real]] += 1
      for key, values in rows.items():
        if key not in columns:
          dtype = np.int64 if values.dtype == np.int32 else values.dtype
          columns[key] = np.zeros((len(split), *values.shape[1:]), dtype)
        columns[key][index[real]] = values[real]
    assert (seen == 1).all(), 'a slice was read more or less than once'
    broken = int((~np.isfinite(columns['logit'])).sum())
    if broken:
      raise UserError(
        f'evaluate: the model gives {broken} of {len(split)} slices a logit that is not finite; train again with a '
        'lower train.learning_rate'
      )
    columns['logit'] = columns['logit'].astype(np.float64) / temperature
    table = {name: getattr(split, name) for name in ('patient', 'owner', 'slice')}
    return table | {'label': split.label.astype(np.int64), **columns, 'histogram': pooled}
