"""Segmentation of lesions: one probability per pixel (paper, section III-D)."""

import jax
import numpy as np

from fusa_jax import models
from fusa_jax.measures import metrics, statistics
from fusa_jax.tasks.task_type import TaskType


def _truth(batch: dict[str, jax.Array]) -> jax.Array:
  return batch['mask']


def _patient_score(sums: dict[str, np.ndarray]) -> np.ndarray:
  """Dice: 2 TP / (2 TP + FP + FN), over all pixels of the patient"""
  return metrics.dice(sums['tp'], sums['fp'], sums['fn'])


def _slice_result(table: dict[str, np.ndarray], row: int) -> str:
  tp, fp, fn = (table[f'{key}_chosen'][row] for key in ('tp', 'fp', 'fn'))
  if not tp + fn:
    return f'no lesion in the reference, {fp} pixels marked'
  return f'Dice {statistics.shown(statistics.defined(metrics.dice(tp, fp, fn)))}'


SEGMENTATION = TaskType(
  name='segmentation',
  models=models.SEGMENTERS,
  has_masks=True,
  output='per pixel, [batch, height, width]',
  truth=_truth,
  definition=metrics.segmentation,
  selection='dice',
  shown=('dice', 'dice_macro', 'dice_per_patient', 'precision', 'recall'),
  counted='pixels',
  overlap='Dice',
  patient_score_name='Dice',
  patient_score=_patient_score,
  slice_result=_slice_result,
)
