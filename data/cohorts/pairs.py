"""Any flat folder of pairs: `X.nii.gz` beside `X_mask.nii.gz` or `X_seg.nii.gz`, one scan per patient."""

import pathlib

from data.cohorts import MASKS, Case, by_name, paired, unique, with_ending


def recognises(folder: pathlib.Path) -> bool:
  return bool(with_ending(folder, *MASKS))


def find(folder: pathlib.Path) -> list[Case]:
  """All scans with their masks.

  Raises:
    UserError: scans without a mask, masks without a scan, and second files of a patient, one line each.
  """
  masks = by_name(folder, *MASKS)
  scans = unique((name, path) for name, path in with_ending(folder, '') if path not in masks.values())
  return paired(scans, masks, '{}.nii.gz', '{}_mask.nii.gz')
