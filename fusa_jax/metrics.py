"""Counts and scores -> the numbers of the paper's tables, in NumPy. What is undefined is None, never 0 or 1."""

import numpy as np


def ratio(numerator: float, denominator: float) -> float | None:
  """numerator / denominator; None where that is 0 / 0 or x / 0."""
  return float(numerator) / float(denominator) if denominator else None


def dice(tp: int, fp: int, fn: int) -> float | None:
  """2 TP / (2 TP + FP + FN): None where there is neither lesion nor prediction (not 1: nothing was measured)."""
  return ratio(2 * int(tp), 2 * int(tp) + int(fp) + int(fn))


def precision(tp: int, fp: int) -> float | None:
  return ratio(tp, int(tp) + int(fp))


def recall(tp: int, fn: int) -> float | None:
  return ratio(tp, int(tp) + int(fn))


def roc(label: np.ndarray, score: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """The ROC curve of boolean labels [N] and scores [N]: false and true positive rates, from (0, 0) to (1, 1).

  One point per distinct score, so that slices that tie are admitted together. Both kinds of label must occur.
  """
  order = np.argsort(-score, kind='stable')
  label, score = np.asarray(label, bool)[order], score[order]
  last_of_its_score = np.append(np.flatnonzero(np.diff(score)), len(score) - 1)
  true, false = np.cumsum(label)[last_of_its_score], np.cumsum(~label)[last_of_its_score]
  return np.append(0, false / false[-1]), np.append(0, true / true[-1])


def auc(label: np.ndarray, score: np.ndarray) -> float | None:
  """Area under the ROC curve (trapezoids: a tie counts half); None where only one kind of label occurs."""
  label = np.asarray(label, bool)
  if label.all() or not label.any():
    return None
  false, true = roc(label, np.asarray(score, np.float64))
  return float(np.sum(np.diff(false) * (true[1:] + true[:-1]) / 2))


def confusion(table: dict[str, np.ndarray]) -> dict[str, int]:
  """tp, fp, fn, tn summed over a table's rows."""
  return {key: int(np.sum(table[key], dtype=np.int64)) for key in ('tp', 'fp', 'fn', 'tn')}


def classification(table: dict[str, np.ndarray]) -> dict[str, float | int | None]:
  """Table I's columns, of a table of slices with label, score, tp, fp, fn, tn."""
  n = confusion(table)
  return {
    'accuracy': ratio(n['tp'] + n['tn'], sum(n.values())),
    'precision': precision(n['tp'], n['fp']),
    'recall': recall(n['tp'], n['fn']),
    'f1': dice(n['tp'], n['fp'], n['fn']),
    'auc': auc(table['label'], table['score']),
    **n,
  }


def segmentation(table: dict[str, np.ndarray]) -> dict[str, float | int | None]:
  """Table II's columns, of a table of slices with patient and the voxel counts tp, fp, fn, tn.

  `dice` is of the foreground, all voxels pooled; `dice_macro` the mean of that and the background's;
  `dice_per_patient` the mean over the patients for whom it is defined.
  """
  n = confusion(table)
  foreground, background = dice(n['tp'], n['fp'], n['fn']), dice(n['tn'], n['fn'], n['fp'])
  per_patient = [row['dice'] for row in by_patient(table) if row['dice'] is not None]
  return {
    'dice': foreground,
    'dice_macro': None if None in (foreground, background) else (foreground + background) / 2,
    'dice_per_patient': float(np.mean(per_patient)) if per_patient else None,
    'precision': precision(n['tp'], n['fp']),
    'recall': recall(n['tp'], n['fn']),
    **n,
  }


def by_patient(table: dict[str, np.ndarray]) -> list[dict]:
  """A row for each patient: number of slices, counts, and Dice (= F1), precision and recall of those."""
  patients, rows = np.asarray(table['patient']), []
  for patient in dict.fromkeys(patients.tolist()):
    mine = patients == patient
    n = confusion({key: table[key][mine] for key in ('tp', 'fp', 'fn', 'tn')})
    rows.append(
      {
        'patient': patient,
        'num_slices': int(mine.sum()),
        **n,
        'dice': dice(n['tp'], n['fp'], n['fn']),
        'precision': precision(n['tp'], n['fp']),
        'recall': recall(n['tp'], n['fn']),
      }
    )
  return rows
