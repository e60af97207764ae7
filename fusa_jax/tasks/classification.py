"""Classification of slices as with or without lesion (paper, section III-C)."""

import jax
import numpy as np

from fusa_jax import models
from fusa_jax.measures import metrics
from fusa_jax.measures.statistics import ratio
from fusa_jax.tasks.task_type import TaskType

# In a table of slices, one of these four counts is 1 and the others are 0.
_OUTCOMES = {'tp': 'true positive', 'fp': 'false positive', 'fn': 'false negative', 'tn': 'true negative'}


def _truth(batch: dict[str, jax.Array]) -> jax.Array:
  return batch['label']


def _patient_score(sums: dict[str, np.ndarray]) -> np.ndarray:
  """accuracy: (TP + TN) / all slices of the patient"""
  return ratio(sums['tp'] + sums['tn'], sums['slices'])


def _slice_result(table: dict[str, np.ndarray], row: int) -> str:
  (outcome,) = (name for key, name in _OUTCOMES.items() if table[f'{key}_chosen'][row])
  return f'score {table["score"][row]:.3f}, {outcome}'


CLASSIFICATION = TaskType(
  name='classification',
  models=models.CLASSIFIERS,
  has_masks=False,
  output='per slice, [batch]',
  truth=_truth,
  definition=metrics.classification,
  selection='auc',
  shown=('accuracy', 'precision', 'recall', 'f1', 'auc'),
  counted='slices',
  overlap='F1',
  patient_score_name='slice accuracy',
  patient_score=_patient_score,
  slice_result=_slice_result,
)
