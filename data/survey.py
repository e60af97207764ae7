"""Checks a cohort before it is prepared: reads each file once, finds copies, measures lesions, assigns folds."""

import dataclasses
import hashlib
import json
import logging
import pathlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from data import read
from data.cohorts import Case
from data.workers import pool, silent
from fusa_jax.scans import volumes
from fusa_jax.scans.archives import in_folder
from fusa_jax.system.errors import UserError

NUM_FOLDS = 5

# The shape of the thumbnails that are compared, and the correlation from which two scans count as one. At 512 x 512,
# the same scan with another kernel, noise or twice the slice thickness has 0.995 or more. Phantoms of two patients have
# 0.09 or less. For phantoms of 96 x 96, where a kernel removes more detail, these limits are 0.88 and 0.52.
_THUMBNAIL = (16, 64, 64)
_ALIKE = 0.8


@dataclasses.dataclass(frozen=True)
class Patient:
  """The survey's result for one case: lesion voxels per slice, and their volume in mL (see `read.Slices`)."""

  case: Case
  lesion_voxels: tuple[int, ...]
  lesion_ml: float | None

  @property
  def burden(self) -> float:
    """The value that folds are stratified by: mL of lesion, or the number of lesion pixels if mL are unknown."""
    return sum(self.lesion_voxels) if self.lesion_ml is None else self.lesion_ml


class _Measured(NamedTuple):
  """A patient, and features of the images that reveal copies.

  Attributes:
    patient: the patient of the images.
    digests: per file, a hash of the values of the scan or picture. Copies have equal hashes. Pictures with only one
      value have none.
    thumbnail: similar for scans of one study (see _thumbnail). Pictures have none, because neighbouring slices are as
      similar as two pictures of one slice.
  """

  patient: Patient
  digests: dict[str, str]
  thumbnail: np.ndarray | None


def survey(cases: Sequence[Case], progress: Callable[..., Iterable] = silent) -> list[Patient]:
  """Reads all files of a cohort on all cores. Logs a warning for each pair of scans that look the same.

  Raises:
    UserError: all problems of all files, one line each. A scan or picture that occurs twice, however it is stored, is
      a problem: one copy could be in training and the other in the test.
  """
  measured, errors = [], []
  with pool(len(cases)) as run:
    for result in progress(run(_measure, cases), total=len(cases), desc='Checking scans', unit='scans'):
      (errors if isinstance(result, str) else measured).append(result)
  errors += _copies(measured)
  if errors:
    raise UserError('\n'.join(dict.fromkeys(errors)))
  _warn_of_similar(measured)
  return [one.patient for one in measured]


def deal(patients: Sequence[Patient]) -> list[list[Patient]]:
  """Divides patients into at most five folds, stratified by burden. The order of `patients` does not matter.

  All scans of one person (`Case.owner`) go into the same fold. Persons are sorted by burden and dealt back and forth
  over the folds. So each fold gets one of every five neighbours, and no fold always gets the larger burden. With fewer
  than five persons, each is a fold.

  Raises:
    UserError: fewer than two persons: no test would be possible on a person that training has not seen.
  """
  owned = defaultdict(list)
  for patient in patients:
    owned[patient.case.owner or patient.case.patient].append(patient)
  if len(owned) < 2:
    raise UserError(f'{len(owned)} patient in the cohort; at least 2 are needed, one to train on and one to test on')
  ordered = sorted(owned, key=lambda name: (-sum(patient.burden for patient in owned[name]), name))
  folds = [[] for _ in range(min(NUM_FOLDS, len(ordered)))]
  for start in range(0, len(ordered), len(folds)):
    group = ordered[start : start + len(folds)]
    order = folds if start // len(folds) % 2 == 0 else folds[::-1]
    for fold, name in zip(order, group, strict=False):
      fold.extend(owned[name])
  return [sorted(fold, key=lambda p: p.case.patient) for fold in folds]


def _measure(case: Case) -> _Measured | str:
  """Measures a case, or returns the error text of its files: the caller reports the errors of all cases."""
  try:
    slices = read.slices(case)
  except UserError as error:
    return str(error)
  patient = Patient(case, slices.lesion_voxels, slices.lesion_ml)
  if slices.lesion_ml is not None:
    return _Measured(patient, {str(case.ct): _digest(slices.images)}, _thumbnail(slices.images, case.intensity))
  names = map(str, case.ct) if isinstance(case.ct, tuple) else [f'{case.ct}, slice {case.slice}']
  images = zip(names, slices.images, strict=True)
  return _Measured(patient, {name: _digest(image) for name, image in images if np.ptp(image)}, None)


def _digest(values: np.ndarray) -> str:
  return hashlib.sha256(repr(values.shape).encode() + values.tobytes()).hexdigest()


def _thumbnail(values: np.ndarray, intensity: str) -> np.ndarray:
  """The fine detail of a scan [S, H, W] as a unit vector: the product of two is their correlation.

  All chests have similar coarse shapes: complete thumbnails of two patients correlate at 0.9. So coarse shapes are
  removed. The rest, the edges of vessels, ribs and organs, differs between patients.
  """
  slices, height, width = _THUMBNAIL
  clipped = np.clip(values, -1000, 300) if intensity == 'hu' else values
  small = volumes.resize(clipped, (height, width))
  small = volumes.resize(small.swapaxes(0, 1), (slices, width))  # [height, slices, width]
  detail = small - ndimage.gaussian_filter(small, (1, 0, 1))
  detail -= detail.mean()
  return detail.ravel() / max(np.linalg.norm(detail), 1e-6)


def _copies(measured: Sequence[_Measured]) -> list[str]:
  """A line for each scan or picture with the same values as an earlier one of another patient."""
  first, lines = {}, []
  for patient, name, digest in ((one.patient, *item) for one in measured for item in one.digests.items()):
    first_patient, first_name = first.setdefault(digest, (patient, name))
    if first_patient is not patient:
      lines.append(
        f'{name}: the same image as {pathlib.Path(first_name).name}, so it could be in both training and test, or '
        'count twice; remove one of the two, with its mask'
      )
  return lines


def _warn_of_similar(measured: Sequence[_Measured]) -> None:
  scans = [one for one in measured if one.thumbnail is not None]
  if not scans:
    return
  thumbnails = np.stack([scan.thumbnail for scan in scans])
  correlations = np.triu(thumbnails @ thumbnails.T, k=1)
  for one, other in np.argwhere(correlations >= _ALIKE):
    logging.warning(
      '%s: looks like %s (correlation %.3f), perhaps another reconstruction, and may be in both training and test; '
      'if both show one patient, remove one of the two, with its mask',
      scans[other].patient.case.ct,
      scans[one].patient.case.ct.name,
      correlations[one, other],
    )


def taken(cases: Sequence[Case]) -> dict:
  """How the files of a cohort were read: values of the config.data keys with the same names."""
  return {
    'lesion_labels': list(cases[0].lesion_labels),
    'intensity': cases[0].intensity,
    'patients': 'named' if all(case.named for case in cases) else 'each_slice',
  }


def fingerprint(cases: Sequence[Case]) -> list[list]:
  """Identifies the state of a cohort: name, size and modification time of files; patients and labels of cases."""
  paths = dict.fromkeys(path for case in cases for path in case.files)
  described = [[case.patient, case.owner, len(case.files), list(case.labels or ()), case.slice] for case in cases]
  return described + [_state(path) for path in paths]


def _state(path):
  """Name, size and modification time of a file; for a DICOM folder its name, number of files and a hash of theirs."""
  if not path.is_dir():
    return [path.name, path.stat().st_size, path.stat().st_mtime_ns]
  inside = in_folder(path)
  states = [[str(file.relative_to(path)), file.stat().st_size, file.stat().st_mtime_ns] for file in inside]
  return [path.name, len(inside), hashlib.sha256(json.dumps(states).encode()).hexdigest()]
