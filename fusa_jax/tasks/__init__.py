"""A task: a model, what makes its inputs of stored values, and all that differs between the two kinds of task.

`kind` is one of the modules beside this file. Both have the same: `loss` and `truth`; the `definition` of their numbers
(fusa_jax.measures.metrics), the one by which the best checkpoint is chosen (`SELECTION`), those of a log line
(`SHOWN`), what they count (`COUNTED`) and what Dice of that is called (`OVERLAP`); `patient_score`, by which runs are
compared.
"""

import dataclasses
import functools
from collections.abc import Callable
from types import ModuleType

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections

from fusa_jax import models
from fusa_jax.scans import volumes
from fusa_jax.system.errors import UserError
from fusa_jax.tasks import classification, segmentation
from fusa_jax.tasks.window import grey_input, network_input

_DEPTHS = {'multiples', 'stage_sizes'}
KINDS = {'segmentation': segmentation, 'classification': classification}


@dataclasses.dataclass(frozen=True)
class Task:
  """What is computed from slices.

  Attributes:
    kind: the module of the task's kind.
    model: takes [B, H, W, 1].
    inputs: makes that of slices [B, H, W], which are in HU, or grey.
  """

  kind: ModuleType
  model: nn.Module
  inputs: Callable[[jax.Array], jax.Array]

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


def create(config: ml_collections.ConfigDict) -> Task:
  """The task of a config.

  Raises:
    UserError: an unknown task, model or kind of values; a model of the other kind of task; no window.
  """
  if config.task not in KINDS:
    raise UserError(f'task: there is no {config.task!r}; one of {", ".join(KINDS)}')
  fits = models.SEGMENTERS if config.task == 'segmentation' else models.CLASSIFIERS
  if config.model.name in models.NAMES and config.model.name not in fits:
    raise UserError(f'model.name: {config.model.name} is not for {config.task}; one of {", ".join(fits)}')
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
  return Task(KINDS[config.task], model, inputs)
