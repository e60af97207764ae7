"""Removes from a thresholded mask what cannot be a lesion: voxels outside of the lungs, and too small lesions."""

import numpy as np

from fusa_jax.measures import masks
from fusa_jax.scans import lungs, volumes


def refine(
  mask: np.ndarray,
  scan: volumes.Scan,
  in_lungs: bool = False,
  smallest_ml: float = 0.0,
  field: np.ndarray | None = None,
) -> np.ndarray:
  """Limits a mask to the lungs, then removes small lesions; returns uint8 {0, 1} [S, H, W].

  Args:
    mask: the mask [S, H, W] of the scan.
    scan: the scan; in HU if `in_lungs` is True.
    in_lungs: limit the mask to the lungs (`lungs.field`).
    smallest_ml: remove lesions below this volume in mL; 0 keeps all.
    field: `lungs.field` of the scan; None computes it if it is needed.
  """
  if in_lungs and mask.any():
    mask = mask * (lungs.field(scan) if field is None else field)
  if smallest_ml > 0:
    labels, sizes = lesions(mask, scan.voxel_ml)
    mask = np.append(False, sizes >= smallest_ml)[labels].astype(np.uint8)
  return mask


def lesions(mask: np.ndarray, voxel_ml: float) -> tuple[np.ndarray, np.ndarray]:
  """Labels the lesions of a mask [S, H, W] with `masks.components`; returns (labels, mL of each lesion [n])."""
  labels, count = masks.components(mask)
  return labels, np.bincount(labels.ravel(), minlength=count + 1)[1:] * voxel_ml


def score_of_mask(mask: np.ndarray, scan: volumes.Scan, name: str, field: np.ndarray | None = None) -> float:
  """One of `patients.OF_MASKS` for the mask [S, H, W] of a scan; NaN if no lungs are found to divide by.

  `field` is as in `refine`.
  """
  lesion_ml = float(mask.sum(dtype=np.int64) * scan.voxel_ml)
  if name == 'lesion_ml':
    return lesion_ml
  field = lungs.field(scan) if field is None else field
  return np.nan if field.all() else lesion_ml / float(field.sum(dtype=np.int64) * scan.voxel_ml)


def true_volumes(mask: np.ndarray, truth: np.ndarray, voxel_ml: float) -> tuple[np.ndarray, np.ndarray, float]:
  """Compares the lesions of a mask with the reference mask `truth`.

  Returns:
    (volume of each lesion in mL [n], its part inside the reference mask in mL [n], mL of the whole reference mask).
  """
  labels, sizes = lesions(mask, voxel_ml)
  true_parts = np.bincount(labels.ravel(), truth.ravel(), minlength=len(sizes) + 1)[1:] * voxel_ml
  return sizes, true_parts, float(np.count_nonzero(truth) * voxel_ml)
