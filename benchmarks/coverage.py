"""Prints how often intervals of a mean contain the true mean, and how wide they are (docs/evaluation.md).

  python -m benchmarks.coverage

It draws `--cohorts` cohorts for each distribution of the values and each number of patients. A cell is the share of
intervals that contain the true mean, which should be 0.95, and their mean width. `ours` is statistics.mean_interval;
the other methods are for comparison. A second table does the same for differences by seed and patient, where `ours` is
crossed.interval; widths are then medians.
"""

import datetime
import functools

import numpy as np
from absl import app, flags
from scipy import stats

from fusa_jax.measures import crossed, statistics
from fusa_jax.system import provenance

_COHORTS = flags.DEFINE_integer('cohorts', 1000, 'number of simulated cohorts per cell')
_PATIENTS = flags.DEFINE_list('patients', ['5', '8', '12', '20', '40'], 'numbers of patients')

SCORE, AMOUNT, DIFFERENCE = (0, 1), (0, np.inf), (-np.inf, np.inf)


def _with_zeros(share, draw):
  """Draws as `draw`, but a share of the values is 0: patients of whom the model finds nothing."""
  return lambda rng, shape: np.where(rng.random(shape) < share, 0, draw(rng, shape))


def _with_outliers(share, distance, draw):
  """Draws as `draw`, but adds a distance to a share of the values."""
  return lambda rng, shape: np.where(rng.random(shape) < share, distance, 0.0) + draw(rng, shape)


_dice = lambda rng, shape: rng.beta(9, 3, shape)
# Title: (range of the values, function that draws them).
SHAPES = {
  'Dice around 0.75': (SCORE, _dice),
  'the same, 15% are 0': (SCORE, _with_zeros(0.15, _dice)),
  'the same, 30% are 0': (SCORE, _with_zeros(0.30, _dice)),
  'around 0.95': (SCORE, lambda rng, shape: rng.beta(30, 1.5, shape)),
  'the same, 5% are 0': (SCORE, _with_zeros(0.05, lambda rng, shape: rng.beta(30, 1.5, shape))),
  '1 or, for 10%, 0': (SCORE, lambda rng, shape: (rng.random(shape) >= 0.1).astype(float)),
  'volumes, sd of log 0.8': (AMOUNT, lambda rng, shape: rng.lognormal(0, 0.8, shape)),
  'volumes, sd of log 1.2': (AMOUNT, lambda rng, shape: rng.lognormal(0, 1.2, shape)),
  'counts around 2': (AMOUNT, lambda rng, shape: rng.poisson(2, shape).astype(float)),
  'distances, 10% are 500': (AMOUNT, _with_outliers(0.1, 500, lambda rng, shape: rng.lognormal(3, 0.6, shape))),
  'differences, sd 0.1': (DIFFERENCE, lambda rng, shape: rng.normal(0.02, 0.1, shape)),
  'the same, Laplace': (DIFFERENCE, lambda rng, shape: rng.laplace(0.02, 0.07, shape)),
  'sd 0.03, 10% gain 0.7': (DIFFERENCE, _with_outliers(0.1, 0.7, lambda rng, shape: rng.normal(0, 0.03, shape))),
}


def expanded(values, _):
  """Returns the expanded percentiles, as for ratios (statistics.intervals)."""
  return statistics.intervals(lambda weights: {'mean': statistics.mean(values, weights)}, len(values))['mean']


def student(values, _):
  """Returns Student's t interval."""
  reach = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
  return values.mean() - reach, values.mean() + reach


def bootstrap_t(values, _):
  """Returns the bootstrap-t alone, with the least standard error of statistics.mean_interval."""
  error = stats.sem(values)
  if not error:
    return values.mean(), values.mean()
  drawn = np.quantile(statistics.studentised(values, error, np.random.default_rng(0)), [0.025, 0.975])
  return values.mean() - drawn[1] * error, values.mean() - drawn[0] * error


def gaffke(values, support):
  """Returns Gaffke's bounds: for each side, a Bayesian bootstrap with one more patient at that end of the range."""
  weights = np.random.default_rng(0).dirichlet(np.ones(len(values) + 1), 1000)
  return [
    np.quantile(weights @ np.append(values, end), tail) for end, tail in zip(support, (0.025, 0.975), strict=True)
  ]


def anderson(values, support):
  """Returns Anderson's bounds (1969), from the band of Kolmogorov and Smirnov around the distribution function."""
  beyond = stats.ksone.ppf(0.975, len(values))
  steps = np.minimum(np.arange(len(values) + 1) / len(values) + beyond, 1)
  weights, low, high = np.append(steps[0], np.diff(steps)), np.sort(values), np.sort(values)[::-1]
  return weights @ np.append(support[0], low), weights @ np.append(support[1], high)


OF_ANY = {'expanded percentiles': expanded, "Student's t": student, 'bootstrap-t': bootstrap_t}
OF_SCORES = {"Gaffke's bounds": gaffke, "Anderson's bounds": anderson}


# Standard deviations of the effects of the seed, of the patient, and the rest.
EFFECTS = ((0.0, 0.03, 0.05), (0.01, 0.03, 0.05), (0.02, 0.03, 0.05), (0.01, 0.06, 0.03), (0.03, 0.01, 0.02))
_CROSSED_PATIENTS, _CROSSED_SEEDS = 17, (2, 3, 5)


def bootstrap_of_both(differences):
  """Returns percentiles over draws of patients and, independently, of seeds (Owen 2007)."""
  rng, sizes = np.random.default_rng(0), differences.shape
  seeds, patients = (rng.multinomial(n, np.full(n, 1 / n), 1000) / n for n in sizes)
  return np.quantile(np.einsum('ds,sp,dp->d', seeds, differences, patients), [0.025, 0.975])


OF_CROSSED = {
  'patients alone': lambda differences: statistics.mean_interval(differences.mean(axis=0), DIFFERENCE),
  'bootstrap of both': bootstrap_of_both,
  'ours': crossed.interval,
}


def crossed_table(cohorts: int) -> str:
  """Returns coverage and median widths of intervals of a mean over seeds and patients, as a Markdown table."""
  lines = [
    f'| sd of seed, patient, rest | method | {" | ".join(f"{n} seeds" for n in _CROSSED_SEEDS)} |',
    f'| --- | --- |{" ---: |" * len(_CROSSED_SEEDS)}',
  ]
  for deviations in EFFECTS:
    drawn = [_drawn_differences(deviations, seeds, cohorts) for seeds in _CROSSED_SEEDS]
    for name, method in OF_CROSSED.items():
      ends = [np.transpose([method(one) for one in each]) for each in drawn]
      cells = [f'{np.mean((low <= 0) & (high >= 0)):.3f}, {np.median(high - low):.3g}' for low, high in ends]
      lines.append(f'| {", ".join(map(str, deviations))} | {name} | {" | ".join(cells)} |')
  return '\n'.join(lines)


def _drawn_differences(deviations, seeds, cohorts):
  """Draws differences [cohorts, seeds, patients] around 0."""
  rng, (of_seed, of_patient, rest) = np.random.default_rng(seeds), deviations
  return (
    of_seed * rng.standard_normal((cohorts, seeds, 1))
    + of_patient * rng.standard_normal((cohorts, 1, _CROSSED_PATIENTS))
    + rest * rng.standard_normal((cohorts, seeds, _CROSSED_PATIENTS))
  )


def coverage(title: str, method, patients: int, cohorts: int) -> tuple[float, float]:
  """Returns the share of intervals that contain the true mean of a shape, and the mean width of the intervals."""
  support, draw = SHAPES[title]
  values = draw(np.random.default_rng(patients), (cohorts, patients))
  low, high = np.transpose([method(one, support) for one in values])
  return float(np.mean((low <= true_mean(title)) & (true_mean(title) <= high))), float(np.mean(high - low))


@functools.cache
def true_mean(title: str) -> float:
  """Returns the mean of a distribution, from ten million draws."""
  _, draw = SHAPES[title]
  rng = np.random.default_rng(0)
  return float(np.mean([draw(rng, 1_000_000).mean() for _ in range(10)]))


def table(cohorts: int, patients: list[int]) -> str:
  """Returns the coverage and the widths as a Markdown table."""
  lines = [
    f'| values | method | {" | ".join(f"n = {n}" for n in patients)} |',
    f'| --- | --- |{" ---: |" * len(patients)}',
  ]
  for title, (support, _) in SHAPES.items():
    methods = OF_ANY | (OF_SCORES if support == SCORE else {}) | {'ours': statistics.mean_interval}
    for name, method in methods.items():
      found = [coverage(title, method, n, cohorts) for n in patients]
      lines.append(f'| {title} | {name} | {" | ".join(f"{share:.3f}, {width:.3g}" for share, width in found)} |')
  return '\n'.join(lines)


def main(_):
  print(table(_COHORTS.value, [int(n) for n in _PATIENTS.value]))
  print(f'\n{crossed_table(_COHORTS.value)}')
  print(f'\n{_COHORTS.value} cohorts, {datetime.date.today()}, commit {provenance.commit()}')


if __name__ == '__main__':
  app.run(main)
