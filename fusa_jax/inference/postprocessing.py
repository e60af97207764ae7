"""From a scan's mask, as a threshold gives it, to the mask that is given away: without what cannot be a lesion."""

import numpy as np

from fusa_jax.measures import masks
from fusa_jax.scans import lungs, volumes


def refine(mask: np.ndarray, scan: volumes.Scan, in_lungs: bool = False, smallest_ml: float = 0.0) -> np.ndarray:
  """A mask [S, H, W], uint8 {0, 1}, without what lies outside of the lungs, and then without lesions below a volume.

  Args:
    mask: of the scan.
    scan: in HU, where lungs are asked for.
    in_lungs: limit it to the lungs (`lungs.field`).
    smallest_ml: in mL; 0 leaves all lesions.
  """
  if in_lungs and mask.any():
    mask = mask * lungs.field(scan)
  if smallest_ml > 0:
    labels, sizes = lesions(mask, scan.voxel_ml)
    mask = np.append(False, sizes >= smallest_ml)[labels].astype(np.uint8)
  return mask


def lesions(mask: np.ndarray, voxel_ml: float) -> tuple[np.ndarray, np.ndarray]:
  """The lesions of a mask [S, H, W] by number, as `masks.components` has them, and the mL of each [n]."""
  labels, count = masks.components(mask)
  return labels, np.bincount(labels.ravel(), minlength=count + 1)[1:] * voxel_ml


def true_volumes(mask: np.ndarray, truth: np.ndarray, voxel_ml: float) -> tuple[np.ndarray, np.ndarray, float]:
  """Of a mask's lesions the mL [n], how many of each are true [n], and the true ones in all."""
  labels, sizes = lesions(mask, voxel_ml)
  rightly = np.bincount(labels.ravel(), truth.ravel(), minlength=len(sizes) + 1)[1:] * voxel_ml
  return sizes, rightly, float(np.count_nonzero(truth) * voxel_ml)
