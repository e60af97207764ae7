"""Definitions of the metrics: the sums over patients, and the metrics that follow from them. NumPy only.

Each metric is a function of sums over patients; AUC is a function of sums over pairs of patients. So the same code
computes it for all patients and for each bootstrap draw of them (statistics.py). Arrays may have any leading shape. An
undefined value is NaN, never 0 or 1, and is written as null.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from fusa_jax.measures import statistics
from fusa_jax.measures.statistics import ratio

COUNTS = ('tp', 'fp', 'fn', 'tn')
# Means of one score per patient, from 0 to 1: the sums that hold the scores, and where they are defined.
MEANS = {'dice_per_patient': ('patient_dice', 'patient_dice_defined')}

# The definition of each metric, which the report shows. TP, FP, FN and TN count slices or pixels, as the report states;
# in the metrics of patients, patients.
DEFINITIONS = {
  'accuracy': 'slice accuracy: (TP + TN) / all',
  'precision': 'positive predictive value (PPV): TP / (TP + FP)',
  'recall': 'sensitivity: TP / (TP + FN)',
  'f1': 'F1 of slices: 2 TP / (2 TP + FP + FN)',
  'auc': 'area under the ROC curve: P(score of a slice with lesion > score of one without); ties count half',
  'specificity': 'specificity: TN / (TN + FP)',
  'npv': 'negative predictive value: TN / (TN + FN)',
  'dice': 'pooled Dice: 2 TP / (2 TP + FP + FN) over the pixels of all test slices; selects checkpoint and threshold',
  'dice_macro': 'macro Dice: (pooled Dice of lesion + pooled Dice of background) / 2',
  'dice_per_patient': 'mean Dice per patient; patients with neither lesion nor prediction are left out',
  'dice_lesion_slices': 'mean Dice of the slices with lesion',
  'dice_slices': 'mean Dice of slices; slices with neither lesion nor prediction are left out',
  'dice_slices_empty_is_1': 'mean Dice of all slices; slices with neither lesion nor prediction count as 1',
  'brier': 'Brier score: mean of (probability - truth)^2',
  'ece': 'expected calibration error: mean of |lesion fraction - mean probability|, over 20 bins weighted by count',
  'sensitivity': 'sensitivity of slices: TP / (TP + FN)',
  'ppv': 'positive predictive value of slices: TP / (TP + FP)',
  # Of patients (patients.py). A patient with several scans has the highest score of these scans.
  'mean_of_highest': 'mean of the k highest probabilities of the slices of a scan; k is chosen on validation patients',
  'noisy_or': 'noisy-or: 1 - prod(1 - p) over the slices of a scan',
  'maximum': 'highest probability of the slices of a scan',
  'lesion_ml': 'volume of the mask of a scan at the operating point, in mL',
  'lung_share': 'volume of the mask of a scan at the operating point / volume of the lungs (fusa_jax/scans/lungs.py)',
  'patient_auc': 'area under the ROC curve: P(score of a patient with lesion > score of one without); ties count half',
  'patient_sensitivity': 'patients with lesion that are called positive: TP / (TP + FN)',
  'patient_specificity': 'patients without lesion that are called negative: TN / (TN + FP)',
  'patient_ppv': 'positive predictive value of patients: TP / (TP + FP)',
  'patient_npv': 'negative predictive value of patients: TN / (TN + FN)',
}

# What the report and the model card call each number.
LABELS = {
  'accuracy': 'Accuracy',
  'precision': 'Precision (PPV)',
  'recall': 'Recall (sensitivity)',
  'f1': 'F1',
  'auc': 'AUC',
  'specificity': 'Specificity',
  'npv': 'NPV',
  'dice': 'Dice, pooled',
  'dice_macro': 'Dice, lesion and background',
  'dice_per_patient': 'Dice per patient',
  'dice_lesion_slices': 'Dice per slice with lesion',
  'dice_slices': 'Dice per slice',
  'dice_slices_empty_is_1': 'Dice per slice, empty slices as 1',
  'brier': 'Brier score',
  'ece': 'Expected calibration error',
  'sensitivity': 'Sensitivity',
  'ppv': 'PPV',
  'mean_of_highest': 'Mean of the highest slices',
  'noisy_or': 'Noisy-or of the slices',
  'maximum': 'Highest slice',
  'lesion_ml': 'Lesion volume, mL',
  'lung_share': 'Share of the lungs',
  'patient_auc': 'AUC',
  'patient_sensitivity': 'Sensitivity',
  'patient_specificity': 'Specificity',
  'patient_ppv': 'PPV',
  'patient_npv': 'NPV',
}


@dataclasses.dataclass(frozen=True)
class Patients:
  """A table of slices, summed per patient: per person, not per scan.

  Attributes:
    owners: the persons [P], in the table's order.
    names: what tables and charts call each [P]: the name of the scan, or of the person if there are several scans.
    num_scans: the number of scans of each person, int [P].
    sums: [P, ...] by name; `by_patient` explains each.
    wins: [P, P], number of pairs of a slice with lesion of patient i and a slice without lesion of patient j. The first
      must have the higher score; ties count half.
  """

  owners: list[str]
  names: list[str]
  num_scans: np.ndarray
  sums: dict[str, np.ndarray]
  wins: np.ndarray

  def __len__(self) -> int:
    return len(self.owners)

  def statistic(self, definition: Callable[[dict], dict]) -> statistics.Statistic:
    """Turns a definition below into a function of how often each patient was drawn."""

    def weighted(weights):
      totals = {name: np.tensordot(weights, values, 1) for name, values in self.sums.items()}
      return definition(totals | {'wins': np.sum((weights @ self.wins) * weights, axis=1)})

    return weighted

  def intervals(self, definition: Callable[[dict], dict]) -> dict[str, list[float] | None]:
    """The 95% interval of each value of a definition below."""
    bounds = statistics.intervals(self.statistic(definition), len(self))
    for name in MEANS.keys() & bounds.keys():
      scores, is_defined = (self.sums[key] for key in MEANS[name])
      bounds[name] = statistics.mean_interval(scores[is_defined > 0], (0, 1))
    return bounds


def by_patient(table: dict[str, np.ndarray], suffix: str = '') -> Patients:
  """Sums a table of slices (scorer.Scorer) per patient.

  Args:
    table: the columns patient (the scan), owner (the person), label, logit, those of COUNTS, reliability and
      squared_error.
    suffix: ending of the count columns: '' at threshold 0.5, '_chosen' at the operating point.
  """
  owners, patient = _in_order(table['owner'])
  scans, first = np.unique(np.asarray(table['patient']), return_index=True)
  num_scans = np.bincount(patient[first], minlength=len(owners))
  scan_of = dict(zip(patient[first].tolist(), scans.tolist(), strict=True))
  names = [scan_of[k] if num_scans[k] == 1 else owner for k, owner in enumerate(owners)]
  n = {key: np.asarray(table[f'{key}{suffix}'], np.int64) for key in COUNTS}
  label, marked = np.asarray(table['label']) > 0, n['tp'] + n['fp'] > 0
  slice_dice = dice(n['tp'], n['fp'], n['fn'])
  is_defined = np.isfinite(slice_dice)

  grouped = np.argsort(patient, kind='stable')
  starts = np.searchsorted(patient[grouped], np.arange(len(owners)))
  add = lambda values: np.add.reduceat(np.asarray(values, np.float64)[grouped], starts)

  sums = {key: add(n[key]) for key in COUNTS} | {
    # number of slices: all, with a lesion, and per outcome; a slice with any marked pixel is called positive
    'slices': add(np.ones(len(label))),
    'positives': add(label),
    'slice_tp': add(label & marked),
    'slice_fp': add(~label & marked),
    'slice_fn': add(label & ~marked),
    'slice_tn': add(~label & ~marked),
    # Dice per slice: sum and number of slices where it is defined; sum and number of slices with lesion pixels
    'slice_dice': add(np.where(is_defined, slice_dice, 0)),
    'slice_dice_defined': add(is_defined),
    'lesion_dice': add(np.where(n['tp'] + n['fn'] > 0, slice_dice, 0)),
    'lesion_slices': add(n['tp'] + n['fn'] > 0),
    # calibration
    'reliability': add(table['reliability']),
    'squared_error': add(table['squared_error']),
  }
  patient_dice = dice(sums['tp'], sums['fp'], sums['fn'])
  sums['patient_dice'] = np.where(np.isfinite(patient_dice), patient_dice, 0)
  sums['patient_dice_defined'] = np.isfinite(patient_dice).astype(float)
  wins = _wins(label, np.asarray(table['logit'], np.float64), patient, len(owners))
  return Patients(owners, names, num_scans, sums, wins)


def _in_order(patients):
  """Names in the order of their first rows, and per row the index of its name."""
  names, first, row = np.unique(np.asarray(patients), return_index=True, return_inverse=True)
  order = np.argsort(first)
  return names[order].tolist(), np.argsort(order)[row]


def _wins(label, score, patient, count):
  """See Patients.wins.

  The slices with lesion are visited in the order of their scores, with the number of slices without lesion below, per
  patient. A search per pair of patients would take minutes for thousands of patients.
  """
  wins, below = np.zeros((count, count)), np.zeros(count)
  order = np.argsort(score, kind='stable')
  without, with_lesion = order[~label[order]], order[label[order]]
  of_without = patient[without]
  first = np.searchsorted(score[without], score[with_lesion], 'left').tolist()
  last = np.searchsorted(score[without], score[with_lesion], 'right').tolist()
  owners, seen = patient[with_lesion].tolist(), 0
  for owner, start, end in zip(owners, first, last, strict=True):
    if start > seen:
      np.add.at(below, of_without[seen:start], 1)
      seen = start
    wins[owner] += below
    if end > start:  # equal scores count half
      np.add.at(wins[owner], of_without[start:end], 0.5)
  return wins


def dice(tp: np.ndarray, fp: np.ndarray, fn: np.ndarray) -> np.ndarray:
  """Dice: 2 TP / (2 TP + FP + FN). With neither lesion nor prediction it is undefined, not 1: nothing was measured."""
  return ratio(2 * np.asarray(tp), 2 * np.asarray(tp) + fp + fn)


def classification(totals: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Metrics of slices: the columns of Table I, specificity, NPV, calibration. Recall is sensitivity, precision PPV."""
  tp, fp, fn, tn = (totals[key] for key in COUNTS)
  return {
    'accuracy': ratio(tp + tn, tp + fp + fn + tn),
    'precision': ratio(tp, tp + fp),
    'recall': ratio(tp, tp + fn),
    'f1': dice(tp, fp, fn),
    'auc': auc(totals),
    'specificity': ratio(tn, tn + fp),
    'npv': ratio(tn, tn + fn),
    **calibration(totals),
  }


def segmentation(totals: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Metrics of pixels: the columns of Table II, all variants of Dice (see docs/evaluation.md), and calibration."""
  tp, fp, fn, tn = (totals[key] for key in COUNTS)
  empty = totals['slices'] - totals['slice_dice_defined']  # neither lesion nor prediction
  return {
    'dice': dice(tp, fp, fn),
    'dice_macro': (dice(tp, fp, fn) + dice(tn, fn, fp)) / 2,
    'dice_per_patient': ratio(totals['patient_dice'], totals['patient_dice_defined']),
    'dice_lesion_slices': ratio(totals['lesion_dice'], totals['lesion_slices']),
    'dice_slices': ratio(totals['slice_dice'], totals['slice_dice_defined']),
    'dice_slices_empty_is_1': ratio(totals['slice_dice'] + empty, totals['slices']),
    'precision': ratio(tp, tp + fp),
    'recall': ratio(tp, tp + fn),
    'specificity': ratio(tn, tn + fp),
    'npv': ratio(tn, tn + fn),
    **calibration(totals),
  }


def detection(totals: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Detection of slices with a lesion. A segmenter calls a slice positive if it marks any pixel.

  AUC uses the highest logit of each slice. PPV and NPV are at the prevalence of the test set.
  """
  tp, fp, fn, tn = (totals[f'slice_{key}'] for key in COUNTS)
  return {
    'sensitivity': ratio(tp, tp + fn),
    'specificity': ratio(tn, tn + fp),
    'ppv': ratio(tp, tp + fp),
    'npv': ratio(tn, tn + fn),
    'auc': auc(totals),
  }


def detection_at(totals: dict[str, np.ndarray], prevalence: float) -> dict[str, np.ndarray]:
  """PPV and NPV of `detection` at another prevalence of slices with a lesion, by Bayes' rule."""
  at_test = detection(totals)
  sensitivity, specificity = at_test['sensitivity'], at_test['specificity']
  true, false = sensitivity * prevalence, (1 - specificity) * (1 - prevalence)
  missed, rest = (1 - sensitivity) * prevalence, specificity * (1 - prevalence)
  return {'ppv': ratio(true, true + false), 'npv': ratio(rest, rest + missed)}


def calibration(totals: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Brier score, and expected calibration error (ECE) over 20 bins of equal width in probability.

  Brier score: mean of (probability - truth)^2. ECE: mean of |lesion fraction - mean probability| over bins, weighted by
  their number of pixels or slices. It is equation 3 of Guo et al. 2017, for the probability of lesion.
  """
  count, positive, probability = np.moveaxis(totals['reliability'], -2, 0)
  total = count.sum(axis=-1)
  return {
    'brier': ratio(totals['squared_error'], total),
    'ece': ratio(np.abs(positive - probability).sum(axis=-1), total),
  }


def auc(totals: dict[str, np.ndarray]) -> np.ndarray:
  """Area under the ROC curve of slices: the fraction of (lesion, no lesion) pairs in order; ties count half."""
  return ratio(totals['wins'], totals['positives'] * (totals['slices'] - totals['positives']))


def patient_rows(patients: Patients) -> list[dict]:
  """One row per patient: number of slices, counts, and their Dice (= F1), precision and recall."""
  sums = patients.sums
  tp, fp, fn, tn = (sums[key].astype(np.int64) for key in COUNTS)
  columns = {
    'patient': patients.names,
    'num_slices': sums['slices'].astype(np.int64),
    **dict(zip(COUNTS, (tp, fp, fn, tn), strict=True)),
    'dice': dice(tp, fp, fn),
    'precision': ratio(tp, tp + fp),
    'recall': ratio(tp, tp + fn),
  }
  return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def roc(label: np.ndarray, score: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """The ROC curve of boolean labels [N] and scores [N]: false and true positive rates, from (0, 0) to (1, 1).

  There is one point per distinct score, so tied slices are added together. Both labels must occur.
  """
  order = np.argsort(-np.asarray(score), kind='stable')
  label, score = np.asarray(label, bool)[order], np.asarray(score)[order]
  last_of_its_score = np.append(np.flatnonzero(np.diff(score)), len(score) - 1)
  true, false = np.cumsum(label)[last_of_its_score], np.cumsum(~label)[last_of_its_score]
  return np.append(0, false / false[-1]), np.append(0, true / true[-1])
