"""COVID-19-20 (MICCAI 2020 challenge, TCIA "CT Images in COVID-19"), and all cohorts with the same file names.

One flat folder with one scan per patient: `Train/volume-covid19-A-NNNN_ct.nii.gz` beside `..._seg.nii.gz`. The
`Validation` folder of the release has no masks and is left out.
"""

import pathlib

from data.cohorts import MASKS, Case, by_name, paired, subfolder, with_ending


def recognises(folder: pathlib.Path) -> bool:
  return bool(with_ending(_train(folder), '_ct'))


def find(folder: pathlib.Path) -> list[Case]:
  """All scans with their masks. `folder` contains the files, or a folder `Train` with them.

  Raises:
    UserError: scans without a mask, masks without a scan, and second files of a patient, one line each.
  """
  folder = _train(folder)
  return paired(by_name(folder, '_ct'), by_name(folder, *MASKS), '{}_ct.nii.gz', '{}_seg.nii.gz')


def _train(folder):
  return subfolder(folder, 'Train') or folder
