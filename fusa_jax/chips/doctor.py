"""Prints facts for a bug report: versions, devices, memory, caches, a check of a few training steps, and compilers.

The output is plain text to paste into an issue. It shows the home folder as `~` and contains no data of the user.
Functions import the packages that they check, so that a missing or broken package is reported like any other problem.
"""

import dataclasses
import functools
import importlib.metadata
import os
import pathlib
import platform
import shutil
import sys
import time

import ml_collections
from packaging.requirements import Requirement

from fusa_jax.scans import decoder
from fusa_jax.system import home, memory, meshes, provenance
from fusa_jax.system.errors import UserError, one_line

_ROOT = home.PACKAGE.parent
# Packages that requirements.txt installs indirectly, and optional ones.
_OTHERS = (
  *('jaxlib', 'tensorstore', 'torch', 'libtpu', 'jax-cuda12-plugin', 'jax-cuda13-plugin'),
  *('pydicom', 'python-gdcm', 'highdicom', 'SimpleITK', 'gcsfs'),
)
_VARIABLES = (
  'JAX_',
  'XLA_',
  'LIBTPU_',
  'TPU_',
  'CUDA_VISIBLE_DEVICES',
  'GLIBC_TUNABLES',
  'LD_PRELOAD',
  'OMP_NUM_THREADS',
)
# Free disk space that the demo's cache and a run need.
_FREE_GB = 1.0


def doctor(config: ml_collections.ConfigDict, caches: dict[str, pathlib.Path]) -> None:
  """Prints facts about the machine, then trains a tiny model for three steps.

  Args:
    config: config of a segmentation run. The check uses its window, optimizer, loss and augmentation, at 32 x 32.
    caches: folders of the caches, by name.

  Raises:
    UserError: problems were found; the message has one line for each, with what to do.
  """
  problems = []
  for title, part in (
    ('versions', versions),
    ('machine', machine),
    ('devices', devices),
    ('caches', lambda: look_at_caches(caches)),
    ('self-check', lambda: self_check(config)),
    ('compilers for other chips', compilers),
  ):
    print(f'{title}:', flush=True)
    try:
      for line, problem in part():
        print(f'  {_without_home(line)}', flush=True)
        problems += [f'{title}: {_without_home(problem)}'] if problem else []
    except Exception as error:  # any error is a problem to report
      text = one_line(error, 300)
      problems.append(
        f'{title}: {type(error).__name__}: {text}; install again in a fresh environment, or report it with this text'
      )
  if problems:
    raise UserError('\n'.join(problems))
  print('no problems found')


def requirements() -> list[Requirement]:
  """The required packages: from requirements.txt in a checkout, else from the metadata of the installed package."""
  if (_ROOT / 'pyproject.toml').exists():
    lines = [line.partition('#')[0].strip() for line in (_ROOT / 'requirements.txt').read_text().splitlines()]
  else:
    lines = importlib.metadata.requires('fusa_jax')
  parsed = [Requirement(line) for line in lines if line]
  return [one for one in parsed if one.marker is None or one.marker.evaluate({'extra': ''})]


def versions():
  """Yields (line, problem or None) for Python, fusa_jax and each package."""
  yield f'Python {platform.python_version()}, {sys.executable}', None
  yield f'fusa_jax {provenance.version("fusa_jax") or "(not installed)"}, in {_ROOT}', None
  for one in requirements():
    version, problem = provenance.version(one.name), None
    if version is None:
      problem = f"{one.name} is not installed; pip install '{one}'"
    elif not one.specifier.contains(version, prereleases=True):
      problem = f"{one.name} {version} does not meet {one.specifier}; pip install '{one}'"
    yield f'{one.name} {version}', problem
  for name in _OTHERS:
    if version := provenance.version(name):
      yield f'{name} {version}', None
  if provenance.version('pydicom'):
    # A separate process decodes compressed DICOM; this line shows whether it starts.
    yield f'decoding in a separate process: {decoder.apart(os.path.basename, "it/works")}', None


def _without_home(text):
  home = str(pathlib.Path.home())
  return text if home == '/' else text.replace(home, '~')


def machine():
  """Yields (line, None) for the system, its cores and memory, and the environment variables that JAX reads."""
  yield platform.platform(), None
  cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
  installed, limit = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES'), memory.container_limit()
  limited = f', limited to {limit / 1e9:.1f}' if limit else ''
  yield f'{cores} CPU cores of {os.cpu_count()}, {installed / 1e9:.1f} GB of memory{limited}', None
  for name, value in sorted(os.environ.items()):
    if name.startswith(_VARIABLES):
      yield f'{name}={value}', None


def devices():
  """Yields (line, problem or None) for the devices of JAX."""
  import jax

  problem = None
  if jax.default_backend() == 'cpu' and 'JAX_PLATFORMS' not in os.environ:
    if pathlib.Path('/dev/nvidiactl').exists():
      problem = "jax does not use this machine's NVIDIA GPU; pip install -U 'jax[cuda12]', or set JAX_PLATFORMS=cpu"
    elif pathlib.Path('/dev/accel0').exists():
      problem = "jax does not use this machine's TPU; pip install -U 'jax[tpu]', or set JAX_PLATFORMS=cpu"
  yield f'backend {jax.default_backend()}, {jax.device_count()} devices', problem
  for device in jax.local_devices():
    stats = device.memory_stats() or {}
    limit = f', {stats["bytes_limit"] / 1e9:.1f} GB for jax' if 'bytes_limit' in stats else ''
    yield f'{device.id}: {device.device_kind}{limit}', None


def look_at_caches(caches: dict[str, pathlib.Path]):
  """Yields (line, problem or None) for each cache: its folder, its size, and whether it can be written."""
  for name, folder in caches.items():
    files = [path for path in folder.rglob('*') if path.is_file()] if folder.is_dir() else []
    size = sum(path.stat().st_size for path in files) / 1e6
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free, problem = shutil.disk_usage(existing).free / 1e9, None
    if not (existing.is_dir() and os.access(existing, os.W_OK)):
      problem = f'{folder} cannot be written, because {existing} is not writable; set HOME to a writable folder'
    elif free < _FREE_GB:
      problem = f'{free:.1f} GB free at {existing}; delete old files in {folder}, or set HOME to a larger disk'
    yield f'{name}: {folder}, {len(files)} files of {size:.0f} MB; {free:.1f} GB free', problem


def self_check(config: ml_collections.ConfigDict):
  """Yields (line, problem or None) for two checks: FUSA, and three training steps of a FUSA-ResUnet of two levels.

  The first check compares FUSA with the paper's literal form. The second runs training's own step over all devices on
  one batch; the loss must fall. On a CPU both are compiled without optimisation: optimising would take longer than the
  checks, and the convolutions come from a library anyway.
  """
  import jax
  import numpy as np

  from fusa_jax import FUSA, models, tasks
  from fusa_jax.training import optimizers, train

  began, options = time.perf_counter(), train.options_to_run_once()

  @functools.partial(jax.jit, compiler_options=options)
  def outputs_and_gradients(x):
    variables = FUSA().init(jax.random.key(0), x)
    value = lambda variables, x, literal: (FUSA(literal=literal).apply(variables, x) ** 2).sum()
    with jax.default_matmul_precision('highest'):
      return [jax.value_and_grad(value, (0, 1))(variables, x, literal) for literal in (False, True)]

  x = np.random.default_rng(0).normal(size=(2, 16, 16, 8)).astype(np.float32)
  ours, literal = map(jax.tree.leaves, jax.device_get(outputs_and_gradients(x)))
  apart = np.max([np.abs(a - b).max() / np.abs(b).max() for a, b in zip(ours, literal, strict=True)])
  problem = None
  if not apart < 1e-4:
    problem = (
      f'FUSA differs from its literal form by {apart:.1e}; report this text and the version of the GPU or TPU driver'
    )
  yield f'FUSA, factored and literal: values and gradients differ by {apart:.1e} of the largest value', problem

  config = ml_collections.ConfigDict(config.to_dict())
  mesh = meshes.create_mesh()
  size, count = 32, meshes.fitting_batch(mesh, 4)
  config.data.image_size = size
  config.augment.update(crop_probability=0.0, flip=False, hu_shift=0.0, hu_scale=0.0)
  config.train.update(steps=3, warmup_steps=0, batch_size=count, learning_rate=0.01)
  small = models.create('fusa_resunet', width=8, multiples=(1, 2))
  task = dataclasses.replace(tasks.create(config), model=small)
  optimizer, _ = optimizers.make_optimizer(config)
  shapes = train.state_shapes(task, optimizer, config, mesh)
  step = train.lower_step(task, optimizer, config, mesh, shapes).compile(options)
  # Draw the parameters on the host: compiling a program that draws them would take a third of the total time.
  draw = lambda leaf: np.random.default_rng(0).normal(0, 0.1, leaf.shape).astype(leaf.dtype)
  zeros = lambda leaf: np.zeros(leaf.shape, leaf.dtype)
  state = jax.tree.map(zeros, shapes).replace(variables=jax.tree.map(draw, shapes.variables))
  state = jax.device_put(state, meshes.replicated(mesh))
  # Soft tissue around lung, and in the lung a square with a lesion's HU.
  image, mask = np.full((count, size, size), 40, np.int16), np.zeros((count, size, size), np.uint8)
  image[:, 4:28, 4:28], image[:, 8:16, 8:16], mask[:, 8:16, 8:16] = -850, -300, 1
  rows = {'image': image, 'mask': mask, 'label': np.ones(count, np.int32), 'index': np.arange(count, dtype=np.int32)}
  local = meshes.local_rows(mesh, count)
  batch = {name: meshes.to_devices(mesh, count, local, value[local]) for name, value in rows.items()}
  losses = []
  for _ in range(config.train.steps):
    state, scalars = step(state, batch)
    losses.append(float(scalars['loss']))
  problem = None
  if not losses[-1] < losses[0]:
    problem = 'three training steps on one batch did not lower the loss; report it with this text'
  yield f'three steps of training: loss {", ".join(f"{loss:.4f}" for loss in losses)}', problem
  yield f'{time.perf_counter() - began:.1f} s', None


def compilers():
  """Yields (line, problem or None) for the compilers of --mode=aot: the chips that each compiles a small program for.

  The compilers are optional: the line names a missing one, and the problem is None. A compiler of a release that does
  not belong to the installed jax is a problem, and so is a chip that the compiler rejects.
  """
  from fusa_jax.chips import gpu, tpu

  for chips, extra, file, topologies in (
    ('TPUs', 'tpu', 'requirements-aot.txt', [tpu.Topology.parse(f'{k}:{c.sweep[0]}') for k, c in tpu.CHIPS.items()]),
    ('NVIDIA GPUs', 'cuda12', 'requirements-aot-gpu.txt', [gpu.Topology(kind, 1) for kind in gpu.CHIPS]),
  ):
    compiler, install = topologies[0].packages[0], f'pip install -r {file}'
    if provenance.version(compiler) is None:
      yield f'{chips}: {compiler} is not installed; for --mode=aot --topology={topologies[0]}: {install}', None
      continue
    needed = [(one, provenance.version(one.name)) for one in _of_extra('jax', extra)]
    missing = sorted({one.name for one, version in needed if version is None})
    wrong = [
      f'{one.name} {version} does not meet {one.specifier}'
      for one, version in needed
      if version is not None and not one.specifier.contains(version, prereleases=True)
    ]
    compiled, rejected = [], []
    for topology in topologies:
      try:
        _compile_for(topology)
        compiled.append(topology.kind)
      except UserError as error:
        rejected.append(str(error))
    absent = f'; {", ".join(missing)} not installed' if missing else ''
    problem = f'{chips}: {"; ".join([*wrong, *rejected])}; {install}' if wrong or rejected else None
    kinds = ', '.join(compiled) or 'none'
    yield f'{chips}: {compiler} {provenance.version(compiler)} compiles for {kinds}{absent}', problem


def _of_extra(package: str, extra: str) -> list[Requirement]:
  """The requirements of an installed package for an extra; if one has extras itself, also all of its requirements."""
  found = []
  for one in _requires(package, extra):
    if one.marker is not None and not one.marker.evaluate({'extra': ''}):
      found += [one, *(more for inner in one.extras for more in _requires(one.name, inner))]
  return found


def _requires(package, extra):
  try:
    parsed = map(Requirement, importlib.metadata.requires(package) or [])
  except importlib.metadata.PackageNotFoundError:
    return []
  return [one for one in parsed if one.marker is None or one.marker.evaluate({'extra': extra})]


def _compile_for(topology) -> None:
  """Compiles a small program for the first chip of a topology."""
  import jax
  import jax.numpy as jnp

  x = jax.ShapeDtypeStruct((8, 128), jnp.bfloat16, sharding=jax.sharding.SingleDeviceSharding(topology.devices()[0]))
  try:
    jax.jit(jnp.sin).lower(x).compile()
  except jax.errors.JaxRuntimeError as error:
    raise UserError(f'{topology}: the compiler fails ({one_line(error)})') from None
