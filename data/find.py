"""A folder of scans as released -> which cohort it is, and its cases."""

import pathlib

from data.cohorts import Case, covid19_20, decathlon, mosmed, nnunet, pairs, zenodo_20
from fusa_jax.errors import UserError

# In the order in which a folder is tried: what is more particular first.
COHORTS = {
  'covid19_20': covid19_20,
  'zenodo_20': zenodo_20,
  'mosmed': mosmed,
  'decathlon': decathlon,
  'nnunet': nnunet,
  'pairs': pairs,
}


def find(raw_dir: str | pathlib.Path, lesion_labels: tuple[int, ...] = ()) -> tuple[str, list[Case]]:
  """The cohort's name and its cases, sorted by patient.

  Args:
    raw_dir: the folder, as it was unpacked.
    lesion_labels: values of the masks that are lesion, in the place of what the cohort says; () leaves that.

  Raises:
    UserError: no folder; a layout that is none of COHORTS'; files that are missing, a line each.
  """
  folder = pathlib.Path(raw_dir)
  if not folder.is_dir():
    raise UserError(f'data.raw_dir: {folder} is no folder; give the one that holds the scans')
  for name, cohort in COHORTS.items():
    if cohort.recognises(folder):
      cases = cohort.find(folder)
      return name, [case._replace(lesion_labels=tuple(lesion_labels)) for case in cases] if lesion_labels else cases
  raise UserError(
    f'{folder}: no scans with masks in a naming that is known (X_ct.nii.gz beside X_seg.nii.gz, X.nii.gz beside '
    'X_mask.nii.gz, imagesTr and labelsTr, dataset.json, ...: docs/data.md); give that folder, or rename the files'
  )
