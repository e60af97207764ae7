"""How far apart the boundaries of two masks lie, in millimetres.

The definitions are MONAI's defaults, as Metrics Reloaded (Maier-Hein, Reinke et al., Nature Methods 2024) recommends
them: a mask's boundary is those of its voxels that have one of their six neighbours outside, the volume's border
counting as outside; distances run from voxel centre to voxel centre. scipy computes them: it is well kept and needed
anyway, where MONAI would bring PyTorch. The tests compare with MONAI.
"""

import numpy as np
from scipy import ndimage, spatial

# The cells of a tree are boxes along the axes, and hold a flat face of a mask loosely. Turned, they hold it closely.
_TURN = spatial.transform.Rotation.from_euler('xyz', [0.5, 0.6, 0.7]).as_matrix()


def distances(
  first: np.ndarray, second: np.ndarray, spacing: tuple[float, float, float], missed_mm: float
) -> tuple[np.ndarray, np.ndarray]:
  """From each boundary voxel of a mask to the nearest of the other's, in mm: those of `first`, and those of `second`.

  By trees of the boundaries' voxels: 0.1 s for a patient's mask of 512 x 512 x 291 with 67,000 of them, 7 s for one
  full of specks with 1.7 million, where distance transforms of the box around both masks take 0.7 s and 45 s.

  Args:
    first, second: bool [S, H, W].
    spacing: mm between slices, rows and columns.
    missed_mm: the distance to the boundary of an empty mask. The diagonal of the scan, say: a patient whose lesions
      were all missed then does not improve a mean by being left out.
  """
  points = [np.argwhere(mask & ~ndimage.binary_erosion(mask)) * spacing @ _TURN for mask in (first, second)]
  if not all(map(len, points)):
    return tuple(np.full(len(own), missed_mm) for own in points)
  # Headers keep spacings in float32. What follows the fifth digit is rounding: 2 mm are within 2 mm.
  return tuple(spatial.KDTree(other).query(own)[0].round(5) for own, other in (points, points[::-1]))


def hd95(distances: tuple[np.ndarray, np.ndarray]) -> float:
  """The larger of the 95th percentiles of both directions, in mm. Both masks empty: NaN; one of them: missed_mm."""
  return max((float(np.percentile(each, 95)) for each in distances if len(each)), default=float('nan'))


def surface_dice(distances: tuple[np.ndarray, np.ndarray], tolerance_mm: float) -> float:
  """The share of both boundaries' voxels within the tolerance of the other one. Both masks empty: NaN; one: 0."""
  both = np.concatenate(distances)
  return float(np.mean(both <= tolerance_mm)) if len(both) else float('nan')
