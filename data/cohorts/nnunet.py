"""Raw datasets of nnU-Net: `imagesTr/X_0000.nii.gz` with `labelsTr/X.nii.gz`, one scan per patient, one channel."""

import pathlib

from data.cohorts import Case, by_name, paired
from fusa_jax.system.errors import UserError


def recognises(folder: pathlib.Path) -> bool:
  return all((folder / name).is_dir() for name in ('imagesTr', 'labelsTr'))


def find(folder: pathlib.Path) -> list[Case]:
  """The training cases.

  Raises:
    UserError: scans without a label, or with more than one channel, one line each.
  """
  more = by_name(folder / 'imagesTr', '_0001').values()
  if more:
    raise UserError('\n'.join(f'{path}: a second channel, but CT has only X_0000; remove it' for path in more))
  return paired(
    by_name(folder / 'imagesTr', '_0000'),
    by_name(folder / 'labelsTr'),
    lambda patient: folder / 'labelsTr' / f'{patient}.nii.gz',
  )
