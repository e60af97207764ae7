"""Earlier datasets of a cohort that grew: a new dataset keeps their folds and takes over their slices.

The cache notes which datasets were prepared from a folder of scans.
"""

import contextlib
import hashlib
import json
import logging
import os
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
import tensorflow_datasets as tfds

from data import survey
from data.cohorts import Case
from data.shards import Item, Shard, Stored
from fusa_jax.system.errors import UserError, one_line
from fusa_jax.system.files import write_json

THUMBNAILS = 'thumbnails.npy'


def note(cache: pathlib.Path, raw_dir: str | pathlib.Path, dataset: pathlib.Path) -> None:
  """Notes in the cache that a dataset was prepared from a folder. Ignores a cache that cannot be written.

  Args:
    cache: the cache folder.
    raw_dir: the folder of scans.
    dataset: the folder of the prepared dataset, with its version.
  """
  dataset = dataset.absolute()
  path = _notes(cache, raw_dir) / f'{hashlib.sha256(str(dataset).encode()).hexdigest()[:16]}.json'
  if not path.exists():
    with contextlib.suppress(UserError, OSError):
      path.parent.mkdir(parents=True, exist_ok=True)
      write_json(path, {'raw_dir': str(_absolute(raw_dir)), 'dataset': str(dataset)})


def find(cache: pathlib.Path, raw_dir: str | pathlib.Path) -> list['EarlierDataset']:
  """Returns the datasets that were prepared from a folder and still exist, the newest first.

  Logs a warning for each that cannot be read: patients that no other dataset contains get a new fold.
  """
  found = []
  with contextlib.suppress(OSError):
    for path in sorted(_notes(cache, raw_dir).glob('*.json'), key=lambda path: (path.stat().st_mtime_ns, path.name)):
      dataset = path  # shown if the note itself is damaged
      try:
        dataset = pathlib.Path(json.loads(path.read_text())['dataset'])
        if dataset.exists():
          found.append(EarlierDataset(dataset))
      except Exception as error:  # damaged, or from another version: TFDS and protobuf raise errors of many types
        logging.warning(
          '%s: damaged or of another version (%s), so the folds of its patients are not kept; delete it if they do not '
          'matter',
          dataset,
          one_line(error),
        )
  return found[::-1]


def _notes(cache, raw_dir):
  return cache / 'prepared' / hashlib.sha256(str(_absolute(raw_dir)).encode()).hexdigest()[:16]


def _absolute(raw_dir):
  return pathlib.Path(raw_dir).expanduser().resolve()


def _is_whole(split):
  """Whether the shards of a split exist and have the bytes that were written. Raises OSError if one is missing."""
  return sum(os.path.getsize(path) for path in split.filepaths) == split.num_bytes


class EarlierDataset:
  """A dataset that was prepared from an earlier state of a cohort.

  Attributes:
    path: the folder of the dataset.
    metadata: its metadata.
  """

  def __init__(self, path: pathlib.Path):
    builder = tfds.builder_from_directory(path)
    self.path, self.metadata = path, builder.info.metadata
    self._splits = builder.info.splits
    self._folds = [self.metadata['folds'][f'fold{k}'] for k in range(len(self.metadata['folds']))]
    self._fold = {}
    for kind in ('owner', 'patient', 'images'):
      for k, fold in enumerate(self._folds):
        for entry in fold:
          names = entry[kind] if kind == 'images' else [entry[kind]]
          self._fold |= {(kind, name): k for name in names if name}

  def fold(self, patient: survey.Patient) -> int | None:
    """Returns the fold of the scan with the same values, else of the same name, else of the same person; or None."""
    keys = [('images', image) for image in patient.images]
    keys += [('patient', patient.case.patient), ('owner', patient.owner)]
    return next((self._fold[key] for key in keys if key in self._fold), None)

  def known(self, cases: Sequence[Case], keys: Mapping[str, str]) -> dict[str, survey.Known]:
    """Returns what the survey found for the cases that have the same name and files in this dataset.

    Args:
      cases: the cases of the new dataset.
      keys: the digest of the files of each case, by name (`survey.case_digests`).

    Returns:
      The results by name; {} if the thumbnails do not fit the metadata.
    """
    entries = {entry['patient']: entry for fold in self._folds for entry in fold}
    # Scans with labels of patients have no volumes, like pictures.
    all_scans = self.metadata.get('patient_labels') and not self.metadata.get('pictures')
    scans = sorted(name for name, entry in entries.items() if all_scans or entry['lesion_ml'] is not None)
    rows = {name: row for row, name in enumerate(scans)}
    try:
      thumbnails = np.load(self.path / THUMBNAILS, mmap_mode='r') if scans else []
      is_whole = len(thumbnails) == len(scans) and all(map(_is_whole, self._splits.values()))
    except (OSError, ValueError, EOFError):
      is_whole = False
    if not is_whole:
      logging.warning('%s: files are missing or damaged, so only its folds are kept', self.path)
      return {}
    known = {}
    for case in cases:
      entry = entries.get(case.patient)
      # Pictures in colour may have been left out of a case.
      if entry and entry['key'] == keys[case.patient] and case.coloured != 'leave_out':
        patient = survey.Patient(
          case,
          tuple(entry['lesion_voxels']),
          entry['lesion_ml'],
          tuple(entry['images']),
          entry['truth'],
          tuple(map(tuple, entry['values'])),
          tuple(map(tuple, entry.get('class_voxels', [entry['lesion_voxels']]))),
        )
        known[case.patient] = survey.Known(patient, thumbnails[rows[case.patient]] if case.patient in rows else None)
    return known

  def shards(self, k: int) -> list[list[tuple[str, Stored]]]:
    """Returns, for each shard of fold `k`, the names of its patients with the places of their slices."""
    if k >= len(self._folds):
      return []
    split, found, entries = self._splits[f'fold{k}'], [], iter(self._folds[k])
    for path, length in zip(split.filepaths, split.shard_lengths, strict=True):
      start, shard = 0, []
      while start < length:
        entry = next(entries)
        stop = start + len(entry['lesion_voxels'])
        shard.append((entry['patient'], Stored(str(path), start, stop)))
        start = stop
      found.append(shard)
    return found

  def plan(self, k: int, fold: Sequence[survey.Patient], known: Mapping) -> tuple[list[Item], list[Shard]]:
    """Divides a fold of the new dataset into patients to write and shards of this dataset to link.

    A shard is linked if all of its patients are known and still in this fold. Other known patients are copied.

    Args:
      k: the number of the fold.
      fold: its patients.
      known: the result of `known`.

    Returns:
      (the patients to write or copy, the shards to link).
    """
    patients = {patient.case.patient: patient for patient in fold}
    linked, stored = [], {}
    for number in range(len(self._folds)):
      for shard in self.shards(number):
        here = [name in patients and name in known for name, _ in shard]
        items = [
          Item(patients[name], place.stop - place.start, place)
          for (name, place), is_here in zip(shard, here, strict=True)
          if is_here
        ]
        if number == k and all(here):
          linked.append(Shard(items, shard[0][1].path))
        else:
          stored |= {item.patient.case.patient: item for item in items}
    done = {item.patient.case.patient for shard in linked for item in shard.items}
    new = lambda patient: Item(patient, len(patient.lesion_voxels))
    rest = [stored.get(name, new(patient)) for name, patient in patients.items() if name not in done]
    return rest, linked
