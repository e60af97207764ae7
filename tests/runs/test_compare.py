"""Paired differences of the same patients, compared with scipy; and refusals."""

import shutil

import numpy as np
import one_class
import pytest
from conftest import tiny
from scipy import stats
from sklearn import metrics as sk

from fusa_jax.measures import metrics
from fusa_jax.runs import compare, result_files, run_config
from fusa_jax.system import own_files
from fusa_jax.system.errors import UserError
from fusa_jax.tasks import CLASSIFICATION, SEGMENTATION


def table(rng, quality, patients=12, slices=5, pixels=400):
  """Makes the table of a segmenter; the true masks are the same for every quality."""
  truth = np.random.default_rng(0).random((patients * slices, pixels)) < 0.1
  called = np.where(rng.random(truth.shape) < quality, truth, rng.random(truth.shape) < 0.1)
  count = lambda where: where.sum(axis=1)
  counts = {
    'tp': count(truth & called),
    'fp': count(~truth & called),
    'fn': count(truth & ~called),
    'tn': count(~truth & ~called),
  }
  return counts | {
    'patient': np.repeat([f'p{k}' for k in range(patients)], slices),
    'owner': np.repeat([f'p{k}' for k in range(patients)], slices),
    'slice': np.tile(np.arange(slices), patients),
    'label': truth.any(axis=1).astype(int),
    'logit': called.mean(axis=1),
    'reliability': np.zeros((len(truth), 3, 20)),
    'squared_error': np.zeros(len(truth)),
  }


def paired(one, other):
  """Compares one table with one other table."""
  return compare.paired(SEGMENTATION, [one], [other])


@pytest.fixture(scope='module')
def pair():
  rng = np.random.default_rng(1)
  return table(rng, 0.75), table(rng, 0.6)


def test_differences_are_paired_by_patient(pair):
  """Compares with the Dice of each patient by hand, scipy's interval of a mean, and the p-value over all sign flips."""
  got = paired(*pair)
  dice = []
  for one in pair:
    sums = {key: np.add.reduceat(one[key], np.arange(0, 60, 5)) for key in metrics.COUNTS}
    dice.append(2 * sums['tp'] / (2 * sums['tp'] + sums['fp'] + sums['fn']))
  gains = dice[0] - dice[1]
  mine = got['per_patient']
  assert mine['difference'] == pytest.approx(gains.mean())
  assert (mine['better'], mine['worse'], mine['left_out']) == ((gains > 0).sum(), (gains < 0).sum(), 0)
  assert mine['interval'] == pytest.approx(list(stats.ttest_1samp(gains, 0).confidence_interval()))
  flips = 1 - 2 * ((np.arange(2**12)[:, None] >> np.arange(12)) & 1)
  assert mine['p'] == pytest.approx(np.mean(np.abs((flips * gains).mean(1)) >= abs(gains.mean()) - 1e-12))
  number = got['numbers']['dice']
  assert number['difference'] == pytest.approx(number['run'] - number['against'])
  assert 0 < number['interval'][0] < number['difference'] < number['interval'][1]


def test_order_of_slices_does_not_matter_and_a_run_is_equal_to_itself(pair):
  mixed = np.random.default_rng(2).permutation(60)
  shuffled = {key: values[mixed] for key, values in pair[1].items()}
  assert paired(pair[0], shuffled) == paired(*pair)
  same = paired(pair[0], pair[0])
  assert same['per_patient']['p'] == 1
  assert same['numbers']['dice']['interval'] == [0, 0]


def test_patients_with_an_undefined_score_are_left_out_and_counted(pair):
  """A patient has no lesion; the first run marks nothing, the second marks something."""
  one, other = ({key: values.copy() for key, values in each.items()} for each in pair)
  for each, marked in ((one, 0), (other, 7)):
    each['label'][:5] = 0
    for key, value in (('tp', 0), ('fn', 0), ('fp', marked), ('tn', 400 - marked)):
      each[key][:5] = value
  got = paired(one, other)['per_patient']
  assert (got['patients'], got['left_out']) == (11, 1)


@pytest.fixture(scope='module')
def seeds():
  """Three seeds of a better model and two of a worse one."""
  rng = np.random.default_rng(5)
  return [table(rng, 0.75) for _ in range(3)], [table(rng, 0.6) for _ in range(2)]


def test_several_seeds_count_as_their_mean(seeds):
  """By hand: means over the seeds of each patient's Dice and of the pooled Dice, with the same draws for both sides."""
  got = compare.paired(SEGMENTATION, *seeds)
  sums = [
    [{key: each[key].reshape(12, 5).sum(axis=1) for key in metrics.COUNTS} for each in reversed(side)] for side in seeds
  ]
  dice = lambda n: 2 * n['tp'] / (2 * n['tp'] + n['fp'] + n['fn'])
  gains = np.subtract(*(np.mean([dice(n) for n in side], axis=0) for side in sums))
  mine = got['per_patient']
  assert mine['difference'] == pytest.approx(gains.mean(), rel=1e-12)
  assert (mine['patients'], mine['better'], mine['left_out']) == (12, (gains > 0).sum(), 0)
  flips = 1 - 2 * ((np.arange(2**12)[:, None] >> np.arange(12)) & 1)
  assert mine['p'] == pytest.approx(np.mean(np.abs((flips * gains).mean(1)) >= abs(gains.mean()) - 1e-12))
  # The patients are resampled: the t interval of twelve differences is close, that of all 36 x 24 pairs is not.
  expected = stats.t.interval(0.95, 11, gains.mean(), stats.sem(gains))
  assert mine['interval'] == pytest.approx(expected, abs=0.15 * (expected[1] - expected[0]))

  pooled = lambda drawn: np.subtract(
    *(np.mean([dice({key: v[drawn].sum() for key, v in n.items()}) for n in side]) for side in sums)
  )
  number = got['numbers']['dice']
  assert number['difference'] == pytest.approx(pooled(np.arange(12)), rel=1e-12)
  assert number['run'] - number['against'] == pytest.approx(number['difference'], rel=1e-12)
  rng = np.random.default_rng(0)
  drawn = [pooled(rng.integers(12, size=12)) for _ in range(4000)]
  low, high = np.quantile(drawn, [0.0139, 0.9861])  # Phi(sqrt(12 / 11) t), t: 2.5% point for 11 degrees of freedom
  assert number['interval'] == pytest.approx([low, high], abs=0.1 * (high - low))


def test_copies_of_a_run_add_no_evidence(pair):
  """Copies of a run add no evidence: they change neither the interval nor the p-value."""
  assert compare.paired(SEGMENTATION, [pair[0]] * 2, [pair[1]] * 4) == paired(*pair)


def test_a_patient_undefined_in_one_seed_is_left_out(seeds):
  """The patient has no lesion, and one of three seeds marks nothing: the mean over the seeds is undefined."""
  one, other = ([{key: values.copy() for key, values in each.items()} for each in side] for side in seeds)
  for each, marked in zip((*one, *other), (3, 0, 4, 5, 6), strict=True):
    each['label'][:5] = 0
    for key, value in (('tp', 0), ('fn', 0), ('fp', marked), ('tn', 400 - marked)):
      each[key][:5] = value
  got = compare.paired(SEGMENTATION, one, other)['per_patient']
  assert (got['patients'], got['left_out']) == (11, 1)


@pytest.mark.parametrize('side', [0, 1])
def test_every_seed_must_have_the_same_test_set(seeds, side):
  sides = [list(each) for each in seeds]
  sides[side][1] = sides[side][1] | {'tp': sides[side][1]['tp'] + 1}
  with pytest.raises(UserError, match='the test sets differ .not the same lesions'):
    compare.paired(SEGMENTATION, *sides)


def test_tables_of_other_patients_are_refused(pair):
  other = pair[1] | {'patient': np.char.add(pair[1]['patient'], 'x')}
  with pytest.raises(UserError, match='the test sets differ .12 patients are only in the first, 12 only in the second'):
    paired(pair[0], other)


def test_scans_of_one_person_are_one_pair(pair):
  """Two scans of each of six persons give the differences of the same slices stored as one scan per person."""
  of = lambda number: np.array([f'p{k // number:02d}' for k in range(12) for _ in range(5)])
  numbered = {'slice': np.tile(np.arange(10), 6)}
  one = paired(*(each | numbered | dict.fromkeys(('patient', 'owner'), of(2)) for each in pair))
  two = [each | numbered | {'patient': of(1), 'owner': of(2)} for each in pair]
  got = paired(*two)
  assert got == one and got['per_patient']['patients'] == 6
  with pytest.raises(UserError, match='not the same scans of each patient'):
    paired(two[0], two[1] | {'owner': of(1)})


def test_classifiers_are_compared_by_accuracy():
  """Two patients with three and two slices: 2 of 3 and 2 of 2 correct, compared with 1 of 3 and 1 of 2."""
  label = np.array([1, 1, 0, 1, 0])
  tables = []
  for called in ([1, 0, 0, 1, 0], [0, 1, 1, 0, 0]):
    called = np.array(called)
    counts = {'tp': label & called, 'fp': (1 - label) & called, 'fn': label & (1 - called)}
    counts['tn'] = 1 - sum(counts.values())
    patient = np.array(list('aaabb'))
    columns = {'patient': patient, 'owner': patient, 'slice': np.array([0, 1, 2, 0, 1])}
    columns |= {'label': label, 'logit': called}
    tables.append(columns | counts | {'reliability': np.zeros((5, 3, 20)), 'squared_error': np.zeros(5)})
  got = compare.paired(CLASSIFICATION, *([table] for table in tables))
  assert got['per_patient']['difference'] == pytest.approx(np.mean([2 / 3 - 1 / 3, 1 - 1 / 2]))
  assert got['numbers']['accuracy']['difference'] == pytest.approx(4 / 5 - 2 / 5)


@pytest.fixture
def other_run(runs, tmp_path):
  """A copy of the segmentation run that tests may change."""
  run = tmp_path / 'other'
  shutil.copytree(runs['seg'], run, ignore=shutil.ignore_patterns('checkpoints', 'tensorboard'))
  return run


def change(run, **columns):
  """Writes the test of a run with another table."""
  result = result_files.read_numbers(run)
  part = one_class.part(run)
  result_files.write_test(run / 'test', result, {'lesion': part._replace(table=part.table | columns, patients=None)})


def test_two_runs_from_their_folders(runs, other_run, caplog):
  caplog.set_level('INFO')
  result = compare.compare(runs['seg'], other_run)
  assert result['made_of']['run'] == result_files.read_numbers(runs['seg'])['made_of']
  assert 'per patient, Dice: 0.0000 [+0.0000, +0.0000], sign-flip p 1.0000' in caplog.text


def test_aucs_of_patients_are_compared_by_the_same_draws(runs, other_run, caplog):
  """Twelve patients: the difference is scikit-learn's, in any order of the patients; the interval holds it."""
  rng, result = np.random.default_rng(4), result_files.read_numbers(runs['seg'])
  label, names = np.repeat([0, 1], 6), np.array([f'p{k}' for k in range(12)])
  tables = [{'owner': names, 'label': label, 'score': rng.normal(label, width)} for width in (0.5, 2.0)]
  areas = [sk.roc_auc_score(one['label'], one['score']) for one in tables]
  mixed = rng.permutation(12)
  tables[1] = {name: values[mixed] for name, values in tables[1].items()}
  got = compare._paired_auc([result, result], tables)
  assert got['auc'] == pytest.approx(
    {'run': areas[0], 'against': areas[1], 'difference': areas[0] - areas[1]}, abs=1e-9
  )
  assert got['interval'][0] < got['auc']['difference'] < got['interval'][1] and got['patients'] == 12
  unknown = [tables[0] | {'score': np.where(np.arange(12) == 8, np.nan, tables[0]['score'])}, tables[1]]
  assert compare._paired_auc([result, result], unknown)['left_out'] == 1
  assert compare._paired_auc([result, result], [one | {'label': label * 0} for one in tables])['auc'] is None
  # From the folders: a run and its copy; and a copy of which the test has no table of patients.
  caplog.set_level('INFO')
  same = compare.compare(runs['seg'], other_run)['patient']
  assert same['auc']['difference'] == 0 and same['auc']['run'] == result['patient']['auc']
  assert 'AUC of patients: ' in caplog.text
  change(other_run)
  lacking = compare.compare(runs['seg'], other_run)['patient']
  assert (
    lacking['auc'] is None and lacking['reason'] == 'against: its test has no numbers of patients; evaluate it again'
  )


def test_other_test_sets_are_refused(runs, other_run):
  refused = lambda reason: pytest.raises(UserError, match=f'against: .* the test sets differ .{reason}')
  table = one_class.part(other_run).table
  change(other_run, patient=np.char.add(table['patient'], 'x'))
  with refused('2 patients are only in the first, 2 only in the second'):
    compare.compare(runs['seg'], other_run)
  change(other_run, patient=table['patient'], slice=table['slice'] + 1)
  with refused('not the same slices'):
    compare.compare(runs['seg'], other_run)
  change(other_run, slice=table['slice'], tp=table['tp'] + 1)
  with refused('not the same lesions'):
    compare.compare(runs['seg'], other_run)


def test_other_tasks_and_missing_runs_are_refused(runs, tmp_path):
  with pytest.raises(
    UserError, match=r'against: .* is for classification, .* for segmentation; compare runs of the same task'
  ):
    compare.compare(runs['seg'], runs['cls'])
  with pytest.raises(UserError, match='no run in it'):
    compare.compare(runs['seg'], tmp_path / 'nowhere')
  run_config.save_config(tmp_path / 'new', tiny())
  with pytest.raises(
    UserError, match=r'new/test: the run was not evaluated, or .*; evaluate the run with --mode=evaluate'
  ):
    compare.compare(runs['seg'], tmp_path / 'new')


@pytest.mark.parametrize('missing', ['metrics.json', 'table.npz'])
def test_an_interrupted_evaluation_is_refused_on_either_side(runs, tmp_path, missing):
  shutil.copytree(runs['seg'], tmp_path / 'run')
  (tmp_path / 'run' / 'test' / missing).unlink()
  for pair in ((runs['seg'], tmp_path / 'run'), (tmp_path / 'run', runs['seg'])):
    with pytest.raises(UserError, match=r'run/test: the run was not evaluated, or its evaluation was interrupted'):
      compare.compare(*pair)


def test_runs_that_were_tested_with_other_masks_are_refused(runs, other_run):
  """The lesions moved, but have as many pixels in each slice as before."""
  path = other_run / 'test' / 'metrics.json'
  record = own_files.read_record(path)
  record['made_of']['data']['truth_sha256'] = 'other'
  own_files.write_record(path, record, record['files'])
  with pytest.raises(
    UserError, match='against: .* were tested with different lesion masks; evaluate both on the same data'
  ):
    compare.compare(runs['seg'], other_run)
