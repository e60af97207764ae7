"""A folder or .zip of DICOM for each patient, `X/` with a CT series at any depth, and its mask.

The mask is `X_seg.nii.gz` or `X_mask.nii.gz` beside it, or a DICOM SEG in it that refers to the series, as a viewer or
`--mode=predict --dicom` has saved it.
"""

import pathlib

from data.cohorts import Case, by_name, refuse_lonely
from fusa_jax.scans import archives, dicom, sources
from fusa_jax.system.errors import UserError


def recognises(folder: pathlib.Path) -> bool:
  patients, (of_seg, of_mask) = _patients(folder), _masks(folder)
  beside_mask = patients.keys() & (of_seg | of_mask).keys()
  # Pairs of NIfTI, with what they were converted from or anything else beside them: as long as none has DICOM alone.
  in_nifti = of_mask.keys() & by_name(folder).keys()
  if in_nifti and beside_mask <= in_nifti:
    return False
  # One folder may be all that an archive held: then its own patients are looked at.
  alone = sum(not path.name.startswith('.') for path in folder.iterdir()) == 1
  return bool(beside_mask) or (not alone and any(path.is_dir() and _holds_dicom(path) for path in patients.values()))


def find(folder: pathlib.Path) -> list[Case]:
  """A case for each folder that holds DICOM, and for each archive; what is in them is seen when they are read.

  Raises:
    UserError: masks without their folder, or two of one name, a line each.
  """
  patients, (of_seg, of_mask) = _patients(folder), _masks(folder)
  twice = sorted(of_seg.keys() & of_mask.keys())
  if twice:
    raise UserError(
      '\n'.join(f'{of_mask[name]}: beside {of_seg[name].name}; take one of the two out' for name in twice)
    )
  masks = of_seg | of_mask
  refuse_lonely(masks, patients, lambda name: f'its folder of DICOM, {name}, is missing; add it, or take the mask out')
  return [Case(name, path, masks.get(name, path), intensity='hu') for name, path in sorted(patients.items())]


def _patients(folder):
  """By name, what may hold a series: folders in which there is DICOM or an archive, and archives.

  Raises:
    UserError: a folder and an archive of one name.
  """
  found = {}
  for path in sorted(folder.iterdir()):
    is_archive = archives.is_archive(path)
    if not path.name.startswith('.') and (is_archive or (path.is_dir() and _may_hold_dicom(path))):
      name = path.stem if is_archive else path.name
      if name in found:
        raise UserError(f'{path}: beside {found[name].name}; take one of the two out')
      found[name] = path
  return found


def _masks(folder):
  return [by_name(folder, ending) for ending in ('_seg', '_mask')]


def _may_hold_dicom(folder):
  return any(map(archives.is_archive, archives.in_folder(folder))) or _holds_dicom(folder)


def _holds_dicom(folder):
  return any(sources.format_of(path) is dicom.Series for path in archives.in_folder(folder))
