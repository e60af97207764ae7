"""Optimizers and learning rate schedules by name, the values of train.optimizer and train.schedule.

To add one, write a function here and add a line to OPTIMIZERS or SCHEDULES.
"""

import jax
import ml_collections
import optax

from fusa_jax.system.errors import look_up


def warmup_cosine(train: ml_collections.ConfigDict) -> optax.Schedule:
  """Rises linearly from 0 to train.learning_rate over train.warmup_steps, then falls by a cosine to 0 at train.steps.

  The warm-up takes at most half of the steps, so that a long config also works for a short trial.
  """
  warmup = min(train.warmup_steps, train.steps // 2)
  return optax.warmup_cosine_decay_schedule(0.0, train.learning_rate, warmup, train.steps)


def polynomial(train: ml_collections.ConfigDict) -> optax.Schedule:
  """train.learning_rate * (1 - step / train.steps)^0.9, as in nnU-Net (Isensee et al., 2021). No warm-up."""
  return optax.polynomial_schedule(train.learning_rate, 0.0, 0.9, train.steps)


def constant(train: ml_collections.ConfigDict) -> optax.Schedule:
  """train.learning_rate at every step. No warm-up."""
  return optax.constant_schedule(train.learning_rate)


def adamw(schedule: optax.Schedule, weight_decay: float) -> optax.GradientTransformation:
  """AdamW (Loshchilov and Hutter, ICLR 2019): the weight decay is not part of the gradient."""
  return optax.adamw(schedule, weight_decay=weight_decay, mask=_is_kernel)


def sgd(schedule: optax.Schedule, weight_decay: float) -> optax.GradientTransformation:
  """SGD with Nesterov momentum 0.99, as in nnU-Net: the gradient includes weight_decay * kernel."""
  return optax.chain(
    optax.add_decayed_weights(weight_decay, mask=_is_kernel), optax.sgd(schedule, momentum=0.99, nesterov=True)
  )


SCHEDULES = {'warmup_cosine': warmup_cosine, 'polynomial': polynomial, 'constant': constant}
OPTIMIZERS = {'adamw': adamw, 'sgd': sgd}


def make_optimizer(config: ml_collections.ConfigDict) -> tuple[optax.GradientTransformation, optax.Schedule]:
  """Returns the optimizer of a config and its learning rate by step. Weight decay applies to kernels only.

  With train.clip_norm, it first scales gradients with a larger norm down to this norm (Pascanu et al., ICML 2013).

  Raises:
    UserError: the optimizer or the schedule is unknown.
  """
  train = config.train
  schedule = look_up(SCHEDULES, train.schedule, 'train.schedule')(train)
  optimizer = look_up(OPTIMIZERS, train.optimizer, 'train.optimizer')(schedule, train.weight_decay)
  if train.clip_norm is not None:
    optimizer = optax.chain(optax.clip_by_global_norm(train.clip_norm), optimizer)
  return optax.GradientTransformation(optimizer.init, lambda g, *rest: optimizer.update(_stored(g), *rest)), schedule


def _stored(gradients):
  """Makes GPUs store each gradient in the layout of its parameter first.

  Otherwise XLA transposes the gradients of convolutions within the update. It then cannot write parameters and moments
  to where they are, and copies all three of them.
  """
  # Flat, since XLA would otherwise store them in the layout of the convolution. Each alone, so that none waits for all.
  barrier = lambda x: jax.lax.optimization_barrier(x.reshape(-1)).reshape(x.shape)
  leaves, tree = jax.tree.flatten(gradients)
  on_gpu = lambda *leaves: tuple(map(barrier, leaves))
  return tree.unflatten(jax.lax.platform_dependent(*leaves, cuda=on_gpu, default=lambda *leaves: leaves))


def _is_kernel(params):
  """Returns True for each kernel, and False for biases and the scales of norms, which are vectors."""
  return jax.tree.map(lambda p: p.ndim > 1, params)
