"""Exclusive classes: each slice, or patient, has one of K classes, and is called the one of the highest probability.

The numbers follow from the tables of slices of all classes (`training.scorer`), which have the same rows. The logit of
a class is the log-odds of its softmax probability, so the highest logit has the highest probability.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np
from scipy import special

from fusa_jax.measures import metrics, patients, statistics
from fusa_jax.measures.statistics import ratio

# The definition of each number. It is undefined if a class that it needs does not occur, never a mean over the others.
DEFINITIONS = {
  'accuracy': 'share of the slices (or patients) of which the class with the highest probability is the true class',
  'balanced_accuracy': 'mean over the classes of the recall, at the class with the highest probability',
  'macro_precision': 'mean over the classes of the precision, at the class with the highest probability',
  'macro_f1': 'mean over the classes of F1, at the class with the highest probability',
  'weighted_f1': 'as macro_f1, but each class weighs by its number of slices (or patients)',
  'macro_auc': 'mean over the classes of the AUC of the class against all others',
}
LABELS = {
  'accuracy': 'Accuracy',
  'balanced_accuracy': 'Balanced accuracy',
  'macro_precision': 'Precision, mean of classes',
  'macro_f1': 'F1, mean of classes',
  'weighted_f1': 'F1, weighted by size of class',
  'macro_auc': 'AUC, mean of classes',
}
# Names of numbers of one class, and the number of all classes that stands in their place.
IN_PLACE_OF_MEANS = {
  'accuracy': 'accuracy',
  'recall': 'balanced_accuracy',
  'precision': 'macro_precision',
  'f1': 'macro_f1',
}
# The numbers of each class at the class with the highest probability.
OF_CLASS = ('precision', 'recall', 'f1')


@dataclasses.dataclass(frozen=True)
class Calls:
  """The true and the called classes of the slices of each patient (person).

  Attributes:
    classes: the names of the classes [K].
    confusion: [P, K, K], the number of slices of each patient by true class and called class.
    of_classes: for each class, its table summed per patient, for the AUC.
  """

  classes: tuple[str, ...]
  confusion: np.ndarray
  of_classes: tuple[metrics.Patients, ...]

  def __len__(self) -> int:
    return len(self.confusion)

  def accuracy(self) -> np.ndarray:
    """Returns the share of the slices of each patient [P] that are called rightly."""
    return np.trace(self.confusion, axis1=1, axis2=2) / self.confusion.sum(axis=(1, 2))

  def statistic(self, weights: np.ndarray) -> dict[str, np.ndarray]:
    """The numbers of DEFINITIONS, and OF_CLASS as 'precision NUMBER' and so on, for weights [draws, P] of patients.

    It is a `statistics.Statistic`. With one row per patient in place of slices, the numbers are those of patients.
    """
    matrix = np.tensordot(weights, self.confusion, 1)
    right = np.moveaxis(np.diagonal(matrix, axis1=-2, axis2=-1), -1, 0)
    true, called = (np.moveaxis(matrix.sum(axis=axis), -1, 0) for axis in (-1, -2))
    total = true.sum(axis=0)
    f1 = ratio(2 * right, true + called)
    weighted = np.where(true > 0, f1 * true, 0).sum(axis=0)
    area = lambda totals: {'auc': metrics.auc(totals)}
    areas = [one.statistic(area)(weights)['auc'] for one in self.of_classes]
    values = {
      'accuracy': ratio(right.sum(axis=0), total),
      'balanced_accuracy': ratio(right, true).mean(axis=0),
      'macro_precision': ratio(right, called).mean(axis=0),
      'macro_f1': f1.mean(axis=0),
      'weighted_f1': ratio(weighted, total),
      'macro_auc': np.mean(areas, axis=0),
    }
    of_class = {'precision': ratio(right, called), 'recall': ratio(right, true), 'f1': f1}
    return values | {f'{name} {k}': of_class[name][k] for name in OF_CLASS for k in range(len(self.classes))}


def calls(tables: Mapping[str, Mapping[str, np.ndarray]]) -> Calls:
  """Returns the calls of the slices of some tables.

  Args:
    tables: the table of each class, by name. All have the same slices in the same order, and the columns that
      `metrics.by_patient` needs. Each slice has the label 1 in one of them.
  """
  label, logit = (np.stack([np.asarray(table[key]) for table in tables.values()]) for key in ('label', 'logit'))
  assert (label.astype(bool).sum(axis=0) == 1).all(), 'a slice has no class, or several'
  of_classes = tuple(metrics.by_patient(dict(table)) for table in tables.values())
  number = {owner: row for row, owner in enumerate(of_classes[0].owners)}
  rows = np.array([number[owner] for owner in np.asarray(next(iter(tables.values()))['owner']).tolist()])
  confusion = np.zeros((len(number), len(tables), len(tables)))
  np.add.at(confusion, (rows, label.argmax(axis=0), logit.argmax(axis=0)), 1)
  return Calls(tuple(tables), confusion, of_classes)


def numbers(tables: Mapping[str, Mapping[str, np.ndarray]]) -> dict:
  """The numbers of exclusive classes for metrics.json, with intervals over patients.

  Args:
    tables: as `calls`; those of `of_patients` give the numbers of patients.

  Returns:
    classes: the names, in the order of rows and columns of `confusion`.
    confusion: counts by true class (row) and called class (column).
    the numbers of DEFINITIONS; None where undefined.
    of_classes: for each class by name, OF_CLASS, `count` (how many have it), and `intervals` of OF_CLASS.
    intervals: [low, high] of the numbers of DEFINITIONS; None where there is none.
  """
  found = calls(tables)
  values = statistics.estimates(found.statistic, len(found))
  bounds = statistics.intervals(found.statistic, len(found))
  confusion = found.confusion.sum(axis=0).astype(np.int64)
  of_classes = {
    name: {
      'count': int(confusion[k].sum()),
      **{key: values[f'{key} {k}'] for key in OF_CLASS},
      'intervals': {key: bounds[f'{key} {k}'] for key in OF_CLASS},
    }
    for k, name in enumerate(found.classes)
  }
  return {
    'classes': list(found.classes),
    'confusion': confusion.tolist(),
    **{name: values[name] for name in DEFINITIONS},
    'of_classes': of_classes,
    'intervals': {name: bounds[name] for name in DEFINITIONS},
  }


def of_patients(tables: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, dict[str, np.ndarray]] | None:
  """Returns a table of each class with one row per patient (person), for `numbers`.

  The probability of a class is its mean over all slices of the patient; `logit` is its log-odds, and `score` the
  probability. The patient is called the class with the highest mean.

  Returns:
    None if the slices of a patient have several classes: then it is not known which the patient has.
  """
  owner = np.asarray(next(iter(tables.values()))['owner'])
  owners, start, row, slices = np.unique(owner, return_index=True, return_inverse=True, return_counts=True)
  in_order, grouped = np.argsort(start), np.argsort(row, kind='stable')  # the first as in the table
  ends, nothing, found = np.cumsum(slices)[:-1], np.zeros(len(owners)), {}
  for name, table in tables.items():
    with_class = np.bincount(row, np.asarray(table['label']) > 0)
    if ((with_class > 0) & (with_class < slices)).any():
      return None
    of_owners = np.split(np.asarray(table['logit'], np.float64)[grouped], ends)
    logit = np.array([patients.mean_logit(logits) for logits in of_owners])
    columns = {'patient': owners, 'owner': owners, 'label': (with_class > 0).astype(np.int64), 'logit': logit}
    columns |= {'score': special.expit(logit), 'reliability': nothing, 'squared_error': nothing}
    columns |= dict.fromkeys(metrics.COUNTS, nothing)  # `metrics.by_patient` needs them; there is no threshold
    found[name] = {key: values[in_order] for key, values in columns.items()}
  return found
