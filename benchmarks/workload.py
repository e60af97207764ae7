"""Our side of the benchmarks: a model's training step and inference on one device, with a batch of random slices."""

import dataclasses
import functools
import os
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
from fusa_jax.system import meshes
from fusa_jax.system.errors import UserError
from fusa_jax.training import optimizers, train


def config_of(name: str, settings: Settings) -> ml_collections.ConfigDict:
  """The paper's experiment with a model, on one device and without augmentation.

  Raises:
    UserError: no such model.
  """
  if name not in models.NAMES:
    raise UserError(f'--models: there is no {name!r}; one or more of {", ".join(models.NAMES)}')
  config = (cls if name in models.CLASSIFIERS else seg).get_config(name)
  config.data.image_size, config.train.batch_size = settings.image_size, settings.batch_size
  config.model.width = settings.width
  config.augment.crop_probability = 0.0
  config.mesh.data = 1
  return config


def forward_gflops(name: str, settings: Settings) -> float:
  """10^9 operations of a batch's forward pass, of our factored form (`model_table.forward_gflops`).

  It is what all frameworks and forms are credited with, and three times that for a training step.
  """
  model = models.create(name, **options_of(settings))
  return settings.batch_size * model_table.forward_gflops(model, settings.image_size)


def options_of(settings: Settings) -> dict:
  """What `models.create` takes of them."""
  return {} if settings.width is None else {'width': settings.width}


def batch_of(size: int, count: int) -> dict[str, np.ndarray]:
  """A batch as the input pipeline has it, of random HU and some lesion."""
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
  """A config's work on one device, not yet compiled; no array is made.

  Attributes:
    init: a jitted initialiser of the train state.
    shapes: of the train state.
  """

  config: ml_collections.ConfigDict
  task: tasks.Task
  mesh: jax.sharding.Mesh
  optimizer: optax.GradientTransformation
  init: Callable[[], train.TrainState]
  shapes: train.TrainState

  def lower_step(self) -> jax.stages.Lowered:
    """The loop's own step."""
    return train.lower_step(self.task, self.optimizer, self.config, self.mesh, self.shapes)

  def lower_infer(self) -> jax.stages.Lowered:
    """Slices -> probabilities."""
    size, count = self.config.data.image_size, self.config.train.batch_size
    slices = jax.ShapeDtypeStruct((count, size, size), np.int16, sharding=meshes.batched(self.mesh, 3))
    return jax.jit(self.task.probabilities).lower(self.shapes.variables, slices)


def create(config: ml_collections.ConfigDict, **changes) -> Workload:
  """The workload of a config; `changes` are of the model's attributes, as `attention=None`."""
  mesh = meshes.create_mesh(1, 1, jax.devices()[:1])
  task = tasks.create(config)
  task = dataclasses.replace(task, model=task.model.clone(**changes))
  optimizer, _ = optimizers.make_optimizer(config)
  init = train.compile_init(task, optimizer, config, meshes.replicated(mesh))
  shapes = train.state_shapes(task, optimizer, config, mesh)
  return Workload(config, task, mesh, optimizer, init, shapes)


class Running:
  """A workload compiled, with its state and batch on the device. Inference is compiled when it is first asked for."""

  def __init__(self, work: Workload, weights: dict | None = None):
    """`weights`, as `torch_weights.from_torch` has them, take the place of the random ones."""
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
    """Bytes that a step holds at once, as the compiler has it."""
    return peak_bytes(self._step)


def peak_bytes(compiled: jax.stages.Compiled) -> int:
  """Bytes that a program holds at once: what it is given and gives, and its temporaries."""
  found = compiled.memory_analysis()
  outside = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
  return outside + found.temp_size_in_bytes


def in_turn(runs: dict, waits: dict, settings: Settings) -> dict:
  """The median seconds a call of each run, by its key. In a turn it is called some times, and then waited for.

  What else the machine does meets all alike, since they take turns.
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
  """Of the device that JAX computes on; of a CPU, which it is and how many cores it has."""
  device = jax.devices()[0]
  if device.platform != 'cpu':
    return device.device_kind
  found = subprocess.run(['lscpu'], capture_output=True, text=True, check=False).stdout
  names = [line.split(':', 1)[1].strip() for line in found.splitlines() if line.startswith('Model name')]
  return f'{os.cpu_count()} cores of {names[0] if names else "a CPU"}'
