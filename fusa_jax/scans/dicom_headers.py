"""What the header elements of one DICOM image say. A header is a pydicom.Dataset with the elements of ELEMENTS."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

_SECONDARY_CAPTURE = '1.2.840.10008.5.1.4.1.1.7'
# Elements that are equal in all slices of one acquisition.
ACQUISITION = (
  'AcquisitionNumber',
  'AcquisitionDate',
  'TemporalPositionIdentifier',
  'NominalPercentageOfCardiacPhase',
  'ContrastBolusAgent',
  'ConvolutionKernel',
  'KVP',
  'SliceThickness',
  'ImageType',
)
ELEMENTS = [
  'SpecificCharacterSet',
  'SOPClassUID',
  'SOPInstanceUID',
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
  *ACQUISITION,
  'AcquisitionTime',
  'PatientName',
  'PatientID',
  'PatientBirthDate',
]
# The elements that place an image in the patient, and the number of their values.
_PLACE = {'ImagePositionPatient': 3, 'ImageOrientationPatient': 6, 'PixelSpacing': 2, 'Rows': 1, 'Columns': 1}
# Seconds without a slice between two acquisitions.
_PAUSE = 10
# Words of ImageType and, if that does not say ORIGINAL, of SeriesDescription. The first kind shows no HU of tissue:
# projections, renderings, and maps that were computed from several images.
_NOT_TISSUE = {
  *('MIP', 'MINIP', 'MAXIP', 'IP', 'MAXIMUM', 'MINIMUM', 'PROJECTION', 'VRT', 'SSD', 'VOLREN', 'SUBTRACTION'),
  *('RENDER', 'RENDERED', 'RENDERING', 'VOLUMERENDERING', 'PERFUSION', 'IODINE', 'CBF', 'CBV', 'MTT', 'TTP', 'TMAX'),
}
_REFORMAT = {'MPR', 'REFORMAT', 'REFORMATTED', 'RESAMPLED', 'AVERAGE', 'CURVED', 'MULTIPLANAR'}


def left_out(header: Any) -> str | None:
  """Describes an object that is not a slice of a scan; None if it may be one."""
  modality = header.get('Modality') or ''
  if str(header.get('SOPClassUID', '')).startswith(_SECONDARY_CAPTURE):
    return 'secondary captures (for example dose sheets)'
  if 'Rows' not in header or modality not in ('CT', ''):
    return f'{modality} objects'.strip()
  if 'LOCALIZER' in _image_type(header):
    return 'localizers'
  if _NOT_TISSUE & _words(header):
    return 'projections, renderings or maps (for example MIP)'
  return None


def is_reformat(header: Any) -> bool:
  """Whether an image was computed from those of another series, often in another direction."""
  if _REFORMAT & _words(header):
    return True
  has_direction = numbers(header, 'ImageOrientationPatient', 6) is not None
  return 'DERIVED' in _image_type(header) and has_direction and not is_axial(header)


def _image_type(header):
  """The values of ImageType, in capitals."""
  value = header.get('ImageType') or ()
  return [str(one).upper() for one in ((value,) if isinstance(value, str) else value)]


def _words(header):
  """The words that say how an image was made: those of ImageType, and of the description unless it is an original."""
  texts = _image_type(header)
  if 'ORIGINAL' not in texts:
    texts.append(str(header.get('SeriesDescription') or '').upper())
  return set(re.split(r'[\W_]+', ' '.join(texts)))


def patient_id(header: Any) -> str:
  """The PatientID; '' if it is missing or empty."""
  return str(header.get('PatientID') or '').strip()


def patient(header: Any) -> tuple[str, ...]:
  """What identifies the patient: the ID; the name and birth date if it is empty."""
  keys = ('PatientID',) if header.get('PatientID') else ('PatientName', 'PatientBirthDate')
  return tuple(str(header.get(key) or '').strip() for key in keys)


def acquisitions(headers: Sequence[Any]) -> list[int]:
  """The number of the acquisition of each slice, by time: a pause separates two. All 0 if some times are unknown."""
  times = []
  for header in headers:
    clock = re.fullmatch(r'(\d\d)(\d\d)(\d\d(?:\.\d*)?)', str(header.get('AcquisitionTime') or '').strip())
    if clock is None:
      return [0] * len(headers)
    times.append(np.dot([float(part) for part in clock.groups()], [3600, 60, 1]))
  begins = np.sort(times)[1:][np.diff(np.sort(times)) > _PAUSE]
  return np.searchsorted(begins, times, side='right').tolist()


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


def is_axial(header: Any) -> bool:
  """Whether the normal of an image is closer to the patient's long axis than to the others."""
  return bool(np.argmax(np.abs(np.cross(*directions(header)))) == 2)


def has_place(header: Any) -> bool:
  """Whether a header has size, spacing, position and orientation."""
  return all(numbers(header, key, count) is not None for key, count in _PLACE.items())


def box(headers: Sequence[Any]) -> np.ndarray:
  """The lowest and the highest coordinates of the images' first and last pixels: [2, (x, y, z)] in mm."""
  corners = []
  for header in headers:
    first, (height, width) = numbers(header, 'ImagePositionPatient', 3), numbers(header, 'PixelSpacing', 2)
    (across, down), (rows, columns) = directions(header), size(header)
    corners += [first, first + across * width * (columns - 1) + down * height * (rows - 1)]
  return np.array([np.min(corners, axis=0), np.max(corners, axis=0)])


def comparable(header: Any, key: str) -> Any:
  """An element's value, hashable and without the differences of writing: 5 equals 5.0, missing equals empty."""
  value = header.get(key)
  if isinstance(value, Sequence) and not isinstance(value, str):
    return tuple(value)
  return round(value, 2) if isinstance(value, float) else value or ''


def numbers(header: Any, key: str, count: int) -> np.ndarray | None:
  """An element's value as float64 [count]; None if it is missing, has another length or is not finite numbers."""
  try:
    values = np.array(header[key].value, float).reshape(count)
  except (KeyError, TypeError, ValueError):
    return None
  return values if np.isfinite(values).all() else None
