"""The twenty cases of Ma et al. (Zenodo 3757476): `COVID-19-CT-Seg_20cases` beside folders of masks of the same names.

`Infection_Mask` holds 0 and 1; `Lung_and_Infection_Mask` 1 and 2 for the lungs, 3 for lesion. Of the scans, the ten
`coronacases` are in HU; the ten `radiopaedia` are 8-bit images, of a window, and of eight patients.
"""

import pathlib

from data.cohorts import Case, by_name, paired

_SCANS = 'COVID-19-CT-Seg_20cases'
_MASKS = {'Infection_Mask': (), 'Lung_and_Infection_Mask': (3,)}


def recognises(folder: pathlib.Path) -> bool:
  return (folder / _SCANS).is_dir()


def find(folder: pathlib.Path) -> list[Case]:
  """All cases, with the mask of infection where there is one, else that of lungs and infection.

  Raises:
    UserError: scans without a mask, a line each.
  """
  kind = next((kind for kind in _MASKS if (folder / kind).is_dir()), 'Infection_Mask')
  masks = by_name(folder / kind) if (folder / kind).is_dir() else {}
  cases = paired(by_name(folder / _SCANS), masks, lambda patient: f'{kind}/{patient}.nii.gz', _MASKS[kind])
  return [
    # radiopaedia_CASE_STUDY_SERIES: two of the eight cases have two scans.
    case._replace(intensity='grey', owner='_'.join(case.patient.split('_')[:2]))
    if case.patient.startswith('radiopaedia')
    else case._replace(intensity='hu')
    for case in cases
  ]
