"""Checks a cohort before it is prepared: reads each file once, finds copies, measures lesions, assigns folds."""

import dataclasses
import hashlib
import json
import logging
import math
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
from fusa_jax.scans.classes import BACKGROUND
from fusa_jax.system.errors import UserError
from fusa_jax.system.files import printable

NUM_FOLDS = 5

# The shape of the thumbnails that are compared, and the correlation from which two scans count as one. At 512 x 512,
# the same scan with another kernel, noise or twice the slice thickness has 0.995 or more. Phantoms of two patients have
# 0.09 or less. For phantoms of 96 x 96, where a kernel removes more detail, these limits are 0.88 and 0.52.
_THUMBNAIL = (16, 64, 64)
_ALIKE = 0.8
# Thumbnails are stored in half precision, which changes correlations by about 1e-5. This is the number of thumbnails
# that are compared at a time, in float32.
_BLOCK = 1024


@dataclasses.dataclass(frozen=True)
class Patient:
  """The survey's result for one case.

  Attributes:
    case: the case.
    lesion_voxels: lesion voxels per slice (see `read.Slices`).
    lesion_ml: the volume of the lesions in mL, or None (see `read.Slices`).
    class_voxels: voxels per class and slice (see `read.Slices`).
    images: the SHA-256 of the values of the scan; of pictures, one for each, and '' for a picture with only one value.
      They do not depend on names and formats.
    truth: the SHA-256 of the lesion mask, or of the labels.
    values: the distinct values of each mask file, in the order of the files (`read.Slices.values`).
  """

  case: Case
  lesion_voxels: tuple[int, ...]
  lesion_ml: float | None
  images: tuple[str, ...] = ()
  truth: str = ''
  values: tuple[tuple[int, ...], ...] = ()
  class_voxels: tuple[tuple[int, ...], ...] = ()

  @property
  def owner(self) -> str:
    """The person: several scans can have the same."""
    return self.case.owner or self.case.patient

  @property
  def burden(self) -> float:
    """The value that folds are stratified by: mL of lesion, or the number of lesion pixels if mL are unknown.

    With exclusive classes it is the number of slices.
    """
    if self.case.classes.exclusive:
      return len(self.lesion_voxels)
    return sum(self.lesion_voxels) if self.lesion_ml is None else self.lesion_ml


class _Measured(NamedTuple):
  """A patient, and features of the images that reveal copies.

  Attributes:
    patient: the patient of the images; None if all are left out.
    names: the names of its images, one for each of `Patient.images`.
    thumbnail: float16, similar for scans of one study (see _thumbnail). Pictures have none, because neighbouring slices
      are as similar as two pictures of one slice.
    coloured: the pictures that are left out because they are in colour.
  """

  patient: Patient | None
  names: Sequence[str]
  thumbnail: np.ndarray | None
  coloured: Sequence[pathlib.Path] = ()


class Known(NamedTuple):
  """The result of an earlier survey for a case.

  Attributes:
    patient: the patient.
    thumbnail: the thumbnail of the scan; None for pictures.
  """

  patient: Patient
  thumbnail: np.ndarray | None


def survey(
  cases: Sequence[Case],
  progress: Callable[..., Iterable] = silent,
  known: Mapping[str, Known] | None = None,
  thumbnails: pathlib.Path | None = None,
) -> list[Patient]:
  """Reads all files of a cohort on all cores. Logs a warning for each pair of scans that look the same.

  Logs how many patients have no lesion, which mask values were taken as background, and the pictures in colour that are
  left out (`Case.coloured`).

  Args:
    cases: the cases.
    progress: wraps an iterable and shows its progress.
    known: cases by name that are not read again, because their files have not changed.
    thumbnails: the .npy file to write the thumbnails of the scans to, in the order of the cases; None keeps them in
      memory only.

  Raises:
    UserError: all problems of all files, one line each. A scan or picture that occurs twice, however it is stored, is
      a problem: one copy could be in training and the other in the test. So are lesion labels that do not fit the
      masks, because patients would count as free of lesions.
  """
  known = known or {}
  new = [case for case in cases if case.patient not in known]
  scans = sum(case.slice is None and not isinstance(case.ct, tuple) for case in cases)
  measured, errors, store = [], [], _Thumbnails(thumbnails, scans)
  with pool(len(new), read.largest(new)) as run:
    results = iter(progress(run(_measure, new), total=len(new), desc='Checking scans', unit='scans'))
    for case in cases:
      result = _measured_before(known[case.patient], case) if case.patient in known else next(results)
      if isinstance(result, str):
        errors.append(result)
        continue
      if result.thumbnail is not None:
        store.add(str(case.ct), result.thumbnail)
      measured.append(result._replace(thumbnail=None))
  coloured = [path for one in measured for path in one.coloured]
  measured = [one for one in measured if one.patient]
  errors += _copies(measured)
  values = {path: values for one in measured for path, values in _values_by_mask(one.patient).items()}
  # A DICOM SEG is checked when it is read; which of the labels it has is not known here.
  has_seg = any(one.patient.case.mask == one.patient.case.ct for one in measured)
  # Without the masks that could not be read, a label may seem to be missing.
  errors = errors or _label_problems(values, cases[0].classes, has_seg)
  if errors:
    raise UserError('\n'.join(dict.fromkeys(errors)))
  store.warn_of_similar()
  _log_labels([one.patient for one in measured], values)
  if coloured:
    logging.info('left out (in colour): %s', sources.counted(path.name for path in coloured))
  return [one.patient for one in measured]


def _measured_before(known, case):
  """Returns a `Known` case as if it had been read again."""
  patient = dataclasses.replace(known.patient, case=case)
  return _Measured(patient, _names(case), known.thumbnail)


def _values_by_mask(patient):
  """Returns the distinct values of each mask file of a patient, by its path."""
  masks = patient.case.mask if isinstance(patient.case.mask, tuple) else (patient.case.mask,)
  return dict(zip(masks, patient.values, strict=False))


def deal(
  patients: Sequence[Patient], fold_of: Callable[[Patient], int | None] = lambda patient: None
) -> list[list[Patient]]:
  """Divides patients into at most five folds, stratified by burden. The order of `patients` does not matter.

  All scans of one person (`Case.owner`) go into the same fold. Persons are sorted by burden and dealt back and forth
  over the folds. So each fold gets one of every five neighbours, and no fold always gets the larger burden. With fewer
  than five persons, each is a fold. With exclusive classes, persons are first sorted by the class of most of their
  slices, so that each fold gets persons of each class.

  In a cohort that grew, the persons of earlier folds stay there. Each new person, the largest burden first, goes to the
  fold with the fewest persons (with exclusive classes: of the same class) and, among equals, with the least burden.
  Logs a warning if a person moves to another fold: because scans of several folds now belong to one person, or because
  a fold has no patients left.

  Args:
    patients: the patients.
    fold_of: the fold of a patient in an earlier dataset, or None for a new patient.

  Raises:
    UserError: fewer than two persons: no test would be possible on a person that training has not seen.
  """
  owned = defaultdict(list)
  for patient in patients:
    owned[patient.owner].append(patient)
  if len(owned) < 2:
    raise UserError(f'{len(owned)} patient in the cohort; at least 2 are needed, one to train on and one to test on')
  burden = {name: sum(patient.burden for patient in scans) for name, scans in owned.items()}
  group = {name: _most_frequent_class(scans) for name, scans in owned.items()}
  ordered = sorted(owned, key=lambda name: (group[name], -burden[name], name))
  fold = _kept_folds(owned, ordered, burden, group, fold_of)
  count = min(NUM_FOLDS, len(ordered))
  if not fold:
    for start in range(0, len(ordered), count):
      order = range(count) if start // count % 2 == 0 else reversed(range(count))
      fold |= dict(zip(ordered[start : start + count], order, strict=False))
  folds = [[patient for name in ordered if fold[name] == k for patient in owned[name]] for k in range(count)]
  return [sorted(each, key=lambda p: p.case.patient) for each in folds]


def _most_frequent_class(scans):
  """Returns the number of the exclusive class of most slices of a person; 0 for other classes."""
  if not scans[0].case.classes.exclusive:
    return 0
  slices = [sum(map(sum, of_scans)) for of_scans in zip(*(scan.class_voxels for scan in scans), strict=True)]
  return slices.index(max(slices))


def _kept_folds(owned, ordered, burden, group, fold_of):
  """Returns the fold of each person by name; {} if no earlier dataset has any of them, or a fold would be empty."""
  fold, moved = {}, []
  for name in ordered:
    earlier = Counter(k for k in map(fold_of, owned[name]) if k is not None)
    if earlier:
      fold[name] = min(earlier, key=lambda k: (-earlier[k], k))
      moved += [name] * (len(earlier) > 1)
  if not fold:
    return {}
  count, new = min(NUM_FOLDS, len(ordered)), [name for name in ordered if name not in fold]
  persons, loads = Counter((group[name], k) for name, k in fold.items()), Counter()
  for name, k in fold.items():
    loads[k] += burden[name]
  for name in new:
    fold[name] = min(range(count), key=lambda k: (persons[group[name], k], loads[k], k))
    persons[group[name], fold[name]] += 1
    loads[fold[name]] += burden[name]
  if set(fold.values()) != set(range(count)):
    logging.warning('a fold of the earlier dataset has no patients left, so all patients get new folds')
    return {}
  for name in moved:
    scans = ', '.join(patient.case.patient for patient in owned[name])
    logging.warning('%s were in several folds and now belong to one patient; all are in fold %d now', scans, fold[name])
  logging.info('%d of %d patients keep their folds; %d new', len(ordered) - len(new), len(ordered), len(new))
  return fold


def _measure(case: Case) -> _Measured | str:
  """Measures a case, or returns the error text of its files: the caller reports the errors of all cases."""
  coloured = read.coloured(case) if case.coloured == 'leave_out' else []
  if coloured:
    case = _without(case, coloured)
    if not case.ct:
      return _Measured(None, (), None, coloured)
  try:
    slices = read.slices(case)
  except UserError as error:
    return str(error)
  truth = slices.masks
  if case.has_labels:
    truth = slices.class_voxels if case.classes.exclusive else slices.lesion_voxels
  is_scan = case.slice is None and not isinstance(case.ct, tuple)
  if is_scan:
    images = (_digest(*slices.images),)
  else:
    images = tuple(_digest(image) if np.ptp(image) else '' for image in slices.images)
  values = tuple(map(tuple, slices.values.values()))
  patient = Patient(case, slices.lesion_voxels, slices.lesion_ml, images, _digest(*truth), values, slices.class_voxels)
  thumbnail = _thumbnail(slices.images, case.intensity) if is_scan else None
  return _Measured(patient, _names(case), thumbnail, coloured)


def _names(case):
  """The names of the images of a case in messages."""
  if isinstance(case.ct, tuple):
    return [*map(str, case.ct)]
  return [str(case.ct) if case.slice is None else f'{case.ct}, slice {case.slice}']


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
  """The fine detail of a scan [S, H, W] as a unit vector in float16: the product of two is their correlation.

  All chests have similar coarse shapes: complete thumbnails of two patients correlate at 0.9. So coarse shapes are
  removed. The rest, the edges of vessels, ribs and organs, differs between patients.
  """
  slices, height, width = _THUMBNAIL
  clipped = np.clip(values, -1000, 300) if intensity == 'hu' else values
  small = volumes.resize(clipped, (height, width))
  small = volumes.resize(small.swapaxes(0, 1), (slices, width))  # [height, slices, width]
  detail = small - ndimage.gaussian_filter(small, (1, 0, 1))
  detail -= detail.mean()
  return (detail.ravel() / max(np.linalg.norm(detail), 1e-6)).astype(np.float16)


def _copies(measured: Sequence[_Measured]) -> list[str]:
  """A line for each scan or picture with the same values as an earlier one of another patient, or of another class."""
  first, lines = {}, []
  images = (
    (one.patient, *item)
    for one in measured
    for item in zip(one.names, one.patient.images, _labels_of(one.patient), strict=True)
  )
  for patient, name, digest, label in images:
    if not digest:
      continue
    first_patient, first_name, first_label = first.setdefault(digest, (patient, name, label))
    if first_label != label:
      lines.append(f'{name}: the same image as {first_name}, but in another class; remove one of the two')
    elif first_patient is not patient:
      lines.append(
        f'{name}: the same image as {pathlib.Path(first_name).name}, so it could be in both training and test, or '
        'count twice; remove one of the two, with its mask'
      )
  return lines


def _labels_of(patient):
  """The label of each image of a patient; None if there are masks."""
  case = patient.case
  return case.labels or (case.patient_label,) * len(patient.images)


class _Thumbnails:
  """Stores the thumbnails of the scans of a cohort, 131 kB each: in a file that is mapped to memory, or in memory.

  Args:
    path: the .npy file; None keeps the thumbnails in memory only.
    most: the largest number of thumbnails.
  """

  def __init__(self, path: pathlib.Path | None, most: int):
    self._names, self._values = [], None
    if path is not None and most:
      path.parent.mkdir(parents=True, exist_ok=True)
      self._values = np.lib.format.open_memmap(path, 'w+', np.float16, (most, math.prod(_THUMBNAIL)))
    elif most:
      self._values = np.empty((most, math.prod(_THUMBNAIL)), np.float16)

  def add(self, name: str, thumbnail: np.ndarray) -> None:
    self._values[len(self._names)] = thumbnail
    self._names.append(name)

  def warn_of_similar(self) -> None:
    """Logs a warning for each pair with a high correlation, in the order of the scans. Compares block by block."""
    count, pairs = len(self._names), []
    block = lambda start: np.asarray(self._values[start : min(start + _BLOCK, count)], np.float32)
    for start in range(0, count, _BLOCK):
      one = block(start)
      for other_start in range(start, count, _BLOCK):
        other = one if other_start == start else block(other_start)
        correlations = one @ other.T
        if other_start == start:
          correlations = np.triu(correlations, k=1)
        pairs += [
          (start + i, other_start + j, float(correlations[i, j])) for i, j in np.argwhere(correlations >= _ALIKE)
        ]
    for one, other, correlation in sorted(pairs):
      logging.warning(
        '%s: looks like %s (correlation %.3f), perhaps another reconstruction, and may be in both training and test; '
        'if both show one patient, remove one of the two, with its mask',
        self._names[other],
        pathlib.Path(self._names[one]).name,
        correlation,
      )


def _label_problems(values, classes, has_seg):
  """A line for each label of a class that no mask has, or each mask without lesion that seems to use other labels.

  In a cohort with labels of organs, a mask without a lesion label is a patient without lesion. But if it also has a
  value that no mask with lesion has, its lesions may have that value: 1 in some masks and 255 in others.

  Args:
    values: the distinct values of each mask.
    classes: the classes of the masks.
    has_seg: whether some masks are DICOM SEG.
  """
  if classes.is_binary or not values:
    return []
  labels = {value for each in classes.values for value in each}
  nonzero = {path: set(each) - {0} for path, each in values.items()}
  missing = sorted(labels - set().union(*nonzero.values()))
  if missing and not has_seg:
    return [
      f'{classes.key}: no mask has the value {", ".join(map(str, missing))}; the masks have '
      f'{_counted(nonzero.values()) or "only 0"}; give the values that are lesion'
    ]
  if classes.background is not None:  # then every value has a meaning
    return []
  with_lesion = set().union(*(each for each in nonzero.values() if each & labels))
  return [
    f'{path}: the values are {_listed(values[path])}, none of which is a lesion label ({_listed(labels)}), and no mask '
    f'with lesion has {_listed(each - with_lesion)}; add it to data.lesion_labels if it is lesion, or set it to 0'
    for path, each in nonzero.items()
    if not each & labels and each - with_lesion
  ]


def _log_labels(patients, values):
  if any(patient.case.has_labels for patient in patients):
    return
  without = sum(not any(patient.lesion_voxels) for patient in patients)
  labels = patients[0].case.classes.known if patients else set()
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
    'lesion_labels': _labels(cases[0].classes) or [],
    'intensity': cases[0].intensity,
    'patients': 'named' if all(case.named for case in cases) else 'each_slice',
    'coloured': cases[0].coloured,
    **_classes(cases[0].classes),
  }


def _labels(classes):
  """Returns the mask values of the only class as in data.lesion_labels; None if data.classes names the classes."""
  return list(classes.values[0]) if classes.background is None else None


def _classes(classes):
  """Returns data.classes and data.ignore_label; {} if only lesion labels are given.

  Exclusive classes have no mask values, and `exclusive` is True.
  """
  if classes.background is None:
    return {}
  if classes.exclusive:
    return {'classes': [[name, []] for name in classes.names], 'ignore_label': [], 'exclusive': True}
  pairs = zip(classes.names, classes.values, strict=True)
  return {
    'classes': [*([name, list(values)] for name, values in pairs), [BACKGROUND, list(classes.background)]],
    'ignore_label': list(classes.ignored),
  }


def case_digests(cases: Sequence[Case], fingerprint: Sequence) -> dict[str, str]:
  """Returns, by name, a digest of the files of each case and of how they are read.

  Args:
    cases: the cases.
    fingerprint: the result of `fingerprint` for these cases.
  """
  paths = dict.fromkeys(path for case in cases for path in case.files)
  digest = dict(zip(paths, (each[1] for each in fingerprint[len(cases) :]), strict=True))
  return {
    case.patient: _text_digest(
      [
        [digest[path] for path in case.files],
        len(case.ct) if isinstance(case.ct, tuple) else None,
        *(case.labels, case.slice, _labels(case.classes), case.intensity, case.windowed),
        *_classes(case.classes).values(),
        *_of_patient(case),
      ]
    )
    for case in cases
  }


def _of_patient(case):
  """The label of a patient for digests; [] without one, so that the digests of other cohorts stay as they were."""
  return [] if case.patient_label is None else [f'patient {case.patient_label}']


def _text_digest(values):
  return hashlib.sha256(json.dumps(values).encode()).hexdigest()


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
  described = [
    [case.patient, case.owner, len(case.files), list(case.labels or ()), case.slice, *_of_patient(case)]
    for case in cases
  ]
  found = digests.of(list(paths), cache, progress)
  return described + [[printable(path.name), digest] for path, digest in zip(paths, found, strict=True)]
