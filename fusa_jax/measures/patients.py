"""From slices to patients: the score of each patient, and metrics of a table with one row per patient. NumPy and SciPy.

A score of slices is a probability. It is computed and ranked as log-odds, because probabilities near 0 and 1 round to
the same number. The score of a patient with several scans is the highest score of these scans.
"""

from collections.abc import Callable, Mapping

import numpy as np
from scipy import special

from fusa_jax.measures import metrics, statistics

# Scores of the slices of a scan, and scores of its mask. metrics.DEFINITIONS defines each.
OF_SLICES = ('mean_of_highest', 'noisy_or', 'maximum')
OF_MASKS = ('lesion_ml', 'lung_share')
# How many slices `mean_of_highest` averages: a number of slices or, below 1, a share of them. Slices of one cohort may
# be 1 to 8 mm thick, and then the same number means another length. The order is that of preference: the first is the
# default, and the choice among equally good ones. Three slices cannot all be one artefact, and small lesions have them.
HIGHEST = (3, 5, 1, 10, 0.1)


def mean_of_highest(logits: np.ndarray, highest: float) -> float:
  """The log-odds of the mean of the highest probabilities.

  Args:
    logits: of the slices of a scan [S].
    highest: as in HIGHEST. A share of the slices is rounded up; a scan with fewer slices uses all of them.
  """
  count = int(np.ceil(highest * len(logits))) if highest < 1 else int(highest)
  return mean_logit(np.sort(np.asarray(logits, np.float64))[::-1][:count])


def mean_logit(logits: np.ndarray) -> float:
  """The log-odds of the mean of probabilities, for their logits [S]; exact where these round to 0 or 1."""
  positive, negative = (special.logsumexp(special.log_expit(sign * logits)) for sign in (1, -1))
  return float(positive - negative)


def noisy_or(logits: np.ndarray) -> float:
  """The log-odds of 1 - prod(1 - p) over the slices of a scan, for their logits [S].

  With q = -log prod(1 - p) = sum log(1 + exp(logit)), the odds are exp(q) - 1. Their logarithm is q + log(1 - exp(-q)),
  which does not overflow for large q. For q below float64's range it is the logarithm of q, which is sum exp(logit).
  """
  logits = np.asarray(logits, np.float64)
  q = float(np.logaddexp(0, logits).sum())
  return float(q + np.log(-np.expm1(-q)) if q > 1e-300 else special.logsumexp(logits))


def of_slices(logits: np.ndarray, highest: float) -> dict[str, float]:
  """The scores OF_SLICES of a scan as log-odds, for the logits of its slices [S]."""
  logits = np.asarray(logits, np.float64)
  scores = mean_of_highest(logits, highest), noisy_or(logits), float(logits.max())
  return dict(zip(OF_SLICES, scores, strict=True))


def shown(name: str, score: np.ndarray) -> np.ndarray:
  """A score as it is written and compared with a threshold: the probability for log-odds, else the score itself."""
  return special.expit(score) if name in OF_SLICES else np.asarray(score, np.float64)


def table_of(
  slices: Mapping[str, np.ndarray], highest: float, of_masks: Mapping[str, Mapping[str, float]] | None = None
) -> dict[str, np.ndarray]:
  """Makes a table with one row per patient (person) from a table of slices.

  Args:
    slices: the columns patient (the scan), owner (the person), label and logit of a table of slices.
    highest: as in HIGHEST.
    of_masks: for each score of masks that is known, its value per scan. A patient with a scan that is not in it, or
      with an undefined value, has the score NaN.

  Returns:
    owner: the persons [P], in the table's order.
    label: int [P], 1 if any slice has a lesion.
    the scores [P] by name; those of slices as log-odds.
  """
  scan, owner = (np.asarray(slices[key]) for key in ('patient', 'owner'))
  _, start, counts = np.unique(scan, return_index=True, return_counts=True)
  order, logit = np.argsort(scan, kind='stable'), np.asarray(slices['logit'], np.float64)
  scores = [of_slices(logit[rows], highest) for rows in np.split(order, np.cumsum(counts)[:-1])]
  columns = {name: np.array([one[name] for one in scores]) for name in OF_SLICES}
  for name, values in (of_masks or {}).items():
    columns[name] = np.array([values.get(one, np.nan) for one in scan[start].tolist()], np.float64)
  owners, first, person = np.unique(owner, return_index=True, return_inverse=True)
  in_order = np.argsort(first)
  person_of_scan, label = person[start], np.zeros(len(owners), np.int64)
  np.maximum.at(label, person, (np.asarray(slices['label']) > 0).astype(np.int64))
  table = {'owner': owners[in_order], 'label': label[in_order]}
  for name, values in columns.items():
    best = np.full(len(owners), -np.inf)
    with np.errstate(invalid='ignore'):  # NaN stays NaN
      np.maximum.at(best, person_of_scan, values)
    table[name] = best[in_order]
  return table


def counted(label: np.ndarray, score: np.ndarray, positive: np.ndarray | None = None) -> metrics.Patients:
  """The sums that `metrics.detection` needs, from one row per patient in place of one per slice.

  Args:
    label: [P], 1 with lesion, 0 without.
    score: [P], ranks the patients.
    positive: bool [P], the patients that are called positive; None if there is no call.
  """
  label = np.asarray(label) > 0
  called = np.zeros(len(label), bool) if positive is None else np.asarray(positive, bool)
  names, nothing = np.arange(len(label)).astype(str), np.zeros(len(label))
  counts = {'tp': label & called, 'fp': ~label & called, 'fn': label & ~called, 'tn': ~label & ~called}
  columns = {'patient': names, 'owner': names, 'label': label, 'logit': score, **counts}
  return metrics.by_patient(columns | {'reliability': nothing, 'squared_error': nothing})


def with_call(table: Mapping[str, np.ndarray], score_name: str, positive: np.ndarray | None) -> dict[str, np.ndarray]:
  """Adds the score that the call uses, as `score`, and the call, as `positive`: 1 or 0, NaN if there is none.

  Args:
    table: as `table_of` makes it.
    score_name: the score; if the table lacks it, `score` is NaN.
    positive: bool [P], or None without a call.
  """
  score = table.get(score_name, np.full(len(table['label']), np.nan))
  called = np.full(len(score), np.nan) if positive is None else np.where(np.isfinite(score), positive, np.nan)
  return {**table, 'score': score, 'positive': called}


def detection(totals: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Detection of patients with a lesion: `metrics.detection` of a table with one row per patient.

  With patients of one kind only, PPV and NPV would be 0 or 1 whatever the model does. They are undefined then.
  """
  values = metrics.detection(totals)
  both = (totals['positives'] > 0) & (totals['positives'] < totals['slices'])
  return values | {name: np.where(both, values[name], np.nan) for name in ('ppv', 'npv')}


def auc(totals: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """The AUC alone, for scores without a call."""
  return {'auc': metrics.auc(totals)}


def estimate(patients: metrics.Patients, definition: Callable[[dict], dict]) -> dict[str, float | None]:
  """The values of a definition, each patient counted once."""
  return statistics.estimates(patients.statistic(definition), len(patients))
