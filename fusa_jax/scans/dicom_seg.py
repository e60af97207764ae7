"""Writes masks of lesions as DICOM SEG for their series, and reads SEGs that a viewer saved.

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
from fusa_jax.scans.classes import IGNORED, LESION, Classes
from fusa_jax.system import provenance
from fusa_jax.system.errors import UserError
from fusa_jax.system.files import printable, replacing

_SEGMENTATION, _LABELMAP = '1.2.840.10008.5.1.4.1.1.66.4', '1.2.840.10008.5.1.4.1.1.66.7'
# How a SEG refers to its source slices. It has the same study and frame of reference.
_REFERRED = ('StudyInstanceUID', 'SeriesInstanceUID', 'FrameOfReferenceUID', 'SOPClassUID', 'SOPInstanceUID')
_OF_SLICE = (*_REFERRED, 'Modality', 'PixelSpacing', 'ImagePositionPatient')
# highdicom requires these elements of a source slice, and prints values that it rejects. So they are empty at first,
# and copied after highdicom's checks.
_OF_PATIENT = ('PatientID', 'PatientName', 'PatientBirthDate', 'PatientSex')
_OF_STUDY = ('AccessionNumber', 'StudyID', 'StudyDate', 'StudyTime')
# The coded types of classes with these names: (scheme, keyword) of pydicom's dictionary, or of a code that it lacks
# (value, scheme, meaning). All others are of the type Lesion.
_CODES = {
  'ground glass': ('DCM', 'GroundGlassOpacity'),
  'ground glass opacity': ('DCM', 'GroundGlassOpacity'),
  'consolidation': ('95436008', 'SCT', 'Lung consolidation'),
  'pleural effusion': ('SCT', 'PleuralEffusion'),
  'effusion': ('SCT', 'Effusion'),
  'nodule': ('SCT', 'Nodule'),
  'mass': ('SCT', 'Mass'),
}
_LONGEST_TEXT = 64  # characters that DICOM allows in a long string
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
    about = {'model': 'none', 'threshold': 0.5}
    made = _segmentation(series, {'Lesion': frames}, {'Lesion': about})
    made.save_as(io.BytesIO(), enforce_file_format=True)


def write_seg(
  path: pathlib.Path,
  masks: Mapping[str, np.ndarray],
  scan: volumes.Scan,
  about: Mapping[str, Mapping[str, Any]],
) -> None:
  """Writes the masks of a series as binary segments, which may overlap.

  Segments are numbered from 1 in the order of the masks. A segment has the coded type of its label (`_CODES`), or the
  type Lesion. Slices without lesion have no frame. If no slice has a lesion, every slice has an empty frame. Each frame
  refers to its source slice and has the same rows and columns.

  Args:
    path: the file to write, .dcm.
    masks: for each segment, by its label: uint8 {0, 1} [S, H, W] on canonical axes.
    scan: the scan from `dicom.read_series`, of a series that passed `check_series`.
    about: for each segment, how the mask was made, stored as parameters of the algorithm: 'model', 'threshold', and
      further ones ('lungs', 'smallest_ml', ...).

  Raises:
    UserError: highdicom rejects the headers of the series; the system refuses to write the file.
  """
  with _without_values(scan.path):
    frames = {label: volumes.to_own_axes(mask, scan).transpose(2, 1, 0) for label, mask in masks.items()}
    made = _segmentation(scan.path, frames, about)
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


def read_seg(path: pathlib.Path, scan: volumes.Scan, classes: Classes = LESION) -> np.ndarray:
  """Reads a SEG as the lesion mask of its series: bits of classes [S, H, W] (`scans.classes`), on the scan's axes.

  Args:
    path: the SEG, from any program. Frames may be in any order; slices without a frame are empty.
    scan: the scan of the series, from `dicom.read_series`.
    classes: the classes and the numbers of their segments. A binary mask has only one segment.

  Raises:
    UserError: the SEG is damaged or not binary; it has several segments but the mask is binary, or none of its
      segments belongs to a class, or one has no meaning; a frame does not match a slice pixel by pixel.
  """
  try:
    return _read(dicom_files.read_dataset(path), path.name, scan, classes)
  except UserError:
    raise
  except Exception as error:  # pydicom raises errors of many types
    raise UserError(f'{path.name}: the DICOM SEG cannot be read ({type(error).__name__}); save it again') from None


def _read(seg, name, scan, classes):
  if seg.SegmentationType != 'BINARY':
    raise UserError(f'{name}: the DICOM SEG must be of type BINARY; save it as a binary segmentation')
  numbers = sorted(int(segment.SegmentNumber) for segment in seg.SegmentSequence)
  if len(numbers) > 1 and classes.is_binary:
    raise UserError(
      f'{name}: the DICOM SEG has several segments ({", ".join(map(str, numbers))}); name the lesion segments, for '
      f'example --config.data.lesion_labels="({numbers[0]},)"'
    )
  if not classes.is_binary and not set(numbers) & classes.known:
    raise UserError(
      f'{name}: {classes.key} ({", ".join(map(str, sorted(classes.known)))}) names no segment of the DICOM SEG '
      f'({", ".join(map(str, numbers))}); add the lesion segments or, without lesions, save an empty lesion segment'
    )
  if not classes.is_binary:
    types = ((one.SegmentNumber, one.get('SegmentedPropertyTypeCodeSequence')) for one in seg.SegmentSequence)
    meanings = tuple((int(number), printable(str(code[0].get('CodeMeaning', '')))) for number, code in types if code)
    classes._replace(meanings=meanings).check(name, numbers)
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
    bits = 1 if classes.is_binary else int(classes.bits(np.array(segment.ReferencedSegmentNumber)))
    if not bits:
      continue
    apart = np.linalg.norm(slices - _corners(orientation, spacing, position, seg), axis=2).max(axis=1)
    nearest = apart.argmin()
    if frame.shape != own.shape[1:] or not apart[nearest] <= 0.1 * min(scan.spacing):
      raise UserError(
        f'{name}: frames of the DICOM SEG do not match the slices of {scan.path} pixel by pixel; save it on the grid '
        'of that series'
      )
    own[nearest] |= (frame > 0) * np.uint8(bits)
  own[own >= IGNORED] = IGNORED
  return np.ascontiguousarray(volumes.to_canonical_axes(own.transpose(2, 1, 0), scan))


def _corners(orientation, spacing, position, size):
  """The positions of three corners of an image [3, (x, y, z)], in millimetres, from its DICOM elements."""
  across, down = np.array(orientation.ImageOrientationPatient, float).reshape(2, 3)
  height, width = map(float, spacing.PixelSpacing)
  first = np.array(position.ImagePositionPatient, float)
  return np.stack([first, first + across * width * (size.Columns - 1), first + down * height * (size.Rows - 1)])


def _segmentation(series, frames, about):
  """Makes a highdicom Segmentation of frames [slices, rows, columns] by label, in the order of the series' grid."""
  highdicom, codes = _highdicom()
  headers, affine = series.grid
  whole = dicom_files.read_dataset(headers[0].filename, stop_before_pixels=True)
  spacing = abs(np.linalg.det(affine[:3, :3])) / np.prod(np.linalg.norm(affine[:3, :2], axis=0))
  thickness = whole.get('SliceThickness') or f'{spacing:.8g}'
  size, (first, *others) = next(iter(frames.values())).shape[1:], about.values()
  sources = [_source(header, headers[0], size, thickness, f'{spacing:.8g}') for header in headers]
  version = provenance.version() or 'source'
  segments = [
    highdicom.seg.SegmentDescription(
      segment_number=number,
      segment_label=label[:_LONGEST_TEXT],
      segmented_property_category=codes.SCT.MorphologicallyAbnormalStructure,
      segmented_property_type=_code(label),
      algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
      algorithm_identification=highdicom.AlgorithmIdentificationSequence(
        'fusa_jax',
        codes.DCM.ArtificialIntelligence,
        version,
        parameters={key: str(about[label][key]) for key in sorted(about[label])},
      ),
    )
    for number, label in enumerate(frames, 1)
  ]
  made = highdicom.seg.Segmentation(
    source_images=sources,
    pixel_array=np.stack(list(frames.values()), axis=-1),
    segmentation_type=highdicom.seg.SegmentationTypeValues.BINARY,
    segment_descriptions=segments,
    series_instance_uid=highdicom.UID(),
    series_number=_NUMBER + max(series.number or 0, 0),
    sop_instance_uid=highdicom.UID(),
    instance_number=1,
    manufacturer='fusa_jax',
    manufacturer_model_name=first['model'][:_LONGEST_TEXT],
    software_versions=version,
    device_serial_number='none',
    series_description='Lesions by fusa_jax, for research only',
    content_label='LESION',
    content_creator_name='',  # required, but no person made it
    content_description=_description(first) if not others else f'{len(frames)} classes; each segment has its threshold',
  )
  for key in (*_OF_PATIENT, *_OF_STUDY, 'SpecificCharacterSet', 'LossyImageCompression'):
    if key in whole:
      made.add(whole[key])
  made.copy_patient_and_study_information(whole)
  return made


def _description(about):
  """Describes the mask of one class in at most _LONGEST_TEXT characters."""
  limits = ', in lungs' if about.get('lungs') else ''
  limits += f', >= {about["smallest_ml"]:.3g} mL' if about.get('smallest_ml') else ''
  return f'Lesions, probability >= {about["threshold"]:.3g}{limits}'


def _code(label):
  """The coded type of a segment."""
  highdicom, codes = _highdicom()
  parts = _CODES.get(label.lower(), ('SCT', 'Lesion'))
  return highdicom.sr.CodedConcept(*parts) if len(parts) == 3 else getattr(getattr(codes, parts[0]), parts[1])


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
