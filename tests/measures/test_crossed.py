"""Differences by seed and patient: mean squares, intervals and power against least squares, SciPy and simulation."""

import numpy as np
import pytest
from scipy import stats

from fusa_jax.measures import crossed

EFFECTS = crossed.Variances(seed=0.01**2, patient=0.04**2, rest=0.03**2)


def drawn(rng, effects, seeds, patients, mean=0.0):
  normal = lambda variance, *shape: np.sqrt(variance) * rng.standard_normal(shape)
  return (
    mean + normal(effects.seed, seeds, 1) + normal(effects.patient, 1, patients) + normal(effects.rest, seeds, patients)
  )


def residual_sum(values, *columns):
  """The squared residuals of a least-squares fit with dummy variables."""
  design = np.concatenate([np.ones((values.size, 1)), *columns], axis=1)
  fitted = design @ np.linalg.lstsq(design, values.ravel(), rcond=None)[0]
  return np.sum((values.ravel() - fitted) ** 2)


def test_mean_squares_are_those_of_least_squares():
  values = drawn(np.random.default_rng(0), EFFECTS, 3, 7, mean=0.02)
  seed, patient = np.divmod(np.arange(21), 7)
  of_seed, of_patient = np.eye(3)[seed], np.eye(7)[patient]
  rest = residual_sum(values, of_seed, of_patient)
  found = crossed.mean_squares(values)
  expected = (
    (residual_sum(values, of_patient) - rest) / 2,
    (residual_sum(values, of_seed) - rest) / 6,
    rest / 12,
  )
  assert found.squares == pytest.approx(expected)
  assert found.degrees == (2, 6, 12)
  assert found.mean == pytest.approx(values.mean())


def test_variances_are_right_on_average():
  rng = np.random.default_rng(1)
  found = [crossed.variances(crossed.mean_squares(drawn(rng, EFFECTS, 4, 30))) for _ in range(1000)]
  assert np.mean(found, axis=0) == pytest.approx(list(EFFECTS), rel=0.1)


def test_seeds_that_agree_leave_the_t_interval_of_the_patients():
  gains = np.random.default_rng(2).normal(0.02, 0.05, 9)
  reference = stats.ttest_1samp(gains, 0).confidence_interval(0.95)
  assert crossed.interval(np.stack([gains] * 3)) == pytest.approx(list(reference))
  undefined = np.append(np.stack([gains] * 3), [[np.nan], [0.0], [0.0]], axis=1)
  assert crossed.interval(undefined) == pytest.approx(list(reference))


def test_no_interval_from_one_seed_or_one_patient():
  assert crossed.interval(np.ones((1, 9))) is None
  assert crossed.interval(np.ones((3, 1))) is None
  assert crossed.interval(np.full((2, 3), 0.5)) == [0.5, 0.5]


@pytest.mark.parametrize('seeds', [2, 3, 5])
@pytest.mark.parametrize('effects', [EFFECTS, EFFECTS._replace(seed=0.0), EFFECTS._replace(seed=0.03**2)])
def test_coverage(seeds, effects):
  rng = np.random.default_rng(3)
  intervals = np.array([crossed.interval(drawn(rng, effects, seeds, 17)) for _ in range(1000)])
  assert 0.89 <= np.mean((intervals[:, 0] <= 0) & (intervals[:, 1] >= 0)) <= 0.985


@pytest.mark.parametrize(('seeds', 'patients'), [(5, 17), (5, 60), (10, 30)])
def test_the_detectable_difference_is_detected_in_80_percent(seeds, patients):
  rng, mean = np.random.default_rng(4), crossed.detectable(EFFECTS, seeds, patients)
  lows = [crossed.interval(drawn(rng, EFFECTS, seeds, patients, mean))[0] for _ in range(2000)]
  assert np.mean(np.array(lows) > 0) == pytest.approx(0.8, abs=0.04)


def test_without_variance_of_seeds_the_power_is_that_of_a_t_test():
  """With many patients it is the textbook's: (1.96 + 0.84) standard errors."""
  effects = crossed.Variances(seed=0.0, patient=0.05**2, rest=0.0)
  assert crossed.detectable(effects, 3, 10_000) == pytest.approx((1.960 + 0.8416) * 0.05 / 100, rel=1e-3)
  assert crossed.detectable(effects._replace(patient=0.0), 3, 10) == 0


def test_patients_needed():
  for seeds in (5, 20):
    count = crossed.patients_needed(EFFECTS, seeds, 0.02)
    assert crossed.detectable(EFFECTS, seeds, count) <= 0.02 < crossed.detectable(EFFECTS, seeds, count - 1)
  assert crossed.patients_needed(EFFECTS, 20, 0.02) < crossed.patients_needed(EFFECTS, 5, 0.02)
  assert crossed.patients_needed(EFFECTS, 5, 0.01) is None  # no number of patients averages the seeds


def test_with_few_seeds_more_patients_may_detect_less():
  """Then the smallest number that suffices is found, although a million patients do not suffice."""
  effects = crossed.Variances(0.0001, 0.0009, 0.0025)
  assert crossed.detectable(effects, 3, 10**6) > 0.031 > crossed.detectable(effects, 3, 100)
  count = crossed.patients_needed(effects, 3, 0.031)
  assert count <= 100
  assert crossed.detectable(effects, 3, count) <= 0.031 < crossed.detectable(effects, 3, count - 1)
