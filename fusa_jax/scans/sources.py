"""Finds scans and pictures of all formats in folders and archives; each is a `Source` of its format."""

import collections
import dataclasses
import itertools
import logging
import os
import pathlib
import unicodedata
from collections.abc import Iterable

from fusa_jax.scans import dicom, pictures, volume_files
from fusa_jax.scans.archives import place_of, within
from fusa_jax.scans.formats import FileSource, Refused, Source
from fusa_jax.system.errors import UserError
from fusa_jax.system.files import LONGEST_NAME, printable, sha256

# A file belongs to the first format that claims it. Formats that check only names come before those that open files.
FORMATS: tuple[type[Source], ...] = (volume_files.VolumeFile, pictures.PictureFile, dicom.Series)
# Endings of the names of masks and results, which often lie beside scans.
RESULTS = ('_seg', '_mask', '_probability', '_explanation')
# The longest stem of results in bytes, with the longest ending of one class. Of several classes, the name of the class
# is in the ending, too: `inference.outputs` refuses stems that are too long for it. A stem must not depend on the
# classes, because the viewer finds results by their stems.
_LONGEST = LONGEST_NAME - len('_gradcam_explanation.nii.gz')
# Number of left-out files whose names are shown.
_LISTED = 6


def find_sources(path: pathlib.Path, intensity: str | None, unpacked: pathlib.Path) -> list[Source]:
  """Finds the scans in `path`, and the pictures if the intensity is grey. Logs the number and names of other files.

  The order is that of FORMATS; within a format, files are sorted by path and series by number. Each source has its own
  `stem`: if files have the same name, it is the part of their paths that differs. An input that cannot be read is a
  `formats.Refused`, or raises its error when it is read.

  Args:
    path: a file, or a folder or .zip of files of any format and depth (see `archives.in_folder`). Names that end in
      `_seg`, `_mask`, `_probability` or `_explanation` are left out.
    intensity: one of volumes.VALUES; None accepts scans of both.
    unpacked: the folder for unpacked archives.

  Raises:
    UserError: nothing is found; only pictures are found, but HU are needed; `path` is a damaged archive.
  """
  if not path.exists():
    raise UserError(
      f'input: {path} does not exist; give a scan ({_endings()}; for 8-bit images also {_endings(of_pictures=True)}), '
      'or a folder or .zip of scans or DICOM series'
    )
  damaged, claimed, others = {}, {}, []
  files = list(within(path, unpacked, damaged))
  is_single_file = files == [path]  # it is read or refused, whatever its name
  for file in files:
    claiming = format_of(file) or (volume_files.VolumeFile if is_single_file else None)
    (claimed.setdefault(claiming, []) if claiming else others).append(file)
  sources = [source for one in FORMATS if one in claimed for source in one.from_files(claimed[one])]
  if not is_single_file:
    results = [source for source in sources if source.stem.lower().endswith(RESULTS)]
    others += [file for source in results for file in source.files()]
    sources = [source for source in sources if source not in results]
  scans = [source for source in sources if not source.is_picture]
  if intensity != 'grey':
    if sources and not scans:
      advice = '; give scans'
      if intensity == 'hu':
        advice = ', but this run was trained on HU; give scans in HU, or a run trained with data.intensity=grey'
      raise UserError(f'input: {sources[0]} is an 8-bit picture{advice}')
    others += [source.path for source in sources if source.is_picture]
    sources = scans
  used = {file for source in sources for file in source.files()}  # with the data files of headers, which none claims
  others = [file for file in dict.fromkeys(others) if file not in used]
  sources += [
    Refused(printable(str(place_of(archive, path, unpacked))), message, (archive,))
    for archive, message in damaged.items()
  ]
  if not sources:
    expected = f'scan ({_endings()}, DICOM)'
    if intensity == 'grey':
      expected = f'scan ({_endings()}) or picture ({_endings(of_pictures=True)})'
    seen = f' (but {counted(file.name for file in others)})' if others else ''
    raise UserError(f'input: no {expected} in {path}{seen}; give a scan, or a folder of scans')
  if others:
    logging.info('left out: %s', counted(file.name for file in others))
  return _with_own_names([_placed(source, path, unpacked) for source in sources])


def _placed(source, path, unpacked):
  """The source with its place in the input."""
  if not isinstance(source, FileSource):
    return source
  return dataclasses.replace(source, place=place_of(source.path, path, unpacked).as_posix())


def _with_own_names(sources):
  """Gives sources with equal stems the part of their paths that differs as stem; refuses those that remain equal.

  Shortens stems that would make the names of results too long for file systems.
  """
  for name in (_differing_part, _whole_path):
    for group in _of_equal_stem(sources):
      if all(isinstance(sources[k], FileSource) for k in group):
        paths = [(*pathlib.PurePath(sources[k].place).parts[:-1], sources[k].stem_of(sources[k].path)) for k in group]
        for k, path in zip(group, paths, strict=True):
          sources[k] = dataclasses.replace(sources[k], stem=name(path, paths))
  for k, source in enumerate(sources):
    if isinstance(source, FileSource) and len(name := os.fsencode(source.stem)) > _LONGEST:
      digest = sha256(source.place.encode())[:8]
      short = os.fsdecode(name[: _LONGEST - 9].decode(errors='ignore').encode())
      sources[k] = dataclasses.replace(source, stem=f'{short}_{digest}')
  for group in _of_equal_stem(sources):
    names = [sources[k].place for k in group]
    for k in group:
      other = next(name for name in (*names, names[0]) if name != sources[k].place or names.count(name) > 1)
      message = f'{sources[k]}: its results would have the same name as those of {other}; rename one'
      sources[k] = Refused(sources[k].place, message, tuple(sources[k].files()))
  return sources


def _of_equal_stem(sources):
  """Lists of indices of sources with the same stem. Some file systems do not distinguish capitals, or forms of ü."""
  by_stem = collections.defaultdict(list)
  for k, source in enumerate(sources):
    if not isinstance(source, Refused):
      by_stem[unicodedata.normalize('NFC', source.stem).casefold()].append(k)
  return [group for group in by_stem.values() if len(group) > 1]


def _differing_part(path, paths):
  """The parts of a path without the first and last parts that all paths share; the last part if none remain."""
  same = lambda parts: len(set(parts)) == 1
  first = sum(1 for _ in itertools.takewhile(same, zip(*paths, strict=False)))
  last = sum(1 for _ in itertools.takewhile(same, zip(*(path[::-1] for path in paths), strict=False)))
  return _joined(path[first : max(len(path) - last, first)] or path[-1:])


def _whole_path(path, _):
  return _joined(path)


def _joined(parts):
  return '_'.join(part.removesuffix('.zip') for part in parts)


def counted(names: Iterable[str]) -> str:
  """Counts files and lists the first names: `3 files (a, b, c)`."""
  names = list(map(printable, names))
  listed = ', '.join(names[:_LISTED]) + (f' and {len(names) - _LISTED} more' if len(names) > _LISTED else '')
  return f'{len(names)} {"file" if len(names) == 1 else "files"} ({listed})'


def format_of(path: pathlib.Path) -> type[Source] | None:
  """The format of a file; None if no format claims it."""
  return next((one for one in FORMATS if one.claims(path)), None)


def _endings(of_pictures=False):
  return ', '.join(one.endings for one in FORMATS if one.endings and one.is_picture == of_pictures)
