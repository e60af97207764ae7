"""What the header elements of one DICOM image say. A header is a pydicom.Dataset with the elements of ELEMENTS."""

from typing import Any

import numpy as np

_SECONDARY_CAPTURE = '1.2.840.10008.5.1.4.1.1.7'
ELEMENTS = [
  'SpecificCharacterSet',
  'SOPClassUID',
  'SOPInstanceUID',
  'ImageType',
  'Modality',
  'StudyInstanceUID',
  'SeriesInstanceUID',
  'FrameOfReferenceUID',
  'SeriesNumber',
  'SeriesDescription',
  'Rows',
  'Columns',
  'ImagePositionPatient',
  'ImageOrientationPatient',
  'PixelSpacing',
  'SamplesPerPixel',
  'NumberOfFrames',
  'RescaleSlope',
  'RescaleIntercept',
  'RescaleType',
  'Units',
  'PatientName',
  'PatientID',
  'PatientBirthDate',
]
# The elements that place an image in the patient, and the number of their values.
_PLACE = {'ImagePositionPatient': 3, 'ImageOrientationPatient': 6, 'PixelSpacing': 2, 'Rows': 1, 'Columns': 1}


def left_out(header: Any) -> str | None:
  """Describes an object that is not a slice of a scan; None if it may be one."""
  modality = header.get('Modality') or ''
  if str(header.get('SOPClassUID', '')).startswith(_SECONDARY_CAPTURE):
    return 'secondary captures (for example dose sheets)'
  if 'Rows' not in header or modality not in ('CT', ''):
    return f'{modality} objects'.strip()
  if 'LOCALIZER' in _image_type(header):
    return 'localizers'
  return None


def _image_type(header):
  """The values of ImageType, in capitals."""
  value = header.get('ImageType') or ()
  return [str(one).upper() for one in ((value,) if isinstance(value, str) else value)]


def size(header: Any) -> tuple[int, int]:
  """Rows and columns."""
  return tuple(int(numbers(header, key, 1)[0]) for key in ('Rows', 'Columns'))


def frames(header: Any) -> int:
  """The number of frames; 1 if the header does not state it."""
  return int(header.get('NumberOfFrames') or 1)


def directions(header: Any) -> np.ndarray:
  """Unit vectors [2, (x, y, z)] along a row and along a column; NaN for vectors of zeros."""
  vectors = numbers(header, 'ImageOrientationPatient', 6).reshape(2, 3)
  with np.errstate(invalid='ignore'):
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def has_place(header: Any) -> bool:
  """Whether a header has size, spacing, position and orientation."""
  return all(numbers(header, key, count) is not None for key, count in _PLACE.items())


def numbers(header: Any, key: str, count: int) -> np.ndarray | None:
  """An element's value as float64 [count]; None if it is missing, has another length or is not finite numbers."""
  try:
    values = np.array(header[key].value, float).reshape(count)
  except (KeyError, TypeError, ValueError):
    return None
  return values if np.isfinite(values).all() else None
