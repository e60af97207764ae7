"""Confidence intervals and paired tests over patients. Only this module resamples.

It draws patients, never slices or pixels. Slices of one patient resemble each other: intervals that treat them as
independent are far too narrow. A statistic is a function of how often each patient was drawn. Its undefined values are
NaN; the results contain None instead.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
from scipy import stats

LEVEL, RESAMPLES, SEED = 0.95, 2000, 0
PERMUTATIONS = 9999
# If a value is undefined in a larger share of draws, too few patients define it, and it has no interval.
_MOST_UNDEFINED = 0.05
_CHUNK = 250  # draws at a time, to limit memory
# The least standard error of a draw in the bootstrap-t, as a share of the standard error of the patients' mean.
_LEAST_ERROR = 0.3

# Weights [draws, patients] -> values [draws] by name.
Statistic = Callable[[np.ndarray], dict[str, np.ndarray]]


def method() -> dict:
  """Describes the method of the intervals, for metrics.json."""
  return {
    'level': LEVEL,
    'method': 'bootstrap over patients, expanded percentiles',
    'method_of_means': (
      'means of scores from 0 to 1: Bayesian bootstrap with half a patient at 0 and half a patient at 1; means of '
      "differences: Student's t; means of volumes, distances and counts: the wider of Student's t and bootstrap-t; "
      'means over scans, if patients have several: as for ratios'
    ),
    # The figures of docs/evaluation.md.
    'coverage': (
      'about 0.95 of the intervals contain the true mean of scores from 0 to 1, and 0.91 to 0.95 the true ratio, with '
      '8 or more patients. Fewer contain the true mean of skewed volumes (0.86 to 0.93 with 5 to 40 patients), and of '
      'distances or differences with rare large values (0.5 to 0.6 with 8 patients); read the medians of these'
    ),
    'resamples': RESAMPLES,
    'seed': SEED,
    'unit': 'patient',
  }


def estimates(statistic: Statistic, patients: int) -> dict[str, float | None]:
  """The statistic with each patient counted once."""
  return {name: defined(values[0]) for name, values in statistic(np.ones((1, patients))).items()}


def intervals(statistic: Statistic, patients: int) -> dict[str, list[float] | None]:
  """95% bootstrap intervals [low, high] of each value of a statistic, by drawing patients with replacement.

  None with fewer than two patients, and for a value that is undefined, or undefined in more than 5% of the draws.

  The percentiles are wider than 2.5% and 97.5%, because the t distribution is wider than the normal for few patients.
  This is the "expanded percentile" (T. Hesterberg, "What Teachers Should Know About the Bootstrap", 2015, section
  4.3.1). BCa, the usual refinement, has worse coverage than plain percentiles if volumes are as skewed as those of
  lesions (docs/evaluation.md has the simulation).
  """
  whole = statistic(np.ones((1, patients)))
  if patients < 2:
    return dict.fromkeys(whole)
  rng, drawn = np.random.default_rng(SEED), []
  for size in _chunks():
    weights = rng.multinomial(patients, np.full(patients, 1 / patients), size=size)
    drawn.append(statistic(weights.astype(np.float64)))
  tail = expanded_tail(patients)
  bounds = {}
  for name, value in whole.items():
    values = np.concatenate([part[name] for part in drawn])
    is_defined = np.isfinite(values)
    enough = np.isfinite(value[0]) and 1 - is_defined.mean() <= _MOST_UNDEFINED
    bounds[name] = [float(v) for v in np.quantile(values[is_defined], [tail, 1 - tail])] if enough else None
  return bounds


def mean_interval(values: np.ndarray, support: tuple[float, float]) -> list[float] | None:
  """95% interval [low, high] of the mean of values [patients]; NaN are left out. None with fewer than two values.

  A bootstrap draws only values of the test. If 15% of all patients score 0, then 27% of all tests of 8 patients contain
  no 0, and no draw contains one. Only the range of the values tells that 0 is possible. It decides the method:

  - Both ends finite: the Bayesian bootstrap (Rubin 1981) of the values and of half a patient at each end of the range.
    For values of 0 and 1 it is the Jeffreys interval of a proportion, which has about the nominal coverage (Brown, Cai
    and DasGupta 2001). With a whole patient at the end it would be Gaffke's bound (2005; Learned-Miller and Thomas
    2020), which for values of 0 and 1 is the Clopper-Pearson interval, and is too wide.
  - No end finite, as for differences: Student's t.
  - Only the lower end finite, as for volumes: their means are skewed. The wider end, on each side, of Student's t and
    of the bootstrap-t (Efron 1982). Standard errors of draws are at least 0.3 of that of the values, because draws of
    few patients can be nearly constant.

  docs/evaluation.md compares the coverage and the width of these methods.

  Args:
    values: one value per patient.
    support: the lowest and the highest value that is possible; infinite if there is none.
  """
  values = np.asarray(values, np.float64)
  values = values[np.isfinite(values)]
  count, (low, high) = len(values), support
  if count < 2:
    return None
  rng, average = np.random.default_rng(SEED), values.mean()
  tails = [(1 - LEVEL) / 2, (1 + LEVEL) / 2]
  if np.isfinite(low) and np.isfinite(high):
    patients = np.append(np.ones(count), [0.5, 0.5])
    draws = [rng.dirichlet(patients, size) @ np.append(values, support) for size in _chunks()]
    ends = np.quantile(np.concatenate(draws), tails)
  else:
    error = values.std(ddof=1) / math.sqrt(count)
    reach = stats.t.ppf(tails, count - 1)
    if np.isfinite(low) and error > 0:
      drawn = np.quantile(studentised(values, error, rng), tails)
      reach = np.array([min(reach[0], drawn[0]), max(reach[1], drawn[1])])
    ends = average - reach[::-1] * error
  # An estimate at an end of the range lies at the end of its interval.
  return [float(max(low, min(ends[0], average))), float(min(high, max(ends[1], average)))]


def average_of_means(columns: Sequence[np.ndarray]) -> np.ndarray:
  """Values [patients] with the average of the means of several columns as their mean, for `mean_interval`.

  If no value is NaN, this is the average of each patient. In a column with NaN, a patient without a value counts as the
  mean, and deviations of the others are enlarged by patients / patients with a value. To first order, the mean of these
  values then varies as the average of the means does (its influence function).

  Args:
    columns: values [patients] each; NaN are left out of the mean.

  Returns:
    All NaN if a column has fewer than two values.
  """
  means = []
  for values in np.asarray(columns, np.float64):
    is_defined = np.isfinite(values)
    if is_defined.sum() < 2:
      return np.full(values.shape, np.nan)
    if not is_defined.all():
      mean_of = values[is_defined].mean()
      values = mean_of + np.where(is_defined, values - mean_of, 0) * len(values) / is_defined.sum()
    means.append(values)
  return np.mean(means, axis=0)


def studentised(values: np.ndarray, error: float, rng: np.random.Generator) -> np.ndarray:
  """(mean of a draw - mean) / standard error of the draw, for each draw of the values with replacement.

  `error` is the standard error of the mean of the values; that of a draw is at least 0.3 of it.
  """
  count, drawn = len(values), []
  for size in _chunks():
    sample = values[rng.integers(count, size=(size, count))]
    own_error = np.maximum(sample.std(axis=1, ddof=1) / math.sqrt(count), _LEAST_ERROR * error)
    drawn.append((sample.mean(axis=1) - values.mean()) / own_error)
  return np.concatenate(drawn)


def _chunks():
  """The sizes of the parts in which the draws are made."""
  return [min(_CHUNK, RESAMPLES - start) for start in range(0, RESAMPLES, _CHUNK)]


def expanded_tail(patients: int) -> float:
  """The fraction of the bootstrap distribution below a 95% interval, for a number of patients."""
  t = stats.t.ppf((1 - LEVEL) / 2, patients - 1)
  return float(stats.norm.cdf(math.sqrt(patients / (patients - 1)) * t))


def difference(first: Statistic, second: Statistic) -> Statistic:
  """first - second for the same draws of the same patients, value by value."""

  def subtract(weights):
    one, other = first(weights), second(weights)
    return {name: one[name] - other[name] for name in one}

  return subtract


def average(each: Sequence[Statistic]) -> Statistic:
  """The mean of several statistics for the same draws of the same patients, value by value; NaN if one is NaN."""

  def mean_of(weights):
    values = [one(weights) for one in each]
    return {name: np.mean([one[name] for one in values], axis=0) for name in values[0]}

  return mean_of


def average_of_defined(each: Sequence[Statistic], patients: int) -> Statistic:
  """The mean of several statistics, value by value, over those that define the value with each patient counted once.

  These are the same in each draw: a draw in which one of them is undefined has no mean, so that draws do not differ in
  what they average.
  """
  whole = [one(np.ones((1, patients))) for one in each]
  counted = {name: [k for k, values in enumerate(whole) if np.isfinite(values[name][0])] for name in whole[0]}

  def mean_of(weights):
    values = [one(weights) for one in each]
    nothing = np.full(len(weights), np.nan)
    return {
      name: np.mean([values[k][name] for k in which], axis=0) if which else nothing for name, which in counted.items()
    }

  return mean_of


def sign_flip_p(differences: np.ndarray) -> float | None:
  """The two-sided p-value of paired differences [patients], by random flips of their signs.

  The null hypothesis is that both signs of each difference are equally likely. The test is exact for up to 13 patients;
  with more it uses 9999 random flips. NaN (undefined pairs) are left out. None if fewer than two pairs are left.
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
  """The mean of values [patients] without NaN, for each row of weights [draws, patients]."""
  is_defined = np.isfinite(values)
  return ratio(weights @ np.where(is_defined, values, 0), weights @ is_defined.astype(np.float64))


def median(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
  """The median, as `mean`; weights must be whole numbers."""
  is_defined = np.isfinite(values)
  if not is_defined.any():
    return np.full(len(weights), np.nan)
  order = np.argsort(values[is_defined])
  ordered = values[is_defined][order]
  reached = np.cumsum(weights[:, is_defined][:, order], axis=1)
  count = reached[:, -1:]
  # The two middle values. They are the same one if the number of patients is odd.
  lower, upper = (np.argmax(reached >= at, axis=1) for at in ((count + 1) // 2, count // 2 + 1))
  return np.where(count[:, 0] > 0, (ordered[lower] + ordered[upper]) / 2, np.nan)


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
  """numerator / denominator; NaN if the denominator is 0."""
  numerator, denominator = np.broadcast_arrays(np.asarray(numerator, np.float64), np.asarray(denominator, np.float64))
  return np.divide(numerator, denominator, out=np.full(numerator.shape, np.nan), where=denominator != 0)


def defined(value: float) -> float | None:
  """A number for JSON; None if it is undefined."""
  return float(value) if np.isfinite(value) else None


def shown(value: float | None, interval: list[float] | None = None, digits: int = 4) -> str:
  """A number as text, with its interval."""
  if value is None:
    return 'undefined'
  return f'{value:.{digits}f}' + (' [{:.{d}f}, {:.{d}f}]'.format(*interval, d=digits) if interval else '')
