"""COVID-19-20 (MICCAI 2020 challenge, TCIA "CT Images in COVID-19"), and every cohort that names its files that way.

One flat folder, `Train/volume-covid19-A-NNNN_ct.nii.gz` beside `..._seg.nii.gz`, a scan per patient. The release's
`Validation` folder has no masks and is left alone.
"""

import pathlib

from data.cohorts import Case
from fusa_jax.errors import UserError


def find(raw_dir: pathlib.Path) -> list[Case]:
  """All scans with their masks, sorted by patient. `raw_dir` is the folder of the files, or one with `Train` in it.

  Raises:
    UserError: no folder, no scans in it, or scans without a mask (all of them named, a line each).
  """
  raw_dir = pathlib.Path(raw_dir)
  if not raw_dir.is_dir():
    raise UserError(f'data.raw_dir: {raw_dir} is no folder; give the one that holds the *_ct.nii.gz files')
  folder = raw_dir / 'Train' if (raw_dir / 'Train').is_dir() else raw_dir
  cases, lonely = [], []
  for path in sorted(folder.iterdir()):
    for suffix in ('.nii.gz', '.nii'):
      if path.name.endswith(f'_ct{suffix}'):
        patient = path.name.removesuffix(f'_ct{suffix}')
        masks = [folder / f'{patient}_seg{s}' for s in ('.nii.gz', '.nii') if (folder / f'{patient}_seg{s}').is_file()]
        if masks:
          cases.append(Case(patient, path, masks[0]))
        else:
          lonely.append(f'{path}: its mask {patient}_seg{suffix} is missing; add it, or take the scan out')
  if lonely:
    raise UserError('\n'.join(lonely))
  if not cases:
    raise UserError(f'{folder}: no *_ct.nii.gz or *_ct.nii in it; give the folder that holds the scans')
  return cases
