"""NIfTI files <-> scans and masks: read in whatever orientation, written on the scan's own grid."""

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

# What nibabel would print of a damaged header is part of the error raised here.
logging.getLogger('nibabel.global').setLevel(logging.CRITICAL)


def is_nifti(path: pathlib.Path) -> bool:
  return path.name.endswith(('.nii', '.nii.gz'))


def stem(path: pathlib.Path) -> str:
  """The file's name without .nii or .nii.gz."""
  return path.name.removesuffix('.gz').removesuffix('.nii')


class NiftiFile(formats.FileSource):
  """A scan in one file."""

  endings = '.nii, .nii.gz'
  stem = property(lambda self: stem(self.path))
  claims = staticmethod(is_nifti)

  def read_image(self, intensity: str) -> Scan:
    return read_scan(self.path, intensity)


def read_scan(path: pathlib.Path, intensity: str = 'hu', windowed: bool = False) -> Scan:
  """Reads a CT scan from .nii or .nii.gz, in whatever orientation and with whatever affine and scaling.

  Args:
    path: of the file.
    intensity: one of VALUES, which the file's have to be.
    windowed: whether HU are known to have lost what lay above a window; otherwise such are refused.

  Raises:
    UserError: unreadable or truncated; not 3D; fewer than 2 slices; an affine that maps no volume; NaN or infinite
      values; values of another intensity. The message names the file and the reason.
  """
  path = pathlib.Path(path)
  return volumes.to_scan(*_read(path), path, intensity, windowed)


def read_mask(path: pathlib.Path, scan: Scan, lesion_labels: tuple[int, ...] = ()) -> np.ndarray:
  """Reads the lesion mask of a scan: uint8 {0, 1}, of scan.values's shape and axes.

  Args:
    path: of the file. It may be stored in another orientation than the scan's, as long as it covers the same grid.
    scan: the mask's.
    lesion_labels: the values of the file that are lesion, all others being none; () where it holds 0 and 1 only.

  Raises:
    UserError: as `read_scan`; also a shape or affine that differs from the scan's, and values other than whole numbers
      or, without labels, than 0 and 1.
  """
  values, grid = _read_canonical(pathlib.Path(path))
  volumes.check_same_grid(grid, scan, 'scan')
  if not lesion_labels:
    return _binary(values, grid.path, 'name those that are lesion, as in --config.data.lesion_labels="(3,)"')
  if values.dtype.kind == 'f' and (values != np.rint(values)).any():
    raise UserError(f'{path}: a mask of labels holds whole numbers only; save it again without interpolation')
  return np.isin(values, lesion_labels).astype(np.uint8)


def read_labels(path: pathlib.Path) -> Mask:
  """Reads a lesion mask that is compared with other masks, not with a scan.

  Raises:
    UserError: as `read_scan`, but for HU; also values other than 0 and 1.
  """
  values, grid = _read_canonical(pathlib.Path(path))
  return Mask(**vars(grid), mask=_binary(values, grid.path, 'save one lesion label as 1'))


def read_grid(path: pathlib.Path) -> Grid:
  """Where a file's voxels lie.

  Raises:
    UserError: as `read_scan`, but for HU.
  """
  return _read_canonical(pathlib.Path(path))[1]


def write_volume(path: pathlib.Path, volume: np.ndarray, scan: Scan) -> None:
  """Writes a volume made on canonical axes [S, H, W] on the scan's own grid, with its own affines and their codes.

  The dtype on disk is that of `volume`. Nothing else of the scan's header is copied: its text fields and extensions
  may name the patient.
  """
  with replacing(path) as partial, partial.open('wb') as file:
    write_volume_to(file, volume, scan, compressed=path.suffix == '.gz')


def write_volume_to(file: BinaryIO, volume: np.ndarray, scan: Scan, compressed: bool) -> None:
  """As `write_volume`, into an open file."""
  data = volumes.to_own_axes(volume, scan)
  header = type(scan.header)()
  header.set_data_shape(scan.header.get_data_shape())
  header.set_data_dtype(volume.dtype)
  fields = ['pixdim', 'xyzt_units', 'qform_code', 'sform_code', 'srow_x', 'srow_y', 'srow_z']
  fields += [f'quatern_{axis}' for axis in 'bcd'] + [f'qoffset_{axis}' for axis in 'xyz']
  for field in fields:
    header[field] = scan.header[field]
  # affine=None keeps both affines of the header as they are; anything else would rewrite one of them.
  image = _image_class(scan.header)(data, None, header)
  # With neither name nor time in it, the same volume is the same file.
  with igzip.IGzipFile('', 'wb', fileobj=file, mtime=0) if compressed else contextlib.nullcontext(file) as stream:
    image.to_stream(stream)


def _read_canonical(path):
  """Values [S, H, W] on canonical axes, and their grid."""
  return volumes.canonical(*_read(path), path)


def _read(path):
  """A file's values [x, y, z] and header."""
  image = _load(path)
  if len(image.shape) != 3 or 0 in image.shape:
    raise UserError(f'{path}: {len(image.shape)}D array of shape {image.shape}; save one 3D volume')
  try:
    return np.asarray(image.dataobj), image.header
  except (OSError, ValueError, OverflowError) as error:
    raise UserError(f'{path}: truncated or damaged ({one_line(error)}); copy it again from its source') from None


def _load(path):
  """The image, read whole: gzip's checksum is compared only where a stream is read to its end."""
  try:
    content = path.read_bytes()
    if content[:2] == b'\x1f\x8b':
      content = igzip.decompress(content)
  except FileNotFoundError:
    raise UserError(f'{path}: no such file; check the path') from None
  except (OSError, EOFError, isal_zlib.error) as error:
    raise UserError(f'{path}: truncated or unreadable ({one_line(error)}); copy it again from its source') from None
  try:
    nifti2 = int.from_bytes(content[:4], 'little') == 540 or int.from_bytes(content[:4], 'big') == 540
    return (nib.Nifti2Image if nifti2 else nib.Nifti1Image).from_bytes(content)
  except Exception as error:  # nibabel lets struct, NumPy and its own errors through for a header that is none
    raise UserError(f'{path}: not a NIfTI file ({one_line(error)}); export the scan as .nii.gz') from None


def _binary(values, path, advice):
  """Values -> uint8 {0, 1}; refuses any other."""
  mask = values != 0
  if not np.array_equal(mask, values):
    found = np.unique(values)
    shown = ', '.join(f'{v:g}' for v in found[:6]) + (', ...' if found.size > 6 else '')
    raise UserError(f'{path}: a mask holds 0 and 1 only, this one has {shown}; {advice}')
  return mask.astype(np.uint8)


def _image_class(header):
  return nib.Nifti2Image if isinstance(header, nib.Nifti2Header) else nib.Nifti1Image
