"""Loss functions by name: the values of train.loss.

To add a loss, write one function here and add one line to LOSSES. Each function takes the logits of one class
[B, ..., 1], the reference truth of 0 and 1, in the same shape and dtype, and where it is known, a bool [B, ..., 1], or
None for everywhere. All are over all devices. It returns a scalar. B is the number of slices. Each loss therefore works
for masks [B, H, W] and for labels [B].

Exclusive classes of slices have losses of their own, in EXCLUSIVE: these take the logits of all classes [B, classes]
and the truth of 0 and 1, in the same shape and dtype.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from fusa_jax.scans.classes import IGNORED
from fusa_jax.system.errors import UserError, look_up

Loss = Callable[[jax.Array, jax.Array], jax.Array]
Known = jax.Array | None


def cross_entropy(logits: jax.Array, truth: jax.Array, known: Known = None) -> jax.Array:
  """Binary cross-entropy, averaged over all pixels or slices."""
  return _mean(optax.losses.sigmoid_binary_cross_entropy(logits, truth), known)


def dice(logits: jax.Array, truth: jax.Array, known: Known = None) -> jax.Array:
  """Soft Dice loss: 1 - (2 sum(p t) + 2) / (sum(p) + sum(t) + 2), for probabilities p and the truth t.

  The sums run over all pixels of the batch, for labels over all slices. Sums per slice would be unstable: most slices
  have little or no lesion, so their Dice jumps between 0 and 1.
  """
  return _overlap(logits, truth, known)


def cross_entropy_dice(logits: jax.Array, truth: jax.Array, known: Known = None) -> jax.Array:
  """The sum of `cross_entropy` and `dice`, as nnU-Net (Isensee et al., Nature Methods 2021) trains."""
  return cross_entropy(logits, truth, known) + dice(logits, truth, known)


def focal(logits: jax.Array, truth: jax.Array, known: Known = None) -> jax.Array:
  """Focal loss (Lin et al., ICCV 2017) with gamma = 2 and no class weights, averaged over all pixels or slices.

  It multiplies each pixel's cross-entropy by (1 - p_t)^2, where p_t is the probability of the true class. The many easy
  pixels therefore weigh little.
  """
  return _mean(optax.losses.sigmoid_focal_loss(logits, truth, gamma=2.0), known)


def focal_dice(logits: jax.Array, truth: jax.Array, known: Known = None) -> jax.Array:
  """The sum of `focal` and `dice`."""
  return focal(logits, truth, known) + dice(logits, truth, known)


def tversky(logits: jax.Array, truth: jax.Array, known: Known = None) -> jax.Array:
  """Tversky loss (Salehi et al., MLMI 2017): false negatives weigh 0.7, false positives 0.3; in `dice` both weigh 0.5.

  It is 1 - (TP + 1) / (TP + 0.3 FP + 0.7 FN + 1), with sums of probabilities over the batch, as in `dice`.
  """
  return _overlap(logits, truth, known, alpha=0.3, beta=0.7)


def focal_tversky(logits: jax.Array, truth: jax.Array, known: Known = None) -> jax.Array:
  """`tversky` to the power 3/4 (Abraham and Khan, ISBI 2019): batches with nearly correct masks weigh more."""
  return jnp.maximum(tversky(logits, truth, known), 1e-9) ** 0.75  # at 0, the gradient would be infinite


LOSSES = {
  'cross_entropy': cross_entropy,
  'cross_entropy_dice': cross_entropy_dice,
  'dice': dice,
  'focal': focal,
  'focal_dice': focal_dice,
  'tversky': tversky,
  'focal_tversky': focal_tversky,
}


def softmax_cross_entropy(logits: jax.Array, truth: jax.Array) -> jax.Array:
  """Cross-entropy of the softmax over the classes, averaged over all slices."""
  return optax.losses.softmax_cross_entropy(logits, truth).mean()


EXCLUSIVE = {'cross_entropy': softmax_cross_entropy}


def get_loss(name: str, has_ignored: bool = False, exclusive: bool = False) -> Loss:
  """Returns the loss with that name, the value of config.train.loss: of exclusive classes, or the mean over classes.

  It takes logits [B, ..., classes] and the truth [B, ...], whose bit k is the truth of class k (`scans.classes`).

  Args:
    name: the name.
    has_ignored: whether the truth may be unknown somewhere. Otherwise its bits are not tested.
    exclusive: whether each slice has exactly one class. The loss is then one of EXCLUSIVE.

  Raises:
    UserError: the name is not in LOSSES, or not in EXCLUSIVE for exclusive classes.
  """
  loss = look_up(LOSSES, name, 'train.loss')
  if not exclusive:
    return functools.partial(_over_classes, loss, has_ignored)
  if name not in EXCLUSIVE:
    raise UserError(f'train.loss: {name} is not for exclusive classes; give one of {", ".join(EXCLUSIVE)}')
  return functools.partial(_of_exclusive, EXCLUSIVE[name])


def _of_exclusive(loss, logits, truth):
  bits = truth[..., None] >> jnp.arange(logits.shape[-1], dtype=truth.dtype) & 1
  return loss(logits, bits.astype(logits.dtype))


def _over_classes(loss, has_ignored, logits, truth):
  known = (truth & IGNORED == 0)[..., None] if has_ignored else None
  if logits.shape[-1] == 1 and not has_ignored:
    return loss(logits, truth.astype(logits.dtype)[..., None], None)
  of_class = lambda number: (truth >> number & 1).astype(logits.dtype)[..., None]
  values = [loss(logits[..., k : k + 1], of_class(k), known) for k in range(logits.shape[-1])]
  return jnp.mean(jnp.stack(values))


def _mean(values, known):
  return values.mean() if known is None else (values * known).sum() / jnp.maximum(known.sum(), 1)


def _overlap(logits, truth, known, **weights):
  """Returns optax's Dice loss over the whole batch. Where the truth is unknown, probability and truth count as 0."""
  if known is not None:
    logits, truth = jnp.where(known, logits, -jnp.inf), truth * known
  return optax.losses.dice_loss(logits, truth, axis=tuple(range(truth.ndim - 1)), **weights)
