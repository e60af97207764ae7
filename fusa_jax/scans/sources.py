"""Scans and pictures, whatever they are stored as: found in folders and archives, named, and read."""

import pathlib

import numpy as np

from fusa_jax.scans import dicom, nifti, pictures, volumes
from fusa_jax.scans.archives import within
from fusa_jax.system.errors import UserError


def find(source: pathlib.Path, kind: str | None, unpacked: pathlib.Path) -> list[pathlib.Path | dicom.Series]:
  """The scans and, for grey values, the pictures that `source` names.

  Args:
    source: a file, or a folder or .zip of them and of DICOM series, at any depth and in any mixture; what names end in
      `_seg`, `_mask` or `_probability`, and what begins with a dot, is left out.
    kind: one of volumes.VALUES; None: scans of either.
    unpacked: a folder for what archives hold.

  Raises:
    UserError: there is none; there are only pictures, and the values wanted are HU; two have one name; a damaged
      archive or DICOM file.
  """
  if not source.exists():
    raise UserError(
      f'--input: {source} does not exist; give a scan (.nii, .nii.gz; of grey values also .png, .jpg), or a folder or '
      '.zip of scans or DICOM series'
    )
  files = list(within(source, unpacked))
  of_dicom = [path for path in files if is_dicom(path)]
  paths = [
    path for path in files if _is_known_by_name(path) and not stem(path).endswith(('_seg', '_mask', '_probability'))
  ]
  if files == [source] and not of_dicom:  # a file that was named is read or refused, whatever its name
    paths = files
  paths += dicom.find_series(of_dicom) if of_dicom else []
  scans = [path for path in paths if not is_picture(path)]
  if kind != 'grey':
    if paths and not scans:
      advice = 'give scans'
      if kind == 'hu':
        advice = 'and this run was trained on HU; give scans in HU, or a run trained with data.intensity=grey'
      raise UserError(f'--input: {paths[0]} is a picture of grey values, {advice}')
    paths = scans
  if not paths:
    what = 'scan (.nii, .nii.gz, DICOM)' if kind != 'grey' else 'scan (.nii, .nii.gz) or picture (.png, .jpg)'
    raise UserError(f'--input: no {what} in {source}; give a scan, or a folder of scans')
  known = {}
  for path in paths:
    if known.setdefault(stem(path), path) != path:
      raise UserError(f'--input: {path} and {known[stem(path)].name} would be written under one name; rename one')
  return paths


def read(path: pathlib.Path | dicom.Series, kind: str) -> volumes.Scan | np.ndarray:
  """A scan, or a picture's values [H, W]; raises UserError as the reader of its format."""
  if isinstance(path, dicom.Series):
    return dicom.read_series(path, kind)
  return pictures.read_picture(path) if is_picture(path) else nifti.read_scan(path, kind)


def is_dicom(path: pathlib.Path) -> bool:
  """Whether a file is DICOM; those are not looked into whose names say that they are something else."""
  return not _is_known_by_name(path) and dicom.is_dicom(path)


def _is_known_by_name(path):
  return nifti.is_nifti(path) or pictures.is_picture(path)


def is_picture(path: pathlib.Path | dicom.Series) -> bool:
  return isinstance(path, pathlib.Path) and pictures.is_picture(path)


def stem(path: pathlib.Path | dicom.Series) -> str:
  """What the names of the results begin with."""
  if isinstance(path, dicom.Series):
    return path.name
  return path.stem if is_picture(path) else nifti.stem(path)
