"""Prepares CT as released into a dataset on disk, once. `--mode=prepare` and training do this first."""

import contextlib
import functools
import hashlib
import io
import json
import logging
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator

import tensorflow_datasets as tfds

from data import earlier, read, survey
from data.cohorts import AS_RELEASED, Case, CohortOptions, phantom
from data.covid_ct import Builder, Config
from data.find import find
from data.workers import silent
from fusa_jax.scans import sources
from fusa_jax.system import home, locks
from fusa_jax.system.errors import UserError, one_line

CACHE = home.CACHE


def prepare(
  raw_dir: str, data_dir: str, size: int, progress=silent, options: CohortOptions = AS_RELEASED
) -> pathlib.Path:
  """Prepares the cohort in `raw_dir` at size x size, unless it is prepared; returns the folder that training reads.

  Args:
    raw_dir: the folder of scans and masks as released.
    data_dir: the folder of the dataset; '' uses a cache folder, named by the cohort's files and the size.
    size: side of the square slices in pixels.
    progress: wraps an iterable and shows its progress, as tqdm.tqdm does.
    options: the user's options for the cohort.

  Raises:
    UserError: all problems of the cohort's files; `data_dir` contains another cohort.
  """
  return _build(*find(raw_dir, options), raw_dir, data_dir, size, progress)


def prepare_phantom(
  data_dir: str, size: int, *, progress=silent, options: CohortOptions = AS_RELEASED, **drawn
) -> pathlib.Path:
  """Draws a cohort of phantoms and prepares it; returns the folder that training reads. `drawn`: `draw_phantoms`."""
  raw_dir = draw_phantoms(size, progress=progress, **drawn)
  return _build('phantom', find(raw_dir, options)[1], raw_dir, data_dir, size, progress)


def draw_phantoms(
  size: int, patients: int, slices: int, seed: int, kinds: bool = False, progress=silent
) -> pathlib.Path:
  """Returns the cache folder of a cohort of phantoms as NIfTI files; draws the phantoms if some are missing."""
  name = f'phantom-v{phantom.VERSION}-{patients}x{slices}x{size}-seed{seed}'
  raw_dir = CACHE / (f'{name}-kinds' if kinds else name)
  is_complete = lambda: all(len(list(raw_dir.glob(f'*_{kind}.nii.gz'))) == patients for kind in ('ct', 'seg'))
  if is_complete():
    return raw_dir
  with _alone(CACHE, raw_dir.name):
    if not is_complete():
      partial = raw_dir.with_name(f'.{raw_dir.name}')
      for old in (partial, raw_dir):
        shutil.rmtree(old, ignore_errors=True)
      partial.mkdir(parents=True)
      phantom.write_phantoms(
        partial, patients=patients, size=size, slices=slices, seed=seed, kinds=kinds, progress=progress
      )
      partial.rename(raw_dir)
  return raw_dir


def scans(raw_dir: str | pathlib.Path, options: CohortOptions = AS_RELEASED) -> dict[str, Callable]:
  """Returns, per patient, a function without arguments that reads the scan and mask as released (`read.volume`).

  Pictures and loose slices are left out, because they are not volumes.

  Raises:
    UserError: as `prepare`, for missing files.
  """
  cases = [
    case for case in find(raw_dir, options, quiet=True)[1] if not isinstance(case.ct, tuple) and case.slice is None
  ]
  return {case.patient: functools.partial(read.volume, case) for case in cases}


def _build(cohort: str, cases: list[Case], raw_dir, data_dir, size, progress):
  files, taken = survey.fingerprint(cases, CACHE / 'digests.json', progress), survey.taken(cases)
  key = hashlib.sha256(json.dumps([files, size, str(Builder.VERSION), taken]).encode()).hexdigest()
  folder = pathlib.Path(data_dir).expanduser() if data_dir else CACHE / f'{cohort}-{size}-{key[:12]}'
  # TFDS requires a new name for a config that is not in BUILDER_CONFIGS.
  config = cohort if size == Config.size else Config(name=f'{cohort}_{size}', size=size)
  open_builder = lambda: _open(folder, config)
  builder = open_builder()
  if not builder.is_prepared():
    found = earlier.find(CACHE, raw_dir)
    if found:
      logging.info(
        '%s was prepared before, so patients keep their folds; to assign all again, delete %s',
        raw_dir,
        ', '.join(str(one.path) for one in found),
      )
    with _alone(folder, 'dataset'):
      builder = open_builder()
      if not builder.is_prepared():
        builder.cases, builder.files = cases, files
        builder.progress, builder.earlier_datasets = progress, found
        _write(builder, folder)
        if survey.fingerprint(cases, CACHE / 'digests.json') != files:
          shutil.rmtree(builder.data_path)
          raise UserError(f'{raw_dir}: files changed while they were read; run the same command again')
        earlier.note(CACHE, raw_dir, pathlib.Path(builder.data_path))
        return pathlib.Path(builder.data_path)
  _check(builder.info, folder, pathlib.Path(builder.data_path), cases, files, taken, raw_dir)
  earlier.note(CACHE, raw_dir, pathlib.Path(builder.data_path))
  return pathlib.Path(builder.data_path)


def _open(folder, config):
  """Opens the dataset in a folder, or a new one.

  Raises:
    UserError: the folder has a dataset that another version wrote, or a damaged one.
  """
  try:
    builder = Builder(data_dir=str(folder), config=config, file_format='array_record')
  except Exception as error:  # TFDS and protobuf raise errors of many types
    raise UserError(
      f'data.dir: the dataset in {folder} is damaged ({one_line(error)}); delete it, or use another folder'
    ) from None
  path = pathlib.Path(builder.data_path)
  others = sorted(each.parent.name for each in path.parent.glob('*/dataset_info.json'))
  others = [name for name in others if name != path.name and not name.startswith('incomplete')]
  if others:
    raise UserError(
      f'data.dir: the dataset in {folder} is of version {", ".join(others)}, but this program writes '
      f'{Builder.VERSION}; delete it, or use another folder'
    )
  return builder


def _write(builder, folder):
  path = pathlib.Path(builder.data_path)
  for left in path.parent.glob(f'incomplete.*_{path.name}'):  # by a build that was killed
    shutil.rmtree(left, ignore_errors=True)
  settings = tfds.download.DownloadConfig(register_checksums=False)
  try:
    with contextlib.redirect_stdout(io.StringIO()):  # TFDS prints that it downloads, but nothing is downloaded
      builder.download_and_prepare(download_config=settings)
  except OSError as error:
    raise UserError(
      f'data.dir: cannot write the dataset to {folder} ({error}); free space there, or use another folder'
    ) from error


def _check(info, folder, path, cases, files, taken, raw_dir):
  """Checks that a prepared dataset is whole and was made from these files in this way."""
  advice = 'use another folder, or delete this one'
  metadata = info.metadata
  for key in (*taken, *({'classes', 'ignore_label'} & metadata.keys() - taken.keys())):
    if metadata.get(key) != taken.get(key):
      raise UserError(
        f'data.dir: {folder} was prepared with data.{key}={metadata.get(key)}, now it is {taken.get(key)}; {advice}'
      )
  if metadata.get('files') != files:
    known = set(survey.case_digests(cases, files).values())
    stored = [entry.get('key') for fold in metadata['folds'].values() for entry in fold]
    if 2 * sum(key in known for key in stored) >= len(stored):
      earlier.note(CACHE, raw_dir, path)
      advice = 'use another folder: its patients will keep these folds, and only what differs is prepared'
    raise UserError(
      f'data.dir: {folder} was prepared from other files than {raw_dir} contains now '
      f'({_difference(metadata.get("files", []), files)}); {advice}'
    )
  prepared = sum(map(len, metadata['folds'].values()))
  absent = [path for split in info.splits.values() for path in split.filepaths if not os.path.exists(path)]
  # Pictures in colour may be all that a patient has.
  if absent or (prepared != len(cases) and taken['coloured'] == 'refuse'):
    raise UserError(
      f'data.dir: {folder} is incomplete ({prepared} of {len(cases)} patients, {len(absent)} files are missing); '
      'delete it, and run the same command again'
    )


def _difference(before, now):
  """Names the files that differ between two fingerprints."""
  states = [{json.dumps(one): one[0] for one in each} for each in (before, now)]
  differ = [name for one, other in (states, states[::-1]) for state, name in one.items() if state not in other]
  return f'{sources.counted(dict.fromkeys(differ))} differ' if differ else 'in another order'


@contextlib.contextmanager
def _alone(folder: pathlib.Path, name: str) -> Iterator[None]:
  """Context that only one process is in at a time; others wait. The lock ends with the process that holds it.

  Args:
    folder: the folder that the process writes to; created if missing.
    name: the name of what it writes there.

  Raises:
    UserError: the folder cannot be written.
  """
  try:
    folder.mkdir(parents=True, exist_ok=True)
    lock = locks.acquire(folder / f'.{name}.lock', f'{folder}: another process prepares its {name}; waiting', wait=True)
  except OSError as error:
    is_cache = folder.is_relative_to(CACHE)
    advice = 'set XDG_CACHE_HOME to a folder that you may write to' if is_cache else 'use another folder'
    raise UserError(
      f'{"" if is_cache else "data.dir: "}{folder}: cannot be written ({one_line(error)}); {advice}'
    ) from None
  try:
    yield
  finally:
    lock.release()
