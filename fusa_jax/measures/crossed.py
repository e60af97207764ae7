"""Differences of two models by seed and patient: intervals over both, and the power of a design.

Each seed tests the same patients, so seeds and patients are crossed. The model of a difference is

  difference[s, p] = mean + seed[s] + patient[p] + rest[s, p]

with independent normal effects. Mean squares estimate their variances (Searle, Casella and McCulloch, Variance
Components, 1992, chapter 4). `rest` holds what neither explains: for example a fold's own luck with a seed.
"""

import math
from typing import NamedTuple

import numpy as np
from scipy import optimize, stats

from fusa_jax.measures.statistics import LEVEL

POWER = 0.8
# More seeds or patients than anybody has.
_MOST = 10**6
# Numbers of patients that are tried up to there, at equal ratios of about 1.05.
_STEPS = 300


class Variances(NamedTuple):
  """The variances of the effects: how much a difference varies with the seed, with the patient, and otherwise."""

  seed: float
  patient: float
  rest: float


class Squares(NamedTuple):
  """The mean of differences, their mean squares in the order seed, patient, rest, and the sizes of the design."""

  mean: float
  squares: tuple[float, float, float]
  seeds: int
  patients: int

  @property
  def degrees(self) -> tuple[int, int, int]:
    """The degrees of freedom of the mean squares."""
    return _degrees_of_freedom(self.seeds, self.patients)


def mean_squares(differences: np.ndarray) -> Squares:
  """Returns the mean squares of differences [seeds, patients], at least 2 x 2 and without NaN."""
  seeds, patients = differences.shape
  mean = differences.mean()
  of_seed, of_patient = differences.mean(axis=1) - mean, differences.mean(axis=0) - mean
  rest = differences - mean - of_seed[:, None] - of_patient
  sums = patients * np.sum(of_seed**2), seeds * np.sum(of_patient**2), np.sum(rest**2)
  degrees = _degrees_of_freedom(seeds, patients)
  squares = tuple(float(total / count) for total, count in zip(sums, degrees, strict=True))
  return Squares(float(mean), squares, seeds, patients)


def _degrees_of_freedom(seeds, patients):
  return seeds - 1, patients - 1, (seeds - 1) * (patients - 1)


def defined(differences: np.ndarray) -> np.ndarray:
  """Returns differences [seeds, patients] without the patients that have a NaN."""
  return differences[:, np.isfinite(differences).all(axis=0)]


def variances(found: Squares) -> Variances:
  """Returns the variances of the effects, at least 0."""
  seed, patient, rest = found.squares
  return Variances(max(0.0, (seed - rest) / found.patients), max(0.0, (patient - rest) / found.seeds), rest)


def interval(differences: np.ndarray) -> list[float] | None:
  """95% interval [low, high] of the mean difference, with other seeds and other patients.

  The variance of the mean is (seed + patient - rest) / number of differences, in mean squares, and at least that of
  seeds alone and of patients alone. Satterthwaite's formula (1946) gives the degrees of freedom of Student's t.
  docs/evaluation.md compares its coverage with that of an interval over patients alone, and of a bootstrap of both.

  Args:
    differences: [seeds, patients]. Patients with a NaN are left out.

  Returns:
    None with fewer than two seeds or two patients.
  """
  differences = defined(differences)
  if min(differences.shape) < 2:
    return None
  found = mean_squares(differences)
  seed, patient, rest = found.squares
  variance = max(seed + patient - rest, seed, patient) / differences.size
  reach = math.sqrt(variance) * stats.t.ppf((1 + LEVEL) / 2, _degrees(variance, found)) if variance else 0.0
  return [found.mean - reach, found.mean + reach]


def _degrees(variance, found):
  """Satterthwaite's degrees of freedom of a variance of the mean; at least 1."""
  terms = sum(square**2 / count for square, count in zip(found.squares, found.degrees, strict=True))
  return max(1.0, (variance * found.seeds * found.patients) ** 2 / terms)


def detectable(effects: Variances, seeds: int, patients: int) -> float:
  """Returns the mean difference that a design detects with 80% power, two-sided at 5%.

  The test is Student's t of the mean. Its power follows from the noncentral t distribution.

  Args:
    effects: the variances of the effects.
    seeds: the number of seeds, at least 2.
    patients: the number of patients, at least 2.
  """
  expected = patients * effects.seed + effects.rest, seeds * effects.patient + effects.rest, effects.rest
  found = Squares(0.0, expected, seeds, patients)
  variance = (expected[0] + expected[1] - expected[2]) / (seeds * patients)
  if not variance:
    return 0.0
  degrees = _degrees(variance, found)
  limit = stats.t.ppf((1 + LEVEL) / 2, degrees)
  # A significant difference in the wrong direction is too rare to matter.
  excess = lambda shift: stats.nct.sf(limit, degrees, shift) - POWER
  return math.sqrt(variance) * float(optimize.brentq(excess, 0, 2 * limit + 3))


def patients_needed(effects: Variances, seeds: int, difference: float) -> int | None:
  """Returns the smallest number of patients with which `detectable` is at most `difference`; None if no number is.

  More patients reduce the variance of patients and the rest, but not that of the seeds. The fewer the seeds, the more
  their variance then counts, and with it their few degrees of freedom: `detectable` may rise again.
  """
  is_enough = lambda patients: detectable(effects, seeds, patients) <= difference
  counts = np.unique(np.geomspace(2, _MOST, _STEPS).astype(int)).tolist()
  found = next((number for number, count in enumerate(counts) if is_enough(count)), None)
  if found is None:
    return None
  low, high = (counts[found - 1] if found else 1), counts[found]
  while high - low > 1:
    middle = (low + high) // 2
    low, high = (low, middle) if is_enough(middle) else (middle, high)
  return high
