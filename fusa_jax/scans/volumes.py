"""A scan in memory on canonical axes: its checks, and the way back to the grid of its file.

Canonical axes [S, H, W] show axial slices as a radiologist sees them:
- axis 0 runs from inferior to superior,
- axis 1 runs from anterior to posterior (row 0 is the front of the chest),
- axis 2 runs from the patient's right to left.

Values are int16: Hounsfield units, or grey values of 0 to 255 if the scan was windowed and saved as 8-bit images.
This module does not import JAX: worker processes import it and must start quickly.
"""

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
from nibabel import orientations
from PIL import Image

from fusa_jax.system.errors import UserError, one_line

# In HU. Scanners fill the area outside the field of view with lower values (-2000, -3024, ...), which are not tissue.
AIR = -1024
# In HU. Lungs and the air around the body lie below, all tissue above.
_AIR_BELOW = -500
# In HU. Only compact bone, metal and dense contrast medium lie above.
_DENSE = 800
# The intensities of a scan. A network is trained on one of the two, never on both.
VALUES = ('hu', 'grey')
_CANONICAL = orientations.axcodes2ornt(('L', 'P', 'S'))
# The largest distance, in voxels, between places that count as one.
SAME_PLACE = 0.1
# Millimetres. Voxels of other sizes show that the header gives metres or micrometres under another name.
_LEAST_SPACING, _MOST_SPACING = 0.01, 100
_IMAGE = 'an 8-bit image'
_RAW = 'raw scanner values'


@dataclasses.dataclass(frozen=True)
class Grid:
  """Where a file's voxels lie, on canonical axes.

  Attributes:
    shape: slices, rows, columns.
    affine: [4, 4], from canonical voxels (x, y, z) = (axis 2, axis 1, axis 0) to world millimetres (RAS+).
    path: its file, or another source with a `name`. Messages begin with str(path).
  """

  shape: tuple[int, int, int]
  affine: np.ndarray
  path: Any

  @property
  def spacing(self) -> tuple[float, float, float]:
    """Millimetres between slices, rows and columns: the order of shape."""
    return tuple(map(float, np.linalg.norm(self.affine[:3, :3], axis=0)[::-1]))

  @property
  def steps(self) -> np.ndarray:
    """[3, 3]: world millimetres of one step along slices, rows and columns. With a tilted gantry they are oblique."""
    return self.affine[:3, :3].T[::-1]

  @property
  def voxel_ml(self) -> float:
    """The volume of one voxel in millilitres."""
    return float(abs(np.linalg.det(self.affine[:3, :3]))) / 1000


@dataclasses.dataclass(frozen=True)
class Scan(Grid):
  """A scan on canonical axes, with the header of its file, which leads back to the stored axes.

  Attributes:
    values: int16 [S, H, W]: Hounsfield units, at least AIR; or grey values, 0 to 255.
    header: the file's header, with shape, affines and their codes.
  """

  values: np.ndarray
  header: nib.Nifti1Header


@dataclasses.dataclass(frozen=True)
class Mask(Grid):
  """A lesion mask on canonical axes, without its scan.

  Attributes:
    mask: bits of classes (`scans.classes`), uint8 [S, H, W].
  """

  mask: np.ndarray


class Stored(NamedTuple):
  """The contents of a file, on its own axes.

  Attributes:
    values: numbers [x, y, z].
    affine: [4, 4], from voxels (x, y, z) to world millimetres (RAS+), checked by `check_affine`.
    header: the header for results on the same grid.
    unplaced: why the affine is only a guess; '' if the file states it.
  """

  values: np.ndarray
  affine: np.ndarray
  header: nib.Nifti1Header
  unplaced: str = ''


def from_volume(values: np.ndarray, affine: np.ndarray, source: Any, intensity: str = 'hu') -> Scan:
  """Makes a scan from values that were not read from NIfTI, with the checks of `volume_files.read_scan`.

  The header has the affine as sform and, if it has no shear, as qform, both with code 1 (scanner).

  Args:
    values: numbers [x, y, z].
    affine: [4, 4], from voxels (x, y, z) to world millimetres (RAS+).
    source: the source in messages, see Grid.path.
    intensity: the intensity that the values must have, one of VALUES.

  Raises:
    UserError: as `volume_files.read_scan`; the affine is not [4, 4] numbers; an axis has more voxels than NIfTI allows.
  """
  header = nib.Nifti1Header()
  try:
    affine = np.asarray(affine, float).reshape(4, 4)
    header.set_data_shape(values.shape)
    header.set_sform(affine, 1)
  except (nib.spatialimages.HeaderDataError, TypeError, ValueError) as error:
    raise UserError(f'{source}: invalid shape or affine ({one_line(error)}); save it again') from None
  check_affine(affine, source)  # first: new_header fails on affines that this refuses
  # The affine that a reader of results finds in their headers, which store float32.
  return to_scan(Stored(values, header.get_sform(), new_header(values.shape, affine)), source, intensity)


def to_scan(stored: Stored, path: Any, intensity: str, windowed: bool = False) -> Scan:
  """Makes a scan of a file's contents, with the checks of `volume_files.read_scan`."""
  values, grid = canonical(stored, path)
  if intensity == 'grey':
    check_grey(values, path)
  else:
    _check_hu(values, path, windowed)
  # The upper bound is that of int16. On extended scales, metal reaches a few tens of thousands.
  hu = np.clip(values, AIR, np.iinfo(np.int16).max)
  if hu.dtype.kind == 'f':
    hu = np.rint(hu)
  hu = np.ascontiguousarray(hu, np.int16)
  _warn_of_constant_parts(hu, path, intensity)
  return Scan(**vars(grid), values=hu, header=stored.header)


def canonical(stored: Stored, path: Any) -> tuple[np.ndarray, Grid]:
  """Brings a file's values to canonical axes [S, H, W]; returns them and their grid."""
  values = stored.values
  if values.dtype.kind not in 'iuf':
    raise UserError(f'{path}: voxels are {values.dtype}, not numbers; save Hounsfield units (mask: 0 and 1)')
  if values.dtype.kind == 'f' and not np.isfinite(values).all():
    count = values.size - np.isfinite(values).sum()
    raise UserError(f'{path}: {count} of {values.size} voxels are NaN or infinite; export it again without them')
  to_canonical = orientations.ornt_transform(orientations.io_orientation(stored.affine), _CANONICAL)
  affine = stored.affine @ orientations.inv_ornt_aff(to_canonical, values.shape)
  values = orientations.apply_orientation(values, to_canonical).transpose(2, 1, 0)
  if len(values) < 2:
    raise UserError(f'{path}: {len(values)} axial slice; a scan must have at least 2')
  return values, Grid(values.shape, affine, path)


def check_affine(affine: np.ndarray, path: Any) -> None:
  """Raises a UserError if an affine cannot be that of a CT: axes of no length or in one plane, or impossible voxels."""
  if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-18:
    raise UserError(f'{path}: invalid affine (zero or undefined spacing); repair the header')
  lengths = np.linalg.norm(affine[:3, :3], axis=0)
  # A tilted gantry leaves at least 0.8 of the volume of a voxel with right angles.
  if np.isnan(orientations.io_orientation(affine)).any() or abs(np.linalg.det(affine[:3, :3] / lengths)) < 0.05:
    raise UserError(f'{path}: invalid affine (its axes are nearly parallel); repair the header')
  if not (lengths >= _LEAST_SPACING).all() or not (lengths <= _MOST_SPACING).all():
    raise UserError(
      f'{path}: voxels of {voxel_text(affine)} cannot be those of a CT; repair the spacing, or its unit, in the header'
    )


def voxel_text(affine: np.ndarray) -> str:
  """The size of a voxel, for messages: 0.7 x 0.7 x 5 mm."""
  return ' x '.join(f'{length:.4g}' for length in np.linalg.norm(affine[:3, :3], axis=0)) + ' mm'


def on_canonical_axes(scan: Scan) -> Scan:
  """The scan as if its file stored canonical axes, in the order L, P, S, and had one affine, `scan.affine`.

  If a header has two affines or none, programs differ in the affine that they use.
  """
  return dataclasses.replace(scan, header=new_header(scan.shape[::-1], scan.affine))


def new_header(shape: tuple[int, int, int], affine: np.ndarray) -> nib.Nifti1Header:
  """Makes the header of a volume [x, y, z] with one affine."""
  header = nib.Nifti1Header()
  header.set_data_shape(shape)
  header.set_xyzt_units('mm')
  header.set_sform(affine, 1)
  header.set_zooms(np.linalg.norm(affine[:3, :3], axis=0))
  try:
    header.set_qform(affine, 1, strip_shears=False)
  except nib.spatialimages.HeaderDataError:  # quaternions cannot express shear
    header['qform_code'] = 0
  return header


def check_same_grid(mask: Grid, other: Grid, called: str) -> None:
  """Raises a UserError if a mask and its scan or reference mask have different grids. Stored axes may differ.

  Args:
    mask: the grid of the mask.
    other: the grid of its scan or reference mask.
    called: the name of the other in messages: 'scan' or 'reference mask'.
  """
  if mask.shape != other.shape:
    raise UserError(
      f'{mask.path}: the mask has {mask.shape} voxels (slices, rows, columns), but its {called} {other.path.name} has '
      f'{other.shape}; save the mask on the grid of its {called}'
    )
  # Headers store affines in float32, some as quaternions. Rounding differences of equal grids are far below this limit.
  apart = corner_distance(mask.affine, other.affine, other.shape[::-1])
  if apart > SAME_PLACE * min(other.spacing):
    raise UserError(
      f'{mask.path}: the affines of the mask and its {called} {other.path.name} differ '
      f'(corners up to {apart:.3g} mm apart); save the mask on the grid of its {called}'
    )


def corner_distance(affine: np.ndarray, other: np.ndarray, shape: tuple[int, int, int]) -> float:
  """The largest distance in mm between the corners of a volume [x, y, z] under two affines."""
  corners = np.array(np.meshgrid(*[(0, n - 1) for n in shape])).reshape(3, -1)
  return float(np.linalg.norm((affine - other)[:3, :3] @ corners + (affine - other)[:3, 3:], axis=0).max())


def to_own_axes(volume: np.ndarray, scan: Scan) -> np.ndarray:
  """Brings a volume from canonical axes [S, H, W] to the stored axes of the scan [x, y, z]."""
  back = orientations.ornt_transform(_CANONICAL, orientations.io_orientation(scan.header.get_best_affine()))
  return orientations.apply_orientation(volume.transpose(2, 1, 0), back)


def to_canonical_axes(volume: np.ndarray, scan: Scan) -> np.ndarray:
  """The inverse of `to_own_axes`."""
  there = orientations.ornt_transform(orientations.io_orientation(scan.header.get_best_affine()), _CANONICAL)
  return orientations.apply_orientation(volume, there).transpose(2, 1, 0)


def network_slices(slices: Sequence[np.ndarray], size: int) -> np.ndarray:
  """Resizes slices, each [H, W], to int16 [S, size, size]: the network's input in datasets and in prediction."""
  return np.rint(resize(slices, (size, size))).astype(np.int16)


def resize(slices: Sequence[np.ndarray], shape: tuple[int, int]) -> np.ndarray:
  """Resizes slices, each [H, W], to float32 [S, *shape]: bilinear, with antialiasing when they shrink."""
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
  """Refuses values that are not an 8-bit image: HU, masks, normalised data, 16-bit images."""
  low, high = values.min(), values.max()
  if low < 0 or high > 255 or high <= 1:
    form = 'Hounsfield units or similar' if low < 0 else _form(values)
    raise UserError(
      f'{path}: values {low:g} to {high:g} are {form}, but data.intensity=grey needs 8-bit images (0 to 255); give '
      '8-bit images, or train on HU without data.intensity=grey'
    )


def _check_hu(values, path, windowed):
  """Refuses values that cannot be Hounsfield units of a chest: images, normalised or windowed data."""
  low, high = values.min(), values.max()
  advice = 'export the original Hounsfield units, neither windowed nor rescaled'
  if low >= 0:
    form = _form(values)
    if form == _IMAGE:
      advice += '; or train and predict on 8-bit images with --config.data.intensity=grey'
    raise UserError(f'{path}: values {low:g} to {high:g} are {form}, not HU (air is -1000); {advice}')
  inside = values[values >= _AIR_BELOW]
  if not _has_air(values):
    text = f'{path}: values {low:g} to {high:g}'
    if low < _AIR_BELOW and inside.size:
      text = f'{path}: values {inside.min():g} to {high:g} (apart from padding, {low:g})'
      if inside.min() >= 0:
        raise UserError(f'{text} are {_form(inside)}, not HU (air is -1000); {advice}')
    raise UserError(f'{text} hold no air (below {_AIR_BELOW}), so they are not HU; {advice}')
  # In scanner values without their intercept of -1024, all tissue lies at about 1000. In HU only bone and metal do.
  dense = np.count_nonzero((inside > _DENSE) & (inside < high)) / values.size
  if dense > 0.1:
    raise UserError(
      f'{path}: values {low:g} to {high:g} are {_RAW}, not HU: {dense:.0%} of all voxels are above {_DENSE}, as only '
      f'bone and metal may be; {advice}'
    )
  # A window sets all values above its upper end to one value. In other scans only a few voxels have the highest value,
  # unless metal reaches the end of the 12-bit scale (3071).
  at_top = np.count_nonzero(values == high)
  if not windowed and high < 1500 and at_top > max(16, 1e-4 * values.size):
    raise UserError(
      f'{path}: windowed: {at_top / values.size:.2%} of all voxels have the highest value, {high:g}, '
      f'so values above it are lost; {advice}'
    )


def _has_air(values):
  """Whether the values hold air, which is a large part of every chest CT: in the lungs and around the body.

  Padding is no air. It lies below AIR, or it is one exact value, while noise gives air many values.
  """
  low = values[values < _AIR_BELOW]
  air = low[low >= AIR]
  if not air.size:
    return False
  return np.count_nonzero(air != air.min()) >= 0.001 * (values.size - low.size + air.size)


def _warn_of_constant_parts(values, path, intensity):
  """Warns of parts of a scan that were probably lost or filled: no part of a patient has exactly one value."""
  low, high = values.min(axis=(1, 2)), values.max(axis=(1, 2))
  constant = np.unique(low[low == high])
  if constant.size:
    shown = ', '.join(map(str, constant[:3])) + (', ...' if constant.size > 3 else '')
    count = np.count_nonzero(low == high)
    logging.warning(
      '%s: %d of %d slices have one constant value (%s); check whether they were lost', path, count, len(low), shown
    )
  if intensity == 'grey':
    return
  # Noise spreads water over tens of HU, so that few voxels have exactly 0 HU. Metal may reach the highest value.
  for value, least, called in (
    (0, 0.02, 'exactly 0 HU, as water'),
    (high.max(), 0.01, f'the highest value, {high.max()}'),
  ):
    share = np.count_nonzero(values == value) / values.size
    if share > least:
      advice = f'if a program filled them, export the scan with {AIR} there'
      logging.warning('%s: %.1f%% of all voxels have %s; %s', path, 100 * share, called, advice)


def _form(values):
  """Describes values without negative numbers."""
  if np.isin(values, (0, 1)).all():
    return 'a mask'
  high = values.max()
  return 'normalised data' if high <= 1 else _IMAGE if high <= 255 else _RAW
