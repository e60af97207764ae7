"""The neighbours of a slice: the slices of its scan that become further channels of the network's input (data.context).

Training, prediction and tests take the neighbours from here. A bundle's run.py repeats the rule in NumPy.
"""

import math
from typing import NamedTuple

import numpy as np

# Distances in headers are rounded: a neighbour may be this much farther away, as a share of the limit.
_ROUNDING = 1e-3


class Context(NamedTuple):
  """The neighbours that a model sees beside a slice.

  Attributes:
    slices: the number of slices on each side; 0 is the slice alone.
    mm: slices farther away are not neighbours.
  """

  slices: int = 0
  mm: float = math.inf

  @property
  def channels(self) -> int:
    """The number of slices in an input: those below the slice, the slice itself in the middle, and those above."""
    return 2 * self.slices + 1

  def shape(self, size: int) -> tuple[int, ...]:
    """The shape of an input of size x size: [H, W], or with neighbours [H, W, C]."""
    return (size, size, self.channels) if self.slices else (size, size)

  def indices(self, count: int, spacing: float) -> np.ndarray:
    """The slices of each input of a scan, from inferior to superior.

    Where a neighbour does not exist or is too far away, the nearest neighbour towards the middle is repeated.

    Args:
      count: the number of slices of the scan.
      spacing: the distance between its slices in mm; NaN if it is unknown: all slices are then near enough.

    Returns:
      int [count, channels].
    """
    reach = self.slices
    # Datasets store the spacing in float32; prediction must decide as training does.
    while reach and reach * np.float32(spacing) > self.mm * (1 + _ROUNDING):
      reach -= 1
    offsets = np.arange(-self.slices, self.slices + 1).clip(-reach, reach)
    return (np.arange(count)[:, None] + offsets).clip(0, max(count - 1, 0))


SLICE_ALONE = Context()


def stacked(slices: np.ndarray, indices: np.ndarray) -> np.ndarray:
  """Inputs [B, H, W, C] of the slices [S, H, W] of a scan, for some rows [B, C] of `Context.indices`."""
  return np.moveaxis(slices[indices], 1, -1)


def middle(image: np.ndarray) -> np.ndarray:
  """The slice [H, W] that an input [H, W] or [H, W, C] is about."""
  return image if image.ndim == 2 else image[..., image.shape[-1] // 2]
