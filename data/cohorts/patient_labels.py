"""Scans without masks, and `labels.csv` (patient,class) or MosMed's folders CT-0 to CT-4: the class of each patient.

Scans lie at any depth: `X.nii.gz` or `X_ct.nii.gz`; or per patient a folder `X` or `X.zip` of DICOM. Results such as
`X_probability.nii.gz` are not scans. A patient is a scan, or a person in `patients.csv`. In place of scans there may be
pictures, with `slices.csv` (name,patient). All slices of a patient inherit the label.
"""

import pathlib
from collections.abc import Sequence

from data.cohorts import (
  MASKS,
  Case,
  decathlon,
  dicom_pairs,
  entry,
  folders,
  labels,
  lists,
  medseg,
  mosmed,
  name_of,
  nnunet,
  refuse,
  slices,
  unique,
  with_ending,
  zenodo_20,
)
from fusa_jax.scans import dicom, dicom_seg, sources, volume_files
from fusa_jax.scans.archives import in_folder, is_archive

# Layouts in which the names of the masks do not say that they are masks.
_WITH_MASKS = (zenodo_20, mosmed, medseg, decathlon, nnunet)
LIST, SLICES = slices.LABELS, slices.LIST
COLUMNS = ('patient', 'class')


def recognises(folder: pathlib.Path) -> bool:
  """Whether there are labels and no masks. With masks, these decide, and labels are left out.

  Raises:
    UserError: there are scans and no masks, and the list cannot be read, or lacks its columns.
  """
  path = entry(folder, LIST)
  if path is None or not path.is_file():
    return bool(mosmed.studies(folder)) and not _has_masks(folder)
  if _are_pictures(folder):
    return lists.has_columns(path, COLUMNS)
  if not _scans(folder) or _has_masks(folder):
    return False
  if slices.recognises(folder) and not lists.has_columns(path, COLUMNS):  # a .zip beside pictures counts as a scan
    return False
  lists.read(path, COLUMNS)
  return True


def find(folder: pathlib.Path) -> list[Case]:
  """One case per scan, or per patient of pictures, without its label: see `labelled`.

  Raises:
    UserError: two studies of MosMed have the same name, one line each; as `slices.of_patients`.
  """
  if entry(folder, LIST) is None:
    found = unique((name, path) for name, path, _ in mosmed.studies(folder))
    return [Case(name, path, None) for name, path in sorted(found.items())]
  if _are_pictures(folder):
    return slices.of_patients(folder)
  return [Case(name, path, None, intensity=intensity) for name, path, intensity in sorted(_scans(folder))]


def labelled(cases: Sequence[Case], folder: pathlib.Path, named: Sequence | str = ()) -> list[Case]:
  """The cases with the labels of their patients. Logs what the classes mean.

  Args:
    cases: the cases of `find`, with their owners (`data.identity`).
    folder: the folder of the cohort.
    named: the value of data.classes (`labels.meaning`).

  Raises:
    UserError: one line each: a patient has two classes, no class, or no scan or picture; a scan has no patient in the
      list; as `labels.meaning`.
  """
  path, rows = _listed(folder)
  classes, listed, lines = {}, set(), []
  known = {name for case in cases for name in (case.owner, case.patient) if name}
  kind = 'picture' if isinstance(cases[0].ct, tuple) else 'scan'
  for line, (patient, name) in rows:
    where = f'{path}: line {line}: '
    listed.add(patient)
    if patient not in known:
      lines.append(f'{where}no {kind} of the patient {patient!r}; correct the name, or remove the line')
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
    elif name is not None:
      first, earlier = by_owner.setdefault(case.owner or case.patient, (case, name))
      if earlier != name:
        lines.append(
          f'{case.files[0]}: the scans of its patient have two classes in {LIST} ({name}, but {first.files[0].name} '
          f'has {earlier}); correct one of them'
        )
  refuse(lines)
  names = list(dict.fromkeys(found))
  advice = (
    f'class ({", ".join(names)}) is without lesion; use 1 and 0, or names of which only those without lesion begin '
    'with non, normal, healthy or negative'
  )
  of_patients, label = labels.meaning(names, named, path, 'patients', advice)
  return [
    case._replace(patient_label=label[name], classes=of_patients) for case, name in zip(cases, found, strict=True)
  ]


def _listed(folder):
  """The list and its rows (`lists.read`); without it, the folder and the severity of each study of MosMed."""
  path = entry(folder, LIST)
  if path is not None:
    return path, lists.read(path, COLUMNS)
  return folder, [(0, (name, severity)) for name, _, severity in mosmed.studies(folder)]


def _are_pictures(folder):
  """Whether the labels are of pictures, also if an archive of them lies there."""
  return slices.has_pictures(folder) and (entry(folder, SLICES) is not None or not _scans(folder))


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
