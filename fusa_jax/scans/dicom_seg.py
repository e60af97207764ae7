"""Lesion masks as DICOM SEG: written beside the series that they were found on, and read as what a viewer has saved.

A SEG belongs to its patient: by DICOM's rules name, ID and dates are those of the series, so that an archive files it
there.
"""

import contextlib
import functools
import io
import logging
import pathlib
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from fusa_jax.scans import dicom, formats, volumes
from fusa_jax.system import provenance
from fusa_jax.system.errors import UserError
from fusa_jax.system.files import replacing

_SEGMENTATION, _LABELMAP = '1.2.840.10008.5.1.4.1.1.66.4', '1.2.840.10008.5.1.4.1.1.66.7'
# What a SEG says of the slices that it was made on; their study and frame of reference are also its own.
_REFERRED = ('StudyInstanceUID', 'SeriesInstanceUID', 'FrameOfReferenceUID', 'SOPClassUID', 'SOPInstanceUID')
_OF_SLICE = (*_REFERRED, 'Modality', 'PixelSpacing', 'ImagePositionPatient')
# What highdicom asks of a source, and prints where it does not like it: copied when nobody looks at it any more.
_OF_PATIENT = ('PatientID', 'PatientName', 'PatientBirthDate', 'PatientSex')
_OF_STUDY = ('AccessionNumber', 'StudyID', 'StudyDate', 'StudyTime')
# From the series' number to that of its mask.
_NUMBER = 1000


def check_series(sources: Sequence[formats.Source]) -> None:
  """Raises a UserError: a source is no series; a line for each of which no SEG can be made; highdicom is missing."""
  others = [source.name for source in sources if not isinstance(source, dicom.Series)]
  if others:
    raise UserError(f'dicom: {others[0]} is no DICOM series; give such alone, or leave it out')
  _highdicom()
  problems = []
  for one in sources:
    lacking = [key for key in _REFERRED if not all(header.get(key) for header in one.headers)]
    if lacking:
      problems.append(f'{one}: its slices lack {", ".join(lacking)}, which a SEG refers to; leave out --dicom')
      continue
    try:
      _check(one)
    except UserError as error:
      problems.append(str(error))
  if problems:
    raise UserError('\n'.join(problems))


def _check(series):
  """Makes a SEG in memory, as if slices had one pixel: only highdicom can tell which headers it takes."""
  frames = np.zeros((len(series.grid[0]), 1, 1), np.uint8)
  frames[0] = 1  # where there is any, slices without have no frame
  with _without_values(series):
    _segmentation(series, frames, {'model': 'none', 'threshold': 0.5}).save_as(io.BytesIO(), enforce_file_format=True)


def write_seg(path: pathlib.Path, mask: np.ndarray, scan: volumes.Scan, about: Mapping[str, Any]) -> None:
  """Writes the mask of a series as one binary segment of the coded type Lesion.

  Slices without lesion have no frame; where none has any, each has an empty one. Frames refer to the slices that they
  lie on, and have their rows and columns.

  Args:
    path: of the file, .dcm.
    mask: uint8 {0, 1} [S, H, W] on canonical axes.
    scan: as `dicom.read_series` gave it, of a series that `check_series` let through.
    about: what made it, all of which its parameters say: 'model', 'threshold'; 'lungs', 'smallest_ml' and others.

  Raises:
    UserError: headers of the series of which highdicom makes no SEG; the system refuses to write there.
  """
  with _without_values(scan.path):
    made = _segmentation(scan.path, volumes.to_own_axes(mask, scan).transpose(2, 1, 0), about)
    with replacing(path) as partial:
      made.save_as(partial, enforce_file_format=True)


@contextlib.contextmanager
def _without_values(series):
  """Around what uses a series' headers: warnings and errors quote the values that they are about."""
  try:
    with warnings.catch_warnings():
      warnings.simplefilter('ignore')
      yield
  except UserError:
    raise
  except Exception as error:  # of many types, with values of the patient's in their texts
    raise UserError(
      f'{series}: its headers make no DICOM SEG ({type(error).__name__}); predict it without --dicom'
    ) from None


def find_segs(paths: Iterable[pathlib.Path]) -> list[pathlib.Path]:
  """Which of some DICOM files, such as `dicom.find_series` has read, are SEGs."""
  from pydicom import filereader

  of_class = lambda path: str(filereader.read_file_meta_info(path).get('MediaStorageSOPClassUID', ''))
  return [path for path in paths if of_class(path) in (_SEGMENTATION, _LABELMAP)]


def series_uid(path: pathlib.Path) -> str:
  """Of the series that a SEG refers to; '' where it names none, also because it is damaged."""
  import pydicom

  try:
    header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=['ReferencedSeriesSequence'])
    return str(header.ReferencedSeriesSequence[0].SeriesInstanceUID)
  except Exception:  # pydicom lets errors of many types through
    return ''


def read_seg(path: pathlib.Path, scan: volumes.Scan, lesion_labels: Sequence[int] = ()) -> np.ndarray:
  """A SEG as the lesion mask of its series: uint8 {0, 1} [S, H, W], of scan.values's shape and axes.

  Args:
    path: of the SEG, whosever. Its frames lie on slices of the series, in any order; slices without one are empty.
    scan: of the series, as `dicom.read_series` gave it.
    lesion_labels: the numbers of the segments that are lesion; () where it has one only.

  Raises:
    UserError: damaged; not binary; several segments and no labels, or labels of none of them; frames that lie on no
      slice, pixel by pixel.
  """
  import pydicom

  try:
    return _read(pydicom.dcmread(path), path.name, scan, lesion_labels)
  except UserError:
    raise
  except Exception as error:  # pydicom lets errors of many types through
    raise UserError(f'{path.name}: a DICOM SEG that cannot be read ({type(error).__name__}); save it again') from None


def _read(seg, name, scan, lesion_labels):
  if seg.SegmentationType != 'BINARY':
    raise UserError(f'{name}: a DICOM SEG of another type than binary; save it as a binary one')
  numbers = sorted(int(segment.SegmentNumber) for segment in seg.SegmentSequence)
  if len(numbers) > 1 and not lesion_labels:
    raise UserError(
      f'{name}: a DICOM SEG with the segments {", ".join(map(str, numbers))}; name those that are lesion, as in '
      f'--config.data.lesion_labels="({numbers[0]},)"'
    )
  if lesion_labels and not set(numbers) & set(lesion_labels):
    raise UserError(
      f'{name}: a DICOM SEG with the segments {", ".join(map(str, numbers))}, none of which data.lesion_labels '
      f'({", ".join(map(str, lesion_labels))}) names; add those that are lesion, or save it with one of them, empty '
      'where there is no lesion'
    )
  headers, _ = scan.path.grid
  slices = np.stack([_corners(header, header, header, header) for header in headers])
  own = np.zeros((len(headers), headers[0].Rows, headers[0].Columns), np.uint8)
  shared = seg.SharedFunctionalGroupsSequence[0]
  frames = seg.pixel_array.reshape(-1, seg.Rows, seg.Columns)
  for frame, groups in zip(frames, seg.PerFrameFunctionalGroupsSequence, strict=True):
    orientation, spacing, position, segment = (
      (groups if f'{key}Sequence' in groups else shared)[f'{key}Sequence'][0]
      for key in ('PlaneOrientation', 'PixelMeasures', 'PlanePosition', 'SegmentIdentification')
    )
    if lesion_labels and segment.ReferencedSegmentNumber not in lesion_labels:
      continue
    apart = np.linalg.norm(slices - _corners(orientation, spacing, position, seg), axis=2).max(axis=1)
    nearest = apart.argmin()
    if frame.shape != own.shape[1:] or not apart[nearest] <= 0.1 * min(scan.spacing):
      raise UserError(
        f'{name}: a DICOM SEG whose frames lie on no slices of {scan.path}, pixel by pixel; save it on the grid of '
        'that series'
      )
    own[nearest] |= frame
  return np.ascontiguousarray(volumes.to_canonical_axes(own.transpose(2, 1, 0), scan))


def _corners(orientation, spacing, position, size):
  """Where three corners of an image lie [3, (x, y, z)], in millimetres, of the elements that say so."""
  across, down = np.array(orientation.ImageOrientationPatient, float).reshape(2, 3)
  height, width = map(float, spacing.PixelSpacing)
  first = np.array(position.ImagePositionPatient, float)
  return np.stack([first, first + across * width * (size.Columns - 1), first + down * height * (size.Rows - 1)])


def _segmentation(series, frames, about):
  """highdicom's Segmentation of frames [slices, rows, columns], in the order of the series' grid."""
  import pydicom

  highdicom, codes = _highdicom()
  headers, affine = series.grid
  whole = pydicom.dcmread(headers[0].filename, stop_before_pixels=True)
  spacing = abs(np.linalg.det(affine[:3, :3])) / np.prod(np.linalg.norm(affine[:3, :2], axis=0))
  thickness = whole.get('SliceThickness') or f'{spacing:.8g}'
  sources = [_source(header, headers[0], frames.shape[1:], thickness, f'{spacing:.8g}') for header in headers]
  version = provenance.version() or 'source'
  by_us = highdicom.AlgorithmIdentificationSequence(
    'fusa_jax', codes.DCM.ArtificialIntelligence, version, parameters={key: str(about[key]) for key in sorted(about)}
  )
  segment = highdicom.seg.SegmentDescription(
    segment_number=1,
    segment_label='Lesion',
    segmented_property_category=codes.SCT.MorphologicallyAbnormalStructure,
    segmented_property_type=codes.SCT.Lesion,
    algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
    algorithm_identification=by_us,
  )
  made = highdicom.seg.Segmentation(
    source_images=sources,
    pixel_array=frames,
    segmentation_type=highdicom.seg.SegmentationTypeValues.BINARY,
    segment_descriptions=[segment],
    series_instance_uid=highdicom.UID(),
    series_number=_NUMBER + max(series.number or 0, 0),
    sop_instance_uid=highdicom.UID(),
    instance_number=1,
    manufacturer='fusa_jax',
    manufacturer_model_name=about['model'][:64],  # as much as there is room for
    software_versions=version,
    device_serial_number='none',
    series_description='Lesions by fusa_jax, for research only',
    content_label='LESION',
    content_creator_name='',  # required, and nobody
    content_description=_description(about),
  )
  for key in (*_OF_PATIENT, *_OF_STUDY, 'SpecificCharacterSet', 'LossyImageCompression'):
    if key in whole:
      made.add(whole[key])
  made.copy_patient_and_study_information(whole)
  return made


def _description(about):
  """In 64 characters, which is what there is room for."""
  limits = ', in lungs' if about.get('lungs') else ''
  limits += f', from {about["smallest_ml"]:.3g} mL' if about.get('smallest_ml') else ''
  return f'Lesions, probability from {about["threshold"]:.3g}{limits}'


def _source(header, first, size, thickness, spacing):
  """A slice as highdicom wants it, of one orientation and without the patient."""
  import pydicom

  source = pydicom.Dataset()
  for key in _OF_SLICE:
    source.add(header[key])
  source.add(first['ImageOrientationPatient'])  # they may differ by rounding
  source.Rows, source.Columns = size
  source.SliceThickness, source.SpacingBetweenSlices = thickness, spacing
  for key in (*_OF_PATIENT, *_OF_STUDY):
    setattr(source, key, '')
  return source


@functools.cache
def _highdicom():
  """highdicom, and the codes of terms."""
  try:
    import highdicom
    from pydicom.sr.codedict import codes
  except ImportError:
    raise UserError(
      'dicom: highdicom, which writes it, is not installed; pip install -r requirements-dicom.txt'
    ) from None
  logging.getLogger('highdicom').setLevel(logging.ERROR)  # as its warnings
  return highdicom, codes
