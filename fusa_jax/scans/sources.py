"""Finds scans and pictures of all formats in folders and archives; each is a `Source` of its format."""

import pathlib

from fusa_jax.scans import dicom, nifti, pictures
from fusa_jax.scans.archives import within
from fusa_jax.scans.formats import Source
from fusa_jax.system.errors import UserError

# A file belongs to the first format that claims it. Formats that check only names come before those that open files.
FORMATS: tuple[type[Source], ...] = (nifti.NiftiFile, pictures.PictureFile, dicom.Series)
# Endings of the names of masks and results, which often lie beside scans.
_RESULTS = ('_seg', '_mask', '_probability')


def find_sources(path: pathlib.Path, intensity: str | None, unpacked: pathlib.Path) -> list[Source]:
  """Finds the scans in `path`, and the pictures if the intensity is grey.

  The order is that of FORMATS; within a format, files are sorted by path and series by number.

  Args:
    path: a file, or a folder or .zip of files of any format and depth. Names that end in `_seg`, `_mask` or
      `_probability`, or begin with a dot, are skipped.
    intensity: one of volumes.VALUES; None accepts scans of both.
    unpacked: the folder for unpacked archives.

  Raises:
    UserError: nothing is found; only pictures are found, but HU are needed; two sources have the same name; an archive
      or DICOM file is damaged.
  """
  if not path.exists():
    raise UserError(
      f'input: {path} does not exist; give a scan ({_endings()}; for 8-bit images also {_endings(of_pictures=True)}), '
      'or a folder or .zip of scans or DICOM series'
    )
  files, claimed = list(within(path, unpacked)), {}
  is_single_file = files == [path]  # it is read or refused, whatever its name
  for file in files:
    claimed.setdefault(format_of(file) or (nifti.NiftiFile if is_single_file else None), []).append(file)
  sources = [source for one in FORMATS if one in claimed for source in one.from_files(claimed[one])]
  if not is_single_file:
    sources = [source for source in sources if not source.stem.endswith(_RESULTS)]
  scans = [source for source in sources if not source.is_picture]
  if intensity != 'grey':
    if sources and not scans:
      advice = '; give scans'
      if intensity == 'hu':
        advice = ', but this run was trained on HU; give scans in HU, or a run trained with data.intensity=grey'
      raise UserError(f'input: {sources[0]} is an 8-bit picture{advice}')
    sources = scans
  if not sources:
    expected = f'scan ({_endings()}, DICOM)'
    if intensity == 'grey':
      expected = f'scan ({_endings()}) or picture ({_endings(of_pictures=True)})'
    raise UserError(f'input: no {expected} in {path}; give a scan, or a folder of scans')
  by_stem = {}
  for source in sources:
    first = by_stem.setdefault(source.stem, source)
    if first is not source:
      raise UserError(f'input: results of {source} and {first.name} would have the same name; rename one')
  return sources


def format_of(path: pathlib.Path) -> type[Source] | None:
  """The format of a file; None if no format claims it."""
  return next((one for one in FORMATS if one.claims(path)), None)


def _endings(of_pictures=False):
  return ', '.join(one.endings for one in FORMATS if one.endings and one.is_picture == of_pictures)
