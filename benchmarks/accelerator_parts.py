"""The measurements of benchmarks/accelerator.py: a function per part, with the part's name.

Each function takes the options. At each new result, it yields all results so far. If it can measure nothing, it raises
UserError with the reason.
"""

import dataclasses
import functools
import importlib.metadata
import pathlib
import re
import sys
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import nibabel as nib
import numpy as np

from benchmarks import input_pipeline, workload
from benchmarks.accelerator_report import mfu, peak_tflops
from benchmarks.settings import Options
from data import prepare
from data.cohorts import phantom
from fusa_jax import FUSA, models
from fusa_jax.inference import predict, predictor
from fusa_jax.runs import checkpoint, run_config
from fusa_jax.scans import volume_files
from fusa_jax.system import provenance
from fusa_jax.system.errors import UserError

_VOLUME = 300  # slices


def compare(options: Options) -> Iterator[dict]:
  """Yields the rows of benchmarks/compare.py for JAX and eager PyTorch, with MFU."""
  yield from _compared(options, ('JAX', 'PyTorch, eager'))


def torch_compile(options: Options) -> Iterator[dict]:
  """Yields the rows for torch.compile and eager PyTorch. It is a part of its own, because compiling takes minutes."""
  yield from _compared(options, ('PyTorch, eager', 'PyTorch, torch.compile'))


def _compared(options, frameworks):
  from benchmarks import compare

  rows = []
  for name in options.models:
    for row in compare.compare(name, options, frameworks):
      rows.append(row | {'train_mfu': mfu(row['train_gflops_per_second'], device_kind())})
    yield {'rows': rows}


def fusa_share(options: Options) -> Iterator[dict]:
  """Times the training step of each fusa_ model: without attention, with FUSA, and with FUSA's literal form."""
  done = []
  for name in options.models:
    if not name.startswith('fusa_'):
      continue
    gflops = 3 * workload.forward_gflops(name, options)
    running = {}
    forms = {'without': None, 'FUSA': FUSA, 'literal': functools.partial(FUSA, literal=True)}
    for form, attention in forms.items():
      work = workload.create(workload.config_of(name, options), attention=attention)
      running[form] = workload.Running(work)
      running[form].step()
      running[form].wait()
      if form == 'without':
        continue
      # Time two forms first, then all three: if the literal form lacks memory or time, only its own row is lost.
      steps = {key: each.step for key, each in running.items()}
      seconds = workload.in_turn(steps, {key: each.wait for key, each in running.items()}, options)
      memory = {key: each.memory() for key, each in running.items()}
      yield {'rows': done + (rows := share_rows(name, seconds, memory, options.batch_size, gflops, device_kind()))}
    done += rows
  if not done:
    raise UserError('--models: none has FUSA; add a model, for example fusa_resunet')


def share_rows(
  name: str, seconds: dict[str, float], memory: dict[str, int], batch_size: int, gflops: float, device: str
) -> list[dict]:
  """Returns a row for each form. FUSA's share of a step: 1 - seconds without FUSA / seconds with FUSA.

  `gflops` is the work of a step with FUSA's factored form; only that form's row has an MFU.
  """
  return [
    {
      'model': name,
      'form': form,
      'step_seconds': taken,
      'slices_per_second': batch_size / taken,
      'share': 1 - seconds['without'] / taken,
      'peak_bytes': memory[form],
      'mfu': mfu(gflops / taken, device) if form == 'FUSA' else None,
    }
    for form, taken in seconds.items()
  ]


def largest_batch(options: Options) -> Iterator[dict]:
  """Finds the largest batch with which a training step of the first model fits into the device's memory."""
  stats = jax.devices()[0].memory_stats() or {}
  limit = options.memory_limit or stats.get('bytes_limit')
  if limit is None:
    raise UserError(f'{device_kind()} does not report its memory; give --memory_limit_mb')
  name = options.models[0]

  def attempt(batch):
    settings = dataclasses.replace(options, batch_size=batch)
    needed = None
    try:
      running = workload.Running(workload.create(workload.config_of(name, settings)))
      needed = running.memory()
      if needed > limit:
        return needed, False
      running.step()
      running.wait()
      return needed, True
    except jax.errors.JaxRuntimeError as error:
      if 'RESOURCE_EXHAUSTED' not in str(error):
        raise
      return needed, False

  for result in search_batch(attempt, limit, options.batch_size):
    yield {'model': name, 'limit_bytes': limit, **result}


def search_batch(attempt: Callable[[int], tuple[int | None, bool]], limit: int, first: int) -> Iterator[dict]:
  """Yields {'fits', 'fits_bytes', 'too_large'} after each attempt; a value that is not known yet is None.

  Compiling a step takes most of a minute, so the search makes few attempts. It assumes that bytes grow in proportion to
  the batch. From the last two batches it computes the batch that would reach the limit, and tries that one. If this
  batch is outside the range that is still open, it halves the range. It stops when the range is at most a sixteenth of
  the batch that fits, or one slice.

  Args:
    attempt: a function of the batch. It returns (bytes, whether the step ran); bytes is None if the compiler gave up.
    limit: the memory limit, in bytes.
    first: the first batch to try.
  """
  fits, fits_bytes, too_large, before, batch = 0, None, None, (0, 0), first
  while True:
    needed, ran = attempt(batch)
    if ran:
      fits, fits_bytes = batch, needed
    else:
      too_large = batch
    yield {'fits': fits or None, 'fits_bytes': fits_bytes, 'too_large': too_large}
    least = max(fits // 16, 1)
    if too_large is not None and too_large - fits <= least:
      return
    if needed is None or batch == before[0] or needed <= before[1]:
      guess = 2 * fits
    else:
      slope = (needed - before[1]) / (batch - before[0])
      guess = int(batch + (limit - needed) / slope)
      before = (batch, needed)
    if too_large is None:
      batch = min(max(guess, fits + least), 16 * fits)
    else:
      batch = guess if fits + least <= guess < too_large else (fits + too_large) // 2


def input_path(options: Options) -> Iterator[dict]:
  """Draws and prepares phantoms, and measures them as benchmarks/input_pipeline.py does."""
  data_dir = prepare.prepare_phantom('', options.image_size, patients=10, slices=16, seed=0)
  yield {'slices_per_second': input_pipeline.rate(data_dir, options.image_size, options.batch_size, steps=60)}


def prediction(options: Options) -> Iterator[dict]:
  """Times the first segmentation model on a volume of many slices, from file to written mask.

  The second of the two runs does not include compiling. The weights are random. With a threshold of 1 the mask is
  empty; a real mask is nearly empty and compresses about as well.
  """
  name = next((name for name in options.models if name in models.SEGMENTERS), None)
  if name is None:
    raise UserError('--models: none is for segmentation; add a model, for example resunet')
  folder, size = pathlib.Path(options.folder), options.image_size
  config = workload.config_of(name, options)
  run_config.save_config(folder / 'run', config)
  with checkpoint.Checkpoints(folder / 'run') as checkpoints:
    checkpoints.save(1, workload.create(config).init().variables, {'none': jnp.zeros(())}, None)
  # Repeat 16 slices: drawing all of them would take longer than everything else.
  slices, _, _ = phantom.patient(0, 1, size=size, slices=16)
  values = np.resize(slices, (_VOLUME, size, size))
  values[0, 0, 0] = values.max() + 1  # a maximum that many voxels share would look like the end of a window
  spacing = phantom.spacing(0, 1, size=size, slices=16)
  image = nib.Nifti1Image(values.transpose(2, 1, 0), np.diag([-spacing[2], -spacing[1], spacing[0], 1]))
  nib.save(image, folder / 'volume.nii.gz')
  began = time.perf_counter()
  volume_files.read_scan(folder / 'volume.nii.gz')
  result = {'model': name, 'slices': _VOLUME, 'reading_seconds': time.perf_counter() - began}
  for key in ('first_seconds', 'seconds'):
    began = time.perf_counter()
    predict.predict(predictor.load_predictor(folder / 'run', threshold=1.0), folder / 'volume.nii.gz', folder / 'masks')
    result[key] = time.perf_counter() - began
    yield result | {'slices_per_second': _VOLUME / result[key]}


def profile(options: Options) -> Iterator[dict]:
  """Yields the ten kernels with the largest share of the first model's training step."""
  running = workload.Running(workload.create(workload.config_of(options.models[0], options)))
  running.step()
  running.wait()
  with jax.profiler.trace(options.folder):
    for _ in range(options.steps):
      running.step()
    running.wait()
  paths = list(pathlib.Path(options.folder).rglob('*.xplane.pb'))
  rows = top_kernels(kernel_seconds(paths[0])) if paths else []
  if not rows:
    raise UserError('the profiler recorded no kernel')
  yield {'model': options.models[0], 'steps': options.steps, 'rows': rows}


def kernel_seconds(path: pathlib.Path) -> dict[str, tuple[float, int]]:
  """Returns (seconds, calls) of each kernel in a trace of jax.profiler.

  On a GPU, kernels are the events of its streams. Elsewhere they are XLA's operations.
  """
  from jax.profiler import ProfileData

  kernels = {}
  for plane in ProfileData.from_file(str(path)).planes:
    for line in plane.lines:
      stream = plane.name.startswith('/device:GPU') and line.name.startswith('Stream')
      for event in line.events:
        # Skip loops and calls: they contain other operations, which the trace lists too.
        is_container = re.match(r'(while|call|conditional)\b', event.name)
        if stream or (not is_container and any(key == 'hlo_op' for key, _ in event.stats)):
          seconds, calls = kernels.get(event.name, (0.0, 0))
          kernels[event.name] = seconds + event.duration_ns / 1e9, calls + 1
  return kernels


def top_kernels(kernels: dict[str, tuple[float, int]], count: int = 10) -> list[dict]:
  """Returns the kernels that take longest, with their share of the total time."""
  total = sum(seconds for seconds, _ in kernels.values())
  longest = sorted(kernels.items(), key=lambda item: -item[1][0])[:count]
  return [
    {'kernel': name, 'seconds': seconds, 'calls': calls, 'share': seconds / total}
    for name, (seconds, calls) in longest
    if total
  ]


def device_kind() -> str:
  return jax.devices()[0].device_kind


def facts() -> dict:
  """Returns the device, commit and versions for the report."""
  names = ('jax', 'jaxlib', 'flax', 'optax', 'torch', 'torchvision')
  versions = {'python': sys.version.split()[0]}
  for name in names:
    try:
      versions[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      versions[name] = None
  return {
    'device': workload.device_name(),
    'platform': jax.default_backend(),
    'peak_tflops': peak_tflops(device_kind()),
    'commit': provenance.commit(),
    'versions': versions,
  }
