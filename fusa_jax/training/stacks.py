"""Reads the slices of a prepared dataset together with their neighbours (data.context)."""

import collections
import threading
from collections.abc import Sequence
from concurrent import futures

import numpy as np

from fusa_jax.scans.neighbours import Context

# Decoded slices that are kept: at 512 x 512, with their masks, 50 MB. In the order of a scan, which tests use, each
# slice is decoded once. In the random order of training, neighbours are rarely in one batch (docs/benchmarks.md).
_KEPT = 64


class Stacks(Sequence):
  """A source of slices in which each `image` has its neighbours as channels, int16 [H, W, C].

  All other features are those of the slice itself. Neighbours are slices of the same scan, which lie one after the
  other in the source, in one file.

  Several threads can read. A slice that one thread decodes, or that is kept, is not decoded by another.
  """

  def __init__(self, source: Sequence[dict], counts: Sequence[int], context: Context):
    """Creates a source.

    Args:
      source: the single slices, {'image': int16 [H, W], 'spacing', ...}.
      counts: the number of slices of each scan, in the order of the source.
      context: the neighbours of a slice.
    """
    self._source, self._context = source, context
    self._count = np.repeat(counts, counts)
    self._first = np.repeat(np.cumsum(counts) - counts, counts)
    self._kept, self._lock = collections.OrderedDict(), threading.Lock()

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, row: int) -> dict:
    example, first = self._slice(row), int(self._first[row])
    rows = first + self._context.indices(int(self._count[row]), example['spacing'][0])[row - first]
    images = [example['image'] if other == row else self._slice(int(other))['image'] for other in rows]
    return {**example, 'image': np.stack(images, axis=-1)}

  def spacings(self, most: int) -> np.ndarray:
    """Distances between slices in mm, of at most `most` scans; NaN where they are unknown. It reads a slice of each."""
    firsts = np.unique(self._first)
    chosen = firsts[np.linspace(0, len(firsts) - 1, min(most, len(firsts))).round().astype(int)]
    return np.array([self._slice(int(row))['spacing'][0] for row in chosen])

  def _slice(self, row):
    with self._lock:
      kept = self._kept.get(row)
      if kept is None:
        own = self._kept[row] = futures.Future()
        if len(self._kept) > _KEPT:
          self._kept.popitem(last=False)
      else:
        self._kept.move_to_end(row)
    if kept is not None:
      return kept.result()
    try:
      own.set_result(self._source[row])
    except BaseException as error:
      own.set_exception(error)
      with self._lock:
        self._kept.pop(row, None)
      raise
    return own.result()
