"""Raw datasets of nnU-Net: `imagesTr/X_0000.nii.gz` with `labelsTr/X.nii.gz`, one scan per patient, one channel.

Scans may also lack the `_0000`, as in the Decathlon. Then all must lack it. `dataset.json` says what mask values mean.
"""

import pathlib

from data.cohorts import Case, by_name, decathlon, paired, refuse, subfolder
from fusa_jax.scans import volume_files
from fusa_jax.scans.classes import LESION

LIST = decathlon.LIST


def recognises(folder: pathlib.Path) -> bool:
  return all(subfolder(folder, name) for name in ('imagesTr', 'labelsTr'))


def find(folder: pathlib.Path) -> list[Case]:
  """The training cases.

  Raises:
    UserError: scans without a label, labels without a scan, scans with more than one channel, or with and without
      `_0000`, one line each.
  """
  scans, labels = (by_name(subfolder(folder, name)) for name in ('imagesTr', 'labelsTr'))
  # The names of the labels decide: X_0000 may also be the whole name of a patient.
  bare = {name: path for name, path in scans.items() if name in labels}
  if not (bare and all(name in bare or not name.endswith('_0000') for name in scans)):
    refuse([_without_suffix(name, path, scans) for name, path in bare.items()])
    refuse(
      [
        f'{path}: a second channel, but CT has only X_0000; remove it'
        for name, path in scans.items()
        if name[-5:-4] == '_' and name[-4:].isdigit() and name[-4:] != '0000' and f'{name[:-4]}0000' in scans
      ]
    )
    scans = {name.removesuffix('_0000'): path for name, path in scans.items()}
  of_masks = LESION._replace(meanings=decathlon.meanings(folder))
  return paired(scans, labels, 'imagesTr/{}_0000.nii.gz', 'labelsTr/{}.nii.gz', of_masks)


def _without_suffix(name, path, scans):
  if f'{name}_0000' in scans:
    return f'{path}: same patient as {scans[f"{name}_0000"].name}; remove one of the two'
  wanted = f'{name}_0000{path.name[len(volume_files.stem(path)) :]}'
  return f'{path}: the ending _0000 is missing, which other scans have; rename it to {wanted}'
