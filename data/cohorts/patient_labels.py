"""Scans without masks, and `labels.csv` (patient,class): whether each patient has a lesion.

Scans lie at any depth: `X.nii.gz` or `X_ct.nii.gz`; or per patient a folder `X` or `X.zip` of DICOM. Results such as
`X_probability.nii.gz` are no scans. A patient is a scan, or a person in `patients.csv`. All slices of a patient inherit
the label.
"""

import logging
import pathlib
from collections.abc import Sequence

from data.cohorts import (
  MASKS,
  Case,
  decathlon,
  dicom_pairs,
  entry,
  folders,
  lists,
  medseg,
  mosmed,
  name_of,
  nnunet,
  refuse,
  slices,
  with_ending,
  zenodo_20,
)
from fusa_jax.scans import dicom, dicom_seg, sources, volume_files
from fusa_jax.scans.archives import in_folder, is_archive
from fusa_jax.system.errors import UserError

# Layouts in which the names of the masks do not say that they are masks.
_WITH_MASKS = (zenodo_20, mosmed, medseg, decathlon, nnunet)
LIST = 'labels.csv'
COLUMNS = ('patient', 'class')


def recognises(folder: pathlib.Path) -> bool:
  """Whether there are labels and no masks. With masks, these decide, and `labels.csv` is left out.

  Raises:
    UserError: there are scans and no masks, and the list cannot be read, or lacks its columns.
  """
  path = entry(folder, LIST)
  if path is None or not path.is_file() or not _scans(folder) or _has_masks(folder):
    return False
  if slices.recognises(folder) and not lists.has_columns(path, COLUMNS):  # a .zip beside pictures counts as a scan
    return False
  lists.read(path, COLUMNS)
  return True


def find(folder: pathlib.Path) -> list[Case]:
  """One case per scan, without its label: see `labelled`."""
  return [Case(name, path, None, intensity=intensity) for name, path, intensity in sorted(_scans(folder))]


def labelled(cases: Sequence[Case], folder: pathlib.Path) -> list[Case]:
  """The cases with the labels of their patients. Logs which classes count as with lesion.

  Args:
    cases: the cases of `find`, with their owners (`data.identity`).
    folder: the folder of the cohort.

  Raises:
    UserError: one line each: a patient has two classes, no class or no scan; a scan has no patient in the list; all
      classes are with lesion, or all without.
  """
  path, classes, listed, lines = entry(folder, LIST), {}, set(), []
  known = {name for case in cases for name in (case.owner, case.patient) if name}
  for line, (patient, name) in lists.read(path, COLUMNS):
    where = f'{path}: line {line}: '
    listed.add(patient)
    if patient not in known:
      lines.append(f'{where}no scan of the patient {patient!r}; correct the name, or remove the line')
    elif not name:
      lines.append(f'{where}{patient!r} has no class; add it, or remove the patient')
    elif classes.setdefault(patient, name) != name:
      lines.append(f'{where}{patient!r} has another class in a line above; correct one of the two')
  found, by_owner = [], {}
  for case in cases:
    name = classes.get(case.owner) or classes.get(case.patient)
    found.append(name)
    if listed.isdisjoint((case.owner, case.patient)):
      lines.append(f'{case.files[0]}: its patient is not in {LIST}; add {case.owner or case.patient}, or remove it')
    elif name is not None and by_owner.setdefault(case.owner or case.patient, name) != name:
      lines.append(f'{case.files[0]}: the scans of its patient have two classes in {LIST}; correct one of them')
  refuse(lines)
  labels = {name: _label(name) for name in dict.fromkeys(found)}
  of_label = [', '.join(name for name in labels if labels[name] == label) or 'none' for label in (1, 0)]
  logging.info('%s: patients with lesion: %s; without: %s', path, *of_label)
  if len(set(labels.values())) != 2:
    raise UserError(
      f'{path}: cannot tell which class ({", ".join(labels)}) is without lesion; use 1 and 0, or names of which only '
      'those without lesion begin with non, normal, healthy or negative'
    )
  return [case._replace(patient_label=labels[name]) for case, name in zip(cases, found, strict=True)]


def _label(name):
  return int(name) if name in ('0', '1') else int(not slices.is_without_lesion(name))


def _scans(folder):
  """(name, path, intensity if known) of the scans: volumes, and folders and archives of DICOM."""
  found = []
  for path in in_folder(folder):
    if volume_files.is_volume(path):
      stem = name_of(volume_files.stem(path))
      if stem.lower().endswith(sources.RESULTS):
        continue
      found.append((folders.without_ct(stem) or name_of(path.parent.name), path, None))
  return found + [(name, path, 'hu') for name, path in dicom_pairs.patients(folder)]


def _has_masks(folder):
  if any(cohort.recognises(folder) for cohort in _WITH_MASKS):
    return True
  paths = in_folder(folder)
  volumes = [path for path in paths if volume_files.is_volume(path)]
  places = [place for _, place in dicom_pairs.patients(folder) if not is_archive(place)]
  in_dicom = [path for place in places for path in in_folder(place) if dicom.Series.claims(path)]
  return (
    bool(with_ending(folder, *MASKS))
    or any(folders.is_mask(path, folder) for path in volumes)
    or slices.has_masks(folder)
    or bool(dicom_seg.find_segs(in_dicom))
  )
