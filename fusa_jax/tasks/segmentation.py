"""Lesion segmentation: a probability for each pixel (paper, section III-D)."""

import jax
import jax.numpy as jnp
import optax

from fusa_jax import metrics

SELECTION = 'dice'
summary = metrics.segmentation


def loss(logits: jax.Array, batch: dict[str, jax.Array]) -> jax.Array:
  """Binary cross-entropy plus soft Dice loss of logits [B, H, W, 1] and batch['mask'] [B, H, W]; a scalar.

  Dice is taken over all pixels of the batch: most slices have little or no lesion, and the Dice of such a slice alone
  jumps between 0 and 1.
  """
  mask = batch['mask'].astype(logits.dtype)[..., None]
  cross_entropy = optax.losses.sigmoid_binary_cross_entropy(logits, mask).mean()
  return cross_entropy + optax.losses.dice_loss(logits, mask, axis=(0, 1, 2))


def score(probability: jax.Array, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
  """Probability [B, H, W] and batch['mask'] -> per slice [B]: its highest probability, and counts of pixels."""
  predicted, truth = probability >= 0.5, batch['mask'] > 0
  count = lambda where: jnp.sum(where, axis=(1, 2), dtype=jnp.int32)
  return {
    'score': probability.max(axis=(1, 2)),
    'tp': count(predicted & truth),
    'fp': count(predicted & ~truth),
    'fn': count(~predicted & truth),
    'tn': count(~predicted & ~truth),
  }
