"""Reads NIfTI files, also in pairs of .hdr and .img, and writes volumes as NIfTI on the scan's own grid."""

import contextlib
import io
import logging
import pathlib
import re
from typing import BinaryIO

import nibabel as nib
import numpy as np
from isal import igzip, isal_zlib

from fusa_jax.scans import formats, volumes
from fusa_jax.scans.volumes import Scan
from fusa_jax.system.errors import UserError, one_line
from fusa_jax.system.files import replacing

# Millimetres in the units that a header can name by their code in xyzt_units: metre, mm, micrometre. No unit means mm.
_MILLIMETRES = {1: 1000.0, 2: 1.0, 3: 0.001}
# Relative difference, and radians (1 degree). Headers are rounded, so smaller differences are not two geometries.
_SAME_SPACING, _SAME_DIRECTION = 0.01, 0.0175

# The header and the values in a pair of files.
_HEADER, _VALUES = (re.compile(rf'\.{ending}(\.gz)?$', re.IGNORECASE) for ending in ('hdr', 'img'))

# nibabel logs what is wrong with a damaged header; the error raised here already contains it.
logging.getLogger('nibabel.global').setLevel(logging.CRITICAL)


def read(path: pathlib.Path) -> volumes.Stored:
  """Reads a file.

  Its affine is that of the sform, or of the qform if the sform has code 0; in mm, whatever unit the header names. The
  header keeps this unit, so results lie on the scan for programs that apply units and for those that do not.

  Raises:
    UserError: unreadable or truncated; not 3D; invalid affine; sform, qform and pixdim differ in spacing or directions.
  """
  image = _load(path)
  shape = image.shape
  if len(shape) < 3 or any(n != 1 for n in shape[3:]) or 0 in shape:
    raise UserError(f'{path}: {len(shape)}D array of shape {shape}; save one 3D volume')
  try:
    values = np.asarray(image.dataobj).reshape(shape[:3])
  except (OSError, ValueError, OverflowError) as error:
    raise UserError(f'{path}: truncated or damaged ({one_line(error)}); copy it again from its source') from None
  header = image.header.copy()
  header.set_data_shape(values.shape)
  scale = _MILLIMETRES.get(int(header['xyzt_units']) & 7, 1)
  to_mm = np.diag([scale, scale, scale, 1])
  affine = to_mm @ header.get_best_affine()
  volumes.check_affine(affine, path)
  if header['sform_code'] > 0:
    with np.errstate(all='ignore'):  # the other reading may hold anything, as NaN
      _check_readings(affine, *_other_reading(header, to_mm), values.shape, path)
  unplaced = ''
  if header['sform_code'] <= 0 and header['qform_code'] <= 0:
    unplaced = 'has no orientation (the codes of sform and qform are 0)'
  elif np.array_equal(affine, np.eye(4)):
    unplaced = 'has the identity as affine, which programs write if they know no position'
  return volumes.Stored(values, affine, header, unplaced)


def _other_reading(header, to_mm):
  """The name and affine of what the header says besides the sform: its qform, or a spacing (pixdim) alone."""
  try:
    qform, code = header.get_qform(coded=True)
  except (ValueError, nib.spatialimages.HeaderDataError):  # impossible quaternions
    qform, code = None, 0
  if qform is not None and code > 0:
    return 'qform', to_mm @ qform
  return 'pixdim', to_mm @ np.diag([*np.abs(header.get_zooms()), 1.0])


def _check_readings(sform, name, other, shape, path):
  """Refuses a header that gives two spacings or directions, and warns if it gives two positions.

  Programs differ in which one they use, so volumes and places would depend on the program.
  """
  spacing, of_other = (np.linalg.norm(affine[:3, :3], axis=0) for affine in (sform, other))
  if not np.isfinite(other).all() or not of_other.all():
    return  # not set: no program can use it
  if name == 'pixdim':  # it gives lengths only
    other = sform @ np.diag([*(of_other / spacing), 1])
  directions, of_qform = sform[:3, :3] / spacing, other[:3, :3] / np.linalg.norm(other[:3, :3], axis=0)
  # A quaternion cannot express the shear of a tilted gantry, so the qform must differ from the sform by it.
  shear = 2 * _angle(directions, _rotation(directions))
  angle = _angle(_rotation(directions), _rotation(of_qform)) - shear
  ratio = np.abs(np.log(spacing / of_other)).max() + np.log(np.cos(shear))
  apart = volumes.corner_distance(sform, other, shape)
  readings = f'sform: {_reading(sform)}; {name}: {_reading(other)}'
  if ratio > _SAME_SPACING or angle > _SAME_DIRECTION:
    raise UserError(
      f'{path}: the header gives two geometries ({readings}); set the code of the wrong one to 0, or export it again'
      if name == 'qform'
      else f'{path}: the header gives two spacings ({readings}); repair the wrong one, or export it again'
    )
  if apart > volumes.SAME_PLACE * spacing.min():
    logging.warning(
      '%s: sform and %s lie up to %.3g mm apart (%s); the sform is used, other programs may use the other',
      path,
      name,
      apart,
      readings,
    )


def _reading(affine):
  """An affine in words."""
  codes = ''.join(nib.aff2axcodes(affine))
  return f'{volumes.voxel_text(affine)}, axes {codes}, {abs(np.linalg.det(affine[:3, :3])) / 1000:.3g} mL per voxel'


def _angle(directions, others):
  """The largest angle in radians between the columns of two matrices of unit vectors."""
  return np.arccos(np.clip(np.sum(directions * others, axis=0).min(), -1, 1))


def _rotation(directions):
  """The nearest matrix with right angles."""
  left, _, right = np.linalg.svd(directions)
  return left @ right


def write_volume(path: pathlib.Path, volume: np.ndarray, scan: Scan) -> None:
  """Writes a volume on canonical axes [S, H, W] to the scan's own grid, with the scan's affines and their codes.

  The dtype on disk is volume.dtype. No other part of the scan's header is copied, because text fields and extensions
  may name the patient.
  """
  with replacing(path) as partial, partial.open('wb') as file:
    write_volume_to(file, volume, scan, compressed=path.suffix == '.gz')


def write_volume_to(file: BinaryIO, volume: np.ndarray, scan: Scan, compressed: bool, description: str = '') -> None:
  """As `write_volume`, to an open file. The header holds the description, of at most 79 ASCII characters."""
  data = volumes.to_own_axes(volume, scan)
  header = _image_class(scan.header).header_class()
  header.set_data_shape(scan.header.get_data_shape())
  header.set_data_dtype(volume.dtype)
  fields = ['pixdim', 'xyzt_units', 'qform_code', 'sform_code', 'srow_x', 'srow_y', 'srow_z']
  fields += [f'quatern_{axis}' for axis in 'bcd'] + [f'qoffset_{axis}' for axis in 'xyz']
  for field in fields:
    header[field] = scan.header[field]
  header['descrip'] = description
  # affine=None keeps both affines of the header; any other value would rewrite one of them.
  image = _image_class(scan.header)(data, None, header)
  # No name and no time in the gzip header: equal volumes give equal files.
  with igzip.IGzipFile('', 'wb', fileobj=file, mtime=0) if compressed else contextlib.nullcontext(file) as stream:
    image.to_stream(stream)


def data_files(path: pathlib.Path) -> list[pathlib.Path]:
  """The files with the values of a header that is a file of its own (.hdr); none for .nii."""
  base, is_header = _HEADER.subn('', path.name)
  if not is_header:
    return []
  endings = ('.IMG', '.IMG.GZ') if path.name.isupper() else ('.img', '.img.gz')
  return [file for file in (path.with_name(base + ending) for ending in endings) if file.exists()]


def _load(path):
  """Reads the image completely, because gzip compares its checksum only at the end of the stream."""
  header = _content(path)
  if _VALUES.search(path.name):
    raise UserError(f'{path}: holds only the values; give its header ({_VALUES.sub(".hdr", path.name)})')
  size = {int.from_bytes(header[:4], order) for order in ('little', 'big')}
  try:
    if not _HEADER.search(path.name):
      return (nib.Nifti2Image if 540 in size else nib.Nifti1Image).from_bytes(header)
    if 348 in size and header[344:347] not in (b'ni1', b'n+1'):
      raise UserError(f'{path}: Analyze states no orientation, so sides are unknown; export the scan as .nii.gz')
    files = data_files(path)
    if len(files) != 1:
      found = ' and '.join(file.name for file in files)
      problem = (
        f'has two data files, {found}; keep one' if files else 'has no data file (.img); copy it beside the header'
      )
      raise UserError(f'{path}: {problem}')
    streams = {'header': io.BytesIO(header), 'image': io.BytesIO(_content(files[0]))}
    holders = {name: nib.FileHolder(fileobj=stream) for name, stream in streams.items()}
    return (nib.Nifti2Pair if 540 in size else nib.Nifti1Pair).from_file_map(holders)
  except UserError:
    raise
  except Exception as error:  # for an invalid header, nibabel raises its own errors and those of struct and NumPy
    raise UserError(f'{path}: not a NIfTI file ({one_line(error)}); export the scan as .nii.gz') from None


def _content(path):
  formats.check_file(path)
  try:
    content = path.read_bytes()
    return igzip.decompress(content) if content[:2] == b'\x1f\x8b' else content
  except (OSError, EOFError, isal_zlib.error) as error:
    raise UserError(f'{path}: truncated or unreadable ({one_line(error)}); copy it again from its source') from None


def _image_class(header):
  return nib.Nifti2Image if isinstance(header, nib.Nifti2Header) else nib.Nifti1Image
