"""Reads MetaImage (.mha, .mhd) and NRRD (.nrrd, .nhdr) files with SimpleITK (requirements-itk.txt).

The fields that SimpleITK does not pass on are read here: the names of data files, units, and whether the file states
its place at all.
"""

import importlib.util
import itertools
import pathlib
import re

import numpy as np
from isal import igzip, isal_zlib

from fusa_jax.scans import decoder, formats, volumes
from fusa_jax.system.errors import UserError, one_line

_NRRD = ('.nrrd', '.nhdr')
# Anatomical spaces of NRRD that ITK knows. It takes all others for left-posterior-superior.
_SPACES = ('right-anterior-superior', 'ras', 'left-anterior-superior', 'las', 'left-posterior-superior', 'lps')
_MILLIMETRES = {'mm': 1, 'millimeter': 1, 'cm': 10, 'm': 1000, 'um': 0.001, 'µm': 0.001, 'micron': 0.001, '?': 1, '': 1}
# More lines than any header has. 3D Slicer writes a few hundred.
_LINES = 100_000


def read(path: pathlib.Path) -> volumes.Stored:
  """Reads a file, and its data files if it is only a header.

  Raises:
    UserError: SimpleITK is not installed; unreadable, truncated or damaged; a data file is missing; not 3D; several
      values per voxel; invalid affine or unit.
  """
  if importlib.util.find_spec('SimpleITK') is None:
    raise UserError(f'{path}: SimpleITK is not installed; pip install -r requirements-itk.txt')
  formats.check_file(path)
  try:
    fields, start = _header(path)
    files = _data_files(path, fields)
    for file in files:
      if not file.is_file():
        raise UserError(f'{path}: its data file {file.name} is missing; copy it beside the header')
      formats.check_file(file)
    _check_compressed(fields, *((files[0], 0) if files else (path, start)))
  except (OSError, EOFError, isal_zlib.error) as error:
    raise UserError(f'{path}: truncated or unreadable ({one_line(error)}); copy it again from its source') from None
  try:  # ITK kills its process on some damaged files
    values, affine = decoder.apart(_with_simpleitk, path)
  except UserError as error:
    raise UserError(f'{path}: {error}') from None
  scale = _unit(path, fields)
  affine = np.diag([-scale, -scale, scale, 1]) @ affine  # from LPS to RAS
  volumes.check_affine(affine, path)
  header = volumes.new_header(values.shape, affine)
  # The affine that a reader of results finds in their headers, which store float32.
  return volumes.Stored(values, header.get_sform(), header, _unplaced(path, fields))


def _with_simpleitk(path):
  """Reads values [x, y, z] and their affine to LPS, in the unit of the file. Its errors do not name the file."""
  import SimpleITK

  reader = SimpleITK.ImageFileReader()
  reader.SetImageIO('NrrdImageIO' if _is_nrrd(path) else 'MetaImageIO')
  reader.SetFileName(str(path))
  try:
    image = reader.Execute()
  except RuntimeError as error:  # a call chain, with the reason in its last line
    reason = one_line(str(error).strip().splitlines()[-1])
    raise UserError(f'truncated or damaged ({reason}); copy it again from its source') from None
  count, size = image.GetNumberOfComponentsPerPixel(), image.GetSize()
  if count > 1:
    raise UserError(
      f'{count} values per voxel, which are colours or layers of a segmentation; save one value per voxel'
    )
  if len(size) < 3 or any(n != 1 for n in size[3:]) or 0 in size:
    raise UserError(f'{len(size)}D array of shape {size}; save one 3D volume')
  affine = np.eye(4)
  affine[:3, :3] = np.reshape(image.GetDirection(), (len(size), len(size)))[:3, :3] * image.GetSpacing()[:3]
  affine[:3, 3] = image.GetOrigin()[:3]
  return SimpleITK.GetArrayFromImage(image).T.reshape(size[:3]), affine


def data_files(path: pathlib.Path) -> list[pathlib.Path]:
  """The files with the values of a header; none if it holds them itself, or cannot be read."""
  try:
    return _data_files(path, _header(path)[0])
  except (OSError, UserError):
    return []


def _is_nrrd(path):
  return path.suffix.lower() in _NRRD


def _header(path):
  """Returns the fields of a header, names in lower case without spaces, and the place where attached values begin.

  The field '' is the list of data files that follows some headers.
  """
  separator, is_nrrd, fields = '=:'[_is_nrrd(path)], _is_nrrd(path), {}
  with path.open('rb') as file:
    lines = (line.decode('latin-1').strip() for line in itertools.islice(iter(file.readline, b''), _LINES))
    first = next(lines, '') if is_nrrd else 'NRRD'
    for line in lines:
      if is_nrrd and not line:
        break
      name, _, value = line.partition(separator)
      name, value = name.lower().replace(' ', ''), value.strip()
      fields[name] = value
      if name in ('datafile', 'elementdatafile') and value.startswith('LIST'):
        fields[''] = '\n'.join(lines)
      if name == 'elementdatafile':
        break
    start = file.tell()
  if not first.startswith('NRRD') or not (is_nrrd or 'elementdatafile' in fields):
    raise UserError(f'{path}: not a {"NRRD" if is_nrrd else "MetaImage"} file; export the scan as .nii.gz')
  return fields, start


def _data_files(path, fields):
  names = fields.get('datafile', fields.get('elementdatafile', 'LOCAL'))
  pattern = re.fullmatch(r'(\S*%\d*d\S*) +(\d+) +(\d+) +(\d+)( +\d+)?', names)  # slice%03d.raw 1 60 1
  if names.upper() == 'LOCAL':
    names = []
  elif names.startswith('LIST'):
    names = [line for line in fields[''].splitlines() if line]
  elif pattern:
    first, last, step = map(int, pattern.groups()[1:4])
    names = [pattern[1] % number for number in range(first, last + 1, max(step, 1))][:_LINES]
  else:
    names = [names]
  return [path.parent / name for name in names]


def _check_compressed(fields, file, start):
  """Compares the checksum of compressed values, which ITK does not, by decompressing them."""
  compressed = fields.get('encoding') in ('gzip', 'gz') or fields.get('compresseddata', '').lower() == 'true'
  if not compressed or {'byteskip', 'lineskip', 'headersize', ''} & set(fields):
    return
  with file.open('rb') as stream:
    stream.seek(start)
    content = stream.read()
  (igzip if content[:2] == b'\x1f\x8b' else isal_zlib).decompress(content)


def _unit(path, fields):
  """The millimetres of a unit of length."""
  units = set(re.findall(r'"([^"]*)"', fields.get('spaceunits', ''))) or {fields.get('distanceunits', '')}
  lengths = {_MILLIMETRES.get(unit.strip().lower()) for unit in units}
  if len(lengths) != 1 or None in lengths:
    raise UserError(f'{path}: unknown unit of length ({", ".join(sorted(units))}); save it in mm')
  return lengths.pop()


def _unplaced(path, fields):
  if _is_nrrd(path):
    if fields.get('space', '').lower() not in _SPACES:
      return 'states no anatomical space (space)'
    return '' if 'spacedirections' in fields else 'states no axes (space directions)'
  if not {'transformmatrix', 'rotation', 'orientation'} & set(fields):
    return 'states no axes (TransformMatrix)'
  return '' if {'elementspacing', 'elementsize'} & set(fields) else 'states no spacing (ElementSpacing)'
