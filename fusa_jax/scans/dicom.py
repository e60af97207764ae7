"""Finds CT series in any mixture of DICOM files, and reads them into the same `Scan` as `volume_files.read_scan`.

Messages and results name a series by its number and description. They never contain a patient's name, ID or dates.
Messages show no paths, because folders of exports are often named by patient. pydicom and its decoders
(requirements-dicom.txt) are needed only to read DICOM.
"""

import collections
import dataclasses
import functools
import hashlib
import logging
import math
import os
import pathlib
import re
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, Self

import numpy as np

from fusa_jax.scans import decoder, formats, volumes
from fusa_jax.system.errors import UserError, one_line

_INSTALL = 'pip install -r requirements-dicom.txt'
_DIRECTORY = '1.2.840.10008.1.3.10'
_CT = '1.2.840.10008.5.1.4.1.1.2'
_SECONDARY_CAPTURE = '1.2.840.10008.5.1.4.1.1.7'
_HEADER = [
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
  'PatientName',
  'PatientID',
  'PatientBirthDate',
]
# Tolerance of positions in millimetres: exporters round them to 0.1 mm.
_ROUNDING = 0.1
# Degrees between the slices' normal and the line through their positions. Above this, the gantry was tilted.
_TILT = 0.5


def is_dicom(path: pathlib.Path) -> bool:
  """Whether a file begins like a DICOM file; its name does not matter."""
  try:
    with path.open('rb') as file:
      return file.read(132)[128:] == b'DICM'
  except OSError:
    return False


@dataclasses.dataclass(frozen=True, eq=False)
class Series(formats.Source):
  """The slices of one series, not yet read or checked.

  Attributes:
    uid: the SeriesInstanceUID.
    headers: per slice, the header elements that are needed (pydicom.Dataset), in any order.
  """

  uid: str
  headers: Sequence[Any]
  title = property(str)
  claims = staticmethod(is_dicom)

  @classmethod
  def from_files(cls, paths: Iterable[pathlib.Path]) -> list[Self]:
    return find_series(paths)

  def read_image(self, intensity: str) -> volumes.Scan:
    return read_series(self, intensity)

  def files(self) -> list[pathlib.Path]:
    return [pathlib.Path(header.filename) for header in self.headers]

  @property
  def number(self) -> int | None:
    value = _numbers(self.headers[0], 'SeriesNumber', 1)
    return None if value is None else int(value[0])

  @property
  def name(self) -> str:
    """The series number, and eight digits of the SHA-256 of the UID."""
    return f'series{"" if self.number is None else self.number}_{hashlib.sha256(self.uid.encode()).hexdigest()[:8]}'

  def __str__(self) -> str:
    """The name and description, for messages. A description with any part of the patient's data is left out."""
    header = self.headers[0]
    description = ' '.join(str(header.get('SeriesDescription') or '').split())
    personal = ' '.join(str(header.get(key) or '') for key in ('PatientName', 'PatientID', 'PatientBirthDate')).lower()
    parts = {*re.split(r'[\s^=]+', personal), *re.split(r'[\W_]+', personal)} - {''}
    words = re.split(r'[\W_]+', description.lower())
    # One or two ASCII letters occur inside many words, so they must match a whole word. Other scripts may have names of
    # one or two letters, and no spaces between words: there, any occurrence counts.
    shown_in = lambda part: words if len(part) <= 2 and part.isascii() else description.lower()
    if not description or any(part in shown_in(part) for part in parts):
      return self.name
    return f'{self.name} ({description})'

  @functools.cached_property
  def grid(self) -> tuple[list[Any], np.ndarray]:
    """The headers sorted along the slices' normal, and the affine [4, 4]: (column, row, slice) to millimetres (RAS+).

    Each slice must lie within a tenth of the spacing, or 0.1 mm, of its place between the first and last slice. A
    tilted gantry shifts slices against each other; the affine then contains this shear.

    Raises:
      UserError: the series is not CT; is in colour; has several frames per file; has missing, doubled or unevenly
        spaced slices; its slices differ in size or orientation, or lack position, orientation, spacing or size.
    """
    self._check_alike()
    across, down = _directions(self.headers[0])
    normal = np.cross(across, down)
    headers = sorted(self.headers, key=lambda header: normal @ _numbers(header, 'ImagePositionPatient', 3))
    positions = np.array([_numbers(header, 'ImagePositionPatient', 3) for header in headers])
    step = self._step(positions, normal)
    affine = np.eye(4)
    height, width = _numbers(headers[0], 'PixelSpacing', 2)
    affine[:3] = np.stack([across * width, down * height, step, positions[0]], axis=1)
    # DICOM's axes point to the patient's left and back, NIfTI's to the right and front.
    return headers, np.diag([-1, -1, 1, 1]) @ affine

  def _check_alike(self):
    first = self.headers[0]
    modality = first.get('Modality')
    if modality != 'CT':
      raise UserError(f'{self}: the modality must be CT, but is {modality or "missing"}; remove it from the input')
    if any(header.get('SamplesPerPixel', 1) != 1 for header in self.headers):
      raise UserError(f'{self}: the images are in colour; give the original series in grey')
    if any(_frames(header) > 1 for header in self.headers):
      raise UserError(f'{self}: several frames in one file (enhanced CT); export it with one file per slice')
    needed = {'ImagePositionPatient': 3, 'ImageOrientationPatient': 6, 'PixelSpacing': 2, 'Rows': 1, 'Columns': 1}
    lacking = sum(any(_numbers(header, *item) is None for item in needed.items()) for header in self.headers)
    if lacking:
      raise UserError(
        f'{self}: {lacking} of {len(self.headers)} slices lack position, orientation, spacing or size; export it again'
      )
    sizes = sorted({_size(header) for header in self.headers})
    if len(sizes) > 1:
      raise UserError(f'{self}: slices differ in size, {sizes[0]} and {sizes[-1]} pixels; export one series per scan')
    for key, name in (('ImageOrientationPatient', 'orientation'), ('PixelSpacing', 'pixel spacing')):
      values = np.array([_numbers(header, key, needed[key]) for header in self.headers])
      if np.ptp(values, axis=0).max() > 1e-3:
        raise UserError(f'{self}: slices differ in {name}; export one series per scan')
    if not abs(np.dot(*_directions(first))) < 0.01:
      raise UserError(f'{self}: invalid orientation (rows and columns are not at right angles); export it again')

  def _step(self, positions, normal):
    """The step between slices in millimetres [3], from sorted positions. Refuses positions without a constant step."""
    count = len(positions)
    if count == 1:
      return normal  # volumes.canonical refuses a single slice
    steps = np.diff(positions @ normal)
    usual = np.median(steps[steps > _ROUNDING / 10]) if (steps > _ROUNDING / 10).any() else 0
    doubled = np.count_nonzero(steps < max(_ROUNDING / 10, usual / 10))
    if doubled:
      raise UserError(
        f'{self}: {doubled} of {count} slices have the position of another slice (copies, or several phases in one '
        'series); export one series per scan'
      )
    places = positions[0] + np.linspace(0, 1, count)[:, None] * (positions[-1] - positions[0])
    if np.linalg.norm(positions - places, axis=1).max() > max(_ROUNDING, usual / 10):
      gaps = np.rint(steps / usual)
      if gaps.max() > 1 and (abs(steps - gaps * usual) < max(_ROUNDING, usual / 10)).all():
        missing = int((gaps - 1).sum())
        raise UserError(f'{self}: {missing} slices are missing between the {count} present; copy the series again')
      raise UserError(
        f'{self}: unevenly spaced slices, {steps.min():.3g} to {steps.max():.3g} mm apart; export it with one spacing'
      )
    step = (positions[-1] - positions[0]) / (count - 1)
    tilt = math.degrees(math.acos(min(1.0, np.dot(step, normal) / np.linalg.norm(step))))
    if tilt > _TILT:
      logging.warning(
        '%s: the gantry was tilted by %.1f degrees; the mask has the same shear in its affine', self, tilt
      )
    return step


def find_series(paths: Iterable[pathlib.Path]) -> list[Series]:
  """Returns the CT series of `sort_series`, and logs what was skipped."""
  series, left_out = sort_series(paths)
  if left_out:
    logging.info('skipped: %s', left_out)
  return series


def sort_series(paths: Iterable[pathlib.Path]) -> tuple[list[Series], str]:
  """Returns the CT series in DICOM files, sorted by number, and a text that counts all other objects.

  Other objects are localizers, dose sheets and other modalities.

  Raises:
    UserError: pydicom is not installed; files are damaged, one line each.
  """
  pydicom = _pydicom()
  headers, skipped, problems = collections.defaultdict(list), collections.Counter(), []
  for path in paths:
    try:
      header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=_HEADER)
      collections.deque(header, 0)  # pydicom decodes values when they are read: damaged values raise here
      if header.file_meta.get('MediaStorageSOPClassUID') == _DIRECTORY:
        continue  # a DICOMDIR: the files that it lists are read themselves
      if header.file_meta.get('MediaStorageSOPClassUID') == _CT and 'Rows' not in header:
        raise ValueError('it ends before the image')
      left_out = _left_out(header)
      if left_out:
        skipped[left_out] += 1
      else:
        _frames(header)  # raises if it is not a number
        headers[str(header.get('SeriesInstanceUID', ''))].append(header)
    except Exception as error:  # pydicom raises errors of many types
      problems.append(f'{path.name}: damaged DICOM file ({one_line(error)}); copy it again')
  if problems:
    raise UserError('\n'.join(problems))
  for uid, of_series in list(headers.items()):
    no_volume = _no_volume(of_series)
    if no_volume:
      skipped[no_volume] += len(headers.pop(uid))
  series = [Series(uid, of_series) for uid, of_series in headers.items()]
  return (
    sorted(series, key=lambda one: (one.number is None, one.number, one.uid)),
    ', '.join(f'{count} {description}' for description, count in sorted(skipped.items())),
  )


def read_series(series: Series, intensity: str = 'hu') -> volumes.Scan:
  """Reads a series on canonical axes, in Hounsfield units by each slice's slope and intercept.

  Raises:
    UserError: as `Series.grid` and `volume_files.read_scan`; a slice cannot be decoded.
  """
  headers, affine = series.grid
  values = None
  for index, header in enumerate(headers):
    try:
      # An absolute path, because the worker may have started in another folder.
      job = decoded, os.path.abspath(header.filename), _size(header)
      image = decoder.apart(*job) if _is_compressed(header) else decoded(*job[1:])
    except UserError as error:
      raise UserError(f'{series}: {error}') from None
    if values is None:  # allocate only now: the size in a damaged header may be larger than any memory
      values = np.empty((len(headers), *image.shape), np.int16)
    values[index] = image
  return volumes.from_volume(values.transpose(2, 1, 0), affine, series, intensity)


def decoded(path: str, size: tuple[int, int]) -> np.ndarray:
  """Decodes the slice in a file and applies its slope and intercept: int16 [H, W].

  Raises:
    UserError: the slice cannot be decoded or has another size. The message does not name the series.
  """
  pydicom, bounds = _pydicom(), np.iinfo(np.int16)
  try:
    image = pydicom.dcmread(path)
    syntax = image.file_meta.TransferSyntaxUID
    if syntax.is_encapsulated and not _has_decoder(syntax):
      raise UserError(f'compressed as {syntax.name}, but no decoder is installed; {_INSTALL}, or decompress it')
    stored = image.pixel_array
    if stored.shape != size:
      raise ValueError(f'{stored.shape} pixels')
    # Some converters omit slope 1 and intercept 0. volumes.to_scan refuses the values if they are not HU.
    slope, intercept = (
      float(image.get(key, default)) for key, default in (('RescaleSlope', 1), ('RescaleIntercept', 0))
    )
    return np.rint(np.clip(stored * slope + intercept, bounds.min, bounds.max)).astype(np.int16)
  except UserError:
    raise
  except Exception as error:  # pydicom and the decoders raise errors of many types
    raise UserError(f'a slice cannot be decoded ({one_line(error)}); copy it again from its source') from None


def _is_compressed(header):
  try:
    return header.file_meta.TransferSyntaxUID.is_encapsulated
  except (AttributeError, ValueError):  # missing or unknown syntax: `decoded` reports it
    return False


def _has_decoder(syntax):
  try:
    return _pydicom().pixels.get_decoder(syntax).is_available
  except NotImplementedError:
    return False


def _left_out(header):
  """Describes an object that is not a slice of a scan; None if it may be one."""
  modality = header.get('Modality') or ''
  if str(header.get('SOPClassUID', '')).startswith(_SECONDARY_CAPTURE):
    return 'secondary captures (for example dose sheets)'
  if 'Rows' not in header or modality not in ('CT', ''):
    return f'{modality} objects'.strip()
  if 'LOCALIZER' in (header.get('ImageType') or ()):
    return 'localizers'
  return None


def _no_volume(headers):
  """Describes images of one series that have no position, or all the same one; None if they may be a scan."""
  if any(_frames(header) > 1 for header in headers):
    return None
  if not any(header.get('ImagePositionPatient') for header in headers):
    return 'images without a position (for example dose sheets)'
  places = [_numbers(header, 'ImagePositionPatient', 3) for header in headers]
  if all(place is not None for place in places) and np.ptp(places, axis=0).max() < _ROUNDING:
    return 'images at one position (for example contrast bolus tracking)'
  return None


def _size(header):
  """Rows and columns."""
  return tuple(int(_numbers(header, key, 1)[0]) for key in ('Rows', 'Columns'))


def _frames(header):
  return int(header.get('NumberOfFrames') or 1)


def _directions(header):
  """Unit vectors [3] along a row and along a column."""
  vectors = _numbers(header, 'ImageOrientationPatient', 6).reshape(2, 3)
  with np.errstate(invalid='ignore'):  # a zero vector gives NaN, which _check_alike refuses
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def _numbers(header, key, count):
  """An element's value as float64 [count]; None if it is missing, has another length or is not finite numbers."""
  try:
    values = np.array(header[key].value, float).reshape(count)
  except (KeyError, TypeError, ValueError):
    return None
  return values if np.isfinite(values).all() else None


def _pydicom():
  try:
    import pydicom
    import pydicom.pixels
  except ImportError:
    raise UserError(f'DICOM: pydicom is not installed; {_INSTALL}') from None
  # pydicom's warnings quote invalid values, for example a name that is too long.
  pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
  # For a damaged file, pydicom also logs its path and the decoders' tracebacks. The error raised here replaces them.
  logging.getLogger('pydicom').setLevel(logging.CRITICAL)
  warnings.filterwarnings('ignore', module=r'pydicom\.')
  return pydicom
