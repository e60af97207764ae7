"""Checks a cohort before it is prepared: reads each file once, finds copies, measures lesions, assigns folds."""

import dataclasses
import hashlib
import logging
import pathlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from data import digests, read
from data.cohorts import Case
from data.workers import pool, silent
from fusa_jax.scans import sources, volumes
from fusa_jax.system.errors import UserError
from fusa_jax.system.files import printable

NUM_FOLDS = 5

# The shape of the thumbnails that are compared, and the correlation from which two scans count as one. At 512 x 512,
# the same scan with another kernel, noise or twice the slice thickness has 0.995 or more. Phantoms of two patients have
# 0.09 or less. For phantoms of 96 x 96, where a kernel removes more detail, these limits are 0.88 and 0.52.
_THUMBNAIL = (16, 64, 64)
_ALIKE = 0.8


@dataclasses.dataclass(frozen=True)
class Patient:
  """The survey's result for one case.

  Attributes:
    case: the case.
    lesion_voxels: lesion voxels per slice (see `read.Slices`).
    lesion_ml: the volume of the lesions in mL, or None (see `read.Slices`).
    images: the SHA-256 of the values of the scan; of pictures, one for each, and '' for a picture with only one value.
      They do not depend on names and formats.
    truth: the SHA-256 of the lesion mask, or of the labels.
  """

  case: Case
  lesion_voxels: tuple[int, ...]
  lesion_ml: float | None
  images: tuple[str, ...] = ()
  truth: str = ''

  @property
  def owner(self) -> str:
    """The person: several scans can have the same."""
    return self.case.owner or self.case.patient

  @property
  def burden(self) -> float:
    """The value that folds are stratified by: mL of lesion, or the number of lesion pixels if mL are unknown."""
    return sum(self.lesion_voxels) if self.lesion_ml is None else self.lesion_ml


class _Measured(NamedTuple):
  """A patient, and features of the images that reveal copies.

  Attributes:
    patient: the patient of the images; None if all are left out.
    names: the names of its images, one for each of `Patient.images`.
    thumbnail: similar for scans of one study (see _thumbnail). Pictures have none, because neighbouring slices are as
      similar as two pictures of one slice.
    values: the distinct values of each mask file (`read.Slices`).
    coloured: the pictures that are left out because they are in colour.
  """

  patient: Patient | None
  names: Sequence[str]
  thumbnail: np.ndarray | None
  values: Mapping[pathlib.Path, tuple[int, ...]]
  coloured: Sequence[pathlib.Path] = ()


def survey(cases: Sequence[Case], progress: Callable[..., Iterable] = silent) -> list[Patient]:
  """Reads all files of a cohort on all cores. Logs a warning for each pair of scans that look the same.

  Logs how many patients have no lesion, which mask values were taken as background, and the pictures in colour that are
  left out (`Case.coloured`).

  Raises:
    UserError: all problems of all files, one line each. A scan or picture that occurs twice, however it is stored, is
      a problem: one copy could be in training and the other in the test. So are lesion labels that do not fit the
      masks, because patients would count as free of lesions.
  """
  measured, errors = [], []
  with pool(len(cases)) as run:
    for result in progress(run(_measure, cases), total=len(cases), desc='Checking scans', unit='scans'):
      (errors if isinstance(result, str) else measured).append(result)
  coloured = [path for one in measured for path in one.coloured]
  measured = [one for one in measured if one.patient]
  errors += _copies(measured)
  values = {path: values for one in measured for path, values in one.values.items()}
  # A DICOM SEG is checked when it is read; which of the labels it has is not known here.
  has_seg = any(one.patient.case.mask == one.patient.case.ct for one in measured)
  # Without the masks that could not be read, a label may seem to be missing.
  errors = errors or _label_problems(values, cases[0].lesion_labels, has_seg)
  if errors:
    raise UserError('\n'.join(dict.fromkeys(errors)))
  _warn_of_similar(measured)
  _log_labels([one.patient for one in measured], values)
  if coloured:
    logging.info('left out (in colour): %s', sources.counted(path.name for path in coloured))
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
    owned[patient.owner].append(patient)
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
  coloured = read.coloured(case) if case.coloured == 'leave_out' else []
  if coloured:
    case = _without(case, coloured)
    if not case.ct:
      return _Measured(None, (), None, {}, coloured)
  try:
    slices = read.slices(case)
  except UserError as error:
    return str(error)
  truth = slices.lesion_voxels if case.labels else slices.masks
  patient = lambda images: Patient(case, slices.lesion_voxels, slices.lesion_ml, images, _digest(*truth))
  if slices.lesion_ml is not None:
    thumbnail = _thumbnail(slices.images, case.intensity)
    return _Measured(patient((_digest(*slices.images),)), [str(case.ct)], thumbnail, slices.values)
  names = [*map(str, case.ct)] if isinstance(case.ct, tuple) else [f'{case.ct}, slice {case.slice}']
  images = tuple(_digest(image) if np.ptp(image) else '' for image in slices.images)
  return _Measured(patient(images), names, None, slices.values, coloured)


def _without(case, paths):
  """A case without some of its pictures."""
  kept = [number for number, path in enumerate(case.ct) if path not in paths]
  chosen = lambda values: None if values is None else tuple(values[number] for number in kept)
  return case._replace(ct=chosen(case.ct), mask=chosen(case.mask), labels=chosen(case.labels))


def _digest(*slices: np.ndarray) -> str:
  """The SHA-256 of the values of some slices, with their shapes and types."""
  digest = hashlib.sha256()
  for values in map(np.asarray, slices):
    digest.update(repr((values.shape, values.dtype.str)).encode() + values.tobytes())
  return digest.hexdigest()


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
  images = ((one.patient, *item) for one in measured for item in zip(one.names, one.patient.images, strict=True))
  for patient, name, digest in images:
    if not digest:
      continue
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


def _label_problems(values, labels, has_seg):
  """A line for each lesion label that no mask has, or each mask without lesion that seems to use other labels.

  In a cohort with labels of organs, a mask without a lesion label is a patient without lesion. But if it also has a
  value that no mask with lesion has, its lesions may have that value: 1 in some masks and 255 in others.

  Args:
    values: the distinct values of each mask.
    labels: the lesion labels.
    has_seg: whether some masks are DICOM SEG.
  """
  if not labels or not values:
    return []
  nonzero = {path: set(each) - {0} for path, each in values.items()}
  missing = sorted(set(labels) - set().union(*nonzero.values()))
  if missing and not has_seg:
    return [
      f'data.lesion_labels: no mask has the value {", ".join(map(str, missing))}; the masks have '
      f'{_counted(nonzero.values()) or "only 0"}; give the values that are lesion'
    ]
  with_lesion = set().union(*(each for each in nonzero.values() if each & set(labels)))
  return [
    f'{path}: the values are {_listed(values[path])}, none of which is a lesion label ({_listed(labels)}), and no mask '
    f'with lesion has {_listed(each - with_lesion)}; add it to data.lesion_labels if it is lesion, or set it to 0'
    for path, each in nonzero.items()
    if not each & set(labels) and each - with_lesion
  ]


def _log_labels(patients, values):
  if any(patient.case.labels is not None for patient in patients):
    return
  without = sum(not any(patient.lesion_voxels) for patient in patients)
  labels = set(patients[0].case.lesion_labels) if patients else set()
  background = _counted(set(each) - labels - {0} for each in values.values()) if labels else ''
  if without or background:
    text = f'{without} of {len(patients)} patients have no lesion'
    logging.info('%s', f'{text}; values taken as background: {background}' if background else text)


def _counted(sets):
  """The values of some masks, with the number of masks that have each: `1 (in 2 masks), 255 (in 1 mask)`."""
  counts = Counter(value for each in sets for value in each)
  return ', '.join(f'{value} (in {n} mask{"s" if n > 1 else ""})' for value, n in sorted(counts.items()))


def _listed(values):
  return ', '.join(map(str, sorted(values)))


def taken(cases: Sequence[Case]) -> dict:
  """How the files of a cohort were read: values of the config.data keys with the same names."""
  return {
    'lesion_labels': list(cases[0].lesion_labels),
    'intensity': cases[0].intensity,
    'patients': 'named' if all(case.named for case in cases) else 'each_slice',
    'coloured': cases[0].coloured,
  }


def fingerprint(
  cases: Sequence[Case], cache: pathlib.Path | None = None, progress: Callable[..., Iterable] = silent
) -> list[list]:
  """Identifies the state of a cohort by content: patients and labels of cases; name and SHA-256 of files and folders.

  Args:
    cases: the cases.
    cache: a file that keeps the digests of files, see `digests.of`; None keeps none.
    progress: wraps an iterable and shows its progress.
  """
  paths = dict.fromkeys(path for case in cases for path in case.files)
  described = [[case.patient, case.owner, len(case.files), list(case.labels or ()), case.slice] for case in cases]
  found = digests.of(list(paths), cache, progress)
  return described + [[printable(path.name), digest] for path, digest in zip(paths, found, strict=True)]
