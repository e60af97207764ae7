"""Builds the task of a config: model, network input and loss. `TASKS` lists the types of task.

The types are segmentation and classification; `TaskType` documents what a type defines. To add a type of task or a
loss, edit this package.
"""

import dataclasses
import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections

from fusa_jax import models
from fusa_jax.models import resunet
from fusa_jax.scans import classes, volumes
from fusa_jax.scans.classes import LESION, Classes
from fusa_jax.scans.neighbours import SLICE_ALONE, Context
from fusa_jax.system.errors import UserError, look_up
from fusa_jax.tasks import losses, supervision
from fusa_jax.tasks.classification import CLASSIFICATION
from fusa_jax.tasks.segmentation import SEGMENTATION
from fusa_jax.tasks.task_type import TaskType
from fusa_jax.tasks.window import grey_input, network_input

_DEPTHS = {'multiples', 'stage_sizes'}
TASKS = {task_type.name: task_type for task_type in (SEGMENTATION, CLASSIFICATION)}  # by the value of config.task


@dataclasses.dataclass(frozen=True)
class Task:
  """The computation that a config describes: from slices to logits and loss.

  Slices are [B, H, W]. With neighbours (data.context) they are [B, H, W, C], and truth and logits are those of the
  middle slice.

  Attributes:
    type: the type of task.
    model: takes images [B, H, W, C] and returns logits [B, ..., classes]; C is 1 without neighbours.
    inputs: converts slices, in HU or grey values, to those images.
    loss: takes logits [B, ..., classes] and the truth [B, ...] of `type.truth`; returns a scalar.
    heads: with train.deep_supervision, the heads of the lower levels; otherwise None.
    context: the neighbours of a slice.
    classes: the names of the classes, in the order of the logits and of the bits of the truth.
    has_ignored: whether the truth may be unknown somewhere (data.ignore_label).
    exclusive: whether each slice has exactly one class. The probabilities of the classes are then a softmax.
  """

  type: TaskType
  model: nn.Module
  inputs: Callable[[jax.Array], jax.Array]
  loss: losses.Loss
  heads: nn.Module | None = None
  context: Context = SLICE_ALONE
  classes: tuple[str, ...] = LESION.names
  has_ignored: bool = False
  exclusive: bool = False

  def init(self, key: jax.Array, size: int) -> dict:
    """Variables {'params', 'batch_stats'} for slices of size x size."""
    return self.model.init(key, jnp.zeros((1, size, size, self.context.channels)), train=False)

  def init_heads(self, key: jax.Array, variables: dict, size: int) -> dict | None:
    """Variables {'params'} of the heads, for the model's variables and slices of size x size; None without heads."""
    if self.heads is None:
      return None
    images = jnp.zeros((1, size, size, self.context.channels))
    run = lambda: self.model.apply(variables, images, train=False, mutable='levels')[1]['levels']
    stored = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), jax.eval_shape(run))
    return self.heads.init(key, supervision.features(stored))

  def train_loss(
    self, variables: dict, heads: dict | None, slices: jax.Array, truth: jax.Array, key: jax.Array
  ) -> tuple[jax.Array, dict]:
    """The loss of slices and their truth, in training mode: norms use this batch, dropout uses the key.

    Args:
      variables: the model's variables.
      heads: the variables of `heads`, or None without heads.
      slices, truth: the slices, and the truth of `type.truth`.
      key: the key of dropout.

    Returns:
      (loss, new batch_stats).
    """
    changed = ['batch_stats'] if heads is None else ['batch_stats', 'levels']
    logits, updated = self.model.apply(
      variables, self.inputs(slices), train=True, mutable=changed, rngs={'dropout': key}
    )
    if heads is None:
      return self.loss(logits, truth), updated['batch_stats']
    deep = self.heads.apply(heads, supervision.features(updated['levels']))
    return supervision.loss(self.loss, logits, deep, truth, self.has_ignored), updated['batch_stats']

  def logits(self, variables: dict, slices: jax.Array, flips: bool = False) -> jax.Array:
    """Slices -> float32 logits, per slice [B, classes] or per pixel [B, H, W, classes], with running statistics.

    The sigmoid of a logit is the probability of its class, also for exclusive classes (`log_odds`).

    With `flips` (test-time augmentation) it returns the logit of the mean probability of each slice and its left-right
    mirror image, the only flip in training's augmentation.
    """

    def logits(slices):
      output = self.model.apply(variables, self.inputs(slices), train=False)
      return log_odds(output) if self.exclusive else output

    if not flips:
      return logits(slices)
    plain, mirrored = jax.lax.map(logits, jnp.stack([slices, slices[:, :, ::-1]]))
    return mean_logits(plain, mirrored[:, :, ::-1] if mirrored.ndim == 4 else mirrored)

  def probabilities(
    self, variables: dict, slices: jax.Array, temperature: float = 1.0, flips: bool = False
  ) -> jax.Array:
    """Slices -> probabilities sigmoid(logit / temperature), in the shape of the logits."""
    return nn.sigmoid(self.logits(variables, slices, flips) / temperature)


def log_odds(logits: jax.Array) -> jax.Array:
  """The log-odds of each softmax probability, logit_k - log sum_{j != k} exp(logit_j): [..., K] -> [..., K], K >= 2.

  The sigmoid of these is the softmax of `logits`. They stay exact where a probability would round to 0 or 1.
  """
  others = ~jnp.eye(logits.shape[-1], dtype=bool)
  return logits - jax.nn.logsumexp(jnp.where(others, logits[..., None, :], -jnp.inf), axis=-1)


def mean_logits(*logits: jax.Array) -> jax.Array:
  """The logit of the mean of the probabilities of `logits`; exact even if a probability would round to 0 or 1."""
  stacked = jnp.stack(logits)
  lesion, background = (jax.nn.logsumexp(jax.nn.log_sigmoid(sign * stacked), axis=0) for sign in (1, -1))
  return lesion - background


def type_of(name: str) -> TaskType:
  """Returns the type of task with that name, the value of config.task.

  Raises:
    UserError: the name is not in TASKS.
  """
  return look_up(TASKS, name, 'task')


def resolved_dtype(config: ml_collections.ConfigDict, platform: str | None = None) -> str:
  """Returns the dtype of the activations, 'float32', 'bfloat16' or 'float64': model.dtype, or what 'auto' means.

  Args:
    config: the config of a run.
    platform: the devices that the model runs on: 'cpu', 'gpu' or 'tpu'. None: those of this process.
  """
  if config.model.dtype != 'auto':
    return config.model.dtype
  return 'float32' if (platform or jax.default_backend()) == 'cpu' else 'bfloat16'


def create(config: ml_collections.ConfigDict, platform: str | None = None) -> Task:
  """Creates the task of a config.

  Args:
    config: the config of a run.
    platform: 'cpu', 'gpu' or 'tpu': the only devices that the model will run on. On 'tpu', models that have a packed
      form use it. None: the devices of this process, and forms that work on every platform.

  Raises:
    UserError: the task, loss, model or data.intensity is unknown. The model is for another type of task, or does not
      have an option.
  """
  task_type, named = type_of(config.task), classes_of(config)
  has_ignored = config.data.ignore_label is not None
  loss = losses.get_loss(config.train.loss, has_ignored, named.exclusive)
  if config.model.name in models.NAMES and config.model.name not in task_type.models:
    names = ', '.join(task_type.models)
    raise UserError(f'model.name: {config.model.name} is not for {config.task}; give one of {names}')
  if config.data.intensity not in volumes.VALUES:
    raise UserError(f'data.intensity: {config.data.intensity!r} is unknown; give one of {", ".join(volumes.VALUES)}')
  of_hu = functools.partial(network_input, window=tuple(config.data.window))
  inputs = grey_input if config.data.intensity == 'grey' else of_hu
  options = {key: config.model.get(key) for key in ('width', 'encoder', *_DEPTHS)}
  options = {key: value for key, value in options.items() if value is not None}
  for key in _DEPTHS & options.keys():
    options[key] = tuple(options[key])  # a run's config.json holds a list
  if config.train.remat:
    options['remat'] = True  # an error for models without this option
  if platform == 'tpu' and config.model.name in models.PACKED:
    options['packed'] = True
  dtype = jnp.dtype(resolved_dtype(config, platform))
  model = models.create(config.model.name, num_classes=len(named.names), dtype=dtype, **options)
  heads = _heads(config, model, len(named.names))
  return Task(task_type, model, inputs, loss, heads, context_of(config), named.names, has_ignored, named.exclusive)


def context_of(config: ml_collections.ConfigDict) -> Context:
  """Returns the neighbours that the models of a config see beside a slice."""
  return Context(config.data.context, config.data.context_mm) if config.data.context else SLICE_ALONE


def classes_of(config: ml_collections.ConfigDict) -> Classes:
  """Returns the classes of a config, in the order of the logits.

  Names with mask values are yes-or-no questions: of pixels, or in classification of slices. Names alone are exclusive
  classes of slices. 'auto' is one class until the cohort is known (`runs.prepared_dataset`).

  Raises:
    UserError: data.classes are not valid, or do not fit the task.
  """
  named = config.data.classes
  if not named or named == classes.AUTO:
    return LESION
  has_masks = type_of(config.task).has_masks
  if classes.are_names(named):
    if has_masks:
      raise UserError(
        f'data.classes: {", ".join(named)} are exclusive classes of slices, but {config.task} needs mask values; give '
        "them, for example --config.data.classes=\"{'ground glass': (1,), 'consolidation': (2,)}\""
      )
    if config.data.ignore_label is not None:
      raise UserError('data.ignore_label: a mask value, but these are classes of slices; leave it out')
    return classes.of_slices(named)
  if not has_masks and config.data.ignore_label is not None:
    raise UserError('data.ignore_label: leaves out pixels, but classification scores slices; leave it out')
  return classes.chosen(named, config.data.ignore_label)


def _heads(config, model, num_classes):
  if not config.train.deep_supervision:
    return None
  if not isinstance(model, resunet.ResUNet) or len(model.multiples) < 3:
    raise UserError(
      f'train.deep_supervision: needs resunet or fusa_resunet with at least three levels, but the model is '
      f'{config.model.name}; leave it out'
    )
  return supervision.Heads(num_classes)
