"""The definitions: what is added up over patients, and the numbers that follow from the sums. NumPy.

Every number of a test is a function of sums over patients (for AUC, of pairs of patients), so that the same few lines
give it for the patients as they are and for each of a thousand draws of them (statistics.py). Arrays of any leading
shape go in and come out; what is undefined is NaN, never 0 or 1, and becomes None where it is written.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from fusa_jax.measures import statistics
from fusa_jax.measures.statistics import ratio

COUNTS = ('tp', 'fp', 'fn', 'tn')

# What each number is, in a sentence; the report and docs/evaluation.md show these.
DEFINITIONS = {
  'accuracy': 'share of slices called rightly',
  'precision': 'share of what is called lesion that is lesion (positive predictive value)',
  'recall': 'share of lesion that is found (sensitivity)',
  'f1': '2 TP / (2 TP + FP + FN) of slices',
  'auc': 'share of pairs of a slice with lesion and one without whose scores are in order; ties count half',
  'specificity': 'share of what is no lesion that is not called lesion',
  'npv': 'share of what is not called lesion that is none (negative predictive value)',
  'dice': '2 TP / (2 TP + FP + FN) of the pixels of all test slices together; the checkpoint and threshold go by it',
  'dice_macro': 'mean of the pooled Dice of lesion and that of background',
  'dice_per_patient': 'mean over patients of the Dice of their pixels; patients without lesion and prediction left out',
  'dice_lesion_slices': 'mean over the slices with lesion of their Dice',
  'dice_slices': 'mean over slices of their Dice; slices without lesion and prediction left out',
  'dice_slices_empty_is_1': 'mean over all slices of their Dice, 1 where there is neither lesion nor prediction',
  'brier': 'mean of (probability - truth)^2',
  'ece': 'mean over 20 equal bins of |share of lesion - mean probability|, weighted by what lies in the bin',
  'sensitivity': 'share of the slices with lesion in which anything is marked or that are called positive',
  'ppv': 'share of the slices called positive that have a lesion',
}


@dataclasses.dataclass(frozen=True)
class Patients:
  """A table of slices, added up by patient.

  Attributes:
    names: of the patients [P], in the table's order.
    sums: [P, ...] by name; what each stands for is in `by_patient`.
    wins: [P, P], pairs of a slice with lesion of patient i and one without of patient j in which the former has the
      higher score; ties count half.
  """

  names: list[str]
  sums: dict[str, np.ndarray]
  wins: np.ndarray

  def __len__(self) -> int:
    return len(self.names)

  def statistic(self, definition: Callable[[dict], dict]) -> statistics.Statistic:
    """A definition below, as a function of how often each patient was drawn."""

    def of(weights):
      totals = {name: np.tensordot(weights, values, 1) for name, values in self.sums.items()}
      return definition(totals | {'wins': np.sum((weights @ self.wins) * weights, axis=1)})

    return of


def by_patient(table: dict[str, np.ndarray], suffix: str = '') -> Patients:
  """A table of slices (scorer.Scorer) added up by patient.

  Args:
    table: with patient, label, logit, the counts of COUNTS, reliability and squared_error.
    suffix: of the counts' columns: '' at threshold 0.5, '_chosen' at the operating point.
  """
  names, patient = _in_order(table['patient'])
  n = {key: np.asarray(table[f'{key}{suffix}'], np.int64) for key in COUNTS}
  label, marked = np.asarray(table['label']) > 0, n['tp'] + n['fp'] > 0
  slice_dice = dice(n['tp'], n['fp'], n['fn'])
  is_defined = np.isfinite(slice_dice)

  def add(values):
    out = np.zeros((len(names), *np.shape(values)[1:]))
    np.add.at(out, patient, values)
    return out

  sums = {key: add(n[key]) for key in COUNTS} | {
    # slices: all, with a lesion, and how they are called where a slice with any marked pixel is called positive
    'slices': add(np.ones(len(label))),
    'positives': add(label),
    'slice_tp': add(label & marked),
    'slice_fp': add(~label & marked),
    'slice_fn': add(label & ~marked),
    'slice_tn': add(~label & ~marked),
    # Dice of single slices, added over those where it is defined, and over those that have lesion pixels
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
  return Patients(names, sums, _wins(label, np.asarray(table['logit'], np.float64), patient, len(names)))


def _in_order(patients):
  """Names as they first occur, and for each row the place of its name."""
  found, first, row = np.unique(np.asarray(patients), return_index=True, return_inverse=True)
  order = np.argsort(first)
  return found[order].tolist(), np.argsort(order)[row]


def _wins(label, score, patient, count):
  wins = np.zeros((count, count))
  with_lesion, owner = score[label], patient[label]
  for other in range(count):
    without = np.sort(score[~label & (patient == other)])
    below = np.searchsorted(without, with_lesion, 'left') + np.searchsorted(without, with_lesion, 'right')
    wins[:, other] = np.bincount(owner, weights=below / 2, minlength=count)
  return wins


def dice(tp: np.ndarray, fp: np.ndarray, fn: np.ndarray) -> np.ndarray:
  """2 TP / (2 TP + FP + FN): undefined where there is neither lesion nor prediction (not 1: nothing was measured)."""
  return ratio(2 * np.asarray(tp), 2 * np.asarray(tp) + fp + fn)


def classification(totals: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Table I's columns, and specificity, NPV and calibration, of slices. Recall is sensitivity, precision PPV."""
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
  """Table II's columns, every reading of Dice (docs/evaluation.md says who uses which), and calibration, of pixels."""
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
  """Slices with a lesion found, by a segmenter too: a slice with any marked pixel is called positive.

  AUC is that of the highest logit in it. Predictive values are at the prevalence of the test itself.
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
  """PPV and NPV of `detection` where a share `prevalence` of slices has a lesion, by Bayes' rule."""
  found = detection(totals)
  sensitivity, specificity = found['sensitivity'], found['specificity']
  true, false = sensitivity * prevalence, (1 - specificity) * (1 - prevalence)
  missed, rest = (1 - sensitivity) * prevalence, specificity * (1 - prevalence)
  return {'ppv': ratio(true, true + false), 'npv': ratio(rest, rest + missed)}


def calibration(totals: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Brier score, and expected calibration error over 20 bins of equal width in probability.

  Brier: mean of (probability - truth)^2. ECE: |share of lesion - mean probability| of each bin, weighted by the bin's
  share of all pixels or slices (Guo et al. 2017, equation 3, for the probability of lesion).
  """
  count, positive, probability = np.moveaxis(totals['reliability'], -2, 0)
  total = count.sum(axis=-1)
  return {
    'brier': ratio(totals['squared_error'], total),
    'ece': ratio(np.abs(positive - probability).sum(axis=-1), total),
  }


def auc(totals: dict[str, np.ndarray]) -> np.ndarray:
  """Area under the ROC curve of slices: the share of pairs with and without lesion that are in order."""
  return ratio(totals['wins'], totals['positives'] * (totals['slices'] - totals['positives']))


def patient_rows(patients: Patients) -> list[dict]:
  """A row for each patient: number of slices, counts, and Dice (= F1), precision and recall of those."""
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

  One point per distinct score, so that slices that tie are admitted together. Both kinds of label must occur.
  """
  order = np.argsort(-np.asarray(score), kind='stable')
  label, score = np.asarray(label, bool)[order], np.asarray(score)[order]
  last_of_its_score = np.append(np.flatnonzero(np.diff(score)), len(score) - 1)
  true, false = np.cumsum(label)[last_of_its_score], np.cumsum(~label)[last_of_its_score]
  return np.append(0, false / false[-1]), np.append(0, true / true[-1])
