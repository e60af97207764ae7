"""A classifier of three exclusive classes from pictures to its report, compared with scikit-learn on its own logits."""

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
from fusa_jax.runs import report, result_files
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
