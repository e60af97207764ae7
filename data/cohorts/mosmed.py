"""MosMedData (Morozov et al. 2020): 1110 studies in `studies/CT-0` to `CT-4`, 50 with `masks/study_NNNN_mask.nii.gz`.

Cases are the studies with a mask, and the studies of CT-0, which have no signs of viral pneumonia according to the
release. All other studies are left out, because the positions of their lesions are unknown. Without `masks`, all
studies are cases of `patient_labels`, with CT-0 to CT-4 as the classes of their patients.
"""

import pathlib
import re

from data.cohorts import Case, by_name, entries, lonely, refuse, subfolder, unique, with_ending


def recognises(folder: pathlib.Path) -> bool:
  return bool(subfolder(subfolder(folder, 'studies'), 'CT-0') and subfolder(folder, 'masks'))


def find(folder: pathlib.Path) -> list[Case]:
  """The studies; those of unknown lesions are unused.

  Raises:
    UserError: masks without a study, and studies of the same name, one line each.
  """
  masks, studies = by_name(subfolder(folder, 'masks'), '_mask'), subfolder(folder, 'studies')
  severities = _severities(studies)
  scans = unique(named for severity in severities for named in with_ending(severity, ''))
  refuse(lonely(masks, scans, 'the study {} is missing in studies/CT-0 to CT-4; add it, or remove the mask'))
  is_known = lambda name: name in masks or scans[name].parent.name.upper() == 'CT-0'
  return [
    Case(name, path, masks.get(name), unused='' if is_known(name) else 'no mask')
    for name, path in sorted(scans.items())
  ]


def studies(folder: pathlib.Path) -> list[tuple[str, pathlib.Path, str]]:
  """(name, path, class) of all studies, in `folder` or in its `studies`; [] if they are not of two classes or more."""
  severities = _severities(subfolder(folder, 'studies') or folder)
  found = [(*named, path.name.upper()) for path in severities for named in with_ending(path, '')]
  return found if len({name for *_, name in found}) > 1 else []


def _severities(folder):
  return [path for path in entries(folder) if path.is_dir() and re.fullmatch('CT-[0-4]', path.name.upper())]
