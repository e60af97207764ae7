"""Scans and pictures in, masks and numbers out, on each one's grid.

Threads read ahead of the devices and one writes behind them: gzip, NumPy and Pillow release the lock.
"""

import collections
import contextlib
import logging
import os
import pathlib
from concurrent import futures

import numpy as np
import tqdm

from fusa_jax import tasks
from fusa_jax.inference.predictor import Predictor
from fusa_jax.scans import dicom_seg, nifti, pictures
from fusa_jax.scans.archives import unpacking
from fusa_jax.scans.sources import find_sources
from fusa_jax.system import hosts
from fusa_jax.system.errors import UserError
from fusa_jax.system.files import write_json

# Pictures that are read and predicted before the first of them is written.
_TOGETHER = 64
# Threads that check files, each of which holds one.
_READERS = min(os.cpu_count() or 1, 4)
# Scans, or parts of pictures, that are read while one is computed and one written: four in memory at most.
_AHEAD = 2
# What a DICOM SEG says of how its mask was made.
_ABOUT = ('model', 'step', 'threshold', 'temperature', 'flips', 'lungs', 'smallest_ml')


def predict(
  run: Predictor, source: pathlib.Path, output: pathlib.Path, probabilities: bool = False, as_dicom: bool = False
) -> None:
  """Marks the lesions of one scan or picture of a slice, or of all in a folder or archive.

  For `NAME.nii.gz` a segmentation model writes `NAME_mask.nii.gz` (uint8, on the scan's grid, with its affines and
  their codes) and, on request, `NAME_probability.nii.gz` (float32). Every model writes `NAME.json`: positive slices and
  their scores, and the lesion's volume where there is a mask. For a picture, NAME.png or NAME.jpg, which only a model
  of grey values reads, the mask is a PNG of 0 and 255, in the picture's size, and the probability one of 0 to 255. The
  results of a DICOM series are those of a scan, on the series' grid, under `dicom.Series.name`, which names no patient;
  on request its mask is also written as a DICOM SEG, `NAME_mask.dcm`, which is the patient's and names them.

  Args:
    run: what predicts.
    source: a .nii, .nii.gz, .png or .jpg file, or a folder or .zip of them and of DICOM series, at any depth and in any
      mixture (`*_seg`, `*_mask`, `*_probability`, and what begins with a dot, are left out).
    output: a folder; made where it is missing.
    probabilities: write them too.
    as_dicom: write masks as DICOM SEG, too.

  Raises:
    UserError: no scans, or scans that are refused, as of the other kind of values (all of them named before the first
      one is predicted); DICOM SEG is wanted of a model without masks, or of anything but DICOM series.
  """
  with unpacking() as unpacked:
    sources = find_sources(source, run.model.values, unpacked)
    if as_dicom:
      if not tasks.type_of(run.model.task).has_masks:
        raise UserError('dicom: is about masks, and this model gives none; leave it out')
      dicom_seg.check_series(sources)
    _predict(run, sources, output, probabilities, as_dicom)


def _predict(run, sources, output, probabilities, as_dicom):
  if len(sources) > 1:
    _check(sources, run.model.values)
  drawn = [source for source in sources if source.is_picture]
  # A scan fills batches of its own; pictures share them.
  parts = [[source] for source in sources if not source.is_picture]
  parts += [drawn[start : start + _TOGETHER] for start in range(0, len(drawn), _TOGETHER)]

  def read_part(part):
    images = [source.read_image(run.model.values) for source in part]
    return part, images, run.prepare(images)

  def write_part(read_and_computed):
    part, images, found = read_and_computed
    of_each = found if part[0].is_picture else [found]
    if hosts.is_main():
      for source, image, probability in zip(part, images, of_each, strict=True):
        _write(output, source, image, run.result(image, probability), probabilities, as_dicom)
    return len(part)

  # A write that has begun is waited for, whatever happens: nothing is half-written.
  with futures.ThreadPoolExecutor(1) as writer, _readers() as reader:
    parts_read = _overlapping(reader, read_part, parts, _AHEAD + 1)
    computed = ((part, images, run.probabilities(prepared)) for part, images, prepared in parts_read)
    with tqdm.tqdm(total=len(sources), desc='Predicting', disable=len(sources) == 1 or not hosts.is_main()) as bar:
      for count in _overlapping(writer, write_part, computed, 1):
        bar.update(count)


def _check(sources, values):
  """Reads all sources, several at a time; raises a UserError of a line for each that is refused."""

  def problem(source):
    try:
      source.read_image(values)
    except UserError as error:
      return str(error)

  with _readers() as reader:
    problems = [line for line in reader.map(problem, sources) if line]
  if problems:
    raise UserError('\n'.join(problems))


@contextlib.contextmanager
def _readers():
  """Threads that on an error or Ctrl-C nobody waits for: what they do has no effect."""
  pool = futures.ThreadPoolExecutor(_READERS)
  try:
    yield pool
  finally:
    pool.shutdown(wait=False, cancel_futures=True)


def _overlapping(pool, function, items, at_once):
  """function(item) of each item, by threads, in order: up to `at_once` begun and not yet asked for.

  The next one begins only when the first of so many has ended without an error.
  """
  begun = collections.deque()
  try:
    for item in items:
      if len(begun) == at_once:
        yield begun.popleft().result()
      begun.append(pool.submit(function, item))
  except Exception as error:
    for earlier in begun:  # what was begun before has failed before
      if earlier.exception() is not None:
        raise earlier.exception() from error
    raise
  while begun:
    yield begun.popleft().result()


def _write(output, source, image, found, probabilities, as_dicom):
  """Of a scan or a picture: its mask, its probabilities on request, and its numbers last."""
  name = source.stem
  volumes = {'mask': found.mask, 'probability': found.probability if probabilities else None}
  for kind, values in volumes.items():
    if values is None:
      continue
    if source.is_picture:
      pictures.write_picture(output / f'{name}_{kind}.png', np.rint(values * 255).astype(np.uint8))
    else:
      nifti.write_volume(output / f'{name}_{kind}.nii.gz', values, image)
  if as_dicom:
    dicom_seg.write_seg(output / f'{name}_mask.dcm', found.mask, image, {key: found.numbers[key] for key in _ABOUT})
  numbers = {'picture' if source.is_picture else 'scan': source.name, **found.numbers}
  write_json(output / f'{name}.json', numbers)
  logging.info('%s: %s', source.title, _one_line(numbers))


def _one_line(result):
  if 'picture' in result:
    pixels = f', {result["lesion_pixels"]} pixels' if 'lesion_pixels' in result else ''
    return f'{"lesion" if result["positive"] else "no lesion"} (score {result["score"]}){pixels}'
  volume = f'{result["lesion_ml"]:.1f} mL of lesion, ' if 'lesion_ml' in result else ''
  return f'{volume}{len(result["positive_slices"])} of {result["num_slices"]} slices positive'
