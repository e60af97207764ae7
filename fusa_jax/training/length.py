"""How long a run trains: train.steps or train.epochs, and at most until its validation score falls behind."""

import math

import ml_collections

from fusa_jax.runs import checkpoint
from fusa_jax.system.errors import UserError
from fusa_jax.training.datasets import Dataset


def with_steps(config: ml_collections.ConfigDict, dataset: Dataset) -> ml_collections.ConfigDict:
  """Returns the config with the number of steps in train.steps: that of train.epochs, if this is given.

  An epoch has as many slices as the training folds. With data.balanced, slices of the smaller group come more than once
  per epoch.

  Raises:
    UserError: train.patience is given, but the dataset has no validation fold.
  """
  if config.train.patience is not None and dataset.validation is None:
    raise UserError(
      'train.patience: needs a validation fold, but this dataset has fewer than three folds; leave it out, or prepare '
      'more patients'
    )
  if config.train.epochs is None:
    return config
  config = config.copy_and_resolve_references()
  config.train.steps = max(1, math.ceil(config.train.epochs * len(dataset.train) / config.train.batch_size))
  return config


def is_over(config: ml_collections.ConfigDict, checkpoints: checkpoint.Checkpoints, step: int) -> bool:
  """Whether a run ends at a step: the last one, or the last train.patience validations are below the best.

  The checkpoints' scores decide, so that a resumed run ends at the same step. All processes must call it together.

  Args:
    config: the config from `with_steps`.
    checkpoints: those of the run.
    step: the number of finished steps, which are saved.
  """
  train = config.train
  if step >= train.steps or train.patience is None:
    return step >= train.steps
  return step // train.evaluate_every - checkpoints.best() // train.evaluate_every >= train.patience
