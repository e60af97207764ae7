"""MosMedData (Morozov et al. 2020): 1110 studies in `studies/CT-0` to `CT-4`, 50 with `masks/study_NNNN_mask.nii.gz`.

Cases are the studies with a mask, and those of CT-0, in which the release says that there are no signs of viral
pneumonia. Where the lesions of all others are is not known: they are left alone.
"""

import pathlib

from data.cohorts import Case, by_name, refuse_lonely


def recognises(folder: pathlib.Path) -> bool:
  return (folder / 'studies' / 'CT-0').is_dir() and (folder / 'masks').is_dir()


def find(folder: pathlib.Path) -> list[Case]:
  """The studies whose lesions are known.

  Raises:
    UserError: masks without their study, a line each.
  """
  masks, healthy = by_name(folder / 'masks', '_mask'), by_name(folder / 'studies' / 'CT-0')
  studies = {name: path for severity in (folder / 'studies').glob('CT-*') for name, path in by_name(severity).items()}
  refuse_lonely(
    masks, studies, lambda name: f'its study {name} is in none of studies/CT-0 to CT-4; add it, or take the mask out'
  )
  return [Case(name, studies[name], masks.get(name)) for name in sorted(masks.keys() | healthy.keys())]
