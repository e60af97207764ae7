"""Writes lesion masks as DICOM SEG for their series, and reads SEGs that a viewer saved.

By DICOM's rules a SEG has the patient name, ID and dates of its series, so that an archive files it under that patient.
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

from fusa_jax.scans import dicom, dicom_files, formats, volumes
from fusa_jax.system import provenance
from fusa_jax.system.errors import UserError
from fusa_jax.system.files import replacing

_SEGMENTATION, _LABELMAP = '1.2.840.10008.5.1.4.1.1.66.4', '1.2.840.10008.5.1.4.1.1.66.7'
# How a SEG refers to its source slices. It has the same study and frame of reference.
_REFERRED = ('StudyInstanceUID', 'SeriesInstanceUID', 'FrameOfReferenceUID', 'SOPClassUID', 'SOPInstanceUID')
_OF_SLICE = (*_REFERRED, 'Modality', 'PixelSpacing', 'ImagePositionPatient')
# highdicom requires these elements of a source slice, and prints values that it rejects. So they are empty at first,
# and copied after highdicom's checks.
_OF_PATIENT = ('PatientID', 'PatientName', 'PatientBirthDate', 'PatientSex')
_OF_STUDY = ('AccessionNumber', 'StudyID', 'StudyDate', 'StudyTime')
# The series number of a mask is this much larger than that of its series.
_NUMBER = 1000


def check_series(sources: Sequence[formats.Source]) -> None:
  """Checks that a SEG can be made for each source.

  Raises:
    UserError: a source is not a DICOM series; highdicom is not installed; no SEG can be made, one line per series.
  """
  others = [source.name for source in sources if not isinstance(source, (dicom.Series, formats.Refused))]
  if others:
    raise UserError(f'dicom: {others[0]} is not a DICOM series; give only DICOM series, or leave out --dicom')
  _highdicom()
  problems = []
  for one in sources:
    if isinstance(one, formats.Refused):
      continue  # reading it raises its own error
    lacking = [key for key in _REFERRED if not all(header.get(key) for header in one.headers)]
    if lacking:
      problems.append(f'{one}: its slices lack {", ".join(lacking)}, which a SEG needs; leave out --dicom')
      continue
    try:
      _check(one)
    except UserError as error:
      problems.append(str(error))
  if problems:
    raise UserError('\n'.join(problems))


def _check(series):
  """Makes a SEG in memory with one pixel per slice, because only highdicom can tell which headers it accepts."""
  frames = np.zeros((len(series.grid[0]), 1, 1), np.uint8)
  frames[0] = 1  # one slice with a lesion is enough: all others then have no frame
  with _without_values(series):
    _segmentation(series, frames, {'model': 'none', 'threshold': 0.5}).save_as(io.BytesIO(), enforce_file_format=True)


def write_seg(path: pathlib.Path, mask: np.ndarray, scan: volumes.Scan, about: Mapping[str, Any]) -> None:
  """Writes the mask of a series as one binary segment of the coded type Lesion.

  Slices without lesion have no frame. If no slice has a lesion, every slice has an empty frame. Each frame refers to
  its source slice and has the same rows and columns.

  Args:
    path: the file to write, .dcm.
    mask: uint8 {0, 1} [S, H, W] on canonical axes.
    scan: the scan from `dicom.read_series`, of a series that passed `check_series`.
    about: how the mask was made, stored as parameters of the algorithm: 'model', 'threshold', and further ones
      ('lungs', 'smallest_ml', ...).

  Raises:
    UserError: highdicom rejects the headers of the series; the system refuses to write the file.
  """
  with _without_values(scan.path):
    made = _segmentation(scan.path, volumes.to_own_axes(mask, scan).transpose(2, 1, 0), about)
    with replacing(path) as partial:
      made.save_as(partial, enforce_file_format=True)


@contextlib.contextmanager
def _without_values(series):
  """Hides the warnings and error texts of code that uses a series' headers, because they quote the values."""
  try:
    with warnings.catch_warnings():
      warnings.simplefilter('ignore')
      yield
  except UserError:
    raise
  except Exception as error:  # of many types; the texts may contain data of the patient
    raise UserError(
      f'{series}: no DICOM SEG can be made from its headers ({type(error).__name__}); leave out --dicom'
    ) from None


def find_segs(paths: Iterable[pathlib.Path]) -> list[pathlib.Path]:
  """The SEGs among DICOM files that `dicom.sort_series` can read."""
  header = lambda path: dicom_files.read_dataset(path, stop_before_pixels=True, specific_tags=['SOPClassUID'])
  return [path for path in paths if dicom_files.sop_class(header(path)) in (_SEGMENTATION, _LABELMAP)]


def series_uid(path: pathlib.Path) -> str:
  """The UID of the series that a SEG refers to; '' if it names none or is damaged."""
  try:
    header = dicom_files.read_dataset(path, stop_before_pixels=True, specific_tags=['ReferencedSeriesSequence'])
    return str(header.ReferencedSeriesSequence[0].SeriesInstanceUID)
  except Exception:  # pydicom raises errors of many types
    return ''


def read_seg(path: pathlib.Path, scan: volumes.Scan, lesion_labels: Sequence[int] = ()) -> np.ndarray:
  """Reads a SEG as the lesion mask of its series: uint8 {0, 1} [S, H, W], with the shape and axes of scan.values.

  Args:
    path: the SEG, from any program. Frames may be in any order; slices without a frame are empty.
    scan: the scan of the series, from `dicom.read_series`.
    lesion_labels: the numbers of the segments that are lesion; () if there is only one segment.

  Raises:
    UserError: the SEG is damaged or not binary; it has several segments and no labels are given, or none of its
      segments is in the labels; a frame does not match a slice pixel by pixel.
  """
  try:
    return _read(dicom_files.read_dataset(path), path.name, scan, lesion_labels)
  except UserError:
    raise
  except Exception as error:  # pydicom raises errors of many types
    raise UserError(f'{path.name}: the DICOM SEG cannot be read ({type(error).__name__}); save it again') from None


def _read(seg, name, scan, lesion_labels):
  if seg.SegmentationType != 'BINARY':
    raise UserError(f'{name}: the DICOM SEG must be of type BINARY; save it as a binary segmentation')
  numbers = sorted(int(segment.SegmentNumber) for segment in seg.SegmentSequence)
  if len(numbers) > 1 and not lesion_labels:
    raise UserError(
      f'{name}: the DICOM SEG has several segments ({", ".join(map(str, numbers))}); name the lesion segments, for '
      f'example --config.data.lesion_labels="({numbers[0]},)"'
    )
  if lesion_labels and not set(numbers) & set(lesion_labels):
    raise UserError(
      f'{name}: data.lesion_labels ({", ".join(map(str, lesion_labels))}) names no segment of the DICOM SEG '
      f'({", ".join(map(str, numbers))}); add the lesion segments or, without lesions, save an empty lesion segment'
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
        f'{name}: frames of the DICOM SEG do not match the slices of {scan.path} pixel by pixel; save it on the grid '
        'of that series'
      )
    own[nearest] |= frame
  return np.ascontiguousarray(volumes.to_canonical_axes(own.transpose(2, 1, 0), scan))


def _corners(orientation, spacing, position, size):
  """The positions of three corners of an image [3, (x, y, z)], in millimetres, from its DICOM elements."""
  across, down = np.array(orientation.ImageOrientationPatient, float).reshape(2, 3)
  height, width = map(float, spacing.PixelSpacing)
  first = np.array(position.ImagePositionPatient, float)
  return np.stack([first, first + across * width * (size.Columns - 1), first + down * height * (size.Rows - 1)])


def _segmentation(series, frames, about):
  """Makes a highdicom Segmentation of frames [slices, rows, columns], in the order of the series' grid."""
  highdicom, codes = _highdicom()
  headers, affine = series.grid
  whole = dicom_files.read_dataset(headers[0].filename, stop_before_pixels=True)
  spacing = abs(np.linalg.det(affine[:3, :3])) / np.prod(np.linalg.norm(affine[:3, :2], axis=0))
  thickness = whole.get('SliceThickness') or f'{spacing:.8g}'
  sources = [_source(header, headers[0], frames.shape[1:], thickness, f'{spacing:.8g}') for header in headers]
  version = provenance.version() or 'source'
  algorithm = highdicom.AlgorithmIdentificationSequence(
    'fusa_jax', codes.DCM.ArtificialIntelligence, version, parameters={key: str(about[key]) for key in sorted(about)}
  )
  segment = highdicom.seg.SegmentDescription(
    segment_number=1,
    segment_label='Lesion',
    segmented_property_category=codes.SCT.MorphologicallyAbnormalStructure,
    segmented_property_type=codes.SCT.Lesion,
    algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
    algorithm_identification=algorithm,
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
    manufacturer_model_name=about['model'][:64],  # DICOM allows 64 characters
    software_versions=version,
    device_serial_number='none',
    series_description='Lesions by fusa_jax, for research only',
    content_label='LESION',
    content_creator_name='',  # required, but no person made it
    content_description=_description(about),
  )
  for key in (*_OF_PATIENT, *_OF_STUDY, 'SpecificCharacterSet', 'LossyImageCompression'):
    if key in whole:
      made.add(whole[key])
  made.copy_patient_and_study_information(whole)
  return made


def _description(about):
  """Describes the mask in at most 64 characters, the limit of DICOM."""
  limits = ', in lungs' if about.get('lungs') else ''
  limits += f', >= {about["smallest_ml"]:.3g} mL' if about.get('smallest_ml') else ''
  return f'Lesions, probability >= {about["threshold"]:.3g}{limits}'


def _source(header, first, size, thickness, spacing):
  """The header of a slice for highdicom: with the orientation of the first slice and without data of the patient."""
  import pydicom

  source = pydicom.Dataset()
  for key in _OF_SLICE:
    source.add(header[key])
  source.add(first['ImageOrientationPatient'])  # orientations may differ by rounding
  source.Rows, source.Columns = size
  source.SliceThickness, source.SpacingBetweenSlices = thickness, spacing
  for key in (*_OF_PATIENT, *_OF_STUDY):
    setattr(source, key, '')
  return source


@functools.cache
def _highdicom():
  """Imports highdicom and the dictionary of DICOM codes."""
  try:
    import highdicom
    from pydicom.sr.codedict import codes
  except ImportError:
    raise UserError('dicom: highdicom is not installed; pip install -r requirements-dicom.txt') from None
  logging.getLogger('highdicom').setLevel(logging.ERROR)  # its log quotes values, too
  return highdicom, codes
