"""What benchmarks/accelerator.py measures: a function per part, named as in its table of parts.

Each function takes the options and yields everything found so far, at each new result. It raises UserError with the
reason where it can find nothing.
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
from fusa_jax.scans import nifti
from fusa_jax.system import provenance
from fusa_jax.system.errors import UserError

_VOLUME = 300  # slices


def compare(options: Options) -> Iterator[dict]:
  """benchmarks/compare.py's rows of ours and of eager PyTorch, with MFU."""
  yield from _compared(options, ('JAX', 'PyTorch, eager'))


def torch_compile(options: Options) -> Iterator[dict]:
  """The same of torch.compile beside eager PyTorch; by itself, since to compile takes it minutes."""
  yield from _compared(options, ('PyTorch, eager', 'PyTorch, torch.compile'))


def _compared(options, frameworks):
  from benchmarks import compare

  rows = []
  for name in options.models:
    for row in compare.compare(name, options, frameworks):
      rows.append(row | {'train_mfu': mfu(row['train_gflops_per_second'], device_kind())})
    yield {'rows': rows}


def fusa_share(options: Options) -> Iterator[dict]:
  """The training step of each fusa_ model: without attention, with FUSA, and with its literal form."""
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
    raise UserError('--models: none of them has FUSA')


def share_rows(
  name: str, seconds: dict[str, float], memory: dict[str, int], batch_size: int, gflops: float, kind: str
) -> list[dict]:
  """A row for each form, by the seconds of its step; what a step takes longer than without FUSA is FUSA's share of it.

  `gflops` is of a step with FUSA's factored form, whose MFU is given.
  """
  return [
    {
      'model': name,
      'form': form,
      'step_seconds': taken,
      'slices_per_second': batch_size / taken,
      'share': 1 - seconds['without'] / taken,
      'peak_bytes': memory[form],
      'mfu': mfu(gflops / taken, kind) if form == 'FUSA' else None,
    }
    for form, taken in seconds.items()
  ]


def largest_batch(options: Options) -> Iterator[dict]:
  """The largest batch of the first model whose training step fits into the device's memory."""
  stats = jax.devices()[0].memory_stats() or {}
  limit = options.memory_limit or stats.get('bytes_limit')
  if limit is None:
    raise UserError(f'{device_kind()} does not tell how much memory it has; give --memory_limit_mb')
  name = options.models[0]

  def attempt(batch):
    settings = dataclasses.replace(options, batch_size=batch)
    needs = None
    try:
      running = workload.Running(workload.create(workload.config_of(name, settings)))
      needs = running.memory()
      if needs > limit:
        return needs, False
      running.step()
      running.wait()
      return needs, True
    except jax.errors.JaxRuntimeError as error:
      if 'RESOURCE_EXHAUSTED' not in str(error):
        raise
      return needs, False

  for found in search_batch(attempt, limit, options.batch_size):
    yield {'model': name, 'limit_bytes': limit, **found}


def search_batch(attempt: Callable[[int], tuple[int | None, bool]], limit: int, first: int) -> Iterator[dict]:
  """Yields what is known after each attempt: {'fits', 'fits_bytes', 'too_large'}, None where it is not known yet.

  To compile a step takes most of a minute: the next batch is where the last two would meet the limit, if bytes grow in
  proportion, and what remains between is halved. It ends where that is a sixteenth of what fits, or one slice.

  Args:
    attempt: of a batch, (the bytes that its step needs, None where the compiler gave up; whether it ran).
    limit: bytes.
    first: the batch to begin with.
  """
  fits, fits_bytes, too_large, before, batch = 0, None, None, (0, 0), first
  while True:
    needs, ran = attempt(batch)
    if ran:
      fits, fits_bytes = batch, needs
    else:
      too_large = batch
    yield {'fits': fits or None, 'fits_bytes': fits_bytes, 'too_large': too_large}
    least = max(fits // 16, 1)
    if too_large is not None and too_large - fits <= least:
      return
    if needs is None or batch == before[0] or needs <= before[1]:
      guess = 2 * fits
    else:
      slope = (needs - before[1]) / (batch - before[0])
      guess = int(batch + (limit - needs) / slope)
      before = (batch, needs)
    if too_large is None:
      batch = min(max(guess, fits + least), 16 * fits)
    else:
      batch = guess if fits + least <= guess < too_large else (fits + too_large) // 2


def input_path(options: Options) -> Iterator[dict]:
  """What benchmarks/input_pipeline.py measures, of phantoms that are drawn and prepared first."""
  data_dir = prepare.prepare_phantom('', options.image_size, patients=10, slices=16, seed=0)
  yield {'slices_per_second': input_pipeline.rate(data_dir, options.image_size, options.batch_size, steps=60)}


def prediction(options: Options) -> Iterator[dict]:
  """A volume of many slices, from file to written mask, by the first segmentation model; twice: once without compiling.

  The weights are random and the threshold 1, so that the mask is empty: real ones nearly are, and compress alike.
  """
  name = next((name for name in options.models if name in models.SEGMENTERS), None)
  if name is None:
    raise UserError('--models: none of them is for segmentation')
  folder, size = pathlib.Path(options.folder), options.image_size
  config = workload.config_of(name, options)
  run_config.save_config(folder / 'run', config)
  with checkpoint.Checkpoints(folder / 'run') as checkpoints:
    checkpoints.save(1, workload.create(config).init().variables, {'none': jnp.zeros(())}, None)
  # Drawing all of them would take longer than all the rest.
  slices, _, _ = phantom.patient(0, 1, size=size, slices=16)
  values = np.resize(slices, (_VOLUME, size, size))
  values[0, 0, 0] = values.max() + 1  # a highest value that is repeated so often would be taken for a window's end
  spacing = phantom.spacing(0, 1, size=size, slices=16)
  image = nib.Nifti1Image(values.transpose(2, 1, 0), np.diag([-spacing[2], -spacing[1], spacing[0], 1]))
  nib.save(image, folder / 'volume.nii.gz')
  began = time.perf_counter()
  nifti.read_scan(folder / 'volume.nii.gz')
  found = {'model': name, 'slices': _VOLUME, 'reading_seconds': time.perf_counter() - began}
  for key in ('first_seconds', 'seconds'):
    began = time.perf_counter()
    predict.predict(predictor.load_predictor(folder / 'run', threshold=1.0), folder / 'volume.nii.gz', folder / 'masks')
    found[key] = time.perf_counter() - began
    yield found | {'slices_per_second': _VOLUME / found[key]}


def profile(options: Options) -> Iterator[dict]:
  """The ten kernels that take most of the first model's training step."""
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
    raise UserError('the profiler saw no kernel')
  yield {'model': options.models[0], 'steps': options.steps, 'rows': rows}


def kernel_seconds(path: pathlib.Path) -> dict[str, tuple[float, int]]:
  """(seconds, calls) of each kernel in a trace of jax.profiler: of a GPU's streams; elsewhere, of XLA's operations."""
  from jax.profiler import ProfileData

  found = {}
  for plane in ProfileData.from_file(str(path)).planes:
    for line in plane.lines:
      stream = plane.name.startswith('/device:GPU') and line.name.startswith('Stream')
      for event in line.events:
        # Loops and calls hold other operations, which are there as well.
        held = re.match(r'(while|call|conditional)\b', event.name)
        if stream or (not held and any(key == 'hlo_op' for key, _ in event.stats)):
          seconds, calls = found.get(event.name, (0.0, 0))
          found[event.name] = seconds + event.duration_ns / 1e9, calls + 1
  return found


def top_kernels(kernels: dict[str, tuple[float, int]], count: int = 10) -> list[dict]:
  """Those that take longest, with their share of the time of all."""
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
  """Of the machine and the code, for the report."""
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
