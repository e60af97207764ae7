"""Reads the files of a case into slices. From here on, scans and pictures are treated alike."""

import contextlib
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import nibabel as nib
import numpy as np

from data.cohorts import Case, labels
from fusa_jax.scans import dicom, dicom_files, dicom_headers, dicom_seg, pictures, sources, volume_files, volumes
from fusa_jax.scans.archives import in_folder, is_archive, unpacking, within
from fusa_jax.scans.classes import of_any, of_class
from fusa_jax.system.errors import UserError

# How many headers are read to find the largest scan.
_HEADERS = 16


class Slices(NamedTuple):
  """The slices of a case in order; those of a scan run from inferior to superior.

  Attributes:
    images: per slice, HU or grey values [H, W]; pictures of one patient may differ in size.
    masks: per slice, bits of classes [H, W] (`scans.classes`); all 0 if a case has only labels.
    lesion_voxels: per slice, the number of voxels of any class; if a case has only labels, 1 if the class of the slice
      or patient is with lesion, else 0.
    spacing: mm between slices, rows and columns; NaN for pictures, because it is unknown.
    lesion_ml: volume of the lesions in mL; None for pictures and loose slices, and without masks where patients have
      labels.
    values: the distinct values of each mask file; {} for DICOM SEG, and without masks.
    class_voxels: for each class, the number of voxels per slice; if a case has only labels, 1 where the slice or
      patient has the class, else 0.
  """

  images: Sequence[np.ndarray]
  masks: Sequence[np.ndarray]
  lesion_voxels: tuple[int, ...]
  spacing: tuple[float, float, float]
  lesion_ml: float | None
  values: Mapping[pathlib.Path, tuple[int, ...]]
  class_voxels: tuple[tuple[int, ...], ...]


def volume(case: Case) -> tuple[volumes.Scan, np.ndarray]:
  """Reads the scan of a case and its mask: bits of classes (`scans.classes`), on the scan's axes.

  Raises:
    UserError: as `volume_files.read_scan` and `volume_files.read_mask`; for DICOM as `dicom.read_series` and
      `dicom_seg.read_seg`; the mask is missing; there is not exactly one series. If the scan is refused, the message
      also says what is wrong with the mask.
  """
  return _volume(case)[:2]


def _volume(case):
  """The scan, its mask, and the values of the mask file (see `Slices`)."""
  if case.ct.is_dir() or is_archive(case.ct):
    return _volume_of_dicom(case)
  try:
    scan = volume_files.read_scan(case.ct, case.intensity or 'hu', case.windowed, loose=case.slice is not None)
  except UserError as error:
    raise UserError('\n'.join([str(error), *_problems_of_mask(case)])) from None
  return _with_mask(scan, case)


def _with_mask(scan, case):
  if case.mask is None:
    return scan, np.zeros(scan.values.shape, np.uint8), {}
  mask, values = volume_files.read_mask_and_values(case.mask, scan, case.classes)
  return scan, mask, {case.mask: values}


def _problems_of_mask(case):
  """What is wrong with the mask file of a scan that is refused: [] or [the error]."""
  return [] if case.mask in (None, case.ct) else _attempt(volume_files.read_grid, case.mask)[1]


def _attempt(function: Callable, *arguments):
  """The result of a function and [], or None and [the error]."""
  try:
    return function(*arguments), []
  except UserError as error:
    return None, [str(error)]


def _volume_of_dicom(case):
  with unpacking() as unpacked:
    try:
      files = list(within(case.ct, unpacked))
      paths = [path for path in files if dicom.Series.claims(path)]
      series, refused, left_out = dicom.sort_series(paths)
      if refused:
        raise UserError('\n'.join(one.message for one in refused))
      for one in series:
        one.check_whole()
      # Exports may divide a series into folders, so that a folder may hold nothing but damaged slices.
      lost = dicom_files.lost_slices(set(files) - set(paths), paths)
      if lost:
        damaged = sources.counted(path.name for path in lost)
        raise UserError(f'{damaged}: empty or damaged, so slices may be missing; copy the series again')
      _check_one_patient(case, series)
      seg = _only_seg(paths) if case.mask == case.ct else None
      if seg:
        uid = dicom_seg.series_uid(seg)
        series = [one for one in series if one.uid == uid]
      if len(series) != 1:
        listed = ', '.join(map(str, series)) or 'none'
        listed += f' (skipped: {left_out})' if left_out and not seg else ''
        needed = f'CT series that {seg.name} refers to' if seg else 'CT series that the mask was drawn on'
        raise UserError(f'there must be exactly one {needed}, but there is {listed}; add it, or remove the others')
      scan = series[0].read_image(case.intensity or 'hu')
      if seg:
        return scan, dicom_seg.read_seg(seg, scan, case.classes), {}
    except UserError as error:  # it does not name the folder; it names the archive only if that is the case itself
      lines = str(error).removeprefix(f'{case.ct}: ').splitlines()
      raise UserError('\n'.join([f'{case.ct}: {line}' for line in lines] + _problems_of_mask(case))) from None
  return _with_mask(scan, case)


def _check_one_patient(case, series):
  """Refuses a folder with two PatientIDs: in its series, or in the file from which `data.identity` took the ID."""
  first, name = dicom_files.find_patient_id(case.ct)
  of = {first: name} if first else {}
  for one in series:
    for header in one.headers:
      own = dicom_headers.patient_id(header)
      if own:
        of.setdefault(own, str(one))
  if len(of) > 1:
    raise UserError(
      f'{" and ".join(list(of.values())[:2])} have different PatientIDs, so they may show two patients; put each '
      'patient in a folder of its own'
    )


def _only_seg(paths):
  segs = dicom_seg.find_segs(paths)
  if len(segs) == 1:
    return segs[0]
  if segs:
    raise UserError(f'{len(segs)} DICOM SEGs ({", ".join(path.name for path in segs)}); remove all but one')
  raise UserError('the mask is missing; add NAME_seg.nii.gz beside it or a DICOM SEG in it, or remove it')


def largest(cases: Sequence[Case]) -> int:
  """Estimates the number of voxels of the largest scan of a cohort; 0 for pictures.

  It reads the headers of the NIfTI files that are largest on disk. For other formats it divides the size on disk by two
  bytes per voxel; for archives by three quarters of a byte.
  """
  sizes = {}
  for case in cases:
    if not isinstance(case.ct, tuple):
      files = in_folder(case.ct) if case.ct.is_dir() else [path for path in case.files if path != case.mask]
      with contextlib.suppress(OSError):
        sizes[case.ct] = sum(path.stat().st_size for path in files)
  return max((_voxels(path, sizes[path]) for path in sorted(sizes, key=sizes.get)[-_HEADERS:]), default=0)


def _voxels(path, size):
  if path.is_file() and path.name.lower().endswith(('.nii', '.nii.gz')):
    with contextlib.suppress(Exception):  # a damaged header is reported when the scan is read
      return int(np.prod(nib.load(path).shape))
  return size * 4 // 3 if is_archive(path) else size // 2


def slices(case: Case) -> Slices:
  """Reads all slices of a case.

  Raises:
    UserError: as `volume`, `pictures.read_picture` and `pictures.read_mask`; one line for each bad file.
  """
  if isinstance(case.ct, tuple):
    return _pictures(case)
  if case.slice is not None:
    scan, mask, values = _shared_volume(case._replace(patient='', slice=0))
    one = slice(case.slice, case.slice + 1)
    voxels = (int(of_any(mask[one]).sum()),)
    return Slices(scan.values[one], mask[one], voxels, scan.spacing, None, values, _class_voxels(case, mask[one]))
  scan, mask, values = _volume(case)
  if case.patient_label is not None:
    counts = _counts_of_labels(case, (case.patient_label,) * len(scan.values))
    return Slices(scan.values, mask, counts[0], scan.spacing, None, {}, counts[1])
  of_classes = _class_voxels(case, mask)
  voxels = of_any(mask).sum(axis=(1, 2), dtype=np.int64)
  lesion_ml = float(voxels.sum() * scan.voxel_ml)
  return Slices(scan.values, mask, tuple(map(int, voxels)), scan.spacing, lesion_ml, values, of_classes)


def _counts_of_labels(case, of_slices):
  """Returns `Slices.lesion_voxels` and `Slices.class_voxels` for the label of each slice."""
  if not case.classes.exclusive:
    return of_slices, (of_slices,)
  with_lesion = [int(not labels.is_without_lesion(name)) for name in case.classes.names]
  numbers = range(len(case.classes.names))
  of_classes = tuple(tuple(int(label == number) for label in of_slices) for number in numbers)
  return tuple(with_lesion[label] for label in of_slices), of_classes


def _class_voxels(case, masks):
  """Returns, for each class, the number of voxels in the masks of some slices."""
  return tuple(
    tuple(int(of_class(mask, number).sum(dtype=np.int64)) for mask in masks)
    for number in range(len(case.classes.names))
  )


# Loose slices of one file are read one after the other: keep the file.
_shared_volume = functools.lru_cache(maxsize=1)(_volume)


def coloured(case: Case) -> list[pathlib.Path]:
  """The pictures of a case that are in colour. A picture that cannot be read is not: `slices` refuses it."""
  found = []
  for path in case.ct:
    try:
      pictures.read_picture(path)
    except pictures.ColouredError:
      found.append(path)
    except UserError:
      pass
  return found


def _pictures(case):
  images, masks, values, lines = [], [], {}, []
  for path, mask_path in zip(case.ct, case.mask or (None,) * len(case.ct), strict=True):
    image, errors = _attempt(pictures.read_picture, path)
    shape = None if errors else image.shape
    lines += errors
    if mask_path is not None:
      read, errors = _attempt(pictures.read_mask_and_values, mask_path, shape, case.classes)
      lines += errors
      mask, values[mask_path] = read or (None, ())
    else:
      mask = None if shape is None else np.zeros(shape, np.uint8)
    images.append(image), masks.append(mask)
  if lines:
    raise UserError('\n'.join(lines))
  spacing = (float('nan'),) * 3
  if case.has_labels:
    counts = _counts_of_labels(case, case.labels or (case.patient_label,) * len(case.ct))
    return Slices(images, masks, counts[0], spacing, None, values, counts[1])
  voxels = tuple(int(of_any(mask).sum()) for mask in masks)
  return Slices(images, masks, voxels, spacing, None, values, _class_voxels(case, masks))
