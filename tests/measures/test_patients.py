"""Scores of patients against float64 formulas, and their numbers against scikit-learn."""

from decimal import Decimal, getcontext

import numpy as np
import pytest
from scipy import special
from sklearn import metrics as sk

from fusa_jax.measures import patients
from fusa_jax.runs import results


def slices(seed=0, persons=14, all_with_lesion=False):
  """A table of slices: persons with one to three scans of 2 to 30 slices."""
  rng = np.random.default_rng(seed)
  rows = {'patient': [], 'owner': [], 'label': [], 'logit': []}
  for person in range(persons):
    ill = all_with_lesion or person % 3 > 0
    for scan in range(1 + person % 3):
      count = int(rng.integers(2, 31))
      label = (rng.random(count) < 0.4) & ill
      label[0] = ill
      rows['patient'] += [f's{person}-{scan}'] * count
      rows['owner'] += [f'p{person}'] * count
      rows['label'] += label.astype(int).tolist()
      rows['logit'] += (rng.normal(-1, 2, count) + 1.5 * label).tolist()
  shuffled = rng.permutation(len(rows['label']))
  return {name: np.array(values)[shuffled] for name, values in rows.items()}


@pytest.mark.parametrize('highest', patients.HIGHEST)
def test_scores_of_a_scan_are_those_of_the_formulas(highest):
  probability = np.random.default_rng(1).random(25)
  scores = patients.of_slices(special.logit(probability), highest)
  count = {0.1: 3}.get(highest, highest)  # a tenth of 25 slices, rounded up
  expected = {
    'mean_of_highest': np.sort(probability)[-int(count) :].mean(),
    'noisy_or': 1 - np.prod(1 - probability),
    'maximum': probability.max(),
  }
  for name, value in expected.items():
    assert patients.shown(name, scores[name]) == pytest.approx(value, abs=1e-12)


def test_a_short_scan_uses_all_of_its_slices():
  assert special.expit(patients.mean_of_highest(special.logit([0.2, 0.4]), 10)) == pytest.approx(0.3)


@pytest.mark.parametrize('logits', [(-60.0, -50.0, -45.0), (30.0, 45.0, 60.0), (800.0, -900.0, 0.0), (-800.0, -801.0)])
def test_noisy_or_is_exact_where_probabilities_round(logits):
  """Compares with decimal numbers of 1000 digits. With float64 probabilities, the results would be 0, 1 or infinite."""
  getcontext().prec = 1000
  healthy = Decimal(1)
  for logit in logits:
    healthy /= 1 + Decimal(logit).exp()
  expected = float(((1 - healthy) / healthy).ln())
  assert patients.noisy_or(np.array(logits)) == pytest.approx(expected, rel=1e-13)


def test_a_patient_with_several_scans_has_their_highest_score_and_any_lesion():
  table = slices()
  got = patients.table_of(table, 3, {'lesion_ml': {name: float(len(name)) for name in set(table['patient'].tolist())}})
  assert got['owner'].tolist() == list(dict.fromkeys(table['owner'].tolist()))
  for row, owner in enumerate(got['owner']):
    of_owner = table['owner'] == owner
    scans = [table['logit'][table['patient'] == scan] for scan in set(table['patient'][of_owner].tolist())]
    probability = [np.sort(special.expit(logits))[::-1] for logits in scans]
    assert special.expit(got['mean_of_highest'][row]) == pytest.approx(max(p[:3].mean() for p in probability))
    assert special.expit(got['noisy_or'][row]) == pytest.approx(max(1 - np.prod(1 - p) for p in probability))
    assert got['label'][row] == table['label'][of_owner].max()


def test_the_volume_of_a_patient_is_unknown_if_that_of_one_scan_is():
  table = slices()
  volumes = dict.fromkeys(table['patient'].tolist(), 2.0) | {'s2-0': 7.0, 's2-1': np.nan}
  del volumes['s5-2']
  got = patients.table_of(table, 3, {'lesion_ml': volumes})
  volume = dict(zip(got['owner'].tolist(), got['lesion_ml'].tolist(), strict=True))
  assert np.isnan(volume.pop('p2')) and np.isnan(volume.pop('p5')) and set(volume.values()) == {2.0}


def numbers(table, score_name='mean_of_highest', threshold=0.6, prevalences=(0.05,), **of_masks):
  columns = patients.table_of(table, 3, of_masks)
  positive = None if threshold is None else patients.shown(score_name, columns[score_name]) >= threshold
  rule = {'score_name': score_name, 'highest': 3, 'threshold': threshold, 'chosen_by': 'a test'}
  of_patients = patients.with_call(columns, score_name, positive)
  return of_patients, results.patient_numbers(of_patients, rule, prevalences)


@pytest.mark.parametrize('score_name', [*patients.OF_SLICES, 'lesion_ml'])
def test_numbers_of_patients_are_those_of_scikit_learn(score_name):
  table = slices()
  volumes = {name: float(k % 5) for k, name in enumerate(dict.fromkeys(table['patient'].tolist()))}  # has ties
  threshold = np.sort(patients.shown(score_name, patients.table_of(table, 3, {'lesion_ml': volumes})[score_name]))[5]
  of_patients, got = numbers(table, score_name, threshold, lesion_ml=volumes)
  label, score = of_patients['label'], patients.shown(score_name, of_patients['score'])
  called = score >= threshold
  tn, fp, fn, tp = sk.confusion_matrix(label, called).ravel().tolist()
  sensitivity, specificity = sk.recall_score(label, called), sk.recall_score(1 - label, ~called)
  assert got['auc'] == pytest.approx(sk.roc_auc_score(label, score), abs=1e-9)
  assert got['sensitivity'] == pytest.approx(sensitivity, abs=1e-9)
  assert got['specificity'] == pytest.approx(specificity, abs=1e-9)
  assert got['ppv'] == pytest.approx(sk.precision_score(label, called), abs=1e-9)
  assert got['npv'] == pytest.approx(sk.precision_score(1 - label, ~called), abs=1e-9)
  assert [got[key] for key in ('tp', 'fp', 'fn', 'tn')] == [tp, fp, fn, tn] and min(tp, fp) > 0
  (at,) = got['at_prevalence']
  weight = np.where(label == 1, 0.05 / label.sum(), 0.95 / (1 - label).sum())
  assert at['ppv'] == pytest.approx(sk.precision_score(label, called, sample_weight=weight), abs=1e-9)
  assert at['npv'] == pytest.approx(sk.precision_score(1 - label, ~called, sample_weight=weight), abs=1e-9)
  for name in (*patients.OF_SLICES, 'lesion_ml'):
    area = sk.roc_auc_score(label, patients.shown(name, of_patients[name]))
    assert got['auc_by_score'][name]['auc'] == pytest.approx(area, abs=1e-9)
  low, high = got['intervals']['auc']
  assert 0 <= low < got['auc'] < high <= 1
  assert got['reason'] is None and got['num_patients'] == 14 and got['num_with_lesion'] == label.sum()


def test_patients_of_one_kind_leave_numbers_undefined():
  _, got = numbers(slices(all_with_lesion=True))
  assert [got[name] for name in ('auc', 'specificity', 'ppv', 'npv')] == [None] * 4
  assert got['sensitivity'] is not None and got['intervals']['auc'] is None
  assert got['at_prevalence'][0]['ppv'] is None
  assert got['reason'] == 'all test patients have a lesion, so AUC, specificity, PPV and NPV are undefined'
  table = slices()
  healthy = {name: values[np.isin(table['owner'], ['p0', 'p3', 'p6'])] for name, values in table.items()}
  _, got = numbers(healthy)
  assert [got[name] for name in ('auc', 'sensitivity', 'ppv', 'npv')] == [None] * 4 and got['specificity'] is not None


def test_without_a_threshold_only_auc_is_given():
  of_patients, got = numbers(slices(), threshold=None)
  assert got['auc'] == pytest.approx(sk.roc_auc_score(of_patients['label'], of_patients['score']), abs=1e-9)
  assert [got[name] for name in ('sensitivity', 'specificity', 'ppv', 'npv')] == [None] * 4 and 'tp' not in got
  assert got['reason'] == 'a test'


def test_patients_with_an_undefined_score_are_left_out_and_counted():
  table = slices()
  scans = list(dict.fromkeys(table['patient'].tolist()))
  volumes = {name: float(k) for k, name in enumerate(scans)} | {'s1-0': np.nan}
  of_patients, got = numbers(table, 'lesion_ml', threshold=9.0, lesion_ml=volumes)
  known = of_patients['owner'] != 'p1'
  assert got['left_out'] == 1 and got['num_patients'] == 14
  area = sk.roc_auc_score(of_patients['label'][known], of_patients['score'][known])
  assert got['auc'] == pytest.approx(area, abs=1e-9)
  assert got['tp'] + got['fp'] + got['fn'] + got['tn'] == 13
  volumes = {name: np.nan if int(name[1:].split('-')[0]) % 3 == 0 else 1.0 for name in scans}
  _, got = numbers(table, 'lesion_ml', threshold=9.0, lesion_ml=volumes)  # all healthy patients have no score
  assert got['reason'].startswith('all test patients with a known score have a lesion, so AUC, specificity')
  _, got = numbers(table, 'lesion_ml', threshold=9.0, lesion_ml=dict.fromkeys(scans, np.nan))
  assert got['auc'] is None and got['reason'] == 'the score is unknown for all test patients'
