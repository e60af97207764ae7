"""Loss functions by name: the values of train.loss.

To add a loss, write one function here and add one line to LOSSES. Each loss takes logits [B, ..., 1] and the reference
truth [B, ...] of 0 and 1, both over all devices, and returns a scalar. B is the number of slices. Each loss therefore
works for masks [B, H, W] and for labels [B].
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from fusa_jax.system.errors import look_up

Loss = Callable[[jax.Array, jax.Array], jax.Array]


def cross_entropy(logits: jax.Array, truth: jax.Array) -> jax.Array:
  """Binary cross-entropy, averaged over all pixels or slices."""
  return optax.losses.sigmoid_binary_cross_entropy(logits, _truth_like(logits, truth)).mean()


def dice(logits: jax.Array, truth: jax.Array) -> jax.Array:
  """Soft Dice loss: 1 - (2 sum(p t) + 2) / (sum(p) + sum(t) + 2), for probabilities p and the truth t.

  The sums run over all pixels of the batch, for labels over all slices. Sums per slice would be unstable: most slices
  have little or no lesion, so their Dice jumps between 0 and 1.
  """
  return optax.losses.dice_loss(logits, _truth_like(logits, truth), axis=tuple(range(truth.ndim)))


def cross_entropy_dice(logits: jax.Array, truth: jax.Array) -> jax.Array:
  """The sum of `cross_entropy` and `dice`, as nnU-Net (Isensee et al., Nature Methods 2021) trains."""
  return cross_entropy(logits, truth) + dice(logits, truth)


def focal(logits: jax.Array, truth: jax.Array) -> jax.Array:
  """Focal loss (Lin et al., ICCV 2017) with gamma = 2 and no class weights, averaged over all pixels or slices.

  It multiplies each pixel's cross-entropy by (1 - p_t)^2, where p_t is the probability of the true class. The many easy
  pixels therefore weigh little.
  """
  return optax.losses.sigmoid_focal_loss(logits, _truth_like(logits, truth), gamma=2.0).mean()


def focal_dice(logits: jax.Array, truth: jax.Array) -> jax.Array:
  """The sum of `focal` and `dice`."""
  return focal(logits, truth) + dice(logits, truth)


def tversky(logits: jax.Array, truth: jax.Array) -> jax.Array:
  """Tversky loss (Salehi et al., MLMI 2017): false negatives weigh 0.7, false positives 0.3; in `dice` both weigh 0.5.

  It is 1 - (TP + 1) / (TP + 0.3 FP + 0.7 FN + 1), with sums of probabilities over the batch, as in `dice`.
  """
  axes = tuple(range(truth.ndim))
  return optax.losses.dice_loss(logits, _truth_like(logits, truth), alpha=0.3, beta=0.7, axis=axes)


def focal_tversky(logits: jax.Array, truth: jax.Array) -> jax.Array:
  """`tversky` to the power 3/4 (Abraham and Khan, ISBI 2019): batches with nearly correct masks weigh more."""
  return jnp.maximum(tversky(logits, truth), 1e-9) ** 0.75  # at 0, the gradient would be infinite


LOSSES = {
  'cross_entropy': cross_entropy,
  'cross_entropy_dice': cross_entropy_dice,
  'dice': dice,
  'focal': focal,
  'focal_dice': focal_dice,
  'tversky': tversky,
  'focal_tversky': focal_tversky,
}


def get_loss(name: str) -> Loss:
  """Returns the loss with that name, the value of config.train.loss.

  Raises:
    UserError: the name is not in LOSSES.
  """
  return look_up(LOSSES, name, 'train.loss')


def _truth_like(logits, truth):
  """Returns the truth [B, ...] in the shape and dtype of the logits [B, ..., 1]."""
  return truth.astype(logits.dtype)[..., None]
