"""Prepares CT as released into a dataset on disk, once. `--mode=prepare` and training do this first."""

import contextlib
import functools
import hashlib
import io
import json
import pathlib
import shutil
from collections.abc import Callable

import tensorflow_datasets as tfds

from data import read, survey
from data.cohorts import AS_RELEASED, Case, CohortOptions, phantom
from data.covid_ct import Builder, Config
from data.find import find
from data.workers import silent
from fusa_jax.system.errors import UserError

CACHE = pathlib.Path('~/.cache/fusa_jax').expanduser()


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


def prepare_phantom(data_dir: str, size: int, patients: int, slices: int, seed: int, progress=silent) -> pathlib.Path:
  """Draws a cohort of phantoms and prepares it; returns the folder that training reads."""
  raw_dir = draw_phantoms(size, patients, slices, seed, progress)
  return _build('phantom', find(raw_dir)[1], raw_dir, data_dir, size, progress)


def draw_phantoms(size: int, patients: int, slices: int, seed: int, progress=silent) -> pathlib.Path:
  """Returns the cache folder of a cohort of phantoms as NIfTI files; draws the phantoms if they are missing."""
  raw_dir = CACHE / f'phantom-v{phantom.VERSION}-{patients}x{slices}x{size}-seed{seed}'
  if not raw_dir.exists():
    partial = raw_dir.with_name(f'.{raw_dir.name}')
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    phantom.write_phantoms(partial, patients=patients, size=size, slices=slices, seed=seed, progress=progress)
    partial.rename(raw_dir)
  return raw_dir


def scans(raw_dir: str | pathlib.Path, options: CohortOptions = AS_RELEASED) -> dict[str, Callable]:
  """Returns, per patient, a function without arguments that reads the scan and mask as released (`read.volume`).

  Pictures and loose slices are left out, because they are not volumes.

  Raises:
    UserError: as `prepare`, for missing files.
  """
  cases = [case for case in find(raw_dir, options, quiet=True)[1] if not isinstance(case.ct, tuple) and case.slice is None]
  return {case.patient: functools.partial(read.volume, case) for case in cases}


def _build(cohort: str, cases: list[Case], raw_dir, data_dir, size, progress):
  files, taken = survey.fingerprint(cases), survey.taken(cases)
  if not data_dir:
    key = [files, size, str(Builder.VERSION), taken]
    data_dir = CACHE / f'{cohort}-{size}-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:12]}'
  # TFDS requires a new name for a config that is not in BUILDER_CONFIGS.
  config = cohort if size == Config.size else Config(name=f'{cohort}_{size}', size=size)
  builder = Builder(data_dir=str(data_dir), config=config, file_format='array_record')
  if builder.is_prepared():
    for key, value in taken.items():
      if builder.info.metadata[key] != value:
        raise UserError(
          f'data.dir: {data_dir} was prepared with data.{key}={builder.info.metadata[key]}, now it is {value}; use '
          'another folder, or delete this one'
        )
    if builder.info.metadata['files'] != files:
      raise UserError(
        f'data.dir: {data_dir} was prepared from other files than {raw_dir} contains now; '
        'use another folder, or delete this one'
      )
    return pathlib.Path(builder.data_path)
  builder.cases, builder.progress = cases, progress
  settings = tfds.download.DownloadConfig(register_checksums=False)
  try:
    with contextlib.redirect_stdout(io.StringIO()):  # TFDS prints that it downloads, but nothing is downloaded
      builder.download_and_prepare(download_config=settings)
  except OSError as error:
    raise UserError(
      f'data.dir: cannot write the dataset to {data_dir} ({error}); free space there, or use another folder'
    ) from error
  return pathlib.Path(builder.data_path)
