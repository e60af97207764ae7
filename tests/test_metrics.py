"""Every number against scikit-learn; what it cannot define is None."""

import numpy as np
import pytest
from sklearn import metrics as sk

from fusa_jax import metrics


def slices(truth, predicted, patient):
  """A table as evaluation makes it, of pixels [N, P]."""
  truth, predicted = np.asarray(truth, bool), np.asarray(predicted, bool)
  return {
    'patient': np.asarray(patient),
    'tp': (truth & predicted).sum(1),
    'fp': (~truth & predicted).sum(1),
    'fn': (truth & ~predicted).sum(1),
    'tn': (~truth & ~predicted).sum(1),
  }


def test_segmentation_against_sklearn():
  rng = np.random.default_rng(0)
  truth = rng.random((12, 200)) < 0.1
  predicted = truth ^ (rng.random((12, 200)) < 0.05)
  patient = np.repeat(['a', 'b', 'c'], 4)
  got = metrics.segmentation(slices(truth, predicted, patient))
  t, p = truth.ravel(), predicted.ravel()
  each = [sk.f1_score(truth[patient == k].ravel(), predicted[patient == k].ravel()) for k in 'abc']
  expected = {
    'dice': sk.f1_score(t, p),
    'dice_macro': sk.f1_score(t, p, average='macro'),
    'dice_per_patient': np.mean(each),
    'precision': sk.precision_score(t, p),
    'recall': sk.recall_score(t, p),
  }
  expected |= dict(zip(('tn', 'fp', 'fn', 'tp'), sk.confusion_matrix(t, p).ravel(), strict=True))
  assert got == pytest.approx(expected)


@pytest.mark.parametrize('ties', [False, True])
def test_classification_against_sklearn(ties):
  rng = np.random.default_rng(1)
  label = rng.random(300) < 0.4
  score = np.clip(0.4 * label + rng.normal(0.3, 0.2, 300), 0, 1)
  if ties:
    score = np.round(score, 1)
  predicted = score >= 0.5
  table = {'label': label, 'score': score, **slices(label[:, None], predicted[:, None], np.arange(300))}
  expected = {
    'accuracy': sk.accuracy_score(label, predicted),
    'precision': sk.precision_score(label, predicted),
    'recall': sk.recall_score(label, predicted),
    'f1': sk.f1_score(label, predicted),
    'auc': sk.roc_auc_score(label, score),
  }
  expected |= dict(zip(('tn', 'fp', 'fn', 'tp'), sk.confusion_matrix(label, predicted).ravel(), strict=True))
  assert metrics.classification(table) == pytest.approx(expected)
  false, true, _ = sk.roc_curve(label, score, drop_intermediate=False)
  np.testing.assert_allclose(np.stack(metrics.roc(label, score)), [false, true])


def test_what_is_undefined_is_none():
  nothing = slices(np.zeros((2, 5)), np.zeros((2, 5)), ['a', 'b'])
  got = metrics.segmentation(nothing)
  assert [got[key] for key in ('dice', 'dice_macro', 'dice_per_patient', 'precision', 'recall')] == [None] * 5
  table = {'label': np.zeros(2, int), 'score': np.array([0.1, 0.2]), **nothing}
  got = metrics.classification(table)
  assert [got[key] for key in ('precision', 'recall', 'f1', 'auc')] == [None] * 4
  assert got['accuracy'] == 1.0


def test_patients_without_lesion_are_left_out_unless_something_was_marked():
  truth = np.array([[1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
  predicted = np.array([[1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]])
  table = slices(truth, predicted, ['ill', 'well', 'marked'])
  rows = {row['patient']: row for row in metrics.by_patient(table)}
  assert rows['ill']['dice'] == pytest.approx(2 / 3)
  assert rows['well']['dice'] is None
  assert rows['marked']['dice'] == 0
  assert metrics.segmentation(table)['dice_per_patient'] == pytest.approx(1 / 3)


def test_counts_do_not_overflow():
  """More voxels than an int32 holds, as a release of 13 705 slices of 512 x 512 has."""
  table = {key: np.full(13705, 512 * 512, np.int32) for key in ('tp', 'fp', 'fn', 'tn')}
  table['patient'] = np.arange(13705)
  got = metrics.segmentation(table)
  assert got['tp'] == 13705 * 512 * 512
  assert got['dice'] == 0.5
