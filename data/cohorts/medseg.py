"""MedSeg's COVID-19 CT (medicalsegmentation.com): `tr_im.nii.gz` with `tr_mask.nii.gz`, and `rp_im/` with `rp_msk/`.

Labels are 1 ground glass, 2 consolidation, 3 pleural effusion. The first two are lesions of the lung. `rp_im` has nine
scans. `tr_im` has a hundred loose slices of more than forty patients, without patient IDs. The originals were pictures
on the web. They were rescaled to HU by the values of air and fat, and HU above their window are lost.
"""

import pathlib

from data.cohorts import Case, by_name, paired
from fusa_jax.scans import volume_files
from fusa_jax.system.errors import UserError

_LESION = (1, 2)


def recognises(folder: pathlib.Path) -> bool:
  return (folder / 'rp_im').is_dir() or 'tr_im' in by_name(folder)


def find(folder: pathlib.Path) -> list[Case]:
  """The scans, and one case per loose slice.

  Raises:
    UserError: scans or slices without a mask, one line each; the mask of the slices cannot be read.
  """
  files, cases = by_name(folder), []
  if (folder / 'rp_im').is_dir():
    masks = by_name(folder / 'rp_msk') if (folder / 'rp_msk').is_dir() else {}
    cases = paired(by_name(folder / 'rp_im'), masks, lambda patient: f'rp_msk/{patient}.nii.gz', _LESION)
    cases = [case._replace(patient=f'rp_{case.patient}', windowed=True) for case in cases]
  if 'tr_im' in files:
    if 'tr_mask' not in files:
      raise UserError(f'{files["tr_im"]}: the mask tr_mask.nii.gz is missing; add it, or remove the slices')
    count = volume_files.read_grid(files['tr_mask']).shape[0]
    cases += [
      Case(f'tr_{number:03d}', files['tr_im'], files['tr_mask'], _LESION, named=False, slice=number, windowed=True)
      for number in range(count)
    ]
  return cases
