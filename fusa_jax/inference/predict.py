"""Predicts scans and pictures: writes a mask, on the grid of the input, and a JSON file with the results.

Several threads read the next inputs and one thread writes results while the devices compute. This works because gzip,
NumPy and Pillow release Python's global lock.
"""

import collections
import contextlib
import logging
import os
import pathlib
from concurrent import futures

import numpy as np

from fusa_jax import tasks
from fusa_jax.inference.predictor import Predictor
from fusa_jax.scans import dicom_seg, nifti, pictures
from fusa_jax.scans.archives import unpacking
from fusa_jax.scans.sources import find_sources
from fusa_jax.system import hosts, progress
from fusa_jax.system.errors import UserError
from fusa_jax.system.files import write_json

# Number of pictures that are predicted together.
_TOGETHER = 64
# Number of threads that read; each holds one file in memory.
_READERS = min(os.cpu_count() or 1, 4)
# Scans, or groups of pictures, that are read ahead. One more is computed and one written: at most four are in memory.
_AHEAD = 2
# Results that a DICOM SEG stores to say how its mask was made.
_ABOUT = ('model', 'step', 'threshold', 'temperature', 'flips', 'lungs', 'smallest_ml')


def predict(
  run: Predictor, source: pathlib.Path, output: pathlib.Path, probabilities: bool = False, as_dicom: bool = False
) -> None:
  """Finds the lesions in one scan or picture, or in all scans and pictures of a folder or archive.

  Scans: for `NAME.nii.gz` each model writes `NAME.json` with the positive slices, the slice scores and, if there is a
  mask, the lesion volume. A segmentation model also writes `NAME_mask.nii.gz` (uint8, on the scan's grid, with its
  affines and their codes). With `probabilities` it writes `NAME_probability.nii.gz` (float32).

  Pictures (NAME.png, NAME.jpg): only models trained on 8-bit images read them. The mask is a PNG of 0 and 255 in the
  picture's size. The probability is a PNG of 0 to 255.

  DICOM series: the results are those of a scan, on the grid of the series. NAME is `dicom.Series.name`, which does not
  contain the patient's name. With `as_dicom` the mask is also written as a DICOM SEG, `NAME_mask.dcm`; this file does
  contain it.

  Args:
    run: the predictor.
    source: a .nii, .nii.gz, .png or .jpg file; or a folder or .zip that holds these and DICOM series, at any depth.
      Files named `*_seg`, `*_mask` or `*_probability`, and names that begin with a dot, are left out.
    output: the folder for the results; it is created if it does not exist.
    probabilities: also write probabilities.
    as_dicom: also write masks as DICOM SEG.

  Raises:
    UserError: the source holds no scans. Or scans are refused, for example because their values do not fit the model;
      the message lists all of them before the first prediction. Or DICOM SEG is requested, but the model predicts no
      masks or an input is not a DICOM series.
  """
  with unpacking() as unpacked:
    sources = find_sources(source, run.model.values, unpacked)
    if as_dicom:
      if not tasks.type_of(run.model.task).has_masks:
        raise UserError('dicom: applies to masks only, and this model gives none; leave it out')
      dicom_seg.check_series(sources)
    _predict(run, sources, output, probabilities, as_dicom)


def _predict(run, sources, output, probabilities, as_dicom):
  if len(sources) > 1:
    _check(sources, run.model.values)
  picture_sources = [source for source in sources if source.is_picture]
  # Each scan has its own batches; pictures share batches.
  parts = [[source] for source in sources if not source.is_picture]
  parts += [picture_sources[start : start + _TOGETHER] for start in range(0, len(picture_sources), _TOGETHER)]

  def read_part(part):
    images = [source.read_image(run.model.values) for source in part]
    return part, images, run.prepare(images)

  def write_part(read_and_computed):
    part, images, output_of_model = read_and_computed
    each = output_of_model if part[0].is_picture else [output_of_model]
    if hosts.is_main():
      for source, image, probability in zip(part, images, each, strict=True):
        _write(output, source, image, run.result(image, probability), probabilities, as_dicom)
    return len(part)

  # The executor of the writer waits for a write that has begun, so no result is half-written.
  with futures.ThreadPoolExecutor(1) as writer, _readers() as reader:
    parts_read = _overlapping(reader, read_part, parts, _AHEAD + 1)
    computed = ((part, images, run.probabilities(prepared)) for part, images, prepared in parts_read)
    show = len(sources) > 1 and hosts.is_main()
    with progress.bar(total=len(sources), desc='Predicting', unit='inputs', show=show) as bar:
      for count in _overlapping(writer, write_part, computed, 1):
        bar.update(count)


def _check(sources, values):
  """Reads all sources, several at a time.

  Raises:
    UserError: sources are refused; one line for each.
  """

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
  """Reader threads. After an error or Ctrl-C the program does not wait for them, because reading changes nothing."""
  pool = futures.ThreadPoolExecutor(_READERS)
  try:
    yield pool
  finally:
    pool.shutdown(wait=False, cancel_futures=True)


def _overlapping(pool, function, items, at_once):
  """Yields function(item) for each item, in order; threads of the pool compute up to `at_once` results ahead.

  With `at_once` results pending, the next item starts only after the oldest result is complete and without error.
  """
  begun = collections.deque()
  try:
    for item in items:
      if len(begun) == at_once:
        yield begun.popleft().result()
      begun.append(pool.submit(function, item))
  except Exception as error:
    for earlier in begun:  # an earlier item that also failed is the error to report
      if earlier.exception() is not None:
        raise earlier.exception() from error
    raise
  while begun:
    yield begun.popleft().result()


def _write(output, source, image, prediction, probabilities, as_dicom):
  """Writes the results of a scan or picture: the mask, the probabilities if requested, and NAME.json last."""
  name = source.stem
  volumes = {'mask': prediction.mask, 'probability': prediction.probability if probabilities else None}
  for suffix, values in volumes.items():
    if values is None:
      continue
    if source.is_picture:
      pictures.write_picture(output / f'{name}_{suffix}.png', np.rint(values * 255).astype(np.uint8))
    else:
      nifti.write_volume(output / f'{name}_{suffix}.nii.gz', values, image)
  if as_dicom:
    about = {key: prediction.numbers[key] for key in _ABOUT}
    dicom_seg.write_seg(output / f'{name}_mask.dcm', prediction.mask, image, about)
  numbers = {'picture' if source.is_picture else 'scan': source.name, **prediction.numbers}
  write_json(output / f'{name}.json', numbers)
  logging.info('%s: %s', source.title, _one_line(numbers))


def _one_line(result):
  if 'picture' in result:
    pixels = f', {result["lesion_pixels"]} pixels' if 'lesion_pixels' in result else ''
    return f'{"lesion" if result["positive"] else "no lesion"} (score {result["score"]}){pixels}'
  volume = f'{result["lesion_ml"]:.1f} mL of lesion, ' if 'lesion_ml' in result else ''
  return f'{volume}{len(result["positive_slices"])} of {result["num_slices"]} slices positive'
