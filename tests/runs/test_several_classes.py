"""Means over classes and comparisons of several classes, compared with NumPy, patient by patient and draw by draw."""

import numpy as np
import pytest

from fusa_jax.measures import histogram, statistics
from fusa_jax.runs import result_files, results
from fusa_jax.system.errors import UserError
from fusa_jax.tasks import SEGMENTATION

PATIENTS, PER_PATIENT, PIXELS = 8, 4, 50


def table(seed, share):
  """Makes a table of slices with lesion in this share of the pixels."""
  rng = np.random.default_rng(seed)
  count = PATIENTS * PER_PATIENT
  truth = rng.random((count, PIXELS)) < share
  called = np.where(rng.random(truth.shape) < 0.8, truth, rng.random(truth.shape) < share)
  counts = {
    'tp': (truth & called).sum(axis=1),
    'fp': (~truth & called).sum(axis=1),
    'fn': (truth & ~called).sum(axis=1),
    'tn': (~truth & ~called).sum(axis=1),
  }
  patient = np.repeat([f'p{k}' for k in range(PATIENTS)], PER_PATIENT)
  return {
    **counts,
    **{f'{key}_chosen': values for key, values in counts.items()},
    'patient': patient,
    'owner': patient,
    'slice': np.tile(np.arange(PER_PATIENT), PATIENTS),
    'label': truth.any(axis=1).astype(int),
    'logit': rng.normal(size=count),
    'score': rng.random(count),
    'reliability': np.zeros((count, 3, histogram.RELIABILITY_BINS)),
    'squared_error': np.zeros(count),
    'histogram': np.zeros((1, 2, histogram.BINS), np.int64),
  }


def dice(one, weights):
  """The pooled Dice of a table for weights [patients]."""
  tp, fp, fn = (one[key].reshape(PATIENTS, PER_PATIENT).sum(axis=1) @ weights for key in ('tp', 'fp', 'fn'))
  return 2 * tp / (2 * tp + fp + fn)


@pytest.fixture(scope='module')
def tables():
  return {'ground glass': table(0, 0.3), 'consolidation': table(1, 0.1)}


def of(tables):
  numbers = {name: results.numbers(SEGMENTATION, one) for name, one in tables.items()}
  return results.with_classes(SEGMENTATION, numbers, tables)


def test_means_over_classes_have_the_interval_of_the_mean(tables):
  got = of(tables)
  whole = np.ones(PATIENTS)
  assert got['dice'] == pytest.approx(np.mean([dice(one, whole) for one in tables.values()]))
  assert got['mean_over']['dice'] == list(tables)
  rng, draws = np.random.default_rng(statistics.SEED), []
  for _ in range(statistics.RESAMPLES):
    drawn = rng.multinomial(PATIENTS, np.full(PATIENTS, 1 / PATIENTS)).astype(float)
    draws.append(np.mean([dice(one, drawn) for one in tables.values()]))
  tail = statistics.expanded_tail(PATIENTS)
  assert got['intervals']['dice'] == pytest.approx(np.quantile(draws, [tail, 1 - tail]))
  assert got['operating_point']['dice'] == got['dice']  # the same counts at both thresholds


def test_the_mean_of_dice_per_patient_is_not_an_interval_of_percentiles(tables):
  """Both classes define the Dice of every patient, so the average of each patient's values has the same mean."""
  each = []
  for one in tables.values():
    tp, fp, fn = (one[key].reshape(PATIENTS, PER_PATIENT).sum(axis=1) for key in ('tp', 'fp', 'fn'))
    each.append(2 * tp / (2 * tp + fp + fn))
  got, of_patients = of(tables), np.mean(each, axis=0)
  assert got['dice_per_patient'] == pytest.approx(of_patients.mean())
  assert got['intervals']['dice_per_patient'] == pytest.approx(statistics.mean_interval(of_patients, (0, 1)))


def test_the_numbers_of_each_class_are_those_of_it_alone(tables):
  got = results.by_class(of(tables), list(tables))
  for name, one in tables.items():
    alone = of({name: one})
    assert 'classes' not in alone and got[name] == alone


def test_a_class_without_lesion_is_left_out_of_a_mean(tables):
  empty = {
    key: np.zeros_like(values) for key, values in tables['consolidation'].items() if key[:2] in ('tp', 'fp', 'fn')
  }
  absent = tables['consolidation'] | empty | {'label': np.zeros(PATIENTS * PER_PATIENT, int)}
  got = of({'ground glass': tables['ground glass'], 'effusion': absent})
  assert got['dice'] == got['classes']['ground glass']['dice'] and got['classes']['effusion']['dice'] is None
  assert got['mean_over']['dice'] == ['ground glass'] and got['mean_over']['specificity'] == [
    'ground glass',
    'effusion',
  ]
  summary = results.summary(SEGMENTATION, {'ground glass': tables['ground glass'], 'effusion': absent})
  assert summary['dice'] == got['dice'] and summary['effusion/dice'] is None
  marked = absent | {'fp': np.ones(PATIENTS * PER_PATIENT, int)}  # one false pixel must not halve the score
  assert (
    results.summary(SEGMENTATION, {'ground glass': tables['ground glass'], 'effusion': marked})['dice'] == got['dice']
  )
  assert summary['ground glass/tp'] == tables['ground glass']['tp'].sum()


def test_files_of_a_class_are_in_its_folder(tables, tmp_path):
  result = of(tables) | {'split': results.BY_PATIENT}
  for numbers in result['classes'].values():
    numbers['patient'] = results.no_patient_numbers('none')
  parts = {name: results.Part(one) for name, one in tables.items()}
  result_files.write_test(tmp_path / 'test', result, parts)
  assert {path.name for path in (tmp_path / 'test').iterdir()} == {'metrics.json', 'ground_glass', 'consolidation'}
  read = result_files.read_parts(tmp_path, list(tables))
  for name, one in tables.items():
    np.testing.assert_array_equal(read[name].table['tp'], one['tp'])
    assert read[name].volumes == [] and read[name].patients is None
  (tmp_path / 'test' / 'ground_glass' / 'slices.csv').write_text('mine')
  with pytest.raises(UserError, match='ground_glass/slices.csv: exists, and this program did not write it'):
    result_files.check_own(tmp_path / 'test', list(tables))
  (tmp_path / 'test' / 'consolidation' / 'table.npz').write_bytes(b'other')
  assert not result_files.is_complete(tmp_path / 'test')


def test_inherited_labels_are_in_no_mean(tables):
  numbers = {name: results.without_slices(results.numbers(SEGMENTATION, one)) for name, one in tables.items()}
  got = results.with_classes(SEGMENTATION, numbers, tables)
  assert not results.scores_slices(got) and got['dice'] is None and got['operating_point']['dice'] is None
  assert got['intervals']['dice'] is None and got['classes']['ground glass']['dice'] is None
