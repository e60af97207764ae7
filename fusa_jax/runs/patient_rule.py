"""The rule that turns the scores of slices, or a mask, into one score and one call per patient.

It is chosen on the validation patients of a run, and belongs to the run's operating point.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import special

from fusa_jax.measures import metrics, patients
from fusa_jax.measures.statistics import defined, ratio

# The highest threshold of a score of slices, as log-odds. Predictions have float32 probabilities, which cannot tell
# log-odds above 17 apart.
_MOST = 16.0


@dataclasses.dataclass(frozen=True)
class PatientRule:
  """How the score of a patient is computed, and from which score on the patient is called positive.

  Attributes:
    score_name: one of patients.OF_SLICES or patients.OF_MASKS.
    highest: how many slices `mean_of_highest` averages, one of patients.HIGHEST.
    threshold: the lowest score of a positive patient: a probability, mL, or a share of the lungs. None without a call.
    chosen_by: how `highest` and `threshold` were chosen, or why they were not, in words.
    validation: on the validation patients: their number, how many have a lesion, the AUC for each `highest`, and
      sensitivity and specificity at the threshold.
  """

  score_name: str
  highest: float = patients.HIGHEST[0]
  threshold: float | None = None
  chosen_by: str = 'not chosen: no validation patients'
  validation: dict = dataclasses.field(default_factory=dict)

  def about(self) -> dict:
    """Returns the attributes that every JSON file repeats."""
    return {name: getattr(self, name) for name in ('score_name', 'highest', 'threshold', 'chosen_by')}

  def without_call(self, why: str) -> 'PatientRule':
    return dataclasses.replace(self, threshold=None, chosen_by=f'not chosen: {why}')

  def positive(self, score: np.ndarray) -> np.ndarray | None:
    """Whether each of these scores (log-odds for a score of slices) is called positive; None without a threshold."""
    return None if self.threshold is None else patients.shown(self.score_name, score) >= self.threshold

  def answer(self, probability: np.ndarray, of_mask: float | None = None) -> dict:
    """Returns the score and the call of a scan, for NAME.json.

    Args:
      probability: the highest probability of each slice [S], in the network's size.
      of_mask: the score of the mask, if the rule uses one; NaN if it is undefined.
    """
    if self.score_name in patients.OF_MASKS:
      score = np.nan if of_mask is None else of_mask
    else:
      # The ends are those of float32: a probability that rounds to 0 or 1 still has finite log-odds.
      logits = special.logit(np.clip(np.asarray(probability, np.float64), 1e-45, 1 - 2.0**-25))
      score = patients.of_slices(logits, self.highest)[self.score_name]
    reason = None
    if not np.isfinite(score):
      reason = 'the score is undefined: no lungs were found'
    elif self.threshold is None:
      reason = self.chosen_by
    return {
      'score': defined(patients.shown(self.score_name, score)),
      'positive': None if reason else bool(self.positive(score)),
      'reason': reason,
      **self.about(),
    }


def no_answer(why: str) -> dict:
  """Returns what NAME.json holds in place of `PatientRule.answer`."""
  return {'score': None, 'positive': None, 'reason': why}


def choose(
  slices: Mapping[str, np.ndarray],
  score_name: str,
  target_sensitivity: float | None = None,
  of_masks: Mapping[str, Mapping[str, float]] | None = None,
) -> PatientRule:
  """Chooses the rule on validation patients.

  `highest` has the highest AUC of `mean_of_highest`; among equals, the first of patients.HIGHEST. The threshold lies
  half way between two neighbouring scores of patients, as log-odds for scores of slices, or is the lowest score. It has
  the best F1; among equals, the lowest is chosen, so that fewer patients are missed.

  A score of masks has a threshold above 0, so that an empty mask is never called positive. If all masks are empty,
  there is no threshold.

  Args:
    slices: the table of slices of the validation fold.
    score_name: the score that the call uses.
    target_sensitivity: choose the highest threshold with at least this sensitivity, over patients; if none has it
      because masks of patients with lesion are empty, the highest one with the best sensitivity. None: the best F1.
    of_masks: as in `patients.table_of`.
  """
  tables = {highest: patients.table_of(slices, highest, of_masks) for highest in patients.HIGHEST}
  label = tables[patients.HIGHEST[0]]['label']
  validation = {'patients': len(label), 'with_lesion': int(label.sum())}
  if label.all() or not label.any():
    which = 'all validation patients have a lesion' if label.any() else 'no validation patient has a lesion'
    return PatientRule(score_name, chosen_by=f'not chosen: {which}', validation=validation)
  areas = {highest: _auc(label, table['mean_of_highest']) for highest, table in tables.items()}
  highest = max(areas, key=areas.get)  # the first of equals
  validation['auc_of_highest'] = [{'highest': key, 'auc': area} for key, area in areas.items()]
  score = tables[highest][score_name]
  known = np.isfinite(score)
  if len(set(label[known].tolist())) < 2:
    rule = PatientRule(score_name, highest, validation=validation)
    return rule.without_call('too few validation patients have a defined score')
  levels, label, score = np.unique(score[known]), label[known] > 0, score[known]
  candidates = np.append(levels[0], (levels[:-1] + levels[1:]) / 2)
  if score_name in patients.OF_SLICES:
    candidates = np.unique(np.minimum(candidates, _MOST))
  else:
    candidates = candidates[candidates > 0]
    if not len(candidates):
      rule = PatientRule(score_name, highest, validation=validation)
      return rule.without_call('the masks of all validation patients are empty')
  called = score >= candidates[:, None]
  tp, fp = (called & label).sum(axis=1), (called & ~label).sum(axis=1)
  sensitivity = ratio(tp, label.sum())
  if target_sensitivity is None:
    chosen = int(np.argmax(metrics.dice(tp, fp, label.sum() - tp)))
    how = 'best F1 of the validation patients'
  else:
    reached = min(target_sensitivity, sensitivity.max())
    chosen = int(np.flatnonzero(sensitivity >= reached)[-1])
    how = f'sensitivity of at least {target_sensitivity:g} over the validation patients'
    if reached < target_sensitivity:
      how = f'best sensitivity over the validation patients; {target_sensitivity:g} would need calls of empty masks'
  validation |= {
    'auc': _auc(label, score),
    'sensitivity': defined(sensitivity[chosen]),
    'specificity': defined(1 - ratio(fp[chosen], (~label).sum())),
  }
  threshold = float(patients.shown(score_name, candidates[chosen]))
  return PatientRule(score_name, highest, threshold, how, validation)


def _auc(label, score):
  return patients.estimate(patients.counted(label, score), patients.auc)['auc']


def mean(rules: Sequence[PatientRule | None]) -> PatientRule | None:
  """Returns the rule for the mean probabilities of several runs; None if a run has none.

  `highest` is the most frequent one of the runs, among equals the first of patients.HIGHEST; the threshold is the mean
  of theirs. This is an approximation: it cannot be chosen on data, because the validation patients of one fold are
  training patients of other folds.
  """
  if None in rules:
    return None
  names = {rule.score_name for rule in rules}
  if len(names) > 1:
    why = f'the runs have different scores of patients ({", ".join(sorted(names))})'
    return PatientRule('mean_of_highest').without_call(why)
  highest = max(patients.HIGHEST, key=[rule.highest for rule in rules].count)
  thresholds = [rule.threshold for rule in rules]
  if None in thresholds:
    return PatientRule(*names, highest).without_call(f'{thresholds.count(None)} of {len(rules)} runs have no threshold')
  return PatientRule(*names, highest, float(np.mean(thresholds)), f'mean of {len(rules)} runs')
