"""A folder of scans as released -> which cohort it is, and its cases."""

import itertools
import logging
import pathlib

from data.cohorts import (
  AS_RELEASED,
  Case,
  CohortOptions,
  covid19_20,
  decathlon,
  dicom_pairs,
  medseg,
  mosmed,
  nnunet,
  only_folder,
  pairs,
  slices,
  zenodo_20,
)
from fusa_jax.scans import volumes
from fusa_jax.system.errors import UserError

# In the order in which a folder is tried: what is more particular first.
COHORTS = {
  'covid19_20': covid19_20,
  'zenodo_20': zenodo_20,
  'mosmed': mosmed,
  'medseg': medseg,
  'decathlon': decathlon,
  'nnunet': nnunet,
  'dicom_pairs': dicom_pairs,
  'pairs': pairs,
  'slices': slices,
}
PATIENTS = ('named', 'each_slice')


def find(raw_dir: str | pathlib.Path, options: CohortOptions = AS_RELEASED) -> tuple[str, list[Case]]:
  """The cohort's name and its cases as options, sorted by patient.

  Args:
    raw_dir: the folder, as it was unpacked.
    options: what its user says of it.

  Raises:
    UserError: no folder; a layout that is none of COHORTS'; files that are missing, a line each; values of the other
      kind; slices of unknown patients where that was not said.
  """
  folder = pathlib.Path(raw_dir)
  if options.intensity not in volumes.VALUES:
    raise UserError(f'data.intensity: there is no {options.intensity!r}; one of {", ".join(volumes.VALUES)}')
  if options.patients not in PATIENTS:
    raise UserError(f'data.patients: there is no {options.patients!r}; one of {", ".join(PATIENTS)}')
  if not folder.is_dir():
    raise UserError(f'data.raw_dir: {folder} is no folder; give the one that holds the scans')
  tried = itertools.product(dict.fromkeys((folder, only_folder(folder))), COHORTS.items())
  for place, (name, cohort) in tried:
    if cohort.recognises(place):
      cases = cohort.find(place)
      if not cases:
        raise UserError(f'{place}: laid out as {name}, but without any scan; unpack it again')
      cases = _of_known_patients(folder, _of_intensity(folder, cases, options), options)
      if options.lesion_labels:
        cases = [case._replace(lesion_labels=tuple(options.lesion_labels)) for case in cases]
      return name, sorted(cases, key=lambda case: case.patient)
  raise UserError(
    f'{folder}: no scans with masks in a naming that is known (X_ct.nii.gz beside X_seg.nii.gz, X.nii.gz or a folder X '
    'of DICOM beside X_mask.nii.gz, imagesTr and labelsTr, dataset.json, pictures in images and masks or in a folder a '
    'class, ...: docs/data.md); give that folder, or rename the files'
  )


def _of_intensity(folder, cases, options):
  """The cases of that intensity, said to be so; those of the other one are left out."""
  chosen = [case._replace(intensity=options.intensity) for case in cases if case.intensity in (None, options.intensity)]
  if not chosen:
    if options.intensity == 'hu':
      raise UserError(f'{folder}: holds 8-bit grey values, not HU; say so with --config.data.intensity=grey')
    raise UserError(f'{folder}: holds Hounsfield units, not grey values; leave out --config.data.intensity=grey')
  return chosen


def _of_known_patients(folder, cases, options):
  """The cases whose patients are known, or all where that is not asked for."""
  if options.patients == 'each_slice':
    return cases
  named = [case for case in cases if case.named]
  if not named:
    raise UserError(
      f'{folder}: whose slices these are is not known, so that a patient may be both trained on and tested; add '
      'slices.csv (name,patient), or say --config.data.patients=each_slice and take no number for one of new patients'
    )
  if len(named) < len(cases):
    logging.warning(
      '%s: %d slices of unknown patients are left out; --config.data.patients=each_slice takes them, too',
      folder,
      len(cases) - len(named),
    )
  return named
