"""Reads scans and masks from NIfTI in any orientation, and writes volumes on the scan's own grid."""

import contextlib
import logging
import pathlib
from typing import BinaryIO

import nibabel as nib
import numpy as np
from isal import igzip, isal_zlib

from fusa_jax.scans import formats, volumes
from fusa_jax.scans.volumes import Grid, Mask, Scan
from fusa_jax.system.errors import UserError, one_line
from fusa_jax.system.files import replacing

# nibabel logs what is wrong with a damaged header; the error raised here already contains it.
logging.getLogger('nibabel.global').setLevel(logging.CRITICAL)


def is_nifti(path: pathlib.Path) -> bool:
  return path.name.endswith(('.nii', '.nii.gz'))


def stem(path: pathlib.Path) -> str:
  """The file's name without .nii or .nii.gz."""
  return path.name.removesuffix('.gz').removesuffix('.nii')


class NiftiFile(formats.FileSource):
  """A scan in one NIfTI file."""

  endings = '.nii, .nii.gz'
  stem = property(lambda self: stem(self.path))
  claims = staticmethod(is_nifti)

  def read_image(self, intensity: str) -> Scan:
    return read_scan(self.path, intensity)


def read_scan(path: pathlib.Path, intensity: str = 'hu', windowed: bool = False) -> Scan:
  """Reads a CT scan from .nii or .nii.gz, with any orientation, affine and scaling.

  Args:
    path: the file.
    intensity: the intensity that the values must have, one of volumes.VALUES.
    windowed: True accepts a scan that lost all HU above a window; otherwise it is refused.

  Raises:
    UserError: unreadable or truncated; not 3D; fewer than 2 slices; invalid affine; NaN or infinite values; values of
      another intensity. The message names the file and the reason.
  """
  path = pathlib.Path(path)
  return volumes.to_scan(*_read(path), path, intensity, windowed)


def read_mask(path: pathlib.Path, scan: Scan, lesion_labels: tuple[int, ...] = ()) -> np.ndarray:
  """Reads the lesion mask of a scan: uint8 {0, 1}, with the shape and axes of scan.values.

  Args:
    path: the file. Its orientation may differ from the scan's, but its grid must be the same.
    scan: the scan of the mask.
    lesion_labels: the values that are lesion, all others are background; () if the file holds only 0 and 1.

  Raises:
    UserError: as `read_scan`; the shape or affine differs from the scan's; with labels, values are not whole numbers;
      without labels, values are not 0 and 1.
  """
  values, grid = _read_canonical(pathlib.Path(path))
  volumes.check_same_grid(grid, scan, 'scan')
  if not lesion_labels:
    return _binary(values, grid.path, 'name the lesion labels, for example --config.data.lesion_labels="(3,)"')
  if values.dtype.kind == 'f' and (values != np.rint(values)).any():
    raise UserError(f'{path}: labels in a mask must be whole numbers; save it again without interpolation')
  return np.isin(values, lesion_labels).astype(np.uint8)


def read_labels(path: pathlib.Path) -> Mask:
  """Reads a lesion mask without its scan, to compare it with other masks.

  Raises:
    UserError: as `read_scan`, without the checks of HU; values other than 0 and 1.
  """
  values, grid = _read_canonical(pathlib.Path(path))
  return Mask(**vars(grid), mask=_binary(values, grid.path, 'save one lesion label as 1'))


def read_grid(path: pathlib.Path) -> Grid:
  """The grid of a file: where its voxels lie.

  Raises:
    UserError: as `read_scan`, without the checks of HU.
  """
  return _read_canonical(pathlib.Path(path))[1]


def write_volume(path: pathlib.Path, volume: np.ndarray, scan: Scan) -> None:
  """Writes a volume on canonical axes [S, H, W] to the scan's own grid, with the scan's affines and their codes.

  The dtype on disk is volume.dtype. No other part of the scan's header is copied, because text fields and extensions
  may name the patient.
  """
  with replacing(path) as partial, partial.open('wb') as file:
    write_volume_to(file, volume, scan, compressed=path.suffix == '.gz')


def write_volume_to(file: BinaryIO, volume: np.ndarray, scan: Scan, compressed: bool) -> None:
  """As `write_volume`, to an open file."""
  data = volumes.to_own_axes(volume, scan)
  header = type(scan.header)()
  header.set_data_shape(scan.header.get_data_shape())
  header.set_data_dtype(volume.dtype)
  fields = ['pixdim', 'xyzt_units', 'qform_code', 'sform_code', 'srow_x', 'srow_y', 'srow_z']
  fields += [f'quatern_{axis}' for axis in 'bcd'] + [f'qoffset_{axis}' for axis in 'xyz']
  for field in fields:
    header[field] = scan.header[field]
  # affine=None keeps both affines of the header; any other value would rewrite one of them.
  image = _image_class(scan.header)(data, None, header)
  # No name and no time in the gzip header: equal volumes give equal files.
  with igzip.IGzipFile('', 'wb', fileobj=file, mtime=0) if compressed else contextlib.nullcontext(file) as stream:
    image.to_stream(stream)


def _read_canonical(path):
  """Reads values [S, H, W] on canonical axes, and their grid."""
  return volumes.canonical(*_read(path), path)


def _read(path):
  """Reads a file's values [x, y, z] and its header."""
  image = _load(path)
  if len(image.shape) != 3 or 0 in image.shape:
    raise UserError(f'{path}: {len(image.shape)}D array of shape {image.shape}; save one 3D volume')
  try:
    return np.asarray(image.dataobj), image.header
  except (OSError, ValueError, OverflowError) as error:
    raise UserError(f'{path}: truncated or damaged ({one_line(error)}); copy it again from its source') from None


def _load(path):
  """Reads the image completely, because gzip compares its checksum only at the end of the stream."""
  try:
    content = path.read_bytes()
    if content[:2] == b'\x1f\x8b':
      content = igzip.decompress(content)
  except FileNotFoundError:
    raise UserError(f'{path}: file not found; check the path') from None
  except (OSError, EOFError, isal_zlib.error) as error:
    raise UserError(f'{path}: truncated or unreadable ({one_line(error)}); copy it again from its source') from None
  try:
    nifti2 = int.from_bytes(content[:4], 'little') == 540 or int.from_bytes(content[:4], 'big') == 540
    return (nib.Nifti2Image if nifti2 else nib.Nifti1Image).from_bytes(content)
  except Exception as error:  # for an invalid header, nibabel raises its own errors and those of struct and NumPy
    raise UserError(f'{path}: not a NIfTI file ({one_line(error)}); export the scan as .nii.gz') from None


def _binary(values, path, advice):
  """Converts a mask of 0 and 1 to uint8; refuses other values."""
  mask = values != 0
  if not np.array_equal(mask, values):
    distinct = np.unique(values)
    shown = ', '.join(f'{v:g}' for v in distinct[:6]) + (', ...' if distinct.size > 6 else '')
    raise UserError(f'{path}: mask values must be 0 and 1, but are {shown}; {advice}')
  return mask.astype(np.uint8)


def _image_class(header):
  return nib.Nifti2Image if isinstance(header, nib.Nifti2Header) else nib.Nifti1Image
