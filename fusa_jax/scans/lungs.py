"""Finds the lungs in a chest CT by Hounsfield units, so that masks can be limited to them.

Air inside the body is lung, airway or bowel gas; the lungs are the largest part. Lesions at the pleura can be as dense
as muscle, and HU cannot separate them from it. So the field is closed over these lesions, and wider than the lungs.
The steps follow published methods, for example Hu, Hoffman and Reinhardt (IEEE TMI 2001), with fixed thresholds.
"""

import logging

import numpy as np
from scipy import ndimage

from fusa_jax.scans import volumes

# In HU. Aerated lung (-850) and ground glass (-700 to -300) are below, tissue including fat (-100) is above.
THRESHOLD = -200
# The largest region of air must have at least _LEAST_ML mL. Another region counts as lung if it has at least _SHARE of
# that volume, as the smaller of two lungs has. Gas in the stomach has less.
_LEAST_ML, _SHARE = 300, 0.1
# Millimetres. Gaps of up to twice _CLOSED, as a lesion at the pleura leaves them, are closed. _MARGIN is added around.
_CLOSED, _MARGIN = 20, 3
# Millimetres: slices are resampled to about this pixel size first.
_COARSE = 3


def field(scan: volumes.Scan) -> np.ndarray:
  """The lungs, the regions that they enclose, and a few millimetres around: bool [S, H, W].

  If no lungs are found, the field is the whole scan, and a warning is logged.

  Args:
    scan: in HU, of the chest or a part of it.
  """
  shape = scan.values.shape[1:]
  thickness, *pixel = scan.spacing
  coarse = tuple(max(1, round(n * mm / _COARSE)) for n, mm in zip(shape, pixel, strict=True))
  small = volumes.resize(scan.values, coarse)
  spacing = (thickness, *(n * mm / m for n, mm, m in zip(shape, pixel, coarse, strict=True)))
  lungs = _lungs(small, float(np.prod(spacing)) / 1000)
  if lungs is None:
    logging.warning('%s: no lungs found, so its mask is not limited to them', scan.path.name)
    return np.ones(scan.values.shape, bool)
  lungs = _closed(lungs, spacing)
  rows, columns = (np.minimum(np.arange(n) * m // n, m - 1) for n, m in zip(shape, coarse, strict=True))
  return lungs[:, rows][:, :, columns]


def _lungs(hu, voxel_ml):
  """The largest regions of air inside the body; None if they are too small."""
  air = hu < THRESHOLD
  inside = air & ~_around(air)
  labels, count = ndimage.label(inside)
  sizes = np.bincount(labels.ravel(), minlength=count + 1)[1:] * voxel_ml
  if not count or sizes.max() < _LEAST_ML:
    return None
  return np.append(False, sizes >= _SHARE * sizes.max())[labels]


def _around(air):
  """The air around the body. It touches the edge of its slice, and is connected in 3D to a corner of some slice.

  A lung at the edge of a narrow field of view touches no corner. Edges are checked within each slice first, because
  the airways connect the lungs with the air outside of the mouth.
  """
  at_edge = np.stack([_at_edge(one) for one in air])
  labels, _ = ndimage.label(at_edge)
  return at_edge & np.isin(labels, labels[:, [0, 0, -1, -1], [0, -1, 0, -1]])


def _at_edge(air):
  labels, _ = ndimage.label(air)
  edge = np.unique(np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]]))
  return air & np.isin(labels, edge)


def _closed(lungs, spacing):
  """Closes the lungs with a ball, widens them by the margin, and fills holes in each slice."""
  # Repeat the first and the last slice, so that the ball does not cut into them. Pad rows and columns with False, so
  # that the ball has room.
  ends, rows, columns = (int(np.ceil((_CLOSED + _MARGIN) / mm)) for mm in spacing)
  padded = np.pad(lungs, ((ends, ends), (0, 0), (0, 0)), mode='edge')
  padded = np.pad(padded, ((0, 0), (rows, rows), (columns, columns)))
  wide = ndimage.distance_transform_edt(~padded, spacing) <= _CLOSED + _MARGIN
  wide = np.stack([ndimage.binary_fill_holes(one) for one in wide])
  closed = ndimage.distance_transform_edt(wide, spacing) > _CLOSED
  return closed[ends:-ends, rows:-rows, columns:-columns]
