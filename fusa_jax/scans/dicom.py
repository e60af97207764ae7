"""Finds CT series in any mixture of DICOM files, and reads them into the same `Scan` as `volume_files.read_scan`.

Messages and results name a series by its number and description. They never contain a patient's name, ID or dates.
Messages show no paths, because folders of exports are often named by patient. pydicom and its decoders
(requirements-dicom.txt) are needed only to read DICOM.
"""

import collections
import dataclasses
import functools
import hashlib
import itertools
import logging
import math
import os
import pathlib
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from fusa_jax.scans import decoder, dicom_files, dicom_headers, dicom_pixels, formats, volumes
from fusa_jax.system.errors import UserError, one_line

_CT = '1.2.840.10008.5.1.4.1.1.2'
# How many file names a message shows.
_NAMES = 6
# Values of RescaleType and Units that say HU, or nothing.
_HU_TYPES = ('', 'HU', 'US', 'UNSPECIFIED')
# Tolerance of positions in millimetres: exporters round them to 0.1 mm.
_ROUNDING = 0.1
# Degrees between the slices' normal and the line through their positions. Above this, the gantry was tilted.
_TILT = 0.5


@dataclasses.dataclass(frozen=True, eq=False)
class Series(formats.Source):
  """The slices of one series, not yet read or checked.

  Attributes:
    uid: the SeriesInstanceUID.
    headers: per slice, the header elements that are needed (pydicom.Dataset), in any order.
    damaged: the names of files that are probably slices of this series, but cannot be read.
  """

  uid: str
  headers: Sequence[Any]
  damaged: Sequence[str] = ()
  title = property(str)
  claims = staticmethod(dicom_files.is_dicom)

  @classmethod
  def from_files(cls, paths: Iterable[pathlib.Path]) -> list[formats.Source]:
    return find_series(paths)

  def read_image(self, intensity: str) -> volumes.Scan:
    return read_series(self, intensity)

  def files(self) -> list[pathlib.Path]:
    return [pathlib.Path(header.filename) for header in self.headers]

  @property
  def number(self) -> int | None:
    value = dicom_headers.numbers(self.headers[0], 'SeriesNumber', 1)
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
    if any(part in shown_in(part) for part in parts):
      description = ''
    told = ', '.join(filter(None, (description, 'reformat' if self.is_reformat else '')))
    return f'{self.name} ({told})' if told else self.name

  @functools.cached_property
  def is_reformat(self) -> bool:
    """Whether the slices were computed from those of another series, often in another direction."""
    return dicom_headers.is_reformat(self.headers[0])

  def is_reformat_of(self, other: 'Series') -> bool:
    """Whether this is a reformat, and the other an axial series that shows the middle of the same volume."""
    if not self.is_reformat or other.is_reformat or not all(map(dicom_headers.has_place, self.headers + other.headers)):
      return False
    first, theirs = self.headers[0], other.headers[0]
    frame = first.get('FrameOfReferenceUID')
    if not frame or frame != theirs.get('FrameOfReferenceUID') or not dicom_headers.is_axial(theirs):
      return False
    middle, (low, high) = dicom_headers.box(self.headers).mean(axis=0), dicom_headers.box(other.headers)
    return bool(((low <= middle) & (middle <= high)).all())

  @functools.cached_property
  def grid(self) -> tuple[list[Any], np.ndarray]:
    """The headers sorted along the slices' normal, and the affine [4, 4]: (column, row, slice) to millimetres (RAS+).

    Each slice must lie within a tenth of the spacing, or 0.1 mm, of its place between the first and last slice. A
    tilted gantry shifts slices against each other; the affine then contains this shear.

    Raises:
      UserError: slices may be missing; the series is not CT; belongs to several patients; is in colour; has several
        frames per file; has missing, doubled or unevenly spaced slices; has two acquisitions that alternate; has values
        other than HU; its slices differ in size or orientation, or lack position, orientation, spacing or size.
    """
    self.check_whole()
    self._check_alike()
    across, down = dicom_headers.directions(self.headers[0])
    normal = np.cross(across, down)
    place = lambda header: dicom_headers.numbers(header, 'ImagePositionPatient', 3)
    headers = sorted(self.headers, key=lambda header: normal @ place(header))
    positions = np.array([place(header) for header in headers])
    step = self._step(positions, normal)
    self._check_one_acquisition(headers)
    if self.is_reformat:
      logging.warning('%s: computed from another series; the original series gives more reliable results', self)
    affine = np.eye(4)
    height, width = dicom_headers.numbers(headers[0], 'PixelSpacing', 2)
    affine[:3] = np.stack([across * width, down * height, step, positions[0]], axis=1)
    # DICOM's axes point to the patient's left and back, NIfTI's to the right and front.
    return headers, np.diag([-1, -1, 1, 1]) @ affine

  def check_whole(self) -> None:
    """Raises a UserError if files are damaged that may be slices of this series."""
    if self.damaged:
      count = len(self.damaged)
      files = '1 file beside its slices is' if count == 1 else f'{count} files beside its slices are'
      raise UserError(
        f'{self}: {files} empty or damaged ({_listed(self.damaged)}), so slices may be missing; copy the series again'
      )

  def _check_alike(self):
    first = self.headers[0]
    modality = first.get('Modality')
    if modality != 'CT':
      raise UserError(f'{self}: the modality must be CT, but is {modality or "missing"}; remove it from the input')
    self._check_one_patient()
    if any(header.get('SamplesPerPixel', 1) != 1 for header in self.headers):
      raise UserError(f'{self}: the images are in colour; give the original series in grey')
    if any(dicom_headers.frames(header) > 1 for header in self.headers):
      raise UserError(f'{self}: several frames in one file (enhanced CT); export it with one file per slice')
    lacking = sum(not dicom_headers.has_place(header) for header in self.headers)
    if lacking:
      raise UserError(
        f'{self}: {lacking} of {len(self.headers)} slices lack position, orientation, spacing or size; export it again'
      )
    sizes = sorted({dicom_headers.size(header) for header in self.headers})
    if len(sizes) > 1:
      raise UserError(f'{self}: slices differ in size, {sizes[0]} and {sizes[-1]} pixels; export one series per scan')
    for key, count, name in (('ImageOrientationPatient', 6, 'orientation'), ('PixelSpacing', 2, 'pixel spacing')):
      values = np.array([dicom_headers.numbers(header, key, count) for header in self.headers])
      if np.ptp(values, axis=0).max() > 1e-3:
        raise UserError(f'{self}: slices differ in {name}; export one series per scan')
    self._check_rescale()
    if not abs(np.dot(*dicom_headers.directions(first))) < 0.01:
      raise UserError(f'{self}: invalid orientation (rows and columns are not at right angles); export it again')

  def _check_one_acquisition(self, headers):
    """Refuses sorted slices that alternate between two acquisitions. Acquisitions may lie one above the other."""
    groups = {key: [dicom_headers.comparable(header, key) for header in headers] for key in dicom_headers.ACQUISITION}
    for key, values in {**groups, 'AcquisitionTime': dicom_headers.acquisitions(headers)}.items():
      if sum(1 for _ in itertools.groupby(values)) > len(set(values)):
        raise UserError(
          f'{self}: slices of {len(set(values))} acquisitions alternate ({key} differs); export one series per '
          'acquisition'
        )

  def _check_one_patient(self):
    for values, called in (
      (set(map(dicom_headers.patient, self.headers)), 'patients'),
      ({str(header.get('FrameOfReferenceUID') or '') for header in self.headers} - {''}, 'frames of reference'),
    ):
      if len(values) > 1:
        raise UserError(f'{self}: its slices belong to {len(values)} {called}; export one series per scan')

  def _check_rescale(self):
    for key in ('RescaleType', 'Units'):
      for value in {' '.join(str(header.get(key) or '').split()) for header in self.headers}:
        if value.upper() not in _HU_TYPES:
          raise UserError(f'{self}: the values are not HU ({key} is {value}); give the original series in HU')
    for key, default in dicom_pixels.RESCALE.items():
      values = [header.get(key) for header in self.headers]
      lacking = values.count(None)
      if lacking and any(value not in (None, default) for value in values):
        raise UserError(
          f'{self}: {lacking} of {len(values)} slices lack {key}, which the others have; export them again'
        )

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


def find_series(paths: Iterable[pathlib.Path]) -> list[formats.Source]:
  """Returns the CT series of `sort_series` and a `formats.Refused` per damaged file; logs what was skipped.

  Reformats are skipped if their original series is there, because they show the same lesions again.
  """
  series, refused, left_out = sort_series(paths)
  if left_out:
    logging.info('skipped: %s', left_out)
  kept = []
  for one in series:
    original = next((other for other in series if one.is_reformat_of(other)), None)
    if original:
      logging.info('skipped: %s, because the original %s is there, too', one, original)
    else:
      kept.append(one)
  return [*kept, *refused]


def sort_series(paths: Iterable[pathlib.Path]) -> tuple[list[Series], list[formats.Refused], str]:
  """Finds the CT series in DICOM files. Several links to one file count as one file.

  Returns:
    The series, sorted by number.
    The damaged files that may belong to none of these series.
    A text that counts all other objects: localizers, dose sheets and other modalities.

  Raises:
    UserError: pydicom is not installed.
  """
  read, damaged = _read_headers(paths)
  headers, skipped = collections.defaultdict(list), collections.Counter()
  for header in read:
    left_out = dicom_headers.left_out(header)
    if left_out:
      skipped[left_out] += 1
    else:
      headers[str(header.get('SeriesInstanceUID', ''))].append(header)
  if len(headers) > 1:  # among slices with a UID, those without one may belong to any series
    for header in headers.pop('', ()):
      path = pathlib.Path(header.filename)
      damaged.append((path, '', f'{path.name}: has no SeriesInstanceUID; copy it again'))
  for uid, of_series in list(headers.items()):
    no_volume = _no_volume(of_series)
    if no_volume:
      skipped[no_volume] += len(headers.pop(uid))
  series, refused = _with_damaged(headers, damaged)
  return (
    sorted(series, key=lambda one: (one.number is None, one.number, one.uid)),
    refused,
    ', '.join(f'{count} {description}' for description, count in sorted(skipped.items())),
  )


def _read_headers(paths):
  """The headers of DICOM files, and the damaged files, also those beside CT images: (path, series UID or '', error)."""
  dicom_files.load_pydicom()
  headers, damaged, images = [], [], collections.defaultdict(set)
  paths = {os.path.realpath(path): path for path in reversed([*paths])}  # of several links, the first remains
  for path in reversed(paths.values()):
    header = None
    try:
      header = dicom_files.read_dataset(path, stop_before_pixels=True, specific_tags=dicom_headers.ELEMENTS)
      collections.deque(header, 0)  # pydicom decodes values when they are read: damaged values raise here
      if header.file_meta.get('MediaStorageSOPClassUID') == dicom_files.DIRECTORY:
        continue  # a DICOMDIR: the files that it lists are read themselves
      _check_header(header)
      headers.append(header)
      if header.get('Modality') == 'CT':
        images[path.parent].add(path)
    except Exception as error:  # pydicom raises errors of many types
      message = f'{path.name}: damaged DICOM file ({one_line(error)}); copy it again'
      damaged.append((path, _uid_of_damaged(header), message))
  read = set(paths.values())
  for folder, of_folder in images.items():
    for path in dicom_files.lost_slices(set(folder.iterdir()) - read, of_folder):
      damaged.append((path, '', f'{path.name}: empty or damaged file beside DICOM images; copy it again'))
  return headers, damaged


def _check_header(header):
  """Raises a ValueError if a file ended too early, or is not DICOM."""
  if 'Rows' not in header:
    if not header.get('SeriesInstanceUID'):
      raise ValueError('it has no SeriesInstanceUID')
    if f'{dicom_files.sop_class(header)}.'.startswith(f'{_CT}.') or header.get('Modality') == 'CT':
      raise ValueError('it ends before the image')
  dicom_headers.frames(header)  # raises if it is not a number


def _uid_of_damaged(header):
  """The SeriesInstanceUID of a damaged file; '' if that cannot be read either."""
  try:
    return str(header.SeriesInstanceUID)
  except Exception:  # pydicom raises errors of many types
    return ''


def _with_damaged(headers, damaged):
  """Makes the series. Each has the names of the damaged files that may be its slices; other such files are refused.

  A damaged file may belong to the series of its UID. If that cannot be read, or not completely, it may belong to any
  series that has a slice in the same folder.
  """
  folders = {uid: {pathlib.Path(header.filename).parent for header in of_series} for uid, of_series in headers.items()}
  names, refused = collections.defaultdict(list), []
  for path, uid, message in damaged:
    beside = [other for other in headers if other.startswith(uid) and path.parent in folders[other]]
    concerned = [uid] if uid and uid in headers else beside
    for one in concerned:
      names[one].append(path.name)
    if not concerned:
      refused.append(formats.Refused(path.name, message, (path,)))
  return [Series(uid, of_series, sorted(names[uid])) for uid, of_series in headers.items()], refused


def _listed(names):
  return ', '.join(names[:_NAMES]) + (', ...' if len(names) > _NAMES else '')


def read_series(series: Series, intensity: str = 'hu') -> volumes.Scan:
  """Reads a series on canonical axes, in Hounsfield units by each slice's slope and intercept.

  Raises:
    UserError: as `Series.grid` and `volume_files.read_scan`; a slice cannot be decoded.
  """
  headers, affine = series.grid
  values, problems = None, {}
  for index, header in enumerate(headers):
    try:
      # An absolute path, because the worker may have started in another folder.
      job = dicom_pixels.decoded, os.path.abspath(header.filename), dicom_headers.size(header)
      image = decoder.apart(*job) if _is_compressed(header) else dicom_pixels.decoded(*job[1:])
    except UserError as error:
      problems[os.path.basename(header.filename)] = str(error)
      continue
    if values is None:  # allocate only now: the size in a damaged header may be larger than any memory
      values = np.empty((len(headers), *image.shape), np.int16)
    values[index] = image
  if problems:
    raise UserError(f'{series}: {_listed(sorted(problems))}: {next(iter(problems.values()))}')
  return volumes.from_volume(values.transpose(2, 1, 0), affine, series, intensity)


def _is_compressed(header):
  try:
    return header.file_meta.TransferSyntaxUID.is_encapsulated
  except (AttributeError, ValueError):  # missing or unknown syntax: `decoded` reports it
    return False


def _no_volume(headers):
  """Describes images of one series that have no position, or all the same one; None if they may be a scan."""
  if any(dicom_headers.frames(header) > 1 for header in headers):
    return None
  if not any(header.get('ImagePositionPatient') for header in headers):
    return 'images without a position (for example dose sheets)'
  places = [dicom_headers.numbers(header, 'ImagePositionPatient', 3) for header in headers]
  if all(place is not None for place in places) and np.ptp(places, axis=0).max() < _ROUNDING:
    return 'images at one position (for example contrast bolus tracking)'
  return None
