"""A scan in memory, on canonical axes: its checks, and the way back to the grid that it was read on.

Canonical axes, the way a radiologist sees axial slices: [S, H, W] with axis 0 from inferior to superior, axis 1 from
anterior to posterior (row 0 is the front of the chest), axis 2 from the patient's right to left. Values are int16, in
Hounsfield units or, of scans that were windowed and saved as 8-bit images, grey of 0 to 255. NumPy only: worker
processes import this file, and they should start quickly.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import nibabel as nib
import numpy as np
from nibabel import orientations
from PIL import Image

from fusa_jax.system.errors import UserError, one_line

# What scanners call air outside of the field of view lies below this (-2000, -3024, ...); it is no tissue.
AIR = -1024
# The two kinds of values that networks are trained on, never both.
VALUES = ('hu', 'grey')
_CANONICAL = orientations.axcodes2ornt(('L', 'P', 'S'))


@dataclasses.dataclass(frozen=True)
class Grid:
  """Where a file's voxels lie, on canonical axes.

  Attributes:
    shape: slices, rows, columns.
    affine: [4, 4], canonical voxel (x, y, z) = (axis 2, axis 1, axis 0) to world millimetres (RAS+).
    path: where it was read from: a file, or what else has a `name` and, as str, stands at the head of a message.
  """

  shape: tuple[int, int, int]
  affine: np.ndarray
  path: Any

  @property
  def spacing(self) -> tuple[float, float, float]:
    """Millimetres between slices, rows and columns: the order of shape."""
    return tuple(map(float, np.linalg.norm(self.affine[:3, :3], axis=0)[::-1]))

  @property
  def voxel_ml(self) -> float:
    """The volume of one voxel in millilitres."""
    return float(abs(np.linalg.det(self.affine[:3, :3]))) / 1000


@dataclasses.dataclass(frozen=True)
class Scan(Grid):
  """A scan on canonical axes, with what is needed to go back.

  Attributes:
    values: int16 [S, H, W]: Hounsfield units, at least AIR; or grey, 0 to 255.
    header: the file's own header: its shape, affines and codes.
  """

  values: np.ndarray
  header: nib.Nifti1Header


@dataclasses.dataclass(frozen=True)
class Mask(Grid):
  """A lesion mask on canonical axes, with no scan beside it.

  Attributes:
    mask: uint8 {0, 1} [S, H, W].
  """

  mask: np.ndarray


def from_volume(values: np.ndarray, affine: np.ndarray, source: Any, intensity: str = 'hu') -> Scan:
  """A scan that was read by other means, with the checks of `nifti.read_scan`.

  Its header has the affine as sform and, where that holds no shear, as qform, both with code 1 (scanner).

  Args:
    values: numbers [x, y, z].
    affine: [4, 4], their (x, y, z) to world millimetres (RAS+).
    source: what messages call it, as Grid's path.
    intensity: one of VALUES, which they have to be.

  Raises:
    UserError: as `nifti.read_scan`; an affine that is not [4, 4] numbers; more voxels along an axis than NIfTI holds.
  """
  header = nib.Nifti1Header()
  try:
    affine = np.asarray(affine, float).reshape(4, 4)
    header.set_data_shape(values.shape)
    header.set_sform(affine, 1)
  except (nib.spatialimages.HeaderDataError, TypeError, ValueError) as error:
    raise UserError(f'{source}: its shape and affine make no volume ({one_line(error)}); save it again') from None
  scan = to_scan(values, header, source, intensity)  # refuses an affine that no whole header can be made of
  return dataclasses.replace(scan, header=_header(values.shape, affine))


def to_scan(values, header, path, intensity, windowed=False):
  values, grid = canonical(values, header, path)
  if intensity == 'grey':
    check_grey(values, path)
  else:
    _check_hu(values, path, windowed)
  # The upper bound is int16's; metal goes to a few tens of thousands on extended scales.
  hu = np.clip(values, AIR, np.iinfo(np.int16).max)
  if hu.dtype.kind == 'f':
    hu = np.rint(hu)
  return Scan(**vars(grid), values=np.ascontiguousarray(hu, np.int16), header=header)


def canonical(values, header, path):
  """Values [x, y, z] as [S, H, W] on canonical axes, and their grid."""
  if values.dtype.kind not in 'iuf':
    raise UserError(f'{path}: voxels are {values.dtype}, not numbers; save Hounsfield units (mask: 0 and 1)')
  if values.dtype.kind == 'f' and not np.isfinite(values).all():
    count = values.size - np.isfinite(values).sum()
    raise UserError(f'{path}: {count} of {values.size} voxels are NaN or infinite; export it again without them')
  affine = header.get_best_affine()
  if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
    raise UserError(f'{path}: its affine maps no volume (zero or undefined spacing); repair the header')
  orientation = orientations.io_orientation(affine)
  lengths = np.linalg.norm(affine[:3, :3], axis=0)
  # A tilted gantry leaves 0.8 of a right-angled voxel's volume, or more.
  if np.isnan(orientation).any() or abs(np.linalg.det(affine[:3, :3] / lengths)) < 0.05:
    raise UserError(f'{path}: its affine maps no volume (its axes are nearly parallel); repair the header')
  to_canonical = orientations.ornt_transform(orientation, _CANONICAL)
  values = orientations.apply_orientation(values, to_canonical).transpose(2, 1, 0)
  affine = affine @ orientations.inv_ornt_aff(to_canonical, header.get_data_shape())
  if len(values) < 2:
    raise UserError(f'{path}: {len(values)} axial slice; a scan has at least 2')
  return values, Grid(values.shape, affine, path)


def on_canonical_axes(scan: Scan) -> Scan:
  """The scan as of a file that stores canonical axes, in the order of L, P, S, and has one affine, `scan.affine`.

  Of a header with two affines, or with none, programs do not all take the same.
  """
  return dataclasses.replace(scan, header=_header(scan.shape[::-1], scan.affine))


def _header(shape, affine):
  """Of a volume [x, y, z] that lies at an affine."""
  header = nib.Nifti1Header()
  header.set_data_shape(shape)
  header.set_xyzt_units('mm')
  header.set_sform(affine, 1)
  header.set_zooms(np.linalg.norm(affine[:3, :3], axis=0))
  try:
    header.set_qform(affine, 1, strip_shears=False)
  except nib.spatialimages.HeaderDataError:  # quaternions hold no shear
    header['qform_code'] = 0
  return header


def check_same_grid(mask: Grid, other: Grid, called: str) -> None:
  """Raises a UserError where a mask's voxels are not those of another grid, however each file is stored.

  Args:
    mask: of the mask.
    other: of what it belongs to.
    called: what messages call that: 'scan' or 'true mask'.
  """
  if mask.shape != other.shape:
    raise UserError(
      f'{mask.path}: the mask has {mask.shape} voxels (slices, rows, columns) and its {called} {other.path.name} '
      f'{other.shape}; save the mask on the grid of its {called}'
    )
  # Headers keep affines in float32, some as quaternions: equal grids differ by rounding, far below this.
  apart = _corner_distance(mask.affine, other.affine, other.shape)
  if apart > 0.1 * min(other.spacing):
    raise UserError(
      f'{mask.path}: the affine differs from that of its {called} {other.path.name} '
      f'(corners up to {apart:.3g} mm apart); save the mask on the grid of its {called}'
    )


def _corner_distance(affine, other, shape):
  """The largest distance in mm between where two affines put the corners of a canonical volume."""
  corners = np.array(np.meshgrid(*[(0, n - 1) for n in shape[::-1]])).reshape(3, -1)
  return np.linalg.norm((affine - other)[:3, :3] @ corners + (affine - other)[:3, 3:], axis=0).max()


def to_own_axes(volume: np.ndarray, scan: Scan) -> np.ndarray:
  """A volume on canonical axes [S, H, W] on those that the scan was read on, [x, y, z]."""
  back = orientations.ornt_transform(_CANONICAL, orientations.io_orientation(scan.header.get_best_affine()))
  return orientations.apply_orientation(volume.transpose(2, 1, 0), back)


def to_canonical_axes(volume: np.ndarray, scan: Scan) -> np.ndarray:
  """The way back from `to_own_axes`."""
  there = orientations.ornt_transform(orientations.io_orientation(scan.header.get_best_affine()), _CANONICAL)
  return orientations.apply_orientation(volume, there).transpose(2, 1, 0)


def network_slices(slices: Sequence[np.ndarray], size: int) -> np.ndarray:
  """Slices, each [H, W] -> int16 [S, size, size]: what datasets store and networks see, in training and prediction."""
  return np.rint(resize(slices, (size, size))).astype(np.int16)


def resize(slices: Sequence[np.ndarray], shape: tuple[int, int]) -> np.ndarray:
  """Slices, each [H, W] -> float32 [S, *shape], bilinear, with the filter widened where it shrinks (no aliasing)."""
  height, width = shape
  out = np.empty((len(slices), height, width), np.float32)
  for target, source in zip(out, slices, strict=True):
    if source.shape == (height, width):
      target[:] = source
      continue
    image = Image.fromarray(np.ascontiguousarray(source, np.float32))
    target[:] = image.resize((width, height), Image.Resampling.BILINEAR)
  return out


def check_grey(values: np.ndarray, path: Any) -> None:
  """Refuses values that are no image of 0 to 255: HU, masks, normalised data, 16-bit images."""
  low, high = values.min(), values.max()
  if low < 0 or high > 255 or high <= 1:
    kind = 'Hounsfield units or the like' if low < 0 else _kind(values)
    raise UserError(
      f'{path}: values {low:g} to {high:g} are {kind}, not grey values of an 8-bit image (0 to 255), which is what '
      'data.intensity=grey stands for; give such, or train on HU without it'
    )


def _check_hu(values, path, windowed):
  """Refuses values that cannot be Hounsfield units of a chest: images, normalised or windowed data."""
  low, high = values.min(), values.max()
  advice = 'export the original Hounsfield units, neither windowed nor rescaled'
  if low >= 0:
    kind = _kind(values)
    if kind == 'a 0-255 image':
      advice += '; or train on such images, and predict them, with --config.data.intensity=grey'
    raise UserError(f'{path}: values {low:g} to {high:g} are {kind}, not HU (air is -1000); {advice}')
  # Air, in the lungs and around the body, is a large part of any chest CT.
  air = np.count_nonzero(values < -500) / values.size
  if air < 0.001:
    raise UserError(f'{path}: values {low:g} to {high:g} hold no air (below -500), so they are not HU; {advice}')
  # A window leaves a wall at its upper end: everything above it has one value. In real scans a few voxels have the
  # greatest value, except where metal meets the end of the 12-bit scale (3071).
  at_top = np.count_nonzero(values == high)
  if not windowed and high < 1500 and at_top > max(16, 1e-4 * values.size):
    raise UserError(
      f'{path}: windowed: {at_top / values.size:.2%} of all voxels have the highest value, {high:g}, '
      f'so what lay above is lost; {advice}'
    )


def _kind(values):
  """What values are that have none below 0."""
  if np.isin(values, (0, 1)).all():
    return 'a mask'
  high = values.max()
  return 'normalised data' if high <= 1 else 'a 0-255 image' if high <= 255 else 'raw scanner values'
