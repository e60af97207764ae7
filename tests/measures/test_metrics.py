"""Each metric compared with scikit-learn; undefined values are None."""

import itertools

import numpy as np
import pytest
from sklearn import metrics as sk
from sklearn.calibration import calibration_curve

from fusa_jax.measures import metrics, statistics


def slices(truth, predicted, patient, **columns):
  """Makes a table like that of evaluation from pixels [N, P]."""
  truth, predicted = np.asarray(truth, bool), np.asarray(predicted, bool)
  return {
    'patient': np.asarray(patient),
    'owner': np.asarray(patient),
    'tp': (truth & predicted).sum(1),
    'fp': (~truth & predicted).sum(1),
    'fn': (truth & ~predicted).sum(1),
    'tn': (~truth & ~predicted).sum(1),
    'label': truth.any(axis=1),
    'logit': predicted.any(axis=1).astype(float),
    'reliability': np.zeros((len(truth), 3, 20)),
    'squared_error': np.zeros(len(truth)),
  } | columns


def of(table, definition):
  patients = metrics.by_patient(table)
  return statistics.estimates(patients.statistic(definition), len(patients))


def reliability(truth, probability):
  """Returns the reliability counts of one slice per bin, with NumPy."""
  index = np.minimum((probability * 20).astype(int), 19)
  count = lambda weights: np.bincount(index, weights, 20)
  return np.stack([count(np.ones(len(truth))), count(truth), count(probability)])


def test_segmentation_against_sklearn():
  rng = np.random.default_rng(0)
  truth = rng.random((12, 200)) < 0.1
  truth[[0, 5]] = False
  predicted = truth ^ (rng.random((12, 200)) < 0.05)
  predicted[0] = False
  patient = np.repeat(['b', 'a', 'c'], 4)
  got = of(slices(truth, predicted, patient), metrics.segmentation)
  t, p = truth.ravel(), predicted.ravel()
  patients = [sk.f1_score(truth[patient == k].ravel(), predicted[patient == k].ravel()) for k in 'abc']
  single = np.array([sk.f1_score(*rows, zero_division=1) for rows in zip(truth, predicted, strict=True)])
  expected = {
    'dice': sk.f1_score(t, p),
    'dice_macro': sk.f1_score(t, p, average='macro'),
    'dice_per_patient': np.mean(patients),
    'dice_lesion_slices': single[truth.any(axis=1)].mean(),
    'dice_slices': single[1:].mean(),
    'dice_slices_empty_is_1': single.mean(),
    'precision': sk.precision_score(t, p),
    'recall': sk.recall_score(t, p),
    'specificity': sk.recall_score(~t, ~p),
    'npv': sk.precision_score(~t, ~p),
  }
  assert {name: got[name] for name in expected} == pytest.approx(expected)


@pytest.mark.parametrize('ties', [False, True])
def test_classification_against_sklearn(ties):
  rng = np.random.default_rng(1)
  label = rng.random(300) < 0.4
  score = np.clip(0.4 * label + rng.normal(0.3, 0.2, 300), 0, 1)
  if ties:
    score = np.round(score, 1)
  predicted = score >= 0.5
  patient = rng.integers(0, 20, 300)
  each = np.stack([reliability(label[[i]], score[[i]]) for i in range(300)])
  table = slices(
    label[:, None], predicted[:, None], patient, logit=score, reliability=each, squared_error=(score - label) ** 2
  )
  share, mean = calibration_curve(label, score, n_bins=20)
  sizes = np.histogram(score, np.linspace(0, 1, 21))[0]
  expected = {
    'accuracy': sk.accuracy_score(label, predicted),
    'precision': sk.precision_score(label, predicted),
    'recall': sk.recall_score(label, predicted),
    'f1': sk.f1_score(label, predicted),
    'auc': sk.roc_auc_score(label, score),
    'specificity': sk.recall_score(~label, ~predicted),
    'npv': sk.precision_score(~label, ~predicted),
    'brier': sk.brier_score_loss(label, score),
    'ece': np.sum(np.abs(share - mean) * sizes[sizes > 0]) / 300,
  }
  got = of(table, metrics.classification)
  if ties:  # scikit-learn's bins include their upper edge; with ties all scores lie on edges
    got.pop('ece'), expected.pop('ece')
  assert got == pytest.approx(expected)
  false, true, _ = sk.roc_curve(label, score, drop_intermediate=False)
  np.testing.assert_allclose(np.stack(metrics.roc(label, score)), [false, true])


def test_resampled_patients_equal_their_copied_slices():
  """A patient who is drawn twice counts as two, also in AUC."""
  rng = np.random.default_rng(2)
  patient = rng.integers(0, 8, 100)
  truth = rng.random((100, 5)) < 0.3
  table = slices(truth, truth ^ (rng.random((100, 5)) < 0.2), patient, logit=np.round(rng.random(100), 1))
  patients = metrics.by_patient(table)
  weights = rng.multinomial(8, np.full(8, 1 / 8), size=20)
  for definition in (metrics.segmentation, metrics.classification, metrics.detection):
    values = patients.statistic(definition)(weights.astype(float))
    for draw, row in enumerate(weights):
      rows = np.concatenate([np.flatnonzero(patient == patients.names[k]) for k in np.repeat(np.arange(8), row)])
      copy = np.concatenate(
        [np.full((patient == patients.names[k]).sum(), n) for n, k in enumerate(np.repeat(np.arange(8), row))]
      )
      expected = of({key: values[rows] for key, values in table.items()} | {'patient': copy, 'owner': copy}, definition)
      got = {name: statistics.defined(v[draw]) for name, v in values.items()}
      assert got == pytest.approx(expected)


def test_detection_and_other_prevalences():
  """A slice counts as positive if any pixel is marked. Predictive values at a prevalence of 10% by hand."""
  truth = np.array([[1, 0], [1, 1], [0, 0], [0, 0], [0, 0]])
  predicted = np.array([[0, 1], [0, 0], [0, 1], [0, 0], [0, 0]])
  table = slices(truth, predicted, ['a', 'a', 'b', 'b', 'b'])
  got = of(table, metrics.detection)
  expected = {'sensitivity': 1 / 2, 'specificity': 2 / 3, 'ppv': 1 / 2, 'npv': 2 / 3}
  assert {name: got[name] for name in expected} == pytest.approx(expected)
  # 100 of 1000 slices have a lesion and 50 of them are found; 300 of the other 900 are false positives.
  assert of(table, lambda totals: metrics.detection_at(totals, 0.1)) == pytest.approx(
    {'ppv': 50 / 350, 'npv': 600 / 650}
  )


def test_scans_of_one_person_count_as_one_patient():
  """Two scans of each person have the numbers and intervals of the same slices stored as one scan, and NumPy's."""
  rng = np.random.default_rng(5)
  person, scan = np.repeat(np.arange(9), 8), np.repeat(np.arange(18), 4)
  truth = rng.random((72, 30)) < np.repeat(rng.uniform(0.05, 0.5, 9), 8)[:, None]
  predicted = truth ^ (rng.random((72, 30)) < np.repeat(rng.uniform(0.02, 0.3, 9), 8)[:, None])
  table = slices(truth, predicted, [f'p{k}' for k in person], logit=np.round(rng.random(72), 1))
  as_one, as_two = (metrics.by_patient(t) for t in (table, table | {'patient': np.array([f's{k}' for k in scan])}))
  assert len(as_two) == 9 and as_two.names == as_two.owners == as_one.names
  assert as_two.num_scans.tolist() == [2] * 9 and as_one.num_scans.tolist() == [1] * 9
  for definition in (metrics.segmentation, metrics.detection):
    one, two = (each.statistic(definition) for each in (as_one, as_two))
    assert statistics.estimates(one, 9) == statistics.estimates(two, 9)
    assert statistics.intervals(one, 9) == statistics.intervals(two, 9)
  weights = np.random.default_rng(statistics.SEED).multinomial(9, np.full(9, 1 / 9), size=250)
  added = lambda values: np.array([values[person == k].sum() for k in range(9)])
  dice = 2 * added(truth & predicted) / (added(truth) + added(predicted))
  got = as_two.statistic(metrics.segmentation)(weights.astype(float))['dice_per_patient']
  np.testing.assert_allclose(got, weights @ dice / 9)


def test_a_person_with_one_scan_has_its_name():
  table = slices(np.ones((3, 2)), np.ones((3, 2)), ['a', 'b', 'c']) | {'owner': np.array(['x', 'y', 'x'])}
  assert [(row['patient'], row['num_slices']) for row in metrics.patient_rows(metrics.by_patient(table))] == [
    ('x', 2),
    ('b', 1),
  ]


def test_undefined_values_are_none():
  nothing = slices(np.zeros((2, 5)), np.zeros((2, 5)), ['a', 'b'])
  got = of(nothing, metrics.segmentation)
  assert got.pop('specificity') == got.pop('npv') == got.pop('dice_slices_empty_is_1') == 1
  assert set(got.values()) == {None}
  got = of(nothing, metrics.classification)
  assert [got[key] for key in ('precision', 'recall', 'f1', 'auc')] == [None] * 4
  assert got['accuracy'] == 1.0


def test_patients_without_lesion_count_only_if_something_is_marked():
  truth = np.array([[1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
  predicted = np.array([[1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]])
  table = slices(truth, predicted, ['ill', 'well', 'marked'])
  rows = {row['patient']: row for row in metrics.patient_rows(metrics.by_patient(table))}
  assert list(rows) == ['ill', 'well', 'marked']
  assert rows['ill']['dice'] == pytest.approx(2 / 3)
  assert np.isnan(rows['well']['dice'])
  assert rows['marked']['dice'] == 0
  assert of(table, metrics.segmentation)['dice_per_patient'] == pytest.approx(1 / 3)


def test_counts_do_not_overflow():
  """13 705 slices of 512 x 512 have more voxels than an int32 can count."""
  count = 13705
  table = slices(np.zeros((count, 1)), np.zeros((count, 1)), np.arange(count) // 70)
  table |= {key: np.full(count, 512 * 512, np.int32) for key in metrics.COUNTS}
  patients = metrics.by_patient(table)
  assert patients.sums['tp'].sum() == count * 512 * 512
  assert of(table, metrics.segmentation)['dice'] == 0.5


@pytest.mark.parametrize('levels', [3, 1000])
def test_wins_count_each_pair_of_slices(levels):
  """Against a loop over all pairs, with many equal scores and with few; patients' slices are not in order."""
  rng = np.random.default_rng(levels)
  patient, label = rng.integers(0, 5, 80), rng.random(80) < 0.4
  score = rng.integers(0, levels, 80).astype(float)
  expected = np.zeros((5, 5))
  for i, j in itertools.product(np.flatnonzero(label), np.flatnonzero(~label)):
    expected[patient[i], patient[j]] += (score[i] > score[j]) + 0.5 * (score[i] == score[j])
  np.testing.assert_array_equal(metrics._wins(label, score, patient, 5), expected)
