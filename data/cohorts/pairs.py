"""Any flat folder of pairs: `X.nii.gz` beside `X_mask.nii.gz`, one scan per patient."""

import pathlib

from data.cohorts import Case, by_name, paired


def recognises(folder: pathlib.Path) -> bool:
  return bool(by_name(folder, '_mask'))


def find(folder: pathlib.Path) -> list[Case]:
  """All scans with their masks.

  Raises:
    UserError: scans without a mask, one line each.
  """
  masks = by_name(folder, '_mask')
  scans = {name: path for name, path in by_name(folder).items() if path not in masks.values()}
  return paired(scans, masks, lambda patient: f'{patient}_mask.nii.gz')
