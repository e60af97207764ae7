"""One folder or .zip of DICOM per patient, `X/` with a CT series at any depth, and its mask.

The mask is `X_seg.nii.gz` or `X_mask.nii.gz` beside it, or a DICOM SEG in it that refers to the series. A viewer or
`--mode=predict --dicom` can save this SEG.
"""

import pathlib

from data.cohorts import MASKS, Case, by_name, entries, lonely, name_of, refuse, unique, with_ending
from fusa_jax.scans import archives, dicom, sources


def recognises(folder: pathlib.Path) -> bool:
  found, masks = dict(patients(folder)), dict(with_ending(folder, *MASKS))
  beside_mask = found.keys() & masks.keys()
  # This is a folder of NIfTI pairs, perhaps with the original DICOM beside them, if no mask has only DICOM.
  in_nifti = masks.keys() & dict(with_ending(folder, '')).keys()
  if in_nifti and beside_mask <= in_nifti:
    return False
  # A folder that contains only one folder may be an unpacked archive: the patients are then inside that folder.
  alone = len(entries(folder)) == 1
  return bool(beside_mask) or (not alone and any(path.is_dir() and _holds_dicom(path) for path in found.values()))


def find(folder: pathlib.Path) -> list[Case]:
  """One case per archive and per folder with DICOM. Their content is checked later, when they are read.

  Raises:
    UserError: masks without a folder, two files for the same patient, and broken links, one line each.
  """
  refuse(
    [
      f'{path}: a broken link, perhaps to a patient; restore what it points to, or remove it'
      for path in entries(folder)
      if not path.exists() and path.suffix.lower() in ('', '.zip')
    ]
  )
  found, masks = unique(patients(folder)), by_name(folder, *MASKS)
  refuse(lonely(masks, found, 'the DICOM folder {} is missing; add it, or remove the mask'))
  return [Case(name, path, masks.get(name, path), intensity='hu') for name, path in sorted(found.items())]


def patients(folder: pathlib.Path) -> list[tuple[str, pathlib.Path]]:
  """The archives, and the folders with DICOM or an archive inside, with their patients."""
  return [
    (name_of(path.stem if archives.is_archive(path) else path.name), path)
    for path in entries(folder)
    if archives.is_archive(path) or (path.is_dir() and _may_hold_dicom(path))
  ]


def _may_hold_dicom(folder):
  return any(map(archives.is_archive, archives.in_folder(folder))) or _holds_dicom(folder)


def _holds_dicom(folder):
  return any(sources.format_of(path) is dicom.Series for path in archives.in_folder(folder))
