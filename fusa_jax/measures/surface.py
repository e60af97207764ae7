"""Distances between the boundaries of two masks, in millimetres.

The definitions are the defaults of MONAI, as Metrics Reloaded (Maier-Hein, Reinke et al., Nature Methods 2024)
recommends. A boundary voxel is a mask voxel with at least one of its six neighbours outside the mask or the volume.
Distances run from voxel centre to voxel centre in the world, also if the axes of a volume have no right angles, as with
a tilted gantry (MONAI knows right angles only). scipy computes them: it is needed anyway, while MONAI would require
PyTorch. The tests compare with MONAI, and with all distances written out.
"""

import numpy as np
from scipy import ndimage, spatial

# The cells of a KD-tree are boxes along the axes. They enclose flat faces of a mask tighter if the points are rotated.
_TURN = spatial.transform.Rotation.from_euler('xyz', [0.5, 0.6, 0.7]).as_matrix()


def distances(
  first: np.ndarray, second: np.ndarray, steps: np.ndarray, missed_mm: float
) -> tuple[np.ndarray, np.ndarray]:
  """Distances in mm from each boundary voxel of one mask to the nearest of the other: for `first`, then for `second`.

  KD-trees of boundary voxels take 0.1 s for a patient's mask of 512 x 512 x 291 with 67,000 boundary voxels. They take
  7 s for a mask full of specks with 1.7 million. Distance transforms of the box around both masks take 0.7 s and 45 s.

  Args:
    first, second: bool [S, H, W].
    steps: [3, 3], mm in the world of one step along slices, rows and columns (volumes.Grid.steps).
    missed_mm: the distance to the boundary of an empty mask, for example the diagonal of the scan. A mean then includes
      patients without any detected lesion. Leaving them out would improve it.
  """
  points = [np.argwhere(mask & ~ndimage.binary_erosion(mask)) @ (steps @ _TURN) for mask in (first, second)]
  if not all(map(len, points)):
    return tuple(np.full(len(own), missed_mm) for own in points)
  # Headers store spacings in float32, so digits after the fifth decimal are rounding errors: 2 mm must be within 2 mm.
  return tuple(spatial.KDTree(other).query(own)[0].round(5) for own, other in (points, points[::-1]))


def hd95(distances: tuple[np.ndarray, np.ndarray]) -> float:
  """The larger of the 95th percentiles of both directions, in mm. Both masks empty: NaN; one empty: missed_mm."""
  return max((float(np.percentile(each, 95)) for each in distances if len(each)), default=float('nan'))


def surface_dice(distances: tuple[np.ndarray, np.ndarray], tolerance_mm: float) -> float:
  """The fraction of both masks' boundary voxels within the tolerance. Both masks empty: NaN; one empty: 0."""
  both = np.concatenate(distances)
  return float(np.mean(both <= tolerance_mm)) if len(both) else float('nan')
