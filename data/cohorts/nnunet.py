"""nnU-Net's raw datasets: `imagesTr/X_0000.nii.gz` beside `labelsTr/X.nii.gz`, a scan per patient, one channel."""

import pathlib

from data.cohorts import Case, by_name, paired
from fusa_jax.system.errors import UserError


def recognises(folder: pathlib.Path) -> bool:
  return all((folder / name).is_dir() for name in ('imagesTr', 'labelsTr'))


def find(folder: pathlib.Path) -> list[Case]:
  """The training cases.

  Raises:
    UserError: scans without a label, or with more channels than CT has, a line each.
  """
  more = by_name(folder / 'imagesTr', '_0001').values()
  if more:
    raise UserError('\n'.join(f'{path}: a second channel; CT has one, X_0000, so take it out' for path in more))
  return paired(
    by_name(folder / 'imagesTr', '_0000'),
    by_name(folder / 'labelsTr'),
    lambda patient: folder / 'labelsTr' / f'{patient}.nii.gz',
  )
