"""Classification of slices into those with and those without a lesion (paper, section III-C)."""

import jax
import numpy as np
import optax

from fusa_jax.measures import metrics
from fusa_jax.measures.statistics import ratio

SELECTION = 'auc'
COUNTED = 'slices'
OVERLAP = 'F1'
SHOWN = ('accuracy', 'precision', 'recall', 'f1', 'auc')
PATIENT_SCORE = 'share of slices called rightly'
definition = metrics.classification


def loss(logits: jax.Array, batch: dict[str, jax.Array]) -> jax.Array:
  """Binary cross-entropy of logits [B, 1] and batch['label'] [B]; a scalar."""
  return optax.losses.sigmoid_binary_cross_entropy(logits[:, 0], batch['label'].astype(logits.dtype)).mean()


def truth(batch: dict[str, jax.Array]) -> jax.Array:
  """What a batch's logits should tell: label [B]."""
  return batch['label']


def patient_score(sums: dict[str, np.ndarray]) -> np.ndarray:
  """The score of each patient alone [P] that runs are compared by; NaN where it is undefined."""
  return ratio(sums['tp'] + sums['tn'], sums['slices'])
