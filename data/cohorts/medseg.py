"""MedSeg's COVID-19 CT (medicalsegmentation.com): `tr_im.nii.gz` with `tr_mask.nii.gz`, and `rp_im/` with `rp_msk/`.

Labels are 1 ground glass, 2 consolidation, 3 pleural effusion. The first two are lesions of the lung. `rp_im` has nine
scans. `tr_im` has a hundred loose slices of more than forty patients, without patient IDs. The originals were pictures
on the web. They were rescaled to HU by the values of air and fat, and HU above their window are lost.
"""

import pathlib

from data.cohorts import Case, by_name, paired, subfolder, with_ending
from fusa_jax.scans import classes, volume_files

_MEANINGS = ((1, 'ground glass'), (2, 'consolidation'), (3, 'pleural effusion'))
_LESION = classes.of_lesion((1, 2))._replace(meanings=_MEANINGS)


def recognises(folder: pathlib.Path) -> bool:
  return bool(subfolder(folder, 'rp_im') or 'tr_im' in dict(with_ending(folder, '')))


def find(folder: pathlib.Path) -> list[Case]:
  """The scans, and one case per loose slice.

  Raises:
    UserError: scans or slices without a mask, masks without a scan, one line each; the mask of the slices cannot be
      read.
  """
  scans, masks = (by_name(subfolder(folder, name)) for name in ('rp_im', 'rp_msk'))
  cases = paired(scans, masks, 'rp_im/{}.nii.gz', 'rp_msk/{}.nii.gz', _LESION)
  cases = [case._replace(patient=f'rp_{case.patient}', windowed=True) for case in cases]
  files = by_name(folder)
  images, masks = ({'tr': files[name]} if name in files else {} for name in ('tr_im', 'tr_mask'))
  for loose in paired(images, masks, '{}_im.nii.gz', '{}_mask.nii.gz', _LESION):
    count = volume_files.read_grid(loose.mask).shape[0]
    cases += [
      loose._replace(patient=f'tr_{number:03d}', named=False, slice=number, windowed=True) for number in range(count)
    ]
  return cases
