"""Lesion segmentation: a probability for each pixel (paper, section III-D)."""

import jax
import numpy as np
import optax

from fusa_jax.measures import metrics

SELECTION = 'dice'
COUNTED = 'pixels'
OVERLAP = 'Dice'
SHOWN = ('dice', 'dice_macro', 'dice_per_patient', 'precision', 'recall')
PATIENT_SCORE = 'Dice'
definition = metrics.segmentation


def loss(logits: jax.Array, batch: dict[str, jax.Array]) -> jax.Array:
  """Binary cross-entropy plus soft Dice loss of logits [B, H, W, 1] and batch['mask'] [B, H, W]; a scalar.

  Dice is taken over all pixels of the batch: most slices have little or no lesion, and the Dice of such a slice alone
  jumps between 0 and 1.
  """
  mask = batch['mask'].astype(logits.dtype)[..., None]
  cross_entropy = optax.losses.sigmoid_binary_cross_entropy(logits, mask).mean()
  return cross_entropy + optax.losses.dice_loss(logits, mask, axis=(0, 1, 2))


def truth(batch: dict[str, jax.Array]) -> jax.Array:
  """What a batch's logits should tell: mask [B, H, W]."""
  return batch['mask']


def patient_score(sums: dict[str, np.ndarray]) -> np.ndarray:
  """The score of each patient alone [P] that runs are compared by; NaN where it is undefined."""
  return metrics.dice(sums['tp'], sums['fp'], sums['fn'])
