"""A cohort before it is prepared: every file read and checked once, scans under two names found, lesions measured,
patients dealt into folds."""

import dataclasses
import hashlib
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from data.cohorts import Case
from data.workers import pool, silent
from fusa_jax import ct
from fusa_jax.errors import UserError

NUM_FOLDS = 5

# What scans are compared by, and the correlation from which two are taken for one. At 512 x 512 the same scan with
# another kernel, noise or twice the slice thickness is at 0.986 or above, phantoms of two patients at 0.74 or below;
# on phantoms of 96 x 96, where a kernel takes more of the detail, these are 0.82 and 0.84.
_THUMBNAIL = (16, 64, 64)
_ALIKE = 0.9


@dataclasses.dataclass(frozen=True)
class Patient:
  """What the survey found of one case: lesion voxels in each slice (inferior to superior), volume in mL."""

  case: Case
  lesion_voxels: tuple[int, ...]
  lesion_ml: float


class _Measured(NamedTuple):
  """A patient with what its scan is recognised by: equal in copies, and alike (see _thumbnail)."""

  patient: Patient
  digest: str
  thumbnail: np.ndarray


def survey(cases: Sequence[Case], progress: Callable[..., Iterable] = silent) -> list[Patient]:
  """Reads all files of a cohort on all cores. Scans that look like one and the same are warned of, a line a pair.

  Raises:
    UserError: all that is wrong with any of the files, a line each; also a scan that is there twice, however it is
      stored: one of the two could be trained on and the other tested.
  """
  found, errors = [], []
  with pool(len(cases)) as run:
    for result in progress(run(_measure, cases), total=len(cases), desc='Checking scans', unit='scan'):
      (errors if isinstance(result, str) else found).append(result)
  errors += _copies(found)
  if errors:
    raise UserError('\n'.join(errors))
  _warn_of_alike(found)
  return [scan.patient for scan in found]


def deal(patients: Sequence[Patient]) -> list[list[Patient]]:
  """Patients in at most five folds, stratified by lesion volume; the same for any order of `patients`.

  They are dealt in order of their volume, forth and back over the folds, so that each fold gets one of each five
  neighbours and none gets always the heavier one. With fewer than five patients there is a fold for each.

  Raises:
    UserError: fewer than two patients: nothing could be tested on a patient that training has not seen.
  """
  if len(patients) < 2:
    raise UserError(f'{len(patients)} patient in the cohort; at least 2 are needed to test on one not trained on')
  ordered = sorted(patients, key=lambda p: (-p.lesion_ml, p.case.patient))
  folds = [[] for _ in range(min(NUM_FOLDS, len(ordered)))]
  for start in range(0, len(ordered), len(folds)):
    group = ordered[start : start + len(folds)]
    order = folds if start // len(folds) % 2 == 0 else folds[::-1]
    for fold, patient in zip(order, group, strict=False):
      fold.append(patient)
  return [sorted(fold, key=lambda p: p.case.patient) for fold in folds]


def read(case: Case) -> tuple[ct.Scan, np.ndarray]:
  """A case's scan, and its mask: uint8 {0, 1} on the scan's axes.

  Raises:
    UserError: as `ct.read` and `ct.read_mask`.
  """
  scan = ct.read(case.ct)
  if case.mask is None:
    return scan, np.zeros(scan.values.shape, np.uint8)
  return scan, ct.read_mask(case.mask, scan, case.lesion_labels)


def _measure(case: Case) -> _Measured | str:
  """What was found of a case, or what is wrong with its files (errors are data here: all of them are wanted)."""
  try:
    scan, mask = read(case)
  except UserError as error:
    return str(error)
  voxels = mask.sum(axis=(1, 2), dtype=np.int64)
  patient = Patient(case, tuple(map(int, voxels)), float(voxels.sum() * scan.voxel_ml))
  return _Measured(patient, hashlib.sha256(scan.values).hexdigest(), _thumbnail(scan.values))


def _thumbnail(hu: np.ndarray) -> np.ndarray:
  """The fine detail of HU [S, H, W] as a vector of length 1: the product of two is their correlation.

  All chests have the same coarse shapes, so that whole thumbnails of two patients correlate at 0.9. What is left
  without them, the edges of vessels, ribs and organs, is the patient's own.
  """
  slices, height, width = _THUMBNAIL
  small = ct.resize(np.clip(hu, -1000, 300), (height, width))
  small = ct.resize(small.swapaxes(0, 1), (slices, width))  # [height, slices, width]
  detail = small - ndimage.gaussian_filter(small, (1, 0, 1))
  detail -= detail.mean()
  return detail.ravel() / max(np.linalg.norm(detail), 1e-6)


def _copies(found: Sequence[_Measured]) -> list[str]:
  """A line for each scan that has the voxels of one before it."""
  first, lines = {}, []
  for scan in found:
    known = first.setdefault(scan.digest, scan)
    if known is not scan:
      lines.append(
        f'{scan.patient.case.ct}: the same scan as {known.patient.case.ct.name}, voxel for voxel, so it would be both '
        'trained on and tested, or count twice; remove one of the two, with its mask'
      )
  return lines


def _warn_of_alike(found: Sequence[_Measured]) -> None:
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


def fingerprint(cases: Sequence[Case]) -> list[list]:
  """What tells one state of a cohort's files from another: names, sizes and times of change."""
  paths = [path for case in cases for path in (case.ct, case.mask) if path is not None]
  return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in paths]
