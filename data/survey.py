"""A cohort before it is prepared: every file read and checked once, lesions measured, patients dealt into folds."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from data.cohorts import Case
from data.workers import pool, silent
from fusa_jax import ct
from fusa_jax.errors import UserError

NUM_FOLDS = 5


@dataclasses.dataclass(frozen=True)
class Patient:
  """What the survey found of one case: lesion voxels in each slice (inferior to superior), volume in mL."""

  case: Case
  lesion_voxels: tuple[int, ...]
  lesion_ml: float


def survey(cases: Sequence[Case], progress: Callable[..., Iterable] = silent) -> list[Patient]:
  """Reads all files of a cohort on all cores.

  Raises:
    UserError: all that is wrong with any of the files, a line each.
  """
  found, errors = [], []
  with pool(len(cases)) as run:
    for result in progress(run(_measure, cases), total=len(cases), desc='Checking scans', unit='scan'):
      (found if isinstance(result, Patient) else errors).append(result)
  if errors:
    raise UserError('\n'.join(errors))
  return found


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


def _measure(case: Case) -> Patient | str:
  """The patient, or what is wrong with its files (errors are data here: all of them are wanted, not the first)."""
  try:
    scan = ct.read(case.ct)
    mask = ct.read_mask(case.mask, scan)
  except UserError as error:
    return str(error)
  voxels = mask.sum(axis=(1, 2), dtype=np.int64)
  return Patient(case, tuple(map(int, voxels)), float(voxels.sum() * scan.voxel_ml))


def fingerprint(cases: Sequence[Case]) -> list[list]:
  """What tells one state of a cohort's files from another: names, sizes and times of change."""
  return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for case in cases for path in (case.ct, case.mask)]
