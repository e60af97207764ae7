"""Intervals and p-values compared with scipy, and the coverage of the 95% intervals."""

import numpy as np
import pytest
from scipy import stats

from fusa_jax.measures import metrics, statistics


def mean_of(values):
  return lambda weights: {'mean': statistics.mean(values, weights), 'median': statistics.median(values, weights)}


def test_intervals_equal_scipys():
  """Compares with scipy's percentile bootstrap at the level that corrects for few patients, with other draws."""
  values = np.random.default_rng(0).gamma(2, size=25)
  got = statistics.intervals(mean_of(values), len(values))
  level = 1 - 2 * statistics.expanded_tail(len(values))
  for name, function in (('mean', np.mean), ('median', np.median)):
    expected = stats.bootstrap(
      (values,), function, method='percentile', confidence_level=level, n_resamples=20_000, rng=1
    ).confidence_interval
    assert got[name] == pytest.approx(list(expected), abs=0.05 * (expected.high - expected.low))


def test_tails_are_wider_for_few_patients():
  """Hesterberg 2015, section 4.3.1: the tail is Phi(-sqrt(n / (n - 1)) t)."""
  assert statistics.expanded_tail(10_000) == pytest.approx(0.025, abs=1e-4)
  assert statistics.expanded_tail(10) == pytest.approx(stats.norm.cdf(-np.sqrt(10 / 9) * 2.262157), abs=1e-6)


def test_median_and_mean_of_resampled_patients():
  rng = np.random.default_rng(0)
  values = np.where(rng.random(9) < 0.3, np.nan, rng.normal(size=9))
  weights = rng.multinomial(9, np.full(9, 1 / 9), size=50)
  for row, mean, median in zip(
    weights, statistics.mean(values, weights), statistics.median(values, weights), strict=True
  ):
    drawn = np.repeat(values, row)
    assert [mean, median] == pytest.approx([np.nanmean(drawn), np.nanmedian(drawn)])


def test_the_same_patients_give_the_same_interval():
  values = np.random.default_rng(0).normal(size=12)
  assert statistics.intervals(mean_of(values), 12) == statistics.intervals(mean_of(values), 12)


@pytest.mark.parametrize(
  'values',
  [
    np.array([0.5]),  # one patient
    np.array([0.7, *[np.nan] * 9]),  # a third of the draws lack the only patient with a defined value
    np.full(5, np.nan),
  ],
)
def test_too_few_patients_give_no_interval(values):
  assert statistics.intervals(mean_of(values), len(values)) == {'mean': None, 'median': None}


def test_p_value_equals_that_of_all_sign_flips():
  """Counts over all 2^10 sign flips."""
  differences = np.random.default_rng(0).normal(0.4, 1, 10)
  signs = 1 - 2 * ((np.arange(2**10)[:, None] >> np.arange(10)) & 1)
  means = (signs * differences).mean(axis=1)
  expected = np.mean(np.abs(means) >= np.abs(differences.mean()) - 1e-12)
  assert statistics.sign_flip_p(differences) == pytest.approx(expected)
  assert statistics.sign_flip_p(np.append(differences, np.nan)) == pytest.approx(expected)


def test_p_value_of_many_patients_is_near_the_t_tests():
  differences = np.random.default_rng(1).normal(0.2, 1, 80)
  assert statistics.sign_flip_p(differences) == pytest.approx(stats.ttest_1samp(differences, 0).pvalue, abs=0.01)
  assert statistics.sign_flip_p(np.zeros(5)) == 1.0
  assert statistics.sign_flip_p(np.array([0.1, np.nan])) is None


def test_a_difference_uses_the_same_draws_for_both():
  """Two scores always differ by 1: the difference has no spread, but each score has a wide one."""
  values = np.random.default_rng(0).normal(size=20)
  both = statistics.difference(mean_of(values + 1), mean_of(values))
  assert statistics.intervals(both, 20)['mean'] == pytest.approx([1, 1])


def cohort(rng, patients, slices=6):
  """Simulates counts and scores of slices with skewed lesion volumes and patients of different difficulty."""
  patient = np.repeat(np.arange(patients), slices)
  skill = np.repeat(rng.normal(1.2, 0.5, patients), slices)
  label = rng.random(patients * slices) < np.repeat(rng.beta(2, 2, patients), slices)
  score = skill * label + rng.normal(size=len(label))
  lesion = label * rng.lognormal(np.repeat(rng.normal(4, 1, patients), slices), 0.5)
  tp = lesion * np.repeat(rng.beta(8, 3, patients), slices)
  fp = lesion * np.repeat(rng.beta(2, 10, patients), slices)
  counts = {'tp': tp, 'fp': fp, 'fn': lesion - tp, 'tn': 1e5 - lesion - fp}
  table = {key: np.rint(values).astype(int) for key, values in counts.items()}
  return table | {
    'patient': patient,
    'owner': patient,
    'label': label,
    'logit': score,
    'reliability': np.zeros((len(label), 3, 1)),
    'squared_error': np.zeros(len(label)),
  }


def covered_metrics(totals):
  values = metrics.segmentation(totals)
  return {
    'dice': values['dice'],
    'dice_per_patient': values['dice_per_patient'],
    'recall': values['recall'],
    'auc': metrics.auc(totals),
  }


@pytest.mark.slow
@pytest.mark.parametrize('patients', [8, 20, 40])
def test_coverage(patients, monkeypatch):
  """The intervals of 90 to 98% of 1000 simulated cohorts contain the value of a much larger cohort."""
  monkeypatch.setattr(statistics, 'RESAMPLES', 1000)
  rng = np.random.default_rng(patients)
  truth = {name: [] for name in ('dice', 'dice_per_patient', 'recall', 'auc')}
  for _ in range(20):
    many = metrics.by_patient(cohort(rng, 1000))
    for name, value in statistics.estimates(many.statistic(covered_metrics), 1000).items():
      truth[name].append(value)
  truth = {name: np.mean(values) for name, values in truth.items()}
  inside = dict.fromkeys(truth, 0)
  for _ in range(1000):
    few = metrics.by_patient(cohort(rng, patients))
    for name, (low, high) in statistics.intervals(few.statistic(covered_metrics), patients).items():
      inside[name] += low <= truth[name] <= high
  print(patients, {name: float(count) / 1000 for name, count in inside.items()})
  assert all(0.90 <= count / 1000 <= 0.98 for count in inside.values()), inside
