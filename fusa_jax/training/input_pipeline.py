"""Reads batches of a prepared dataset onto the devices.

The batch of step t depends only on (seed, t). Row r of step t is entry t * batch_size + r of a shuffled index, and
Grain computes each entry directly. So a run needs no saved iterator state, and resumes at any step on any number of
hosts. Each host reads only its own rows.
"""

from collections.abc import Iterator, Mapping

import grain
import jax
import numpy as np

from fusa_jax.system import meshes
from fusa_jax.system.errors import UserError
from fusa_jax.training.datasets import Split

# Threads are enough: zlib and NumPy decode the slices and release Python's lock (benchmarks/input_pipeline.py).
_READ = grain.ReadOptions(num_threads=8, prefetch_buffer_size=32)


def sampled_indices(groups: Mapping[str, np.ndarray], seed: int, balanced: bool) -> grain.MapDataset:
  """Returns the endless training order of the slices: indices into a split, with random access.

  If balanced, slices of the groups alternate, for example those with and without lesion (paper, section III-B:
  up-sampling). Otherwise all slices are one group. Each group is shuffled in a new order in each of its epochs.

  Args:
    groups: bool [N] by name, as `Split.groups`.
    seed: the seed of the order.
    balanced: whether to draw from each group equally often.

  Raises:
    UserError: `balanced` is set, but one of the groups is empty.
  """
  pools = [*map(np.flatnonzero, groups.values())] if balanced else [np.arange(len(next(iter(groups.values()))))]
  for group, pool in zip(groups, pools, strict=False):
    if balanced and not len(pool):
      raise UserError(f'data.balanced: the training slices include none {group}; set data.balanced=False')
  # Grain shuffles epoch e with seed + e. These seeds are far apart, so runs with seeds 0 and 1 share no order.
  seeds = np.random.SeedSequence(seed).generate_state(len(pools))
  streams = [grain.MapDataset.source(pool).shuffle(seed=int(s)).repeat() for pool, s in zip(pools, seeds, strict=True)]
  return streams[0] if len(streams) == 1 else grain.MapDataset.mix(streams)


def train_batches(
  split: Split, mesh: jax.sharding.Mesh, *, batch_size: int, seed: int, first_step: int, last_step: int, balanced: bool
) -> Iterator[dict[str, jax.Array]]:
  """Yields the batches of steps first_step .. last_step - 1: image int16 [B, H, W], mask uint8 [B, H, W], label [B].

  Mask and label are bits of classes (`scans.classes`). If the split's source gives slices with their neighbours
  (`stacks.Stacks`), image is [B, H, W, C].
  """
  rows = meshes.local_rows(mesh, batch_size)
  order = sampled_indices(split.groups, seed, balanced)

  def indices(number):
    step, row = divmod(number, len(rows))
    return int(order[(first_step + step) * batch_size + int(rows[row])])

  numbers = grain.MapDataset.range(max(last_step - first_step, 0) * len(rows))
  return _batches(numbers.map(indices), split, mesh, batch_size, rows)


def test_batches(split: Split, mesh: jax.sharding.Mesh, *, batch_size: int) -> Iterator[dict[str, jax.Array]]:
  """Yields every slice of a split once, in order. Batches are as in `train_batches`, with `index` [B] into the split.

  Repeated slices fill the last batch. Their index is -1, so that the caller can drop their results.
  """
  rows = meshes.local_rows(mesh, batch_size)
  steps = -(-len(split) // batch_size)

  def indices(number):
    step, row = divmod(number, len(rows))
    return step * batch_size + int(rows[row])

  return _batches(grain.MapDataset.range(steps * len(rows)).map(indices), split, mesh, batch_size, rows)


def _batches(indices, split, mesh, batch_size, rows):
  def read(index):
    example = split.source[index % len(split)]
    return {
      'image': example['image'],
      'mask': example['mask'],
      'label': split.bits[index % len(split)],
      'index': np.int32(index if index < len(split) else -1),
    }

  def put(batch):
    return {key: meshes.to_devices(mesh, batch_size, rows, value) for key, value in batch.items()}

  batches = indices.map(read).to_iter_dataset(_READ).batch(len(rows)).map(put)
  # Another thread copies the next batches to the devices during the computation of the current one.
  return iter(grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=2))
