"""The JAX side of the benchmarks: a model's training step and inference on one device, with random slices."""

import dataclasses
import datetime
import functools
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable

import jax
import ml_collections
import numpy as np
import optax

from benchmarks import model_table
from benchmarks.settings import Settings
from configs import cls, seg
from fusa_jax import models, tasks, torch_weights
from fusa_jax.chips import gpu, tpu
from fusa_jax.system import meshes, provenance
from fusa_jax.system.errors import UserError
from fusa_jax.training import optimizers, train

# Published rates by the name that JAX gives to a device. An H200 is an H100 with more and faster memory
# (nvidia.com/en-us/data-center/h200). The H100 and A100 are those for SXM; others with these names are slower.
CHIPS = {
  'NVIDIA A100-SXM4-80GB': gpu.CHIPS['a100'],
  'NVIDIA H100 80GB HBM3': gpu.CHIPS['h100'],
  'NVIDIA H200': dataclasses.replace(gpu.CHIPS['h100'], hbm=141e9, hbm_rate=4800e9),
  'NVIDIA B200': gpu.CHIPS['b200'],
  'TPU v4': tpu.CHIPS['v4'],
  'TPU v5 lite': tpu.CHIPS['v5e'],
  'TPU v5': tpu.CHIPS['v5p'],
  'TPU v6 lite': tpu.CHIPS['v6e'],
}


def config_of(name: str, settings: Settings) -> ml_collections.ConfigDict:
  """Returns the config of the paper's experiment with a model, on one device and without augmentation.

  Raises:
    UserError: the model does not exist.
  """
  if name not in models.NAMES:
    raise UserError(f'--models: {name!r} is unknown; choose from {", ".join(models.NAMES)}')
  config = (cls if name in models.CLASSIFIERS else seg).get_config(name)
  config.data.image_size, config.train.batch_size = settings.image_size, settings.batch_size
  config.model.width = settings.width
  config.augment.crop_probability = 0.0
  config.mesh.data = 1
  return config


def forward_gflops(name: str, settings: Settings) -> float:
  """Returns 10^9 operations of a batch's forward pass in our factored form (`model_table.forward_gflops`).

  All frameworks and forms are credited with this number, and with three times this number for a training step.
  """
  model = models.create(name, **options_of(settings))
  return settings.batch_size * model_table.forward_gflops(model, settings.image_size)


def options_of(settings: Settings) -> dict:
  """Returns the settings that are options of `models.create`."""
  return {} if settings.width is None else {'width': settings.width}


def batch_of(size: int, count: int) -> dict[str, np.ndarray]:
  """Returns a batch like the input pipeline's, with random HU and some lesion."""
  rng = np.random.default_rng(0)
  mask = (rng.random((count, size, size)) < 0.05).astype(np.uint8)
  return {
    'image': rng.integers(-1000, 300, (count, size, size)).astype(np.int16),
    'mask': mask,
    'label': (np.arange(count) % 2).astype(np.int32),
    'index': np.arange(count, dtype=np.int32),
  }


@dataclasses.dataclass(frozen=True)
class Workload:
  """The programs of a config on one device. Creating a workload neither compiles nor allocates arrays.

  Attributes:
    init: a jitted initialiser of the train state.
    shapes: the shapes of the train state.
  """

  config: ml_collections.ConfigDict
  task: tasks.Task
  mesh: jax.sharding.Mesh
  optimizer: optax.GradientTransformation
  init: Callable[[], train.TrainState]
  shapes: train.TrainState

  def lower_step(self) -> jax.stages.Lowered:
    """Lowers the step of the training loop."""
    return train.lower_step(self.task, self.optimizer, self.config, self.mesh, self.shapes)

  def lower_infer(self) -> jax.stages.Lowered:
    """Lowers inference: slices -> probabilities."""
    size, count = self.config.data.image_size, self.config.train.batch_size
    slices = jax.ShapeDtypeStruct((count, size, size), np.int16, sharding=meshes.batched(self.mesh, 3))
    return jax.jit(self.task.probabilities).lower(self.shapes.variables, slices)


def create(config: ml_collections.ConfigDict, **changes) -> Workload:
  """Returns the workload of a config; `changes` replace attributes of the model, for example `attention=None`."""
  mesh = meshes.create_mesh(1, 1, jax.devices()[:1])
  task = tasks.create(config, jax.default_backend())  # as in training
  task = dataclasses.replace(task, model=task.model.clone(**changes))
  optimizer, _ = optimizers.make_optimizer(config)
  init = train.compile_init(task, optimizer, config, meshes.replicated(mesh))
  shapes = train.state_shapes(task, optimizer, config, mesh)
  return Workload(config, task, mesh, optimizer, init, shapes)


class Running:
  """A compiled workload with its state and batch on the device. Inference is compiled at its first call."""

  def __init__(self, work: Workload, weights: dict | None = None):
    """`weights`, in the form of `torch_weights.from_torch`, replace the random weights."""
    batch = batch_of(work.config.data.image_size, work.config.train.batch_size)
    self._work = work
    self._step = work.lower_step().compile()
    self._batch = {key: jax.device_put(value, meshes.batched(work.mesh, value.ndim)) for key, value in batch.items()}
    self._state, self._out = work.init(), None
    if weights is not None:
      self._state = self._state.replace(variables=torch_weights.overlay(self._state.variables, weights))

  @functools.cached_property
  def _infer(self):
    return self._work.lower_infer().compile()

  def step(self) -> None:
    self._state, self._out = self._step(self._state, self._batch)

  def infer(self) -> jax.Array:
    self._out = self._infer(self._state.variables, self._batch['image'])
    return self._out

  def wait(self) -> None:
    jax.block_until_ready((self._state, self._out))

  def memory(self) -> int:
    """Returns the peak memory of a step in bytes, as the compiler reports it."""
    return peak_bytes(self._step)

  def program(self) -> str:
    """Returns the text of the compiled step (optimised HLO)."""
    return self._step.as_text()


def peak_bytes(compiled: jax.stages.Compiled) -> int:
  """Returns the peak memory of a program in bytes: its arguments, its outputs and its temporaries."""
  memory = compiled.memory_analysis()
  outside = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
  return outside + memory.temp_size_in_bytes


def in_turn(runs: dict, waits: dict, settings: Settings) -> dict:
  """Returns the median seconds per call of each run, by its key.

  In a turn, a run is called `settings.steps` times, then its wait function once. Because the runs take turns, other
  work on the machine affects all of them equally.
  """
  seconds = {key: [] for key in runs}
  for _ in range(settings.rounds):
    for key, run in runs.items():
      began = time.perf_counter()
      for _ in range(settings.steps):
        run()
      waits[key]()
      seconds[key].append((time.perf_counter() - began) / settings.steps)
  return {key: statistics.median(values) for key, values in seconds.items()}


def device_name() -> str:
  """Returns the name of the device that JAX uses; for a CPU, its number of cores and its model."""
  device = jax.devices()[0]
  if device.platform != 'cpu':
    return device.device_kind
  output = subprocess.run(['lscpu'], capture_output=True, text=True, check=False).stdout
  names = [line.split(':', 1)[1].strip() for line in output.splitlines() if line.startswith('Model name')]
  return f'{os.cpu_count()} cores of {names[0] if names else "a CPU"}'


def chip() -> gpu.Chip | tpu.Chip | None:
  """Returns the published rates of JAX's device; None if CHIPS does not have it."""
  return CHIPS.get(jax.devices()[0].device_kind)


def mfu(gflops_per_second: float, chip: gpu.Chip | tpu.Chip | None) -> float | None:
  """Returns model FLOP utilisation: the model's FLOP/s / the published peak in bfloat16; None if it is unknown."""
  return 1e9 * gflops_per_second / chip.flops if chip else None


def percent(share: float | None) -> str:
  return '-' if share is None else f'{share:.1%}'


def facts(settings: Settings, *packages: str) -> dict:
  """Returns what a result must state: device, date, code, versions (also of `packages`) and sizes."""
  versions = {name: provenance.version(name) for name in ('jax', 'flax', *packages)}
  return {
    'device': device_name(),
    'date': str(datetime.date.today()),
    'commit': provenance.commit(),
    'code_sha256': provenance.code_sha256(),
    'versions': {'python': platform.python_version()} | versions,
    'activations': 'float32' if jax.default_backend() == 'cpu' else 'bfloat16',
    **dataclasses.asdict(settings),
  }


def sentence(facts: dict) -> str:
  """Returns the facts as one line of a page. A copy without its repository has no commit, but a digest of its code."""
  size, width = facts['image_size'], facts['width']
  parts = [
    facts['device'],
    facts['date'],
    f'commit {facts["commit"][:7]}' if facts['commit'] else f'code {facts["code_sha256"][:12]}',
    *(f'{name} {version}' for name, version in facts['versions'].items()),
    f'{size} x {size}',
    f'batch {facts["batch_size"]}',
    *([f'width {width}'] if width else []),
    facts['activations'],
  ]
  return ', '.join(parts) + '.'
