"""Reads scans and masks from files of one volume each, in any orientation. `_READERS` lists the formats."""

import logging
import pathlib

import nibabel as nib
import numpy as np

from fusa_jax.scans import formats, itk, nifti, volumes
from fusa_jax.scans.classes import LESION, Classes
from fusa_jax.scans.volumes import Grid, Mask, Scan
from fusa_jax.system.errors import UserError

# The reader of each ending; each returns volumes.Stored.
_READERS = {
  **dict.fromkeys(('.nii', '.nii.gz', '.hdr', '.hdr.gz'), nifti.read),
  **dict.fromkeys(('.mha', '.mhd', '.nrrd', '.nhdr', '.seg.nrrd'), itk.read),
}
# The largest distance of a label from its whole number. Scalings, and floats of 16 bits, round by less.
_ROUNDING = 1e-3


def is_volume(path: pathlib.Path) -> bool:
  """Whether a file is a volume, judged by its name. Capitals do not matter."""
  return _ending(path) is not None


def stem(path: pathlib.Path) -> str:
  """The file's name without the ending of its format. 3D Slicer names masks `X.seg.nrrd`, which is `X_seg`."""
  ending = _ending(path) or ''
  return path.name[: len(path.name) - len(ending)] + ('_seg' if ending == '.seg.nrrd' else '')


def data_files(path: pathlib.Path) -> list[pathlib.Path]:
  """The files that hold the values of a header, for example .img and .raw; empty if a file holds them itself."""
  return (itk if _READERS.get(_ending(path)) == itk.read else nifti).data_files(path)


class VolumeFile(formats.FileSource):
  """A scan in one file."""

  endings = '.nii, .nii.gz, .hdr, .mha, .mhd, .nrrd, .nhdr'
  stem_of = staticmethod(stem)
  claims = staticmethod(is_volume)

  def files(self) -> list[pathlib.Path]:
    return [self.path, *(file for file in data_files(self.path) if file.is_file())]

  def read_image(self, intensity: str) -> Scan:
    return read_scan(self.path, intensity)


def read_scan(path: pathlib.Path, intensity: str = 'hu', windowed: bool = False, loose: bool = False) -> Scan:
  """Reads a CT scan in a format of _READERS, with any orientation, affine and scaling.

  Args:
    path: the file.
    intensity: the intensity that the values must have, one of volumes.VALUES.
    windowed: True accepts a scan that lost all HU above a window; otherwise it is refused.
    loose: True accepts a file without orientation: its slices, along its last axis, do not form one volume.

  Raises:
    UserError: unreadable or truncated; not 3D; fewer than 2 slices; invalid affine, none, or two that differ; NaN or
      infinite values; values of another intensity. The message names the file and the reason.
  """
  path = pathlib.Path(path)
  stored = _read(path)
  if not loose:
    _check_placed(stored, path)
  return volumes.to_scan(stored, path, intensity, windowed)


def read_mask(path: pathlib.Path, scan: Scan, classes: Classes = LESION) -> np.ndarray:
  """Reads the lesion mask of a scan: bits of classes, uint8 (`scans.classes`), with the shape and axes of scan.values.

  Args:
    path: the file. Its orientation may differ from the scan's, but its grid must be the same.
    scan: the scan of the mask.
    classes: the classes and their values. A binary mask has the values 0 and 1.

  Raises:
    UserError: as `read_scan`; the shape or affine differs from the scan's; values are not whole numbers; a value has no
      meaning.
  """
  return read_mask_and_values(path, scan, classes)[0]


def read_mask_and_values(
  path: pathlib.Path, scan: Scan, classes: Classes = LESION
) -> tuple[np.ndarray, tuple[int, ...]]:
  """As `read_mask`; also returns the distinct values of the file, in ascending order.

  A cohort compares these with its lesion labels: one mask may lack a lesion, but not all masks of a cohort.
  """
  values, grid = _read_canonical(pathlib.Path(path))
  volumes.check_same_grid(grid, scan, 'scan')
  listed = f' ({classes.listed_meanings})' if classes.meanings else ''
  return _bits(values, path, classes, f'name the lesion labels{listed}, for example --config.data.lesion_labels="(3,)"')


def read_labels(path: pathlib.Path, classes: Classes = LESION, advice: str = 'save one lesion label as 1') -> Mask:
  """Reads a lesion mask without its scan, to compare it with other masks.

  Args:
    path: the file.
    classes: the classes and their values. A binary mask has the values 0 and 1.
    advice: what to do about a binary mask with other values, for the message.

  Raises:
    UserError: as `read_scan`, without the checks of HU; otherwise as `read_mask`.
  """
  path = pathlib.Path(path)
  stored = _read(path)
  _check_placed(stored, path)
  values, grid = volumes.canonical(stored, path)
  return Mask(**vars(grid), mask=_bits(values, path, classes, advice)[0])


def read_grid(path: pathlib.Path) -> Grid:
  """The grid of a file: where its voxels lie.

  Raises:
    UserError: as `read_scan`, without the checks of HU.
  """
  return _read_canonical(pathlib.Path(path))[1]


def _read_canonical(path):
  """Reads values [S, H, W] on canonical axes, and their grid."""
  return volumes.canonical(_read(path), path)


def _read(path):
  return _READERS[_ending(path) or '.nii'](path)


def _check_placed(stored, path):
  """Refuses a file whose affine is a guess: sides, the order of slices and the volume of a voxel would be guesses."""
  affine = stored.affine
  sizes = ' x '.join(map(str, stored.values.shape))
  if stored.unplaced:
    raise UserError(
      f'{path}: the header {stored.unplaced}, so it is unknown which of its axes ({sizes} voxels of '
      f'{volumes.voxel_text(affine)}) are slices, and which side is left; export it again with its affine'
    )
  if not affine[:3, 3].any() and np.count_nonzero(affine[:3, :3]) == 3:
    logging.warning(
      '%s: %s voxels of %s, axes %s and origin 0, as programs write if they know no position; check them',
      path,
      sizes,
      volumes.voxel_text(affine),
      ''.join(nib.aff2axcodes(affine)),
    )


def _ending(path):
  """The longest ending in _READERS that the name has, in lower case; None if it has none."""
  return max((ending for ending in _READERS if path.name.lower().endswith(ending)), key=len, default=None)


def _bits(values, path, classes, advice):
  """Converts the values of a mask to bits of classes and returns them with the distinct values; refuses wrong ones."""
  if classes.is_binary:
    return _binary(values, path, advice)
  labels = _whole(values)
  if labels is None:
    raise UserError(
      f'{path}: labels in a mask must be whole numbers, but values are {_shown(values)}; '
      'save it again without interpolation'
    )
  distinct = tuple(map(int, _distinct(labels)))
  classes.check(path, distinct)
  return classes.bits(labels), distinct


def _binary(values, path, advice):
  """Converts a mask of 0 and 1 to uint8 and returns it with its distinct values; refuses other values."""
  labels = _whole(values)
  distinct = () if labels is None else tuple(map(int, _distinct(labels)))
  if labels is None or not set(distinct) <= {0, 1}:
    raise UserError(f'{path}: mask values must be 0 and 1, but are {_shown(values)}; {advice}')
  return labels.astype(np.uint8), distinct


def _whole(values):
  """The values as whole numbers; None if they are not. A mask that was saved with a scaling may hold 0.99999 for 1."""
  if values.dtype.kind != 'f':
    return values
  labels = np.rint(values)
  return labels if (np.abs(values - labels) <= _ROUNDING).all() else None


def _distinct(values):
  """The distinct values, sorted. Most voxels of a mask are 0; leaving them out saves most of the sorting."""
  other = np.unique(values[values != 0])
  return other if np.all(values) else np.sort(np.append(other, values.dtype.type(0)))


def _shown(values):
  """The first distinct values, for messages."""
  distinct = _distinct(values)
  return ', '.join(f'{v:.7g}' for v in distinct[:6]) + (', ...' if distinct.size > 6 else '')
