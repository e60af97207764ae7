"""Scans and pictures, whatever they are stored as: found in folders and archives, each as a `Source` of its format."""

import pathlib

from fusa_jax.scans import dicom, nifti, pictures
from fusa_jax.scans.archives import within
from fusa_jax.scans.formats import Source
from fusa_jax.system.errors import UserError

# The first that claims a file has it: formats that look into files come after those that look at names.
FORMATS: tuple[type[Source], ...] = (nifti.NiftiFile, pictures.PictureFile, dicom.Series)
# Names of masks and results, which lie beside scans.
_RESULTS = ('_seg', '_mask', '_probability')


def find_sources(path: pathlib.Path, intensity: str | None, unpacked: pathlib.Path) -> list[Source]:
  """The scans and, for grey values, the pictures that `path` names.

  Formats come in the order of FORMATS; files in the order of their paths, series of their numbers.

  Args:
    path: a file, or a folder or .zip of files of any format, at any depth and in any mixture; what names end in `_seg`,
      `_mask` or `_probability`, and what begins with a dot, is left out.
    intensity: one of volumes.VALUES; None: scans of either.
    unpacked: a folder for what archives hold.

  Raises:
    UserError: there is none; there are only pictures, and the values wanted are HU; two have one name; a damaged
      archive or DICOM file.
  """
  if not path.exists():
    raise UserError(
      f'input: {path} does not exist; give a scan ({_endings()}; of grey values also {_endings(of_pictures=True)}), '
      'or a folder or .zip of scans or DICOM series'
    )
  files, claimed = list(within(path, unpacked)), {}
  is_named = files == [path]  # such a file is read or refused, whatever its name
  for file in files:
    claimed.setdefault(format_of(file) or (nifti.NiftiFile if is_named else None), []).append(file)
  sources = [source for one in FORMATS if one in claimed for source in one.from_files(claimed[one])]
  if not is_named:
    sources = [source for source in sources if not source.stem.endswith(_RESULTS)]
  scans = [source for source in sources if not source.is_picture]
  if intensity != 'grey':
    if sources and not scans:
      advice = 'give scans'
      if intensity == 'hu':
        advice = 'and this run was trained on HU; give scans in HU, or a run trained with data.intensity=grey'
      raise UserError(f'input: {sources[0]} is a picture of grey values, {advice}')
    sources = scans
  if not sources:
    what = f'scan ({_endings()}, DICOM)'
    if intensity == 'grey':
      what = f'scan ({_endings()}) or picture ({_endings(of_pictures=True)})'
    raise UserError(f'input: no {what} in {path}; give a scan, or a folder of scans')
  known = {}
  for source in sources:
    first = known.setdefault(source.stem, source)
    if first is not source:
      raise UserError(f'input: {source} and {first.name} would be written under one name; rename one')
  return sources


def format_of(path: pathlib.Path) -> type[Source] | None:
  """The format of a file; None where no format claims it."""
  return next((one for one in FORMATS if one.claims(path)), None)


def _endings(of_pictures=False):
  return ', '.join(one.endings for one in FORMATS if one.endings and one.is_picture == of_pictures)
