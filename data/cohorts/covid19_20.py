"""COVID-19-20 (MICCAI 2020 challenge, TCIA "CT Images in COVID-19"), and every cohort that names its files that way.

One flat folder, `Train/volume-covid19-A-NNNN_ct.nii.gz` beside `..._seg.nii.gz`, a scan per patient. The release's
`Validation` folder has no masks and is left alone.
"""

import pathlib

from data.cohorts import Case, by_name, paired


def recognises(folder: pathlib.Path) -> bool:
  return bool(by_name(_train(folder), '_ct'))


def find(folder: pathlib.Path) -> list[Case]:
  """All scans with their masks; `folder` is that of the files, or one with `Train` in it.

  Raises:
    UserError: scans without a mask, a line each.
  """
  folder = _train(folder)
  return paired(by_name(folder, '_ct'), by_name(folder, '_seg'), lambda patient: f'{patient}_seg.nii.gz')


def _train(folder):
  return folder / 'Train' if (folder / 'Train').is_dir() else folder
