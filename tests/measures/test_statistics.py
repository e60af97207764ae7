"""Intervals and p-values compared with scipy, and the coverage of the 95% intervals."""

import numpy as np
import pytest
from scipy import stats

from fusa_jax.measures import masks, metrics, statistics


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


@pytest.mark.parametrize(('ones', 'patients'), [(8, 8), (7, 8), (15, 20), (0, 5), (60, 200)])
def test_interval_of_a_proportion_is_jeffreys(ones, patients):
  """Brown, Cai and DasGupta 2001: quantiles of Beta(x + 1/2, n - x + 1/2), up to 0 or 1 if all patients agree."""
  values = (np.arange(patients) < ones).astype(float)
  low, high = statistics.mean_interval(values, (0, 1))
  below, above = stats.beta(ones + 0.5, patients - ones + 0.5).cdf([low, high])
  assert low == 0 if ones == 0 else below == pytest.approx(0.025, abs=0.01)
  assert high == 1 if ones == patients else above == pytest.approx(0.975, abs=0.01)
  shifted = statistics.mean_interval(2 * values - 1, (-1, 1))  # another range
  assert shifted == pytest.approx([2 * low - 1, 2 * high - 1])


def test_interval_of_differences_is_students():
  values = np.random.default_rng(0).normal(size=9)
  expected = stats.ttest_1samp(values, 0).confidence_interval()
  for each in (values, np.append(values, np.nan)):
    assert statistics.mean_interval(each, (-np.inf, np.inf)) == pytest.approx(list(expected))
  assert statistics.mean_interval(np.array([0.5, np.nan]), (-np.inf, np.inf)) is None
  assert statistics.mean_interval(np.full(4, 0.25), (-np.inf, np.inf)) == [0.25, 0.25]


def test_interval_of_skewed_volumes_is_the_wider_of_two():
  """Compares with scipy's standard errors of other draws, and with Student's t."""
  rng = np.random.default_rng(0)
  values = rng.lognormal(0, 1, 15)
  student = stats.ttest_1samp(values, 0).confidence_interval()
  drawn = rng.choice(values, (20_000, 15))
  errors = np.maximum(stats.sem(drawn, axis=1), 0.3 * stats.sem(values))
  ratios = (drawn.mean(axis=1) - values.mean()) / errors
  high = values.mean() - np.quantile(ratios, 0.025) * stats.sem(values)
  assert high > student.high + 0.1 * (student.high - student.low)
  got = statistics.mean_interval(values, (0, np.inf))
  assert got == pytest.approx([student.low, high], abs=0.1 * (high - student.low))
  # No interval goes below 0, which Student's t would.
  assert statistics.mean_interval(np.array([0, 0, 0, 5.0]), (0, np.inf))[0] == 0


@pytest.mark.parametrize(
  ('patients', 'zeros', 'a', 'b', 'least'),
  [(8, 0.15, 9, 3, 0.95), (12, 0.15, 9, 3, 0.93), (20, 0.3, 9, 3, 0.92), (8, 0, 9, 3, 0.95), (12, 0.05, 30, 1.5, 0.95)],
)
def test_coverage_of_the_mean_of_scores(patients, zeros, a, b, least):
  """The intervals contain the true mean also if a test can lack the zeros that 5 to 30% of all patients have.

  Percentiles contain it in 0.5 (12 patients, 5% zeros) or 0.83 (8 patients, 15% zeros) of these cohorts.
  """
  rng = np.random.default_rng(0)
  values = np.where(rng.random((500, patients)) < zeros, 0, rng.beta(a, b, (500, patients)))
  low, high = np.transpose([statistics.mean_interval(each, (0, 1)) for each in values])
  truth = (1 - zeros) * a / (a + b)
  assert least <= np.mean((low <= truth) & (truth <= high))


def test_means_of_patients_use_the_range_of_their_scores():
  """The mean Dice of patients and the means of volumes, which can be 1 for all patients of a small test."""
  rng = np.random.default_rng(0)
  one = cohort(rng, 8)
  patients = metrics.by_patient(one)
  scores = [row['dice'] for row in metrics.patient_rows(patients)]
  intervals = patients.intervals(metrics.segmentation)
  assert intervals['dice_per_patient'] == statistics.mean_interval(np.array(scores), (0, 1))
  assert intervals['dice'] == statistics.intervals(patients.statistic(metrics.segmentation), 8)['dice']
  rows = [dict.fromkeys(masks.DEFINITIONS, 1.0) | {'error_ml': error} for error in (-1.0, 0.0, 4.0)]
  measures = masks.summary(rows)['measures']
  assert measures['dice']['mean_interval'][0] < 0.7 and measures['dice']['mean_interval'][1] == 1
  assert measures['error_ml']['mean_interval'] == pytest.approx(stats.t.interval(0.95, 2, 1, stats.sem([-1, 0, 4])))
  assert masks.SUPPORT.keys() == masks.DEFINITIONS.keys()


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
  """The intervals of 90 to 98% of 1000 simulated cohorts contain the value of a much larger cohort.

  Those of the mean Dice allow for patients of 0, of which this simulation has none, and contain it in up to 99.5%.
  """
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
    for name, (low, high) in few.intervals(covered_metrics).items():
      inside[name] += low <= truth[name] <= high
  print(patients, {name: float(count) / 1000 for name, count in inside.items()})
  assert 0.94 <= inside.pop('dice_per_patient') / 1000 <= 0.995
  assert all(0.90 <= count / 1000 <= 0.98 for count in inside.values()), inside


def test_values_of_an_average_of_means():
  """Complete columns: the average of each patient. With gaps: mean and standard error are those of a bootstrap."""
  rng = np.random.default_rng(5)
  columns = rng.normal(size=200) + rng.normal(size=(3, 200))
  np.testing.assert_allclose(statistics.average_of_means(columns), columns.mean(axis=0), rtol=1e-12)
  columns[rng.random(columns.shape) < [[0.0], [0.3], [0.7]]] = np.nan
  values = statistics.average_of_means(columns)
  assert values.mean() == pytest.approx(np.nanmean(columns, axis=1).mean())
  drawn = rng.integers(200, size=(4000, 200))
  averages = np.mean([np.nanmean(column[drawn], axis=1) for column in columns], axis=0)
  assert values.std(ddof=1) / np.sqrt(200) == pytest.approx(averages.std(), rel=0.05)
  columns[1, 1:] = np.nan
  assert np.isnan(statistics.average_of_means(columns)).all()
