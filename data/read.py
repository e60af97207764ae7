"""A case's files -> its slices: scans and pictures alike from here on."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from data.cohorts import Case
from fusa_jax.scans import dicom, dicom_seg, nifti, pictures, volumes
from fusa_jax.scans.archives import is_archive, unpacking, within
from fusa_jax.system.errors import UserError


class Slices(NamedTuple):
  """The slices of a case, in order; of a scan from inferior to superior.

  Attributes:
    images: of each, [H, W] of HU or grey values; pictures of one patient may differ in size.
    masks: of each, uint8 {0, 1} [H, W]; 0 also where a case has labels only.
    lesion_voxels: of each, how many of its voxels are lesion; of a case with labels only, the label.
    spacing: mm between slices, rows and columns; NaN for pictures, of which it is not known.
    lesion_ml: volume of the lesions; None for pictures and loose slices.
  """

  images: Sequence[np.ndarray]
  masks: Sequence[np.ndarray]
  lesion_voxels: tuple[int, ...]
  spacing: tuple[float, float, float]
  lesion_ml: float | None


def volume(case: Case) -> tuple[volumes.Scan, np.ndarray]:
  """A case's scan, and its mask: uint8 {0, 1}, on the scan's axes.

  Raises:
    UserError: as `nifti.read_scan` and `nifti.read_mask`; of DICOM as `dicom.read_series` and `dicom_seg.read_seg`;
      there is not one series, or no mask.
  """
  if case.ct.is_dir() or is_archive(case.ct):
    return _volume_of_dicom(case)
  scan = nifti.read_scan(case.ct, case.intensity or 'hu', case.windowed)
  if case.mask is None:
    return scan, np.zeros(scan.values.shape, np.uint8)
  return scan, nifti.read_mask(case.mask, scan, case.lesion_labels)


def _volume_of_dicom(case):
  with unpacking() as unpacked:
    try:
      paths = [path for path in within(case.ct, unpacked) if dicom.is_dicom(path)]
      series, left_out = dicom.sort_series(paths)
      drawn = _segmentation(paths) if case.mask == case.ct else None
      if drawn:
        uid = dicom_seg.series_uid(drawn)
        series = [one for one in series if one.uid == uid]
      if len(series) != 1:
        found = (', '.join(map(str, series)) or 'none') + (f' (left out: {left_out})' if left_out and not drawn else '')
        needed = f'CT series that {drawn.name} refers to' if drawn else 'CT series, the one that the mask was drawn on'
        raise UserError(f'there must be one {needed}, and there is {found}; add it, or take the others out')
      scan = series[0].read_image(case.intensity or 'hu')
      if drawn:
        return scan, dicom_seg.read_seg(drawn, scan, case.lesion_labels)
    except UserError as error:  # which does not say in which folder, but of the archive that is all
      lines = str(error).removeprefix(f'{case.ct}: ').splitlines()
      raise UserError('\n'.join(f'{case.ct}: {line}' for line in lines)) from None
  return scan, nifti.read_mask(case.mask, scan, case.lesion_labels)


def _segmentation(paths):
  found = dicom_seg.find_segs(paths)
  if len(found) == 1:
    return found[0]
  if found:
    raise UserError(f'{len(found)} DICOM SEGs ({", ".join(path.name for path in found)}); take all but one out')
  raise UserError('its mask is missing; add NAME_seg.nii.gz beside it or a DICOM SEG in it, or take it out')


def slices(case: Case) -> Slices:
  """Reads all of a case.

  Raises:
    UserError: as `volume`, `pictures.read_picture` and `pictures.read_mask`.
  """
  if isinstance(case.ct, tuple):
    return _pictures(case)
  if case.slice is not None:
    scan, mask = _shared_volume(case._replace(patient='', slice=0))
    one = slice(case.slice, case.slice + 1)
    return Slices(scan.values[one], mask[one], (int(mask[one].sum()),), scan.spacing, None)
  scan, mask = volume(case)
  voxels = mask.sum(axis=(1, 2), dtype=np.int64)
  return Slices(scan.values, mask, tuple(map(int, voxels)), scan.spacing, float(voxels.sum() * scan.voxel_ml))


# Loose slices are cases of one file each after the other.
_shared_volume = functools.lru_cache(maxsize=1)(volume)


def _pictures(case):
  images = [pictures.read_picture(path) for path in case.ct]
  if case.mask is None:
    masks = [np.zeros(image.shape, np.uint8) for image in images]
    voxels = case.labels or (0,) * len(images)
  else:
    masks = [
      pictures.read_mask(path, image.shape, case.lesion_labels) for path, image in zip(case.mask, images, strict=True)
    ]
    voxels = tuple(int(mask.sum()) for mask in masks)
  return Slices(images, masks, voxels, (float('nan'),) * 3, None)
