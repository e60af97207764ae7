"""Recognises DICOM files, also damaged ones and those without a preamble, and reads their elements with pydicom."""

import contextlib
import itertools
import logging
import os
import pathlib
import re
import struct
import warnings
import zipfile
from collections.abc import Iterable
from typing import Any, BinaryIO

from fusa_jax.scans import archives, dicom_headers
from fusa_jax.system.errors import UserError

INSTALL = 'pip install -r requirements-dicom.txt'
# Endings of DICOM files, in lower case. Most files have none.
_ENDINGS = ('.dcm', '.dicom', '.ima')
# A file without preamble begins with an element of group 2 or 8. These are the VRs of the elements that come first.
_FIRST_VRS = (b'UL', b'OB', b'CS', b'DA', b'TM', b'DT', b'UI', b'SH', b'LO', b'SQ')
# Bytes that are enough to recognise a file.
_HEAD = 1024
# How many files are tried for a PatientID.
_TRIED = 5
# The SOP class of a DICOMDIR.
DIRECTORY = '1.2.840.10008.1.3.10'


def is_dicom(path: pathlib.Path) -> bool:
  """Whether a file begins like a DICOM file, with or without a preamble, or has the ending of one."""
  return path.suffix.lower() in _ENDINGS or _begins_like_dicom(path)


def _begins_like_dicom(path):
  try:
    with path.open('rb') as file:
      return _begins(file.read(_HEAD))
  except OSError:
    return False


def _begins(head):
  return head[128:132] == b'DICM' or _is_dataset(head)


def _is_dataset(head):
  """Whether bytes are the beginning of a dataset: a first element with a known VR, or two elements without VRs."""
  if head[:2] in (b'\2\0', b'\x08\0', b'\0\2', b'\0\x08') and head[4:6] in _FIRST_VRS:
    return True
  if head[:2] not in (b'\2\0', b'\x08\0') or len(head) < 8:
    return False
  _, element, length = struct.unpack('<HHI', head[:8])
  following = head[8 + length : 12 + length]
  return following[:2] == head[:2] and int.from_bytes(following[2:], 'little') > element


def read_dataset(path: pathlib.Path | str | BinaryIO, **options: Any) -> Any:
  """Reads a file with pydicom, also without a preamble; the options are those of pydicom.dcmread.

  If the file does not state its transfer syntax, it gets that of an uncompressed file with its encoding.
  """
  pydicom = load_pydicom()
  dataset = pydicom.dcmread(path, force=True, **options)
  if not dataset.file_meta.get('TransferSyntaxUID'):
    is_implicit, is_little_endian = dataset.original_encoding
    explicit = pydicom.uid.ExplicitVRLittleEndian if is_little_endian else pydicom.uid.ExplicitVRBigEndian
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.ImplicitVRLittleEndian if is_implicit else explicit
  return dataset


def find_patient_id(source: pathlib.Path) -> tuple[str, str]:
  """Returns the PatientID of the first DICOM file of a folder or .zip that states one, and the name of that file.

  A dose report may state none although the slices do. It reads only the headers of a few files, which is fast for a
  cohort. It opens no archives inside. Both values are '' if no file states one.

  Raises:
    UserError: pydicom is not installed.
  """
  load_pydicom()
  for name, file in itertools.islice(_opened(source), _TRIED):
    with contextlib.suppress(Exception), file:  # pydicom and zipfile raise errors of many types
      header = read_dataset(file, stop_before_pixels=True, specific_tags=['SOPClassUID', 'PatientID'])
      own = dicom_headers.patient_id(header)
      if own and sop_class(header) != DIRECTORY:
        return own, name
  return '', ''


def _opened(source):
  """Yields the name of each DICOM file of a folder or .zip, and the open file, in the order of their paths."""
  if source.is_dir():
    yield from ((path.name, path.open('rb')) for path in archives.in_folder(source) if is_dicom(path))
    return
  with contextlib.suppress(Exception), zipfile.ZipFile(source) as packed:
    for name in sorted(packed.namelist()):
      file = packed.open(name)
      head = file.read(_HEAD)
      file.seek(0)
      if name.lower().endswith(_ENDINGS) or _begins(head):
        yield pathlib.PurePosixPath(name).name, file
      else:
        file.close()


def sop_class(header: Any) -> str:
  """The SOPClassUID of a dataset; '' if it has none."""
  return str(header.get('SOPClassUID') or header.file_meta.get('MediaStorageSOPClassUID') or '')


def lost_slices(files: Iterable[pathlib.Path], slices: Iterable[pathlib.Path]) -> list[pathlib.Path]:
  """Files that are probably slices, too, but are empty or do not begin like DICOM.

  They have a name like a slice; or they are empty or begin with zeros, as files of interrupted copies do, and have no
  ending of another format.

  Args:
    files: files beside the slices.
    slices: the DICOM files.
  """
  patterns = {_pattern(path.name) for path in slices}
  endings = {'', *(ending for _, ending in patterns)}
  lost = []
  for path in sorted(files):
    if path.name.startswith('.') or path.is_dir():
      continue
    own = _pattern(path.name)
    if (own in patterns or (own[1] in endings and _is_blank(path))) and not _begins_like_dicom(path):
      lost.append(path)
  return lost


def _pattern(name):
  """A file name with numbers (also hexadecimal, or with dots) replaced by #, and its ending, if that has letters."""
  stem, ending = os.path.splitext(name.lower())
  if not ending[1:].isalpha():
    stem, ending = stem + ending, ''
  return re.sub(r'[0-9a-f.]*[0-9][0-9a-f.]*', '#', stem), ending


def _is_blank(path):
  """Whether a file is empty or begins with zeros only; True if it cannot be read."""
  try:
    with path.open('rb') as file:
      return not any(file.read(1 << 16))
  except OSError:
    return True


def load_pydicom() -> Any:
  """Imports pydicom, and hides its warnings."""
  try:
    import pydicom
    import pydicom.pixels
  except ImportError:
    raise UserError(f'DICOM: pydicom is not installed; {INSTALL}') from None
  # pydicom's warnings quote invalid values, for example a name that is too long.
  pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
  # For a damaged file, pydicom also logs its path and the decoders' tracebacks. The error raised here replaces them.
  logging.getLogger('pydicom').setLevel(logging.CRITICAL)
  warnings.filterwarnings('ignore', module=r'pydicom\.')
  return pydicom
