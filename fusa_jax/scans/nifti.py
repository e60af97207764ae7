"""Reads NIfTI files, and writes volumes as NIfTI on the scan's own grid."""

import contextlib
import logging
import pathlib
from typing import BinaryIO

import nibabel as nib
import numpy as np
from isal import igzip, isal_zlib

from fusa_jax.scans import volumes
from fusa_jax.scans.volumes import Scan
from fusa_jax.system.errors import UserError, one_line
from fusa_jax.system.files import replacing

# nibabel logs what is wrong with a damaged header; the error raised here already contains it.
logging.getLogger('nibabel.global').setLevel(logging.CRITICAL)


def read(path: pathlib.Path) -> tuple[np.ndarray, nib.Nifti1Header]:
  """Reads a file's values [x, y, z] and its header.

  Raises:
    UserError: unreadable or truncated; not 3D.
  """
  image = _load(path)
  if len(image.shape) != 3 or 0 in image.shape:
    raise UserError(f'{path}: {len(image.shape)}D array of shape {image.shape}; save one 3D volume')
  try:
    return np.asarray(image.dataobj), image.header
  except (OSError, ValueError, OverflowError) as error:
    raise UserError(f'{path}: truncated or damaged ({one_line(error)}); copy it again from its source') from None


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


def _image_class(header):
  return nib.Nifti2Image if isinstance(header, nib.Nifti2Header) else nib.Nifti1Image
