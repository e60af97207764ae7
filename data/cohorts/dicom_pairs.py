"""One folder or .zip of DICOM per patient, `X/` with a CT series at any depth, and its mask.

The mask is `X_seg.nii.gz` or `X_mask.nii.gz` beside it, or a DICOM SEG in it that refers to the series. A viewer or
`--mode=predict --dicom` can save this SEG.
"""

import pathlib

from data.cohorts import Case, by_name, refuse_lonely
from fusa_jax.scans import archives, dicom, sources
from fusa_jax.system.errors import UserError


def recognises(folder: pathlib.Path) -> bool:
  patients, (of_seg, of_mask) = _patients(folder), _masks(folder)
  beside_mask = patients.keys() & (of_seg | of_mask).keys()
  # This is a folder of NIfTI pairs, perhaps with the original DICOM beside them, if no mask has only DICOM.
  in_nifti = of_mask.keys() & by_name(folder).keys()
  if in_nifti and beside_mask <= in_nifti:
    return False
  # A folder that contains only one folder may be an unpacked archive: the patients are then inside that folder.
  alone = sum(not path.name.startswith('.') for path in folder.iterdir()) == 1
  return bool(beside_mask) or (not alone and any(path.is_dir() and _holds_dicom(path) for path in patients.values()))


def find(folder: pathlib.Path) -> list[Case]:
  """One case per archive and per folder with DICOM. Their content is checked later, when they are read.

  Raises:
    UserError: masks without a folder, or two files for the same patient, one line each.
  """
  patients, (of_seg, of_mask) = _patients(folder), _masks(folder)
  twice = sorted(of_seg.keys() & of_mask.keys())
  if twice:
    raise UserError(
      '\n'.join(f'{of_mask[name]}: same patient as {of_seg[name].name}; remove one of the two' for name in twice)
    )
  masks = of_seg | of_mask
  refuse_lonely(masks, patients, lambda name: f'the DICOM folder {name} is missing; add it, or remove the mask')
  return [Case(name, path, masks.get(name, path), intensity='hu') for name, path in sorted(patients.items())]


def _patients(folder):
  """The archives, and the folders with DICOM or an archive inside, by patient.

  Raises:
    UserError: a folder and an archive have the same name.
  """
  patients = {}
  for path in sorted(folder.iterdir()):
    is_archive = archives.is_archive(path)
    if not path.name.startswith('.') and (is_archive or (path.is_dir() and _may_hold_dicom(path))):
      name = path.stem if is_archive else path.name
      if name in patients:
        raise UserError(f'{path}: same patient as {patients[name].name}; remove one of the two')
      patients[name] = path
  return patients


def _masks(folder):
  return [by_name(folder, ending) for ending in ('_seg', '_mask')]


def _may_hold_dicom(folder):
  return any(map(archives.is_archive, archives.in_folder(folder))) or _holds_dicom(folder)


def _holds_dicom(folder):
  return any(sources.format_of(path) is dicom.Series for path in archives.in_folder(folder))
