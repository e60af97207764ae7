"""A cohort before it is prepared: every file read and checked once, scans under two names found, lesions measured,
patients dealt into folds."""

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

# What scans are compared by, and the correlation from which two are taken for one. At 512 x 512 the same scan with
# another kernel, noise or twice the slice thickness is at 0.995 or above, phantoms of two patients at 0.09 or below; on
# phantoms of 96 x 96, where a kernel takes more of the detail, these are 0.88 and 0.52.
_THUMBNAIL = (16, 64, 64)
_ALIKE = 0.8


@dataclasses.dataclass(frozen=True)
class Patient:
  """What the survey found of one case: lesion voxels in each slice, and their volume in mL (see `read.Slices`)."""

  case: Case
  lesion_voxels: tuple[int, ...]
  lesion_ml: float | None

  @property
  def burden(self) -> float:
    """What folds are stratified by: mL of lesion; of pictures, which have no size, pixels."""
    return sum(self.lesion_voxels) if self.lesion_ml is None else self.lesion_ml


class _Measured(NamedTuple):
  """A patient with what its images are recognised by.

  Attributes:
    patient: whose they are.
    digests: by file, a hash of the scan's or the picture's values: equal in copies. Pictures of one value have none.
    thumbnail: of a scan, and alike in scans of one study (see _thumbnail). Pictures have none: those of neighbouring
      slices are as much alike as two of one slice.
  """

  patient: Patient
  digests: dict[str, str]
  thumbnail: np.ndarray | None


def survey(cases: Sequence[Case], progress: Callable[..., Iterable] = silent) -> list[Patient]:
  """Reads all files of a cohort on all cores. Scans that look like one and the same are warned of, a line a pair.

  Raises:
    UserError: all that is wrong with any of the files, a line each; also a scan or a picture that is there twice,
      however it is stored: one of the two could be trained on and the other tested.
  """
  found, errors = [], []
  with pool(len(cases)) as run:
    for result in progress(run(_measure, cases), total=len(cases), desc='Checking scans', unit='scan'):
      (errors if isinstance(result, str) else found).append(result)
  errors += _copies(found)
  if errors:
    raise UserError('\n'.join(dict.fromkeys(errors)))
  _warn_of_alike(found)
  return [scan.patient for scan in found]


def deal(patients: Sequence[Patient]) -> list[list[Patient]]:
  """Patients in at most five folds, stratified by their burden; the same for any order of `patients`.

  Scans of one owner are dealt as one.

  They are dealt in order of it, forth and back over the folds, so that each fold gets one of each five
  neighbours and none gets always the heavier one. With fewer than five patients there is a fold for each.

  Raises:
    UserError: fewer than two patients: nothing could be tested on a patient that training has not seen.
  """
  owned = defaultdict(list)
  for patient in patients:
    owned[patient.case.owner or patient.case.patient].append(patient)
  if len(owned) < 2:
    raise UserError(f'{len(owned)} patient in the cohort; at least 2 are needed to test on one not trained on')
  ordered = sorted(owned, key=lambda name: (-sum(patient.burden for patient in owned[name]), name))
  folds = [[] for _ in range(min(NUM_FOLDS, len(ordered)))]
  for start in range(0, len(ordered), len(folds)):
    group = ordered[start : start + len(folds)]
    order = folds if start // len(folds) % 2 == 0 else folds[::-1]
    for fold, name in zip(order, group, strict=False):
      fold.extend(owned[name])
  return [sorted(fold, key=lambda p: p.case.patient) for fold in folds]


def _measure(case: Case) -> _Measured | str:
  """What was found of a case, or what is wrong with its files (errors are data here: all of them are wanted)."""
  try:
    found = read.slices(case)
  except UserError as error:
    return str(error)
  patient = Patient(case, found.lesion_voxels, found.lesion_ml)
  if found.lesion_ml is not None:
    return _Measured(patient, {str(case.ct): _digest(found.images)}, _thumbnail(found.images, case.intensity))
  names = map(str, case.ct) if isinstance(case.ct, tuple) else [f'{case.ct}, slice {case.slice}']
  images = zip(names, found.images, strict=True)
  return _Measured(patient, {name: _digest(image) for name, image in images if np.ptp(image)}, None)


def _digest(values: np.ndarray) -> str:
  return hashlib.sha256(repr(values.shape).encode() + values.tobytes()).hexdigest()


def _thumbnail(values: np.ndarray, kind: str) -> np.ndarray:
  """The fine detail of a scan [S, H, W] as a vector of length 1: the product of two is their correlation.

  All chests have the same coarse shapes, so that whole thumbnails of two patients correlate at 0.9. What is left
  without them, the edges of vessels, ribs and organs, is the patient's own.
  """
  slices, height, width = _THUMBNAIL
  clipped = np.clip(values, -1000, 300) if kind == 'hu' else values
  small = volumes.resize(clipped, (height, width))
  small = volumes.resize(small.swapaxes(0, 1), (slices, width))  # [height, slices, width]
  detail = small - ndimage.gaussian_filter(small, (1, 0, 1))
  detail -= detail.mean()
  return detail.ravel() / max(np.linalg.norm(detail), 1e-6)


def _copies(found: Sequence[_Measured]) -> list[str]:
  """A line for each scan or picture that has the values of one before it, of another patient."""
  first, lines = {}, []
  for owner, name, digest in ((one.patient, *item) for one in found for item in one.digests.items()):
    whose, known = first.setdefault(digest, (owner, name))
    if whose is not owner:
      lines.append(
        f'{name}: the same image as {pathlib.Path(known).name}, value for value, so it would be both trained on and '
        'tested, or count twice; remove one of the two, with its mask'
      )
  return lines


def _warn_of_alike(found: Sequence[_Measured]) -> None:
  found = [scan for scan in found if scan.thumbnail is not None]
  if not found:
    return
  thumbnails = np.stack([scan.thumbnail for scan in found])
  correlations = np.triu(thumbnails @ thumbnails.T, k=1)
  for one, other in np.argwhere(correlations >= _ALIKE):
    logging.warning(
      '%s: looks like %s (correlation %.3f), as one study reconstructed twice does, and may be both trained on and '
      'tested; if they are of one patient, remove one of the two, with its mask',
      found[other].patient.case.ct,
      found[one].patient.case.ct.name,
      correlations[one, other],
    )


def taken(cases: Sequence[Case]) -> dict:
  """How a cohort's files were taken, in the keys of config.data of the same names."""
  return {
    'lesion_labels': list(cases[0].lesion_labels),
    'intensity': cases[0].intensity,
    'patients': 'named' if all(case.named for case in cases) else 'each_slice',
  }


def fingerprint(cases: Sequence[Case]) -> list[list]:
  """What tells one state of a cohort from another: of its files names, sizes and times of change; whose they are, and
  what is said of them elsewhere than in images and masks."""
  paths = dict.fromkeys(path for case in cases for path in case.files)
  said = [[case.patient, case.owner, len(case.files), list(case.labels or ()), case.slice] for case in cases]
  return said + [_state(path) for path in paths]


def _state(path):
  """Of a file its name, size and time of change; of a folder of DICOM, how many files it has and a hash of theirs."""
  if not path.is_dir():
    return [path.name, path.stat().st_size, path.stat().st_mtime_ns]
  inside = in_folder(path)
  states = [[str(file.relative_to(path)), file.stat().st_size, file.stat().st_mtime_ns] for file in inside]
  return [path.name, len(inside), hashlib.sha256(json.dumps(states).encode()).hexdigest()]
