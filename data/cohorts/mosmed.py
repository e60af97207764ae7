"""MosMedData (Morozov et al. 2020): 1110 studies in `studies/CT-0` to `CT-4`, 50 with `masks/study_NNNN_mask.nii.gz`.

Cases are the studies with a mask, and the studies of CT-0, which have no signs of viral pneumonia according to the
release. All other studies are ignored, because the positions of their lesions are unknown.
"""

import pathlib

from data.cohorts import Case, by_name, refuse_lonely


def recognises(folder: pathlib.Path) -> bool:
  return (folder / 'studies' / 'CT-0').is_dir() and (folder / 'masks').is_dir()


def find(folder: pathlib.Path) -> list[Case]:
  """The studies with known lesions.

  Raises:
    UserError: masks without a study, one line each.
  """
  masks, healthy = by_name(folder / 'masks', '_mask'), by_name(folder / 'studies' / 'CT-0')
  studies = {name: path for severity in (folder / 'studies').glob('CT-*') for name, path in by_name(severity).items()}
  refuse_lonely(
    masks, studies, lambda name: f'the study {name} is missing in studies/CT-0 to CT-4; add it, or remove the mask'
  )
  return [Case(name, studies[name], masks.get(name)) for name in sorted(masks.keys() | healthy.keys())]
