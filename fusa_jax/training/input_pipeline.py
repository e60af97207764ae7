"""Prepared dataset -> the global batch of step t, on the devices.

The batch of step t is a function of (seed, t) alone: a row's slice is looked up from its number, step * batch + row,
in a shuffled index that Grain computes at random access. So there is no iterator state to save, a run resumes at any
step on any number of hosts, and each host reads its own rows only.
"""

from collections.abc import Iterator

import grain
import jax
import numpy as np

from fusa_jax.system import meshes
from fusa_jax.system.errors import UserError
from fusa_jax.training.datasets import Split

# Decoding is zlib and NumPy, which let go of Python's lock: threads are enough (benchmarks/input_pipeline.py).
_READ = grain.ReadOptions(num_threads=8, prefetch_buffer_size=32)


def sampled_indices(label: np.ndarray, seed: int, balanced: bool) -> grain.MapDataset:
  """The endless order in which slices are trained on: indices into a split, at random access.

  Balanced, every second slice is drawn from those with a lesion (paper, section III-B: up-sampling); each of the two
  kinds is gone through in a new order each time round. Unbalanced, all slices are.

  Raises:
    UserError: balanced, but one of the kinds is missing.
  """
  pools = [np.flatnonzero(label), np.flatnonzero(~label)] if balanced else [np.arange(len(label))]
  for kind, pool in zip(('with', 'without'), pools, strict=False):
    if balanced and not len(pool):
      raise UserError(f'data: no training slice {kind} a lesion, so none can be balanced; set data.balanced=False')
  # Grain shuffles epoch e with seed + e: seeds far apart keep runs of neighbouring seeds from sharing orders.
  seeds = np.random.SeedSequence(seed).generate_state(len(pools))
  streams = [grain.MapDataset.source(pool).shuffle(seed=int(s)).repeat() for pool, s in zip(pools, seeds, strict=True)]
  return streams[0] if len(streams) == 1 else grain.MapDataset.mix(streams)


def train_batches(
  split: Split, mesh: jax.sharding.Mesh, *, batch_size: int, seed: int, first_step: int, last_step: int, balanced: bool
) -> Iterator[dict[str, jax.Array]]:
  """The batches of steps first_step .. last_step - 1: image int16 [B, H, W], mask uint8 [B, H, W], label [B]."""
  rows = meshes.local_rows(mesh, batch_size)
  order = sampled_indices(split.label, seed, balanced)

  def indices(number):
    step, row = divmod(number, len(rows))
    return int(order[(first_step + step) * batch_size + int(rows[row])])

  numbers = grain.MapDataset.range(max(last_step - first_step, 0) * len(rows))
  return _batches(numbers.map(indices), split, mesh, batch_size, rows)


def test_batches(split: Split, mesh: jax.sharding.Mesh, *, batch_size: int) -> Iterator[dict[str, jax.Array]]:
  """Every slice of a split once, in order, as train_batches and with `index` [B]: its place in the split.

  The last batch is filled up with repeats, whose index is -1: they are computed like the others and then dropped.
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
      'label': np.int32(example['label']),
      'index': np.int32(index if index < len(split) else -1),
    }

  def put(batch):
    return {key: meshes.to_devices(mesh, batch_size, rows, value) for key, value in batch.items()}

  batches = indices.map(read).to_iter_dataset(_READ).batch(len(rows)).map(put)
  # One more thread copies the next batches to the devices while this one is computed.
  return iter(grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=2))
