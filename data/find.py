"""Recognises the cohort in a folder of scans as released, and lists its cases."""

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

# Layouts are tried in this order: the more specific ones first.
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
  """Returns the cohort's name and its cases, with the options applied, sorted by patient.

  Args:
    raw_dir: the unpacked folder.
    options: the user's options for the cohort.

  Raises:
    UserError: `raw_dir` is not a folder; its layout is not in COHORTS; files are missing, one line each; the values
      have the other intensity; patients are unknown and the options do not allow that.
  """
  folder = pathlib.Path(raw_dir)
  if options.intensity not in volumes.VALUES:
    raise UserError(f'data.intensity: {options.intensity!r} is unknown; give one of {", ".join(volumes.VALUES)}')
  if options.patients not in PATIENTS:
    raise UserError(f'data.patients: {options.patients!r} is unknown; give one of {", ".join(PATIENTS)}')
  if not folder.is_dir():
    raise UserError(f'data.raw_dir: {folder} is not a folder; give the folder that contains the scans')
  tried = itertools.product(dict.fromkeys((folder, only_folder(folder))), COHORTS.items())
  for place, (name, cohort) in tried:
    if cohort.recognises(place):
      cases = cohort.find(place)
      if not cases:
        raise UserError(f'{place}: has the layout of {name}, but no scans; unpack it again')
      cases = _of_known_patients(folder, _of_intensity(folder, cases, options), options)
      if options.lesion_labels:
        cases = [case._replace(lesion_labels=tuple(options.lesion_labels)) for case in cases]
      return name, sorted(cases, key=lambda case: case.patient)
  raise UserError(
    f'{folder}: no known layout of scans and masks (X_ct.nii.gz with X_seg.nii.gz, X.nii.gz or a DICOM folder X with '
    'X_mask.nii.gz, imagesTr with labelsTr, dataset.json, images with masks, one folder per class, others in '
    'docs/data.md); give the folder of the scans, or rename the files'
  )


def _of_intensity(folder, cases, options):
  """The cases of the chosen intensity, marked with it. Cases of the other intensity are left out."""
  chosen = [case._replace(intensity=options.intensity) for case in cases if case.intensity in (None, options.intensity)]
  if not chosen:
    if options.intensity == 'hu':
      raise UserError(f'{folder}: contains 8-bit images, not HU; add --config.data.intensity=grey')
    raise UserError(f'{folder}: contains Hounsfield units, not 8-bit images; leave out --config.data.intensity=grey')
  return chosen


def _of_known_patients(folder, cases, options):
  """The cases of known patients; all cases if the options allow unknown patients."""
  if options.patients == 'each_slice':
    return cases
  named = [case for case in cases if case.named]
  if not named:
    raise UserError(
      f'{folder}: slices without patient IDs, so one patient may be in both training and test; add slices.csv '
      '(name,patient), or use --config.data.patients=each_slice (scores will not be patient-level)'
    )
  if len(named) < len(cases):
    logging.warning(
      '%s: %d slices without patient IDs are left out; --config.data.patients=each_slice includes them',
      folder,
      len(cases) - len(named),
    )
  return named
