"""The twenty cases of Ma et al. (Zenodo 3757476): `COVID-19-CT-Seg_20cases` beside folders of masks with equal names.

`Infection_Mask` has the values 0 and 1. `Lung_and_Infection_Mask` has 1 and 2 for the lungs, 3 for lesion; it is read
if data.classes is given. The ten `coronacases` scans are in HU. The ten `radiopaedia` scans are windowed 8-bit images
of eight patients.
"""

import pathlib

from data.cohorts import Case, by_name, paired, subfolder
from fusa_jax.scans import classes

_SCANS = 'COVID-19-CT-Seg_20cases'
_WITH_LUNGS = 'Lung_and_Infection_Mask'
_MEANINGS = ((1, 'left lung'), (2, 'right lung'), (3, 'infection'))
_MASKS = {'Infection_Mask': classes.LESION, _WITH_LUNGS: classes.of_lesion((3,))._replace(meanings=_MEANINGS)}


def recognises(folder: pathlib.Path) -> bool:
  return subfolder(folder, _SCANS) is not None


def find(folder: pathlib.Path, several: bool = False) -> list[Case]:
  """All cases, with the masks of infection if present, otherwise those of lungs and infection.

  Args:
    folder: the folder of the cohort.
    several: whether data.classes gives mask values. The masks of lungs and infection are then preferred.

  Raises:
    UserError: scans without a mask, masks without a scan, and second files of a patient, one line each.
  """
  of_masks = next((name for name in sorted(_MASKS, reverse=several) if subfolder(folder, name)), 'Infection_Mask')
  scans, masks = (by_name(subfolder(folder, name)) for name in (_SCANS, of_masks))
  cases = paired(scans, masks, f'{_SCANS}/{{}}.nii.gz', f'{of_masks}/{{}}.nii.gz', _MASKS[of_masks])
  return [
    # Names are radiopaedia_CASE_STUDY_SERIES: two of the eight cases have two scans.
    case._replace(intensity='grey', owner='_'.join(case.patient.split('_')[:2]))
    if case.patient.startswith('radiopaedia')
    else case._replace(intensity='hu')
    for case in cases
  ]
