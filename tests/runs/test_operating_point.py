"""The chosen threshold is the best one in a search over the pixels of the validation fold."""

import numpy as np
import one_class
import pytest
from scipy import optimize, special
from sklearn import metrics as sk

from fusa_jax.measures import histogram
from fusa_jax.runs import operating_point
from fusa_jax.system.errors import UserError


@pytest.fixture(scope='module')
def validation():
  """Logits, truth and table of slices with a best threshold far from 0.5."""
  rng = np.random.default_rng(0)
  truth = rng.random((6, 2000)) < 0.1
  logits = (2 * rng.normal(-3 + 2 * truth, 1)).astype(np.float32)
  return logits, truth, {'histogram': np.asarray(histogram.count(logits, truth, 1.0)['histogram'])}


def choose(table, **options):
  return operating_point.choose(table, step=7, **options)


def test_best_dice(validation):
  logits, truth, table = validation
  point = choose(table)
  probability = special.expit(logits.astype(np.float64)).ravel()
  dice = lambda threshold: sk.f1_score(truth.ravel(), probability >= threshold)
  best = max(dice(t) for t in special.expit(np.arange(-8, 4, 1 / 16)))
  assert dice(point.threshold) == pytest.approx(best) == pytest.approx(point.validation['chosen']['dice'])
  assert dice(0.5) == pytest.approx(point.validation['half']['dice'])
  assert point.validation['chosen']['dice'] > point.validation['half']['dice'] + 0.05
  assert point.about() == {
    'threshold': point.threshold,
    'temperature': 1.0,
    'flips': False,
    'lungs': False,
    'smallest_ml': 0.0,
    'chosen_by': 'best Dice on the validation fold',
  }


@pytest.mark.parametrize('target', [0.5, 0.95, 1.0])
def test_target_sensitivity(validation, target):
  logits, truth, table = validation
  point = choose(table, target_sensitivity=target)
  probability = special.expit(logits.astype(np.float64)).ravel()
  sensitivity = lambda threshold: sk.recall_score(truth.ravel(), probability >= threshold)
  assert sensitivity(point.threshold) >= target
  next_one = special.expit(special.logit(point.threshold) + 1 / 16)
  assert sensitivity(next_one) < target
  assert 'sensitivity of at least' in point.chosen_by


def test_temperature_maximises_the_likelihood_and_changes_no_mask(validation):
  logits, truth, table = validation
  cold, point = choose(table), choose(table, fit_temperature=True)
  exact = optimize.minimize_scalar(
    lambda t: sk.log_loss(truth.ravel(), special.expit(logits.ravel() / t)), bounds=(0.1, 10), method='bounded'
  )
  assert point.temperature == pytest.approx(exact.x, rel=0.01)
  assert point.bin == cold.bin
  assert point.validation['chosen']['dice'] == cold.validation['chosen']['dice']
  marked = special.expit(logits.astype(np.float64) / point.temperature) >= point.threshold
  np.testing.assert_array_equal(marked, special.expit(logits.astype(np.float64)) >= cold.threshold)


def test_saved_and_loaded(validation, tmp_path):
  point = choose(validation[2])
  operating_point.save_points(tmp_path, {'lesion': point})
  assert one_class.point(tmp_path) == point
  assert one_class.point(tmp_path / 'none').threshold == 0.5
  (tmp_path / operating_point.FILE).write_text('{"threshold":')
  with pytest.raises(UserError, match=r'operating_point.json: damaged .*; choose it again with --mode=evaluate'):
    one_class.point(tmp_path)


def test_default_threshold_without_both_classes(validation):
  table = {'histogram': validation[2]['histogram'] * np.array([1, 0])[:, None]}
  point = choose(table)
  assert (point.threshold, point.step) == (0.5, 7)
  assert point.chosen_by == 'default: all of the validation fold is lesion, or none of it'


@pytest.mark.parametrize('target', [0.05, 0.95])
def test_temperature_and_target_together_where_classes_are_far_apart(target):
  """A temperature below 1 rounds probabilities to 1; the chosen bin must not change."""
  rng = np.random.default_rng(3)
  truth = np.repeat([[0, 1]], 500, axis=0)
  logits = (np.where(truth, 3.0, -3.0) + rng.normal(0, 0.5, truth.shape)).astype(np.float32)
  table = {'histogram': np.asarray(histogram.count(logits, truth, 1.0)['histogram'])}
  point = choose(table, target_sensitivity=target, fit_temperature=True)
  assert 0.04 < point.temperature < 1
  called = logits >= histogram.edges()[point.bin]
  assert sk.recall_score(truth.ravel(), called.ravel()) >= target


def test_smallest_lesion_with_the_best_dice_is_chosen():
  """Rows of 0.01 mL voxels are lesions. Compares with scikit-learn's Dice at every smallest size."""
  rng = np.random.default_rng(0)
  sizes = [rng.choice([1, 3, 8, 30, 150], 12, p=[0.3, 0.3, 0.2, 0.1, 0.1]) for _ in range(2)]
  # Larger predicted lesions overlap more with the true mask.
  right = [np.array([rng.binomial(n, min(0.9, n / 60)) for n in of_scan]) for of_scan in sizes]
  missed = [40, 25]
  volumes = [(n * 0.01, k * 0.01, (k.sum() + m) * 0.01) for n, k, m in zip(sizes, right, missed, strict=True)]

  def dice(smallest):
    truth, marked = [], []
    for n, k, m in zip(sizes, right, missed, strict=True):
      for size, true in zip(n, k, strict=True):
        truth += [1] * true + [0] * (size - true)
        marked += [size * 0.01 >= smallest - 1e-9] * size
      truth, marked = truth + [1] * m, marked + [False] * m
    return sk.f1_score(truth, marked)

  point = operating_point.choose_smallest(operating_point.OperatingPoint(threshold=0.3), volumes)
  every = {smallest: dice(smallest) for smallest in operating_point.SMALLEST_ML}
  assert point.validation['dice_of_volumes'] == pytest.approx(list(every.values()))
  assert point.smallest_ml == max(every, key=every.get) > 0 and point.threshold == 0.3
  nothing_found = operating_point.choose_smallest(operating_point.OperatingPoint(), [(np.zeros(0), np.zeros(0), 0.0)])
  assert nothing_found.smallest_ml == 0


def test_points_of_several_runs():
  points = [
    operating_point.OperatingPoint(threshold=t, smallest_ml=s, temperature=1 + t) for t, s in ((0.2, 0), (0.6, 1))
  ]
  (mean,) = operating_point.mean([{'lesion': point} for point in points]).values()
  assert (mean.threshold, mean.smallest_ml, mean.temperature) == (pytest.approx(0.4), 0.5, (1.2, 1.6))
  with pytest.raises(UserError, match=r'workdir: the runs differ in evaluate.lungs; give --lungs or --nolungs'):
    operating_point.mean([{'lesion': points[0]}, {'lesion': points[1].with_options(lungs=True)}])


def test_several_classes_have_a_point_each(validation, tmp_path):
  points = {'ground glass': choose(validation[2]), 'consolidation': operating_point.OperatingPoint(0.25)}
  operating_point.save_points(tmp_path, points)
  assert operating_point.load_points(tmp_path, list(points)) == points
  with pytest.raises(UserError, match=r'operating_point.json: damaged .*they are for ground glass, consolidation'):
    operating_point.load_points(tmp_path, ['consolidation'])
  changed = operating_point.with_options(points, {'consolidation': 0.5}, flips=True)
  assert changed['ground glass'].threshold == points['ground glass'].threshold
  assert changed['consolidation'].threshold == 0.5 and all(point.flips for point in changed.values())
  with pytest.raises(UserError, match='threshold: 0.5 is for one class, but the model has 2 .*give it for each class'):
    operating_point.with_options(points, 0.5)
  with pytest.raises(UserError, match="smallest_ml: the model has no class 'effusion'; give one of ground glass, cons"):
    operating_point.with_options(points, smallest_ml={'effusion': 1.0})
  assert list(operating_point.about(points)['classes']) == list(points)
  assert operating_point.about({'lesion': points['consolidation']}) == points['consolidation'].about()
