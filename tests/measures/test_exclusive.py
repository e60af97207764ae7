"""Exclusive classes: numbers and intervals compared with scikit-learn."""

import numpy as np
import pytest
from scipy import special
from sklearn import metrics as sk

from fusa_jax.measures import exclusive, metrics, statistics

NAMES = ('normal', 'COVID', 'other')


def tables(slices=300, patients=12, seed=0, of_patients=False, scans=1):
  """Tables of slices of each class, and the true class and softmax probability of each slice."""
  rng = np.random.default_rng(seed)
  owner = rng.integers(patients, size=slices)
  truth = owner % len(NAMES) if of_patients else rng.integers(len(NAMES), size=slices)
  logits = rng.normal(size=(slices, len(NAMES))) + 0.8 * np.eye(len(NAMES))[truth]
  probability = special.softmax(logits, axis=1)
  names = np.array([f'p{number}' for number in owner])
  patient = np.array([f'p{number}-{rng.integers(scans)}' for number in owner])
  found = {}
  for k, name in enumerate(NAMES):
    label, called = (truth == k).astype(int), probability[:, k] >= 0.5
    columns = {'tp': label & called, 'fp': (1 - label) & called, 'fn': label & ~called, 'tn': (1 - label) & ~called}
    found[name] = {
      **{'owner': names, 'patient': patient, 'label': label, 'logit': special.logit(probability[:, k])},
      **{'score': probability[:, k], 'reliability': np.zeros((slices, 3, 20)), 'squared_error': np.zeros(slices)},
      **columns,
    }
  return found, truth, probability


def expected(truth, probability):
  called, labels = probability.argmax(axis=1), range(len(NAMES))
  f1 = lambda average: sk.f1_score(truth, called, average=average, labels=labels)
  return {
    'accuracy': sk.accuracy_score(truth, called),
    'balanced_accuracy': sk.balanced_accuracy_score(truth, called),
    'macro_precision': sk.precision_score(truth, called, average='macro', labels=labels),
    'macro_f1': f1('macro'),
    'weighted_f1': f1('weighted'),
    'macro_auc': sk.roc_auc_score(truth, probability, multi_class='ovr', average='macro'),
  }


@pytest.mark.parametrize('seed', [0, 1])
def test_numbers_equal_scikit_learns(seed):
  found, truth, probability = tables(seed=seed)
  got = exclusive.numbers(found)
  called = probability.argmax(axis=1)
  assert got['classes'] == list(NAMES) and got['confusion'] == sk.confusion_matrix(truth, called).tolist()
  for name, value in expected(truth, probability).items():
    assert got[name] == pytest.approx(value, abs=1e-9), name
    low, high = got['intervals'][name]
    assert low < value < high
  each = sk.precision_recall_fscore_support(truth, called, labels=range(len(NAMES)))
  for name, *values in zip(NAMES, *each, strict=True):
    of_class = got['of_classes'][name]
    np.testing.assert_allclose([of_class[key] for key in (*exclusive.OF_CLASS, 'count')], values, atol=1e-9)
    assert all(
      of_class['intervals'][key][0] < of_class[key] < of_class['intervals'][key][1] for key in exclusive.OF_CLASS
    )
  assert got.keys() - exclusive.DEFINITIONS.keys() == {'classes', 'confusion', 'of_classes', 'intervals'}
  assert exclusive.LABELS.keys() == exclusive.DEFINITIONS.keys() == got['intervals'].keys()


def test_a_draw_counts_each_patient_as_often_as_it_was_drawn():
  found, truth, probability = tables(slices=150, patients=6)
  calls = exclusive.calls(found)
  weights = np.random.default_rng(0).multinomial(6, np.full(6, 1 / 6), size=5).astype(float)
  got = calls.statistic(weights)
  owner = found['COVID']['owner']
  for draw, row in enumerate(weights):
    times = dict(zip(calls.of_classes[0].owners, row.astype(int), strict=True))
    rows = np.repeat(np.arange(150), [times[name] for name in owner])
    for name, value in expected(truth[rows], probability[rows]).items():
      assert got[name][draw] == pytest.approx(value, abs=1e-9), name


def test_numbers_of_patients_equal_scikit_learns():
  found, truth, probability = tables(slices=400, patients=30, of_patients=True, scans=2)
  by_patient = exclusive.of_patients(found)
  owner = found['COVID']['owner']
  names = list(dict.fromkeys(owner.tolist()))
  means = np.array([probability[owner == name].mean(axis=0) for name in names])
  classes = np.array([truth[owner == name][0] for name in names])
  for k, table in enumerate(by_patient.values()):
    assert table['owner'].tolist() == names and table['label'].tolist() == (classes == k).astype(int).tolist()
    np.testing.assert_allclose(table['score'], means[:, k], atol=1e-12)
  got = exclusive.numbers(by_patient)
  assert got['confusion'] == sk.confusion_matrix(classes, means.argmax(1)).tolist()
  for name, value in expected(classes, means).items():
    assert got[name] == pytest.approx(value, abs=1e-9), name


def test_patients_with_slices_of_several_classes_have_no_class():
  assert exclusive.of_patients(tables()[0]) is None


def test_a_class_that_does_not_occur_leaves_means_undefined():
  found, truth, probability = tables()
  rows = truth != 1
  without = {name: {key: values[rows] for key, values in table.items()} for name, table in found.items()}
  got = exclusive.numbers(without)
  assert got['accuracy'] == pytest.approx(sk.accuracy_score(truth[rows], probability[rows].argmax(1)), abs=1e-9)
  assert got['balanced_accuracy'] is None and got['macro_auc'] is None and got['of_classes']['COVID']['recall'] is None
  assert got['of_classes']['COVID']['count'] == 0 and got['intervals']['macro_auc'] is None
  weighted = sk.f1_score(truth[rows], probability[rows].argmax(1), average='weighted')
  assert got['weighted_f1'] == pytest.approx(weighted, abs=1e-9)


def test_two_exclusive_classes_agree_with_the_binary_numbers():
  rng = np.random.default_rng(3)
  found, truth, probability = tables()
  for k, name in enumerate(NAMES):  # the per-class numbers of the same tables are those of one against the others
    one = metrics.by_patient(found[name])
    values = statistics.estimates(one.statistic(metrics.classification), len(one))
    assert values['auc'] == pytest.approx(sk.roc_auc_score(truth == k, probability[:, k]), abs=1e-9)
    assert values['f1'] == pytest.approx(sk.f1_score(truth == k, probability[:, k] >= 0.5), abs=1e-9)
  logit, label = rng.normal(size=80), rng.integers(2, size=80)
  pair = {}
  for sign, name in ((-1, 'no'), (1, 'yes')):
    own, called = (label == (sign > 0)).astype(int), sign * logit >= 0
    counts = {'tp': own & called, 'fp': (1 - own) & called, 'fn': own & ~called, 'tn': (1 - own) & ~called}
    pair[name] = {
      'owner': np.arange(80) % 8,
      'patient': np.arange(80) % 8,
      'label': own,
      'logit': sign * logit,
      **counts,
    }
    pair[name] |= {'reliability': np.zeros((80, 3, 20)), 'squared_error': np.zeros(80)}
  binary = metrics.by_patient(pair['yes'])
  values = statistics.estimates(binary.statistic(metrics.classification), 8)
  got = exclusive.numbers(pair)
  assert got['accuracy'] == pytest.approx(values['accuracy']) and got['macro_auc'] == pytest.approx(values['auc'])
  assert got['of_classes']['yes']['f1'] == pytest.approx(values['f1'])
