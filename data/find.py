"""Recognises the cohort in a folder of scans as released, and lists its cases."""

import itertools
import logging
import os
import pathlib
import re
from collections import defaultdict

from data import identity
from data.cohorts import (
  AS_RELEASED,
  Case,
  CohortOptions,
  covid19_20,
  decathlon,
  dicom_pairs,
  entry,
  folders,
  medseg,
  mosmed,
  nnunet,
  only_folder,
  pairs,
  patient_labels,
  refuse,
  slices,
  zenodo_20,
)
from fusa_jax.scans import classes, sources, volumes
from fusa_jax.scans.archives import in_folder
from fusa_jax.system.errors import UserError

# Layouts are tried in this order: the more specific ones first.
COHORTS = {
  'patient_labels': patient_labels,
  'covid19_20': covid19_20,
  'zenodo_20': zenodo_20,
  'mosmed': mosmed,
  'medseg': medseg,
  'decathlon': decathlon,
  'nnunet': nnunet,
  'dicom_pairs': dicom_pairs,
  'pairs': pairs,
  'folders': folders,
  'slices': slices,
}
PATIENTS = ('named', 'each_slice')
COLOURED = ('refuse', 'leave_out')
# Why a slice without a patient is not used (see `Case.unused`).
_UNKNOWN = 'patients unknown'


def find(
  raw_dir: str | pathlib.Path, options: CohortOptions = AS_RELEASED, quiet: bool = False
) -> tuple[str, list[Case]]:
  """Returns the cohort's name and its cases, with the options applied, sorted by patient. Logs what is left out.

  Args:
    raw_dir: the unpacked folder.
    options: the user's options for the cohort.
    quiet: do not log what is left out.

  Raises:
    UserError: `raw_dir` is not a folder; its layout is not in COHORTS; files are missing, one line each; the values
      have the other intensity; patients are unknown and the options do not allow that; an option is invalid.
  """
  _check(options)
  folder = pathlib.Path(raw_dir).expanduser()
  if not folder.is_dir():
    raise UserError(f'data.raw_dir: {folder} is not a folder; give the folder that contains the scans')
  tried = itertools.product(dict.fromkeys((folder, only_folder(folder))), COHORTS.items())
  for place, (name, cohort) in tried:
    if cohort.recognises(place):
      takes = {slices: (options.classes,), zenodo_20: (classes.have_values(options.classes),)}
      found = cohort.find(place, *takes.get(cohort, ()))
      if not found:
        raise UserError(f'{place}: has the layout of {name}, but no scans; unpack it again')
      refuse([f'{path}: {_missing(path)}' for case in found for path in case.files if not path.exists()])
      found = identity.identified(found, place, quiet)
      if cohort is patient_labels:
        found = patient_labels.labelled(found, place, options.classes)
      found = _of_intensity(folder, found, options)
      found = _of_known_patients(folder, found, options)
      if not quiet:
        _log_left_out(place, found, [entry(place, name) for name in _lists(cohort)])
      _check_kind(place, found, options)
      cases = [_with_options(case, options) for case in found if not case.unused]
      return name, sorted(cases, key=lambda case: case.patient)
  raise UserError(
    f'{folder}: no known layout of scans and masks (X_ct.nii.gz with X_seg.nii.gz, X.nii.gz or a DICOM folder X with '
    'X_mask.nii.gz, X/ct.nii.gz with X/mask.nii.gz, imagesTr with labelsTr, dataset.json, images with masks, one '
    'folder per class, scans with labels.csv (patient,class), others in docs/data.md); '
    'give the folder of the scans, or rename the files'
  )


def _check(options):
  for name, allowed in (('intensity', volumes.VALUES), ('patients', PATIENTS), ('coloured', COLOURED)):
    value = getattr(options, name)
    if value not in allowed:
      raise UserError(f'data.{name}: {value!r} is unknown; give one of {", ".join(allowed)}')
  labels = options.lesion_labels
  if not isinstance(labels, list | tuple) or not all(_is_label(label) for label in labels):
    numbers = [int(number) for number in re.findall(r'\d+', str(labels)) if int(number)] or [1, 2]
    typed = f'({numbers[0]},)' if len(numbers) == 1 else f'({",".join(map(str, numbers))})'
    raise UserError(
      f'data.lesion_labels: {labels!r} are not mask values (whole numbers other than 0); give the values that are '
      f'lesion, for example --config.data.lesion_labels="{typed}"'
    )
  classes.check_keys(options.classes, options.ignore_label, labels)


def _is_label(label):
  return isinstance(label, int | float) and not isinstance(label, bool) and label == int(label) != 0


def _lists(cohort):
  """The names of the lists that a cohort may have."""
  return (identity.LIST, *(getattr(cohort, name) for name in ('LIST', 'LABELS', 'SLICES') if hasattr(cohort, name)))


def _check_kind(place, cases, options):
  """Checks that mask values are given for masks only; `labels.meaning` checks the names of exclusive classes."""
  if cases[0].classes.exclusive:
    for key in ('lesion_labels', 'ignore_label'):
      if getattr(options, key) not in ((), [], None):
        raise UserError(f'data.{key}: a mask value, but {place} has classes of slices or patients; leave it out')
  if classes.are_names(options.classes) and not cases[0].has_labels:
    raise UserError(
      f'data.classes: names {", ".join(options.classes)} without mask values, but {place} has masks; give their '
      "values, for example --config.data.classes=\"{'ground glass': (1,), 'consolidation': (2,)}\""
    )


def _missing(path):
  if path.is_symlink():
    return f'a broken link to {os.readlink(path)}; restore what it points to, or remove it'
  return 'file not found; check the path'


def _with_options(case, options):
  if classes.have_values(options.classes):
    chosen = classes.chosen(options.classes, options.ignore_label)
    case = case._replace(classes=chosen._replace(meanings=case.classes.meanings))
  elif options.lesion_labels:
    case = case._replace(classes=classes.of_lesion(options.lesion_labels)._replace(meanings=case.classes.meanings))
  return case._replace(coloured=options.coloured) if isinstance(case.ct, tuple) else case


def _log_left_out(place, found, lists):
  """Logs the number and names of the files that are not used: those of cases by reason, and all others."""
  named, reasons = set(lists), defaultdict(dict)
  for case in found:
    named.update(case.files)
    if case.unused:
      reasons[case.unused].update(dict.fromkeys(case.files))
  for reason, paths in reasons.items():
    logging.info('left out (%s): %s', reason, sources.counted(path.name for path in paths))
  unknown = sum(case.unused == _UNKNOWN for case in found)
  if unknown:
    logging.warning(
      '%s: %d slices without patient IDs are left out; --config.data.patients=each_slice includes them', place, unknown
    )
  others = [path for path in in_folder(place) if path not in named and named.isdisjoint(path.parents)]
  if others:
    logging.info('left out: %s', sources.counted(path.name for path in others))


def _of_intensity(folder, cases, options):
  """The cases of the chosen intensity, marked with it. Cases of the other intensity become unused."""
  other = 'HU, not 8-bit values' if options.intensity == 'grey' else '8-bit values, not HU'
  cases = [
    case._replace(intensity=options.intensity)
    if case.intensity in (None, options.intensity)
    else case._replace(unused=other)
    for case in cases
  ]
  if all(case.unused == other for case in cases):
    if options.intensity == 'hu':
      raise UserError(f'{folder}: contains 8-bit images, not HU; add --config.data.intensity=grey')
    raise UserError(f'{folder}: contains Hounsfield units, not 8-bit images; leave out --config.data.intensity=grey')
  return cases


def _of_known_patients(folder, cases, options):
  """The cases; those of unknown patients become unused, unless the options allow them."""
  if options.patients == 'each_slice':
    return cases
  if not any(case.named for case in cases):
    raise UserError(
      f'{folder}: slices without patient IDs, so one patient may be in both training and test; add slices.csv '
      '(name,patient), or use --config.data.patients=each_slice (scores will not be patient-level)'
    )
  return [case if case.named else case._replace(unused=_UNKNOWN) for case in cases]
