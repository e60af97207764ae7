"""The rule for patients is the best one in a search; patients of one kind leave it open."""

import json

import numpy as np
import one_class
import pytest
from scipy import special
from sklearn import metrics as sk

from fusa_jax.measures import patients
from fusa_jax.runs import operating_point, patient_rule
from fusa_jax.runs.patient_rule import PatientRule


def validation(seed=3, persons=20, slices=20, strength=2.0):
  """A table of slices; lesions fill six slices of a scan, so that a mean of more slices is a better score."""
  rng = np.random.default_rng(seed)
  label = np.zeros((persons, slices), int)
  label[: persons // 2, 5:11] = 1
  logit = rng.normal(-2, 2, label.shape) + strength * label
  names = np.repeat([f'p{k}' for k in range(persons)], slices)
  return {'patient': names, 'owner': names, 'label': label.ravel(), 'logit': logit.ravel()}


def searched(table, highest):
  probability = np.sort(special.expit(table['logit'].reshape(20, -1)), axis=1)[:, ::-1]
  count = {0.1: 2}.get(highest, highest)
  return table['label'].reshape(20, -1).max(axis=1), probability[:, : int(count)].mean(axis=1)


@pytest.mark.parametrize('seed', range(4))
def test_highest_has_the_best_auc_and_the_threshold_the_best_f1(seed):
  table = validation(seed)
  rule = patient_rule.choose(table, 'mean_of_highest')
  areas = [sk.roc_auc_score(*searched(table, highest)) for highest in patients.HIGHEST]
  assert rule.highest == patients.HIGHEST[int(np.argmax(areas))]
  stated = [one['auc'] for one in rule.validation['auc_of_highest']]
  np.testing.assert_allclose(stated, areas, atol=1e-9)
  label, score = searched(table, rule.highest)
  best = max(sk.f1_score(label, score >= threshold) for threshold in score)
  assert sk.f1_score(label, score >= rule.threshold) == pytest.approx(best)
  assert score.min() <= rule.threshold and not np.isclose(score, rule.threshold).any()
  assert rule.validation['sensitivity'] == pytest.approx(sk.recall_score(label, score >= rule.threshold))
  assert rule.validation['specificity'] == pytest.approx(sk.recall_score(1 - label, score < rule.threshold))


@pytest.mark.parametrize('target', [0.5, 0.9, 1.0])
def test_target_sensitivity_is_over_patients(target):
  table = validation()
  rule = patient_rule.choose(table, 'mean_of_highest', target)
  label, score = searched(table, rule.highest)
  assert sk.recall_score(label, score >= rule.threshold) >= target
  above = score[score > rule.threshold].min()
  assert sk.recall_score(label, score > above) < target or above == score.max()
  assert rule.chosen_by == f'sensitivity of at least {target:g} over the validation patients'


def test_equal_aucs_choose_the_first_in_the_list_and_equal_f1s_the_lowest_threshold():
  rule = patient_rule.choose(validation(strength=50.0), 'mean_of_highest')
  assert rule.highest == 3 and {one['auc'] for one in rule.validation['auc_of_highest']} == {1.0}
  # Scores 1, 2, 3, 4 mL of healthy, ill, healthy, ill: F1 is 4/5 at 1.5 mL, and lower elsewhere; then ties.
  names = np.array(['a', 'b', 'c', 'd'])
  table = {'patient': names, 'owner': names, 'label': np.array([0, 1, 0, 1]), 'logit': np.zeros(4)}
  volumes = {'lesion_ml': dict(zip('abcd', (1.0, 2.0, 3.0, 4.0), strict=True))}
  assert patient_rule.choose(table, 'lesion_ml', of_masks=volumes).threshold == 1.5
  table['label'] = np.array([1, 0, 0, 1])  # 2/3 if all are called, and 2/3 from 3.5 mL
  assert patient_rule.choose(table, 'lesion_ml', of_masks=volumes).threshold == 1.0


def test_an_empty_mask_is_never_called_positive():
  """F1 is best if all are called, and the target needs all of them: one patient with lesion has an empty mask."""
  names = np.array(list('abcd'))
  table = {'patient': names, 'owner': names, 'label': np.array([1, 1, 1, 0]), 'logit': np.zeros(4)}
  chosen = lambda values, target=None: patient_rule.choose(
    table, 'lesion_ml', target, {'lesion_ml': dict(zip('abcd', values, strict=True))}
  )
  for rule in (chosen((0.0, 0.5, 2.0, 0.5)), chosen((0.0, 0.5, 2.0, 0.5), 1.0)):
    assert rule.threshold == 0.25 and rule.validation['sensitivity'] == pytest.approx(2 / 3)
    assert not rule.answer(np.ones(3), 0.0)['positive'] and rule.answer(np.ones(3), 0.25)['positive']
  assert rule.chosen_by == 'best sensitivity over the validation patients; 1 would need calls of empty masks'
  assert chosen((0.0, 0.5, 2.0, 0.0), 0.6).chosen_by == 'sensitivity of at least 0.6 over the validation patients'
  none = chosen((0.0, 0.0, 0.0, 0.0))
  assert none.threshold is None and none.chosen_by == 'not chosen: the masks of all validation patients are empty'
  assert none.answer(np.ones(3), 0.0)['reason'] == none.chosen_by
  assert chosen((1.0, 2.0, 3.0, 1.0)).threshold == 1.0  # the lowest score calls all


@pytest.mark.parametrize(
  ('label', 'why'), [(1, 'all validation patients have a lesion'), (0, 'no validation patient has a lesion')]
)
def test_patients_of_one_kind_keep_the_default_without_a_call(label, why):
  table = validation()
  rule = patient_rule.choose(table | {'label': np.full(len(table['label']), label)}, 'mean_of_highest')
  assert (rule.highest, rule.threshold, rule.chosen_by) == (3, None, f'not chosen: {why}')
  answer = rule.answer(np.array([0.2, 0.4, 0.9, 0.1]))
  assert answer['score'] == pytest.approx(0.5) and answer['positive'] is None and answer['reason'].endswith(why)


def test_an_answer_is_that_of_the_formula_and_rounds_no_call_away():
  rule = PatientRule('mean_of_highest', 2, 0.6, 'a test')
  assert rule.answer(np.float32([0.5, 0.9, 0.1]))['positive'] and not rule.answer(np.float32([0.5, 0.6]))['positive']
  assert rule.answer(np.float32([0.5, 0.9, 0.1]))['score'] == pytest.approx(0.7, abs=1e-7)
  # Confident networks: the threshold is at most the log-odds 16, and float32 probabilities reach it.
  table = validation(strength=100.0)
  sure = patient_rule.choose(table | {'logit': table['logit'] + 40}, 'mean_of_highest')
  assert sure.threshold == special.expit(16.0)
  assert sure.answer(np.ones(5, np.float32))['positive'] and not sure.answer(np.full(5, 0.99, np.float32))['positive']
  share = PatientRule('lung_share', 3, 0.1, 'a test').answer(np.float32([0.5]), np.nan)
  assert share['score'] is None and share['positive'] is None and 'no lungs' in share['reason']


def test_mean_of_several_runs():
  rules = [PatientRule('noisy_or', highest, threshold, '') for highest, threshold in ((1, 0.2), (5, 0.4), (5, 0.9))]
  mean = patient_rule.mean(rules)
  assert (mean.score_name, mean.highest, mean.threshold) == ('noisy_or', 5, pytest.approx(0.5))
  assert patient_rule.mean([*rules, None]) is None
  assert patient_rule.mean([*rules, PatientRule('noisy_or')]).threshold is None
  mixed = patient_rule.mean([*rules, PatientRule('lesion_ml', 3, 2.0)])
  assert mixed.threshold is None and 'different scores of patients (lesion_ml, noisy_or)' in mixed.chosen_by
  points = [operating_point.OperatingPoint(patient=rule) for rule in rules]
  of_classes = [{'lesion': point} for point in points]
  assert operating_point.mean(of_classes)['lesion'].patient == mean


def test_the_operating_point_keeps_the_rule(tmp_path):
  rule = patient_rule.choose(validation(), 'mean_of_highest')
  point = operating_point.OperatingPoint(patient=rule)
  operating_point.save_points(tmp_path, {'lesion': point})
  assert one_class.point(tmp_path) == operating_point.OperatingPoint(**json.loads(json.dumps(vars_of(point))))
  assert one_class.point(tmp_path).patient.threshold == rule.threshold
  old = json.loads((tmp_path / 'operating_point.json').read_text())
  del old['patient']
  (tmp_path / 'operating_point.json').write_text(json.dumps(old))
  assert one_class.point(tmp_path).patient is None
  assert 'patient' not in one_class.point(tmp_path).about()


def vars_of(point):
  return json.loads(json.dumps({**vars(point), 'patient': vars(point.patient)}))


def test_a_call_by_volume_needs_the_masks_that_it_was_chosen_with():
  by_volume = operating_point.OperatingPoint(patient=PatientRule('lesion_ml', 3, 2.0, 'a test'))
  for changed in ({'threshold': 0.7}, {'lungs': True}, {'smallest_ml': 1.0}, {'flips': True}):
    other = by_volume.with_options(**changed).patient
    assert (
      other.threshold is None and other.chosen_by == f'not chosen: it was chosen with another {next(iter(changed))}'
    )
  assert by_volume.with_options(threshold=0.5, lungs=False).patient == by_volume.patient
  by_slices = operating_point.OperatingPoint(patient=PatientRule('maximum', 3, 0.2, 'a test'))
  assert by_slices.with_options(threshold=0.7).patient == by_slices.patient
