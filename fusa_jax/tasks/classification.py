"""Classification of slices into those with and those without a lesion (paper, section III-C)."""

import jax
import jax.numpy as jnp
import optax

from fusa_jax import metrics

SELECTION = 'auc'
summary = metrics.classification


def loss(logits: jax.Array, batch: dict[str, jax.Array]) -> jax.Array:
  """Binary cross-entropy of logits [B, 1] and batch['label'] [B]; a scalar."""
  return optax.losses.sigmoid_binary_cross_entropy(logits[:, 0], batch['label'].astype(logits.dtype)).mean()


def score(probability: jax.Array, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
  """Probability [B] and batch['label'] -> per slice [B]: the probability, and a 1 in one of tp, fp, fn, tn."""
  predicted, truth = probability >= 0.5, batch['label'] > 0
  as_count = lambda where: where.astype(jnp.int32)
  return {
    'score': probability,
    'tp': as_count(predicted & truth),
    'fp': as_count(predicted & ~truth),
    'fn': as_count(~predicted & truth),
    'tn': as_count(~predicted & ~truth),
  }
