"""What a number is worth: intervals and differences over patients. The only place that resamples.

Patients are drawn, never slices or pixels: those of one patient resemble each other, and an interval that took them for
independent would be far too narrow. A statistic is a function of how often each patient was drawn; what it cannot
define is NaN there, and None in what is given out.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
from scipy import stats

LEVEL, RESAMPLES, SEED = 0.95, 2000, 0
PERMUTATIONS = 9999
# Where more of the draws leave a number undefined, it rests on too few of the patients to have an interval.
_MOST_UNDEFINED = 0.05
_CHUNK = 250  # draws at a time, for a small memory

# Weights [draws, patients] -> values [draws] by name.
Statistic = Callable[[np.ndarray], dict[str, np.ndarray]]


def method() -> dict:
  """What metrics.json says of its intervals."""
  return {
    'level': LEVEL,
    'method': 'bootstrap over patients, expanded percentiles',
    'resamples': RESAMPLES,
    'seed': SEED,
    'unit': 'patient',
  }


def estimates(statistic: Statistic, patients: int) -> dict[str, float | None]:
  """The statistic of the patients as they are, each once."""
  return {name: defined(values[0]) for name, values in statistic(np.ones((1, patients))).items()}


def intervals(statistic: Statistic, patients: int) -> dict[str, list[float] | None]:
  """95% intervals [low, high] of each value of a statistic, by drawing patients with replacement.

  None with fewer than two patients, and where the value is undefined or is so in more than 5% of the draws.

  The percentiles are wider than 2.5% and 97.5%, by what the t distribution has over the normal with so few patients
  (T. Hesterberg, "What Teachers Should Know About the Bootstrap", 2015, section 4.3.1, "expanded percentile"). BCa, the
  usual refinement, covers worse than plain percentiles where volumes are as skewed as those of lesions
  (docs/evaluation.md has the simulation).
  """
  whole = statistic(np.ones((1, patients)))
  if patients < 2:
    return dict.fromkeys(whole)
  rng, drawn = np.random.default_rng(SEED), []
  for start in range(0, RESAMPLES, _CHUNK):
    weights = rng.multinomial(patients, np.full(patients, 1 / patients), size=min(_CHUNK, RESAMPLES - start))
    drawn.append(statistic(weights.astype(np.float64)))
  tail = expanded_tail(patients)
  found = {}
  for name, value in whole.items():
    values = np.concatenate([part[name] for part in drawn])
    is_defined = np.isfinite(values)
    enough = np.isfinite(value[0]) and 1 - is_defined.mean() <= _MOST_UNDEFINED
    found[name] = [float(v) for v in np.quantile(values[is_defined], [tail, 1 - tail])] if enough else None
  return found


def expanded_tail(patients: int) -> float:
  """The share of the bootstrap's distribution that lies below a 95% interval of so many patients."""
  t = stats.t.ppf((1 - LEVEL) / 2, patients - 1)
  return float(stats.norm.cdf(math.sqrt(patients / (patients - 1)) * t))


def difference(first: Statistic, second: Statistic) -> Statistic:
  """first - second of the same patients, value by value, under the same draws."""

  def subtract(weights):
    one, other = first(weights), second(weights)
    return {name: one[name] - other[name] for name in one}

  return subtract


def average(each: Sequence[Statistic]) -> Statistic:
  """The mean of several statistics of the same patients, value by value, under the same draws; NaN where one is."""

  def mean_of(weights):
    values = [one(weights) for one in each]
    return {name: np.mean([one[name] for one in values], axis=0) for name in values[0]}

  return mean_of


def sign_flip_p(differences: np.ndarray) -> float | None:
  """The two-sided p-value of paired differences [patients], had each been as likely with the other sign.

  Exact for up to 13 patients, else of 9999 random flips. NaN (undefined pairs) are left out; None without two others.
  """
  differences = np.asarray(differences, np.float64)
  differences = differences[np.isfinite(differences)]
  if len(differences) < 2:
    return None
  if not differences.any():
    return 1.0
  mean = lambda one, other, axis: np.mean(one - other, axis=axis)
  result = stats.permutation_test(
    (differences, np.zeros_like(differences)),
    mean,
    permutation_type='samples',
    vectorized=True,
    n_resamples=PERMUTATIONS,
    batch=1000,
    rng=SEED,
  )
  return float(result.pvalue)


def mean(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
  """The mean of values [patients], NaN left out, for each row of weights [draws, patients]."""
  is_defined = np.isfinite(values)
  return ratio(weights @ np.where(is_defined, values, 0), weights @ is_defined.astype(np.float64))


def median(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
  """As `mean`, the median; weights are whole numbers."""
  is_defined = np.isfinite(values)
  if not is_defined.any():
    return np.full(len(weights), np.nan)
  order = np.argsort(values[is_defined])
  ordered = values[is_defined][order]
  reached = np.cumsum(weights[:, is_defined][:, order], axis=1)
  count = reached[:, -1:]
  # The value at which half of the patients are reached, and the one at which the next patient is: equal or neighbours.
  lower, upper = (np.argmax(reached >= at, axis=1) for at in ((count + 1) // 2, count // 2 + 1))
  return np.where(count[:, 0] > 0, (ordered[lower] + ordered[upper]) / 2, np.nan)


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
  """numerator / denominator; NaN where that is 0 / 0 or x / 0."""
  numerator, denominator = np.broadcast_arrays(np.asarray(numerator, np.float64), np.asarray(denominator, np.float64))
  return np.divide(numerator, denominator, out=np.full(numerator.shape, np.nan), where=denominator != 0)


def defined(value: float) -> float | None:
  """A number for JSON: None where it is undefined."""
  return float(value) if np.isfinite(value) else None


def shown(value: float | None, interval: list[float] | None = None, digits: int = 4) -> str:
  """A number for people, with its interval."""
  if value is None:
    return 'undefined'
  return f'{value:.{digits}f}' + (' [{:.{d}f}, {:.{d}f}]'.format(*interval, d=digits) if interval else '')
