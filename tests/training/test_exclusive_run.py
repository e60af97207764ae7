"""A classifier of three exclusive classes from pictures to its report, compared with scikit-learn on its own logits."""

import shutil

import jax
import layouts
import numpy as np
import pytest
from conftest import SIZE, tiny
from sklearn import metrics as sk

from configs import cls
from data import prepare
from data.cohorts import CohortOptions, phantom
from fusa_jax import tasks
from fusa_jax.inference import predictor, trained
from fusa_jax.runs import compare, report, result_files, results
from fusa_jax.system import meshes
from fusa_jax.training import datasets, evaluate, train

KINDS = layouts.KINDS


@pytest.fixture(scope='module')
def made(tmp_path_factory):
  """Returns the run, its config and the folder of its data."""
  folder = tmp_path_factory.mktemp('exclusive')
  phantom.write_phantoms(folder / 'raw', patients=8, size=SIZE, slices=16, seed=0, kinds=True)
  layouts.three_kinds(folder / 'raw', folder / 'cohort')
  options = CohortOptions(intensity='grey', classes='auto')
  data_dir = prepare.prepare(str(folder / 'cohort'), str(folder / 'data'), SIZE, options=options)
  config = tiny(cls, **{'data.classes': KINDS, 'data.intensity': 'grey', 'data.balanced': False})
  train.train(config, folder / 'run', data_dir)
  evaluate.evaluate(config, folder / 'run', data_dir)
  return folder / 'run', config, data_dir


def test_numbers_equal_scikit_learns(made):
  run, config, data_dir = made
  task = tasks.create(config)
  _, variables = trained.load_best(config, task, run, meshes.create_mesh())
  split = datasets.load_dataset(data_dir, 0, SIZE).test
  images = np.stack([split.source[k]['image'] for k in range(len(split))])
  probability = np.asarray(jax.jit(task.probabilities)(variables, images), np.float64)
  truth = np.argmax([split.bits >> k & 1 for k in range(3)], axis=0)
  result = result_files.read_numbers(run)
  got, called = result['exclusive']['slices'], probability.argmax(axis=1)
  np.testing.assert_allclose(probability.sum(axis=1), 1, atol=1e-5)
  assert got['classes'] == list(KINDS) and len(set(truth.tolist())) == 3
  np.testing.assert_array_equal(got['confusion'], sk.confusion_matrix(truth, called, labels=range(3)))
  assert got['accuracy'] == pytest.approx(sk.accuracy_score(truth, called))
  assert got['balanced_accuracy'] == pytest.approx(sk.balanced_accuracy_score(truth, called))
  for k, name in enumerate(KINDS):
    area = sk.roc_auc_score(truth == k, probability[:, k])
    assert result['classes'][name]['auc'] == pytest.approx(area, abs=1e-4)  # from float32 probabilities
  assert result['accuracy'] == got['accuracy'] and result['recall'] == got['balanced_accuracy']
  assert result['intervals']['f1'] == got['intervals']['macro_f1']
  assert result['auc'] == pytest.approx(got['macro_auc'])  # the mean over the classes selects the checkpoint
  assert result['exclusive']['patients'] is None  # slices of a patient have several classes


def test_differences_are_of_the_class_with_the_highest_probability(made, tmp_path, caplog):
  """Compared with a run of other logits: each number and difference is scikit-learn's."""
  caplog.set_level('INFO')
  run, rng = made[0], np.random.default_rng(0)
  shutil.copytree(run, tmp_path / 'other')
  parts, record = result_files.read_parts(run, KINDS), result_files.read_numbers(run)
  tables = {name: dict(part.table) for name, part in parts.items()}
  order = rng.permutation(len(tables[KINDS[0]]['label']))
  for table in tables.values():
    table['logit'] = table['logit'][order] + 0.2 * table['label']
  numbers = {name: results.numbers(tasks.CLASSIFICATION, table) for name, table in tables.items()}
  for name, each in numbers.items():
    each['patient'] = record['classes'][name]['patient']
  result = results.with_classes(tasks.CLASSIFICATION, numbers, tables, is_exclusive=True)
  result |= {key: record[key] for key in ('made_of', 'split')}
  changed = {name: part._replace(table=tables[name]) for name, part in parts.items()}
  result_files.write_test(tmp_path / 'other' / 'test', result, changed)

  got = compare.compare(tmp_path / 'other', run)
  truth, *called = (
    np.argmax([table[key] for table in of_run], axis=0)
    for of_run, key in (
      (tables.values(), 'label'),
      (tables.values(), 'logit'),
      ([p.table for p in parts.values()], 'logit'),
    )
  )
  of_slices = got['exclusive']['slices']
  for name, score in (('accuracy', sk.accuracy_score), ('balanced_accuracy', sk.balanced_accuracy_score)):
    values = [score(truth, one) for one in called]
    row = of_slices['numbers'][name]
    assert [row['run'], row['against']] == pytest.approx(values)
    assert row['difference'] == pytest.approx(np.subtract(*values))
  assert got['numbers']['accuracy'] == of_slices['numbers']['accuracy']
  for name in ('recall', 'precision'):
    assert got['numbers'][name]['run'] == result[name]
  owner = tables[KINDS[0]]['owner']
  gains = [np.subtract(*((one == truth)[owner == name].mean() for one in called)) for name in dict.fromkeys(owner)]
  assert of_slices['per_patient']['difference'] == pytest.approx(np.mean(gains))
  assert of_slices['per_patient']['better'] == np.sum(np.array(gains) > 0)
  assert list(got['exclusive']) == ['slices']  # slices of a patient have several classes
  assert 'slices, class with the highest probability' in caplog.text


def test_report_shows_the_confusion_matrix(made):
  run, _, data_dir = made
  page = report.write_report(run, [datasets.card(data_dir, 0, k) for k in range(3)]).read_text()
  assert 'Confusion matrix of slices' in page and 'Balanced accuracy' in page
  assert 'Confusion matrix of patients' not in page
  assert (run / 'test' / 'figures' / 'confusion_matrix_of_slices.png').is_file()
  assert (run / 'test' / 'ground_glass' / 'report.html').is_file()


def test_a_picture_has_the_class_with_the_highest_probability(made):
  run, _, data_dir = made
  model = predictor.load_predictor(run)
  pictures = datasets.load_dataset(data_dir, 0, SIZE).test.source
  for k in range(3):
    image = np.asarray(pictures[k]['image'], np.uint8)
    numbers = model(image).numbers
    scores = {name: each['score'] for name, each in numbers['classes'].items()}
    assert numbers['predicted_class'] == max(scores, key=scores.get)
    assert numbers['probabilities'] == pytest.approx(scores, abs=1e-4) and 'mask' not in str(numbers)
