"""Every test slice once, whatever the batch and the devices; files that say what the contract says."""

import csv
import json

import jax
import numpy as np
import pytest
from conftest import SIZE, SLICES, tiny
from PIL import Image
from sklearn import metrics as sk

from configs import cls, seg
from fusa_jax import evaluate, figures, input_pipeline, sharding, tasks
from fusa_jax.errors import UserError

MODULES = {'seg': seg, 'cls': cls}


def read(workdir):
  with (workdir / 'test' / 'slices.csv').open(newline='') as file:
    return list(csv.DictReader(file)), json.loads((workdir / 'test' / 'metrics.json').read_text())


@pytest.mark.parametrize('kind', ['seg', 'cls'])
def test_slices_csv_has_every_test_slice_once(runs, data_dir, kind):
  rows, result = read(runs[kind])
  test = input_pipeline.load(data_dir, 0, SIZE).test
  assert list(rows[0]) == ['patient', 'slice', 'label', 'score', 'tp', 'fp', 'fn', 'tn']
  assert [(r['patient'], int(r['slice'])) for r in rows] == list(
    zip(test.patient.tolist(), test.slice.tolist(), strict=True)
  )
  assert [int(r['label']) for r in rows] == test.label.astype(int).tolist()
  assert result['num_slices'] == len(rows) == len(set(test.patient)) * SLICES
  assert result['num_patients'] == len(set(test.patient))
  pixels = 1 if kind == 'cls' else SIZE * SIZE
  assert all(sum(int(r[key]) for key in ('tp', 'fp', 'fn', 'tn')) == pixels for r in rows)


def test_segmentation_numbers_follow_from_the_masks(runs, data_dir):
  """Recomputed from probabilities of one slice at a time, with scikit-learn, next to nothing of ours in between."""
  config = tiny()
  task = tasks.create(config)
  _, variables = evaluate.load_variables(config, task, runs['seg'], sharding.create_mesh())
  test = input_pipeline.load(data_dir, 0, SIZE).test
  predict = jax.jit(task.probabilities)
  examples = [test.source[i] for i in range(len(test))]
  probability = np.concatenate([predict(variables, example['image'][None]) for example in examples])
  truth = np.stack([example['mask'] for example in examples]).ravel()
  rows, result = read(runs['seg'])
  predicted = (probability >= 0.5).ravel()
  assert result['dice'] == pytest.approx(sk.f1_score(truth, predicted), abs=1e-4)
  assert result['dice_macro'] == pytest.approx(sk.f1_score(truth, predicted, average='macro'), abs=1e-4)
  assert result['recall'] == pytest.approx(sk.recall_score(truth, predicted), abs=1e-4)
  scores = np.array([float(r['score']) for r in rows])
  np.testing.assert_allclose(scores, probability.max(axis=(1, 2)), atol=1e-4)


def test_classification_numbers_follow_from_the_table(runs):
  rows, result = read(runs['cls'])
  label, score = (np.array([float(r[key]) for r in rows]) for key in ('label', 'score'))
  assert result['auc'] == pytest.approx(sk.roc_auc_score(label, score))
  assert result['accuracy'] == pytest.approx(sk.accuracy_score(label, score >= 0.5))
  assert {'precision', 'recall', 'f1', 'tp', 'fp', 'fn', 'tn', 'step', 'dataset', 'commit'} <= result.keys()
  assert result['step'] in (2, 4)
  assert result['dataset'].startswith('covid_ct/')


@pytest.mark.parametrize(('batch_size', 'data', 'space'), [(7, 1, 1), (7, 4, 2)])
def test_the_table_does_not_depend_on_batch_or_devices(runs, data_dir, batch_size, data, space):
  """Batches that do not divide the number of slices, on one device and on eight."""
  config = tiny(cls)
  task = tasks.create(config)
  mesh = sharding.create_mesh(data, space, jax.devices()[: data * space])
  _, variables = evaluate.load_variables(config, task, runs['cls'], mesh)
  split = input_pipeline.load(data_dir, 0, SIZE).test
  table = evaluate.Scorer(task, mesh, batch_size).table(variables, split)
  rows, _ = read(runs['cls'])
  np.testing.assert_allclose(table['score'], [float(r['score']) for r in rows], atol=1e-5)
  assert table['tp'].tolist() == [int(r['tp']) for r in rows]


def test_an_image_that_cannot_be_shared_is_refused(runs, data_dir, monkeypatch):
  three = sharding.create_mesh(1, 3, jax.devices()[:3])
  monkeypatch.setattr(sharding, 'create_mesh', lambda *_: three)
  before = (runs['cls'] / 'test' / 'metrics.json').stat()
  with pytest.raises(UserError, match=r'data.image_size: 32 does not divide over mesh.space=3; 30 or 33 does'):
    evaluate.evaluate(tiny(cls), runs['cls'], data_dir)
  assert (runs['cls'] / 'test' / 'metrics.json').stat() == before


def test_pictures(runs):
  folder = runs['seg'] / 'test' / 'figures'
  names = {path.name for path in folder.iterdir()}
  assert {'confusion_matrix.png', 'roc.png'} <= names
  assert len(names) == 2 + 2
  assert {'confusion_matrix.png', 'roc.png'} == {p.name for p in (runs['cls'] / 'test' / 'figures').iterdir()}


def test_overlay_has_the_colours_of_the_paper(tmp_path):
  """Fig. 4: blue where lesion was found, green where it was found wrongly, red where it was missed."""
  hu = np.full((40, 40), -900, np.int16)
  mask, predicted = np.zeros((2, 40, 40), bool)
  mask[:20], predicted[:, :20] = True, True
  figures.write_overlay(tmp_path / 'a.png', hu, mask, predicted, (-1000, 300))
  picture = np.asarray(Image.open(tmp_path / 'a.png').convert('RGB')).astype(int)
  middle = picture[picture.shape[0] // 2 - 60 : picture.shape[0] // 2 + 60, picture.shape[1] // 2 :]
  strongest = middle.argmax(axis=-1)[np.ptp(middle, axis=-1) > 60]
  assert set(np.unique(strongest)) == {0, 1, 2}
  height, width = middle.shape[0] // 2, middle.shape[1] // 2
  corners = {
    'true': middle[height - 40, width - 60],
    'missed': middle[height - 40, width + 60],
    'wrong': middle[height + 30, width - 60],
  }
  assert {key: int(value.argmax()) for key, value in corners.items()} == {'true': 2, 'missed': 0, 'wrong': 1}


def test_telling_slices_show_each_patient_then_the_errors():
  table = {
    'patient': np.array(['a', 'a', 'b', 'b']),
    'tp': np.array([1, 5, 0, 0]),
    'fn': np.array([0, 0, 0, 2]),
    'fp': np.array([9, 0, 1, 0]),
  }
  assert figures.telling_slices(table, 3) == [1, 3, 0]
  table['fp'][:] = 0
  assert figures.telling_slices(table, 4) == [1, 3]
