"""Divides the slices of a fold into shards: large files that are few enough to be open all at once."""

import os
import pathlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from array_record.python import array_record_module

# A shard has about this many bytes, unless the fold is large.
_BYTES = 64 * 2**20
# Bytes on disk per pixel of a slice and its mask, zlib: 0.9 to 1.3 for chest CT.
_BYTES_PER_PIXEL = 1.2
# The least number of shards of a new fold (if it has so many patients), so that all cores write. The largest number is
# limited because a reader keeps all shards of all folds open.
_LEAST, _MOST = 12, 32
# The same for patients that are added to a dataset. A fold never has more than _CAP shards, and five folds 200.
_LEAST_ADDED, _MOST_ADDED, _CAP = 2, 8, 40
_KEPT = _CAP - _MOST_ADDED
# Records that are copied at a time.
_RECORDS = 32


class Stored(NamedTuple):
  """Slices of one or more patients in a shard of another dataset: records `start` to `stop` of a file."""

  path: str
  start: int
  stop: int


class Item(NamedTuple):
  """A patient to write.

  Attributes:
    patient: the patient.
    slices: the number of slices.
    stored: where the slices are stored already; None reads the files.
  """

  patient: Any
  slices: int
  stored: Stored | None = None


class Shard(NamedTuple):
  """The patients of a shard, in order.

  Attributes:
    items: the patients.
    linked: the file of another dataset that has the same content; None writes a new one.
  """

  items: Sequence[Item]
  linked: str | None = None

  @property
  def slices(self) -> int:
    return sum(item.slices for item in self.items)


def plan(items: Sequence[Item], stored: Sequence[Shard], size: int) -> list[Shard]:
  """Divides a fold into shards: first those that are stored already, then new ones.

  Args:
    items: the patients that are in none of the stored shards.
    stored: shards of another dataset that can be linked.
    size: the side of the slices in pixels.
  """
  by_slices = sum(item.slices for item in items) * size**2 * _BYTES_PER_PIXEL / _BYTES
  least, most = (_LEAST_ADDED, _MOST_ADDED) if stored else (_LEAST, _MOST)
  count = min(max(round(by_slices), least), most, len(items))
  if len(stored) + count > _CAP:  # small shards of earlier additions are written together
    kept = sorted(sorted(range(len(stored)), key=lambda k: -stored[k].slices)[: _KEPT - 1])
    added = [item for k, shard in enumerate(stored) if k not in kept for item in shard.items]
    return plan([*items, *added], [stored[k] for k in kept], size)
  return [*stored, *_divided(items, count)]


def _divided(items, count):
  """Returns `count` shards of neighbours with about equally many slices, each with at least one patient."""
  total, before, groups = sum(item.slices for item in items), 0, {}
  for number, item in enumerate(items):
    place = (before + item.slices / 2) * count / total if total else 0
    # Each shard before and after must get a patient, too.
    index = min(max(int(place), max(groups, default=0)), max(groups, default=-1) + 1)
    index = max(index, count - (len(items) - number))
    groups.setdefault(index, []).append(item)
    before += item.slices
  return [Shard(groups[index]) for index in sorted(groups)]


def link_or_copy(source: str, target: pathlib.Path) -> None:
  """Makes a hard link to a file; copies the file if that fails, as between two file systems."""
  try:
    os.link(source, target)
  except OSError:
    shutil.copyfile(source, target)


def records(stored: Stored) -> Iterator[bytes]:
  """Yields the records of stored slices, without decoding them."""
  reader = array_record_module.ArrayRecordReader(stored.path, 'readahead_buffer_size:0')
  try:
    for start in range(stored.start, stored.stop, _RECORDS):
      yield from reader.read(start, min(start + _RECORDS, stored.stop))
  finally:
    reader.close()


def write_shard(path: str, parts: Sequence[Any], records_of: Callable) -> tuple[int, int]:
  """Writes a shard; returns the number of records and of bytes.

  Args:
    path: the file.
    parts: a `Stored` to copy, or anything else that `records_of` turns into records.
    records_of: returns the records (bytes) of a part.
  """
  writer = array_record_module.ArrayRecordWriter(path, 'group_size:1')
  count = 0
  try:
    for part in parts:
      for record in records(part) if isinstance(part, Stored) else records_of(part):
        writer.write(record)
        count += 1
  finally:
    writer.close()
  return count, os.path.getsize(path)
