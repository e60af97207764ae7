"""A task: what a config computes from slices. `TASKS` holds the types of task, segmentation and classification.

`TaskType` documents what a type of task has. Open this package to add a type of task or a loss.
"""

import dataclasses
import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections

from fusa_jax import models
from fusa_jax.scans import volumes
from fusa_jax.system.errors import UserError, look_up
from fusa_jax.tasks import losses
from fusa_jax.tasks.classification import CLASSIFICATION
from fusa_jax.tasks.segmentation import SEGMENTATION
from fusa_jax.tasks.task_type import TaskType
from fusa_jax.tasks.window import grey_input, network_input

_DEPTHS = {'multiples', 'stage_sizes'}
TASKS = {task_type.name: task_type for task_type in (SEGMENTATION, CLASSIFICATION)}  # by the value of config.task


@dataclasses.dataclass(frozen=True)
class Task:
  """What a config computes from slices.

  Attributes:
    type: the type of task.
    model: takes images [B, H, W, 1] and returns logits [B, ..., 1].
    inputs: converts slices [B, H, W], in HU or grey values, to those images.
    loss: takes logits [B, ..., 1] and the truth [B, ...] of `type.truth`; returns a scalar.
  """

  type: TaskType
  model: nn.Module
  inputs: Callable[[jax.Array], jax.Array]
  loss: losses.Loss

  def init(self, key: jax.Array, size: int) -> dict:
    """Variables {'params', 'batch_stats'} for slices of size x size."""
    return self.model.init(key, jnp.zeros((1, size, size, 1)), train=False)

  def train_logits(self, variables: dict, slices: jax.Array, key: jax.Array) -> tuple[jax.Array, dict]:
    """Slices [B, H, W] -> (logits, new batch_stats), with the norms of this batch; the key is of dropout."""
    logits, changed = self.model.apply(
      variables, self.inputs(slices), train=True, mutable=['batch_stats'], rngs={'dropout': key}
    )
    return logits, changed['batch_stats']

  def logits(self, variables: dict, slices: jax.Array, flips: bool = False) -> jax.Array:
    """Slices [B, H, W] -> logit of lesion, per slice [B] or per pixel [B, H, W]; float32, running statistics.

    With `flips`, that of the mean probability of the slices as they are and mirrored left and right, the one flip of
    training's augmentation (test-time augmentation).
    """
    logits = lambda slices: self.model.apply(variables, self.inputs(slices), train=False)[..., 0]
    if not flips:
      return logits(slices)
    plain, mirrored = jax.lax.map(logits, jnp.stack([slices, slices[..., ::-1]]))
    return mean_logits(plain, mirrored[..., ::-1] if mirrored.ndim == 3 else mirrored)

  def probabilities(
    self, variables: dict, slices: jax.Array, temperature: float = 1.0, flips: bool = False
  ) -> jax.Array:
    """Slices [B, H, W] -> probability of lesion, per slice [B] or per pixel [B, H, W]: sigmoid(logit / temperature)."""
    return nn.sigmoid(self.logits(variables, slices, flips) / temperature)


def mean_logits(*logits: jax.Array) -> jax.Array:
  """The logit of the mean of their probabilities; exact where these would round to 0 or 1."""
  stacked = jnp.stack(logits)
  lesion, none = (jax.nn.logsumexp(jax.nn.log_sigmoid(sign * stacked), axis=0) for sign in (1, -1))
  return lesion - none


def type_of(name: str) -> TaskType:
  """The type of task with that name, which is the value of config.task.

  Raises:
    UserError: there is no such type.
  """
  return look_up(TASKS, name, 'task')


def create(config: ml_collections.ConfigDict) -> Task:
  """The task of a config.

  Raises:
    UserError: an unknown task, loss, model or value of data.intensity; a model of another type of task; no window.
  """
  task_type, loss = type_of(config.task), losses.get_loss(config.train.loss)
  if config.model.name in models.NAMES and config.model.name not in task_type.models:
    raise UserError(f'model.name: {config.model.name} is not for {config.task}; one of {", ".join(task_type.models)}')
  low, high = config.data.window
  if not low < high:
    raise UserError(f'data.window: {low} is not below {high}; give the lowest and the highest HU, in this order')
  if config.data.intensity not in volumes.VALUES:
    raise UserError(f'data.intensity: there is no {config.data.intensity!r}; one of {", ".join(volumes.VALUES)}')
  inputs = grey_input if config.data.intensity == 'grey' else functools.partial(network_input, window=(low, high))
  dtype = config.model.dtype
  if dtype == 'auto':
    dtype = 'float32' if jax.default_backend() == 'cpu' else 'bfloat16'
  options = {key: config.model.get(key) for key in ('width', 'encoder', *_DEPTHS)}
  options = {key: value for key, value in options.items() if value is not None}
  for key in _DEPTHS & options.keys():
    if not options[key] or not all(isinstance(number, int) and number >= 1 for number in options[key]):
      raise UserError(f'model.{key}: {options[key]} is no list of whole numbers from 1 on; give (1, 2), for example')
    options[key] = tuple(options[key])  # from a run's folder it comes as a list
  model = models.create(config.model.name, num_classes=1, dtype=jnp.dtype(dtype), **options)
  return Task(task_type, model, inputs, loss)
