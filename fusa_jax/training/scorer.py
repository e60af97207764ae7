"""Computes the table of slices of a split for each class, from which all numbers of a test are computed."""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from fusa_jax import tasks
from fusa_jax.measures import histogram
from fusa_jax.scans.classes import IGNORED
from fusa_jax.system import hosts, meshes, progress
from fusa_jax.system.errors import UserError
from fusa_jax.training import datasets, input_pipeline

# The logit of a slice without a pixel that counts.
_LOWEST = -1e4


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
    self._classes = task.classes

    def of_class(logits, truth, known, is_real, temperature, bin):
      counted = logits if known is None else jnp.where(known, logits, _LOWEST)
      highest = counted.reshape(len(logits), -1).max(axis=1)
      counts = histogram.count(logits, truth, temperature, known)
      score = jax.nn.sigmoid(highest / temperature)
      of_slice = counts.pop('histogram')
      return {
        'histogram': jnp.where(is_real, of_slice, 0).sum(axis=0),
        **counts,
        **histogram.counts_at(of_slice, histogram.HALF),
        **{f'{key}_chosen': values for key, values in histogram.counts_at(of_slice, bin).items()},
        'score': score,
        'logit': highest,
      }

    def run(variables, batch, temperatures, bins):
      logits = task.logits(variables, batch['image'], flips)
      truth = task.type.truth(batch)
      known = truth & IGNORED == 0 if task.has_ignored else None
      is_real = (batch['index'] >= 0)[:, None, None]  # not a row that fills the last batch
      is_plain = len(task.classes) == 1 and not task.has_ignored
      truths = [truth] if is_plain else [truth >> number & 1 for number in range(len(task.classes))]
      found = {
        name: of_class(logits[..., number], truths[number], known, is_real, temperatures[number], bins[number])
        for number, name in enumerate(task.classes)
      }
      return batch['index'], found

    # Every host receives all rows; each row is 80 numbers per class.
    options = meshes.compiler_options(mesh, deterministic)
    jitted = jax.jit(run, out_shardings=meshes.replicated(mesh), compiler_options=options)
    self._run = hosts.compiled_together(jitted)

  def tables(
    self,
    variables: dict,
    split: datasets.Split,
    temperatures: Mapping[str, float] | None = None,
    stage: str = '',
    bins: Mapping[str, int] | None = None,
  ) -> dict[str, dict[str, np.ndarray]]:
    """Returns the table of slices of each class, in the order of the split.

    The columns of a table are those of `result_files.COLUMNS`, with the counts at threshold 0.5; the same counts at the
    operating point, as `tp_chosen` and so on; reliability and squared_error of `histogram.count`; and `logit`, the
    highest logit of the slice. Slices are ranked by logits, because probabilities near 0 and 1 round to the same
    number. `histogram`, int64 [1, 2, BINS], is the sum of the histograms of all slices, not a column.

    Args:
      variables: the variables of the model.
      split: the slices.
      temperatures: the logits of each class are divided by its temperature; None: by 1.
      bins: the operating point of each class, as a bin of `histogram`; None: those of a probability of 0.5.
      stage: the title of the progress bar; '' shows none.

    Raises:
      UserError: a logit is not finite.
    """
    temperatures = temperatures or dict.fromkeys(self._classes, 1.0)
    bins = bins or dict.fromkeys(self._classes, histogram.HALF)
    columns, seen = {name: {} for name in self._classes}, np.zeros(len(split), np.int64)
    pooled = {name: np.zeros((1, 2, histogram.BINS), np.int64) for name in self._classes}
    steps = math.ceil(len(split) / self._batch_size)
    batches = input_pipeline.test_batches(split, self._mesh, batch_size=self._batch_size)
    options = [np.float32(temperatures[name]) for name in self._classes], [np.int32(bins[n]) for n in self._classes]
    options = jax.device_put(options, meshes.replicated(self._mesh))
    show = bool(stage) and hosts.is_main()
    for batch in progress.bar(batches, total=steps, desc=stage, unit='batches', show=show):
      index, of_classes = jax.device_get(self._run(variables, batch, *options))
      real = index >= 0
      seen[index[real]] += 1
      for name, rows in of_classes.items():
        pooled[name] += rows.pop('histogram')
        for key, values in rows.items():
          if key not in columns[name]:
            dtype = np.int64 if values.dtype == np.int32 else values.dtype
            columns[name][key] = np.zeros((len(split), *values.shape[1:]), dtype)
          columns[name][key][index[real]] = values[real]
    assert (seen == 1).all(), 'a slice was read more or less than once'
    return {
      name: self._table(split, columns[name], pooled[name], split.class_labels[number], temperatures[name])
      for number, name in enumerate(self._classes)
    }

  def _table(self, split, columns, pooled, label, temperature):
    """Returns the table of one class."""
    broken = int((~np.isfinite(columns['logit'])).sum())
    if broken:
      raise UserError(
        f'evaluate: the model gives {broken} of {len(split)} slices a logit that is not finite; train again with a '
        'lower train.learning_rate'
      )
    columns['logit'] = columns['logit'].astype(np.float64) / temperature
    table = {name: getattr(split, name) for name in ('patient', 'owner', 'slice')}
    return table | {'label': label.astype(np.int64), **columns, 'histogram': pooled}
