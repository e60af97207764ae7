"""A task: a model, the window its inputs are seen through, and all that differs between the two kinds of task.

`kind` is one of the modules beside this file. Both have the same: `loss` and `truth`; the `definition` of their numbers
(fusa_jax.metrics), the one by which the best checkpoint is chosen (`SELECTION`), those of a log line (`SHOWN`), what
they count (`COUNTED`) and what Dice of that is called (`OVERLAP`); `patient_score`, by which runs are compared.
"""

import dataclasses
from types import ModuleType

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections

from fusa_jax import models
from fusa_jax.errors import UserError
from fusa_jax.tasks import classification, segmentation
from fusa_jax.window import network_input

KINDS = {'segmentation': segmentation, 'classification': classification}


@dataclasses.dataclass(frozen=True)
class Task:
  """What is computed from HU.

  Attributes:
    kind: the module of the task's kind.
    model: takes [B, H, W, 1].
    window: lowest and highest HU that the network tells apart.
  """

  kind: ModuleType
  model: nn.Module
  window: tuple[float, float]

  def init(self, key: jax.Array, size: int) -> dict:
    """Variables {'params', 'batch_stats'} for slices of size x size."""
    return self.model.init(key, jnp.zeros((1, size, size, 1)), train=False)

  def train_logits(self, variables: dict, hu: jax.Array, key: jax.Array) -> tuple[jax.Array, dict]:
    """HU [B, H, W] -> (logits, new batch_stats), with the norms of this batch; the key is of dropout."""
    inputs = network_input(hu, self.window)
    logits, changed = self.model.apply(variables, inputs, train=True, mutable=['batch_stats'], rngs={'dropout': key})
    return logits, changed['batch_stats']

  def logits(self, variables: dict, hu: jax.Array) -> jax.Array:
    """HU [B, H, W] -> logit of lesion, per slice [B] or per pixel [B, H, W]; float32, running statistics."""
    return self.model.apply(variables, network_input(hu, self.window), train=False)[..., 0]

  def probabilities(self, variables: dict, hu: jax.Array, temperature: float = 1.0) -> jax.Array:
    """HU [B, H, W] -> probability of lesion, per slice [B] or per pixel [B, H, W]: sigmoid(logit / temperature)."""
    return nn.sigmoid(self.logits(variables, hu) / temperature)


def create(config: ml_collections.ConfigDict) -> Task:
  """The task of a config.

  Raises:
    UserError: an unknown task or model, or a model of the other kind of task.
  """
  if config.task not in KINDS:
    raise UserError(f'task: there is no {config.task!r}; one of {", ".join(KINDS)}')
  fits = models.SEGMENTERS if config.task == 'segmentation' else models.CLASSIFIERS
  if config.model.name in models.NAMES and config.model.name not in fits:
    raise UserError(f'model.name: {config.model.name} is not for {config.task}; one of {", ".join(fits)}')
  low, high = config.data.window
  if not low < high:
    raise UserError(f'data.window: {low} is not below {high}; give the lowest and the highest HU, in this order')
  dtype = config.model.dtype
  if dtype == 'auto':
    dtype = 'float32' if jax.default_backend() == 'cpu' else 'bfloat16'
  options = {key: config.model.get(key) for key in ('width', 'encoder')}
  options = {key: value for key, value in options.items() if value is not None}
  model = models.create(config.model.name, num_classes=1, dtype=jnp.dtype(dtype), **options)
  return Task(KINDS[config.task], model, (low, high))
