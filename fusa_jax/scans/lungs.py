"""Where the lungs are in a chest CT, by its Hounsfield units: what masks can be limited to.

Air inside of the body is lung, airway or gas in the bowel; the lungs are the largest of it. Lesions may be as dense as
muscle and lie at the pleura, where no HU tells them from it: the field is closed over them, and wider than the lungs.
The steps are those of most such rules, as Hu, Hoffman and Reinhardt's (IEEE TMI 2001), with fixed thresholds.
"""

import logging

import numpy as np
from scipy import ndimage

from fusa_jax.scans import volumes

# Aerated lung (-850) and ground glass (-700 to -300) are below, tissue and its fat (-100) above.
THRESHOLD = -200
# Both lungs are more than this together; one that is emptier than the other has at least a share of it. What gas there
# is in the stomach has less.
_LEAST_ML, _SHARE = 300, 0.1
# Millimetres: gaps twice as wide are closed over, which a lesion at the pleura leaves; then the margin remains.
_CLOSED, _MARGIN = 20, 3
# The voxels that all this is done on, in millimetres.
_COARSE = 3


def field(scan: volumes.Scan) -> np.ndarray:
  """The lungs with what is closed in by them, and some millimetres around: bool [S, H, W].

  All of the scan, and a warning, where no lungs are found.

  Args:
    scan: in HU, of the chest or some of it.
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
  """The largest air inside of the body; None where there is too little of it."""
  air = hu < THRESHOLD
  inside = air & ~_around(air)
  labels, count = ndimage.label(inside)
  sizes = np.bincount(labels.ravel(), minlength=count + 1)[1:] * voxel_ml
  if not count or sizes.max() < _LEAST_ML:
    return None
  return np.append(False, sizes >= _SHARE * sizes.max())[labels]


def _around(air):
  """The air around the body: what reaches the edge of its slice and, through others, a corner of one.

  A lung at the edge of a narrow field of view reaches no corner. Slice by slice first, since air in the throat leads
  from the lungs out of the mouth.
  """
  at_edge = np.stack([_at_edge(one) for one in air])
  labels, _ = ndimage.label(at_edge)
  return at_edge & np.isin(labels, labels[:, [0, 0, -1, -1], [0, -1, 0, -1]])


def _at_edge(air):
  labels, _ = ndimage.label(air)
  edge = np.unique(np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]]))
  return air & np.isin(labels, edge)


def _closed(lungs, spacing):
  """Closed with a ball, widened by the margin, and without holes in any slice."""
  # Beyond its ends the scan goes on as it ends: a ball does not bite into the first and the last slice. Beyond the
  # edges of slices there is room for it.
  ends, rows, columns = (int(np.ceil((_CLOSED + _MARGIN) / mm)) for mm in spacing)
  padded = np.pad(lungs, ((ends, ends), (0, 0), (0, 0)), mode='edge')
  padded = np.pad(padded, ((0, 0), (rows, rows), (columns, columns)))
  wide = ndimage.distance_transform_edt(~padded, spacing) <= _CLOSED + _MARGIN
  wide = np.stack([ndimage.binary_fill_holes(one) for one in wide])
  closed = ndimage.distance_transform_edt(wide, spacing) > _CLOSED
  return closed[ends:-ends, rows:-rows, columns:-columns]
