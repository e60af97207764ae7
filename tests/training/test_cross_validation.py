"""Cross-validation with one command: each patient is tested once, by a model not trained on it; it can be resumed."""

import csv
import dataclasses
import json
import shutil

import numpy as np
import one_class
import pytest
from conftest import PATIENTS, SIZE, SLICES, tiny
from sklearn import metrics as sk

from configs import cls
from data import prepare
from fusa_jax.inference import export, predictor
from fusa_jax.measures import patients
from fusa_jax.runs import operating_point, report, result_files, results, run_config
from fusa_jax.runs.patient_rule import PatientRule
from fusa_jax.scans import volume_files
from fusa_jax.system.errors import UserError
from fusa_jax.training import cross_validation, datasets, evaluate, train


def protocol(**overrides):
  return tiny(cls, **{'data.fold': 'all', 'train.steps': 2, **overrides})


@pytest.fixture(scope='module')
def made(raw_dir, data_dir, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('folds')
  cross_validation.cross_validate(protocol(), workdir, data_dir, prepare.scans(raw_dir))
  return workdir


def result_of(workdir):
  return json.loads((workdir / 'test' / 'metrics.json').read_text())


@pytest.mark.slow
def test_every_patient_is_tested_once_by_a_model_not_trained_on_it(made, data_dir):
  with (made / 'test' / 'slices.csv').open(newline='') as file:
    rows = list(csv.DictReader(file))
  assert len(rows) == len({(row['patient'], row['slice']) for row in rows}) == PATIENTS * SLICES
  for fold in range(5):
    with (made / f'fold{fold}' / 'test' / 'slices.csv').open(newline='') as file:
      tested = {row['patient'] for row in csv.DictReader(file)}
    dataset = datasets.load_dataset(data_dir, fold, SIZE)
    assert tested == set(dataset.test.patient.tolist())
    assert not tested & (set(dataset.train.patient.tolist()) | set(dataset.validation.patient.tolist()))
  label, score = (np.array([float(row[key]) for row in rows]) for key in ('label', 'score'))
  result = result_of(made)
  assert result['auc'] == pytest.approx(sk.roc_auc_score(label, score), abs=1e-3)  # rounding makes ties
  assert result['accuracy'] == pytest.approx(sk.accuracy_score(label, score >= 0.5))
  low, high = result['intervals']['accuracy']
  assert low < result['accuracy'] < high


@pytest.mark.slow
def test_results_of_single_folds_and_their_spread_are_reported(made):
  result = result_of(made)
  each = [result_of(made / f'fold{k}') for k in range(5)]
  assert [row['accuracy'] for row in result['folds']] == [one['accuracy'] for one in each]
  assert [row['num_patients'] for row in result['folds']] == [one['num_patients'] for one in each]
  accuracies = [one['accuracy'] for one in each]
  assert result['over_folds']['accuracy'] == pytest.approx(
    {'low': min(accuracies), 'high': max(accuracies), 'mean': np.mean(accuracies), 'sd': np.std(accuracies, ddof=1)}
  )
  assert result['operating_point']['threshold'] == [one['operating_point']['threshold'] for one in each]


@pytest.mark.slow
def test_patients_keep_the_rule_of_their_own_fold(made):
  """Two of the ten phantoms are healthy: most validation folds have none, and these runs call no patient."""
  got, folds = result_of(made)['patient'], [result_of(made / f'fold{k}')['patient'] for k in range(5)]
  assert got['threshold'] == [one['threshold'] for one in folds] and None in got['threshold']
  assert got['highest'] == [one['highest'] for one in folds] and got['score_name'] == 'mean_of_highest'
  assert got['sensitivity'] is None and got['reason'] == 'not chosen: all validation patients have a lesion'
  for key in ('num_patients', 'num_with_lesion'):
    assert got[key] == sum(one[key] for one in folds)
  table = one_class.part(made).patients
  called = np.concatenate([one_class.part(made / f'fold{k}').patients['positive'] for k in range(5)])
  np.testing.assert_array_equal(table['positive'], called)
  assert got['auc'] == pytest.approx(sk.roc_auc_score(table['label'], table['score']), abs=1e-9)
  assert len(table['label']) == PATIENTS


def test_the_calls_of_the_folds_are_pooled():
  rng, tables, rules = np.random.default_rng(1), [], []
  for threshold in (0.3, 0.7):
    label = np.arange(8) % 2
    columns = {'owner': np.array([f'{threshold}{k}' for k in range(8)]), 'label': label}
    columns |= {'mean_of_highest': rng.normal(label)}
    rule = PatientRule('mean_of_highest', 3, threshold, 'a test')
    rules.append(rule.about())
    tables.append(patients.with_call(columns, rule.score_name, rule.positive(columns['mean_of_highest'])))
  _, got = cross_validation._pool_patients(tables, rules, (0.1,), [{}, {}])
  label = np.concatenate([one['label'] for one in tables])
  score = np.concatenate([one['mean_of_highest'] for one in tables])
  called = 1 / (1 + np.exp(-score)) >= np.repeat([0.3, 0.7], 8)
  assert got['sensitivity'] == pytest.approx(sk.recall_score(label, called), abs=1e-9)
  assert got['specificity'] == pytest.approx(sk.recall_score(1 - label, ~called), abs=1e-9)
  assert got['auc'] == pytest.approx(sk.roc_auc_score(label, score), abs=1e-9)
  assert got['threshold'] == [0.3, 0.7] and got['reason'] is None


def test_folds_with_different_scores_of_patients_get_no_call():
  rng = np.random.default_rng(0)
  tables, rules = [], []
  for fold, name in enumerate(('lesion_ml', 'mean_of_highest')):
    columns = {'owner': np.array([f'p{fold}{k}' for k in range(6)]), 'label': np.arange(6) % 2}
    columns |= {score: rng.normal(size=6) for score in ('mean_of_highest', 'noisy_or', 'maximum', name)}
    tables.append(patients.with_call(columns, name, np.ones(6)))
    rules.append(PatientRule(name, 3, 0.5, 'a test').about())
  table, got = cross_validation._pool_patients(tables, rules, (0.1,), [{}, {}])
  both = np.concatenate([one['mean_of_highest'] for one in tables])
  assert got['auc'] == pytest.approx(sk.roc_auc_score(table['label'], both), abs=1e-9)
  assert got['sensitivity'] is None and 'different scores of patients (lesion_ml, mean_of_highest)' in got['reason']
  # A fold without a threshold: only its reason is named.
  tables[1] = patients.with_call(tables[0], 'lesion_ml', None)
  rules[1] = PatientRule('lesion_ml').without_call('no validation patient has a lesion').about()
  _, got = cross_validation._pool_patients(tables, rules, (0.1,), [{}, {}])
  assert got['sensitivity'] is None and got['reason'] == 'not chosen: no validation patient has a lesion'
  table, got = cross_validation._pool_patients([tables[0], None], [rules[0], None], (0.1,), [{}, {}])
  assert table is None and got['auc'] is None and got['reason'] == operating_point.NO_RULE


@pytest.mark.slow
def test_finished_folds_are_kept_and_another_protocol_is_refused(made, data_dir, monkeypatch):
  trained = []
  monkeypatch.setattr(train, 'train', lambda config, *_: trained.append(config.data.fold))
  before = (made / 'test' / 'metrics.json').read_bytes()
  cross_validation.cross_validate(protocol(), made, data_dir)
  assert not trained
  assert (made / 'test' / 'metrics.json').read_bytes() == before
  with pytest.raises(UserError, match='holds a run with another config: train.learning_rate'):
    cross_validation.cross_validate(protocol(**{'train.learning_rate': 0.1}), made, data_dir)


@pytest.mark.slow
def test_resumes_unfinished_folds(made, raw_dir, data_dir, tmp_path, monkeypatch):
  """One fold is not tested yet, and one was tested with other options. Only these two are evaluated."""
  workdir = tmp_path / 'folds'
  shutil.copytree(made, workdir)
  (workdir / 'fold3' / 'test' / 'metrics.json').unlink()
  other = protocol(**{'data.fold': 1, 'evaluate.target_sensitivity': 0.9})
  evaluate.evaluate(other, workdir / 'fold1', data_dir, prepare.scans(raw_dir))
  done, original = [], evaluate.evaluate
  monkeypatch.setattr(
    evaluate, 'evaluate', lambda config, *rest: (done.append(config.data.fold), original(config, *rest))
  )
  cross_validation.cross_validate(protocol(), workdir, data_dir, prepare.scans(raw_dir))
  assert done == [1, 3]
  without_commit = lambda folder: {k: v for k, v in result_of(folder).items() if k != 'commit'}
  assert without_commit(workdir) == without_commit(made)


@pytest.mark.slow
def test_a_cohort_that_changed_between_folds_is_refused(made, data_dir, tmp_path):
  """Two folds tested the same patients and none tested the others, as after files were added."""
  workdir = tmp_path / 'folds'
  shutil.copytree(made, workdir)
  table, result = one_class.part(workdir / 'fold0').table, result_files.read_numbers(workdir / 'fold1')
  result_files.write_test(workdir / 'fold1' / 'test', result, {'lesion': results.Part(table)})
  (workdir / 'test' / 'metrics.json').unlink()
  with pytest.raises(UserError, match='the folds do not test each patient of .* once, because files were added'):
    cross_validation.cross_validate(protocol(), workdir, data_dir)


@pytest.mark.slow
def test_evaluate_again_and_report(made, data_dir):
  before = result_of(made)
  cross_validation.evaluate_again(protocol(), made, data_dir)
  assert result_of(made) == before
  text = report.write_report(made, [datasets.card(data_dir, 'all')]).read_text()
  assert 'all folds, each patient tested once' in text
  assert 'The folds share training patients, so they are not independent.' in text


@pytest.mark.slow
def test_the_pool_on_other_data_follows_the_operating_points_of_the_folds(made, data_dir, tmp_path):
  """The same slices count as other data. A fold then gets another operating point, and is tested there again."""
  workdir = tmp_path / 'folds'
  shutil.copytree(made, workdir)
  for path in workdir.glob('fold*/split.json'):
    path.write_text(json.dumps(json.loads(path.read_text()) | {'sha256': 'other'}))
  cross_validation.evaluate_again(protocol(), workdir, data_dir)
  (test,) = workdir.glob('test-*')
  point = one_class.point(workdir / 'fold1')
  changed = dataclasses.replace(point, threshold=0.0, bin=0)
  operating_point.save_points(workdir / 'fold1', {'lesion': changed})
  before = json.loads((test / 'metrics.json').read_text())
  after = cross_validation.evaluate_again(protocol(), workdir, data_dir)
  assert after['operating_point']['threshold'][1] == 0 and before['operating_point']['threshold'][1] > 0
  folds = [result_files.read_numbers(workdir / f'fold{k}', test.name) for k in range(5)]
  assert after['operating_point']['tp'] == sum(one['operating_point']['tp'] for one in folds)
  assert json.loads((test / 'metrics.json').read_text())['operating_point'] == after['operating_point']


@pytest.mark.slow
def test_prediction_is_the_mean_of_the_folds(made, raw_dir):
  """Compares the prediction with NumPy's mean over the folds. The threshold is the mean of the folds' thresholds."""
  scan = volume_files.read_scan(raw_dir / 'volume-phantom-A-0001_ct.nii.gz')
  scores = lambda run: run.probabilities(run.prepare([scan]))
  folds, together = (
    [predictor.load_predictor(made / f'fold{fold}') for fold in range(5)],
    predictor.load_predictor(made),
  )
  each = [scores(fold) for fold in folds]
  assert np.std(each, axis=0).min() > 1e-4
  np.testing.assert_allclose(scores(together), np.mean(each, axis=0, dtype=np.float64), atol=1e-6)
  threshold = lambda run: run.points['lesion'].threshold
  assert threshold(together) == pytest.approx(np.mean([threshold(fold) for fold in folds]))
  assert together(scan).numbers['step'] == [fold.model.step for fold in folds]


@pytest.mark.slow
def test_bundle_is_the_mean_of_the_folds_and_its_card_says_so(made, raw_dir, tmp_path):
  export.write_bundle([made], tmp_path / 'bundle')
  scan = volume_files.read_scan(raw_dir / 'volume-phantom-A-0001_ct.nii.gz')
  bundle, together = predictor.load_predictor(tmp_path / 'bundle'), predictor.load_predictor(made)
  exported, expected = (run.probabilities(run.prepare([scan])) for run in (bundle, together))
  np.testing.assert_allclose(exported, expected, atol=1e-5)
  assert bundle(scan).numbers['step'] == together(scan).numbers['step']
  card, result = (tmp_path / 'bundle' / 'README.md').read_text(), result_of(made)
  assert f'| 0 to 4, each patient by the network that had not seen it | {result["num_patients"]} |' in card
  assert f'| {result["accuracy"]:.4f} [' in card and 'This bundle returns their mean, which was not evaluated.' in card


def test_prediction_needs_a_finished_cross_validation(tmp_path):
  run_config.save_config(tmp_path, protocol())
  with pytest.raises(UserError, match=r'is a cross-validation that is not complete; .*, .*fold0'):
    predictor.load_predictor(tmp_path)


@pytest.mark.parametrize('fold', ['one', 5, -1, 1.5])
def test_an_invalid_fold_is_refused(data_dir, fold):
  with pytest.raises(UserError, match=r"data.fold: .* is not a fold of .*; give 0 to 4, or 'all' for cross-validation"):
    datasets.load_dataset(data_dir, fold, SIZE)
