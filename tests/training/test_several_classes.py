"""A run of two classes from masks to its report: compared with NumPy on its own logits, and with runs of one class."""

import json

import jax
import numpy as np
import one_class
import pytest
from conftest import SIZE, tiny

from data import prepare
from data.cohorts import CohortOptions, phantom
from fusa_jax import tasks
from fusa_jax.inference import trained
from fusa_jax.runs import compare, operating_point, report, result_files
from fusa_jax.system import meshes
from fusa_jax.system.errors import UserError
from fusa_jax.training import datasets, evaluate, side_by_side, train

KINDS = (('ground glass', (1,)), ('consolidation', (2,)))
NAMES = tuple(name for name, _ in KINDS)


def options(classes=KINDS, ignored=None):
  return CohortOptions(classes=classes, ignore_label=ignored)


@pytest.fixture(scope='module')
def raw(tmp_path_factory):
  folder = tmp_path_factory.mktemp('kinds')
  phantom.write_phantoms(folder, patients=10, size=SIZE, slices=16, kinds=True)
  return folder


def make(raw, folder, classes=KINDS, ignored=None, **changes):
  """Trains and tests a tiny run; returns its config and the folder of its data."""
  data_dir = prepare.prepare(str(raw), str(folder / 'data'), SIZE, options=options(classes, ignored))
  config = tiny(**{'data.classes': classes, 'data.ignore_label': ignored, 'train.steps': 4, **changes})
  train.train(config, folder / 'run', data_dir)
  evaluate.evaluate(config, folder / 'run', data_dir, prepare.scans(raw, options(classes, ignored)))
  return config, data_dir


@pytest.fixture(scope='module')
def made(raw, tmp_path_factory):
  folder = tmp_path_factory.mktemp('two')
  return folder / 'run', *make(raw, folder)


def logits_and_masks(config, run, data_dir):
  """The network's logits [N, H, W, 2] and the masks [N, H, W] of the test fold."""
  task = tasks.create(config)
  _, variables = trained.load_best(config, task, run, meshes.create_mesh())
  split = datasets.load_dataset(data_dir, 0, SIZE).test
  examples = [split.source[k] for k in range(len(split))]
  images, masks = (np.stack([one[key] for one in examples]) for key in ('image', 'mask'))
  return np.asarray(jax.jit(task.logits)(variables, images)), masks


def test_the_numbers_of_each_class_are_those_of_its_logits(made):
  run, config, data_dir = made
  logits, masks = logits_and_masks(config, run, data_dir)
  result = result_files.read_numbers(run)
  assert list(result['classes']) == list(NAMES)
  for k, name in enumerate(NAMES):
    truth, called = (masks >> k & 1) > 0, logits[..., k] >= 0
    expected = 2 * (truth & called).sum() / (truth.sum() + called.sum())
    assert result['classes'][name]['dice'] == pytest.approx(expected)
    assert result['classes'][name]['tp'] + result['classes'][name]['fn'] == truth.sum() > 0
  assert result['dice'] == pytest.approx(np.mean([each['dice'] for each in result['classes'].values()]))
  log = [json.loads(line) for line in (run / 'log.jsonl').read_text().splitlines()]
  last = [entry for entry in log if 'validation/dice' in entry][-1]
  of_classes = [last[f'validation/{name}/dice'] for name in NAMES]
  assert last['validation/dice'] == pytest.approx(np.mean([value for value in of_classes if value is not None]))


def test_volumes_are_of_each_class(made, raw):
  run, *_ = made
  parts, points = result_files.read_parts(run, NAMES), operating_point.load_points(run, NAMES)
  loaded = trained.load_model([run], meshes.create_mesh())[0]
  assert loaded.classes.names == NAMES and list(points) == list(NAMES)
  for k, name in enumerate(NAMES):
    for row in parts[name].volumes:
      number = int(row['case'].rsplit('-', 1)[-1])
      _, labels, _ = phantom.patient(0, number, size=SIZE, slices=16, kinds=True)
      ml = np.prod(phantom.spacing(0, number, size=SIZE, slices=16)) / 1000
      assert row['true_ml'] == pytest.approx((labels == k + 1).sum() * ml, rel=1e-3)
    assert points[name].patient.score_name == 'lesion_ml'
    assert result_files.read_numbers(run)['classes'][name]['volumes']['num_volumes'] == len(parts[name].volumes) == 2


def test_files_and_reports(made, raw):
  run, config, data_dir = made
  cards = [datasets.card(data_dir, 0, number) for number in range(2)]
  page = report.write_report(run, cards).read_text()
  for name, folder in zip(NAMES, ('ground_glass', 'consolidation'), strict=True):
    names = {path.name for path in (run / 'test' / folder).iterdir()}
    assert {'table.npz', 'slices.csv', 'patients.csv', 'patients.npz', 'volumes.csv', 'figures', 'report.html'} <= names
    own = (run / 'test' / folder / 'report.html').read_text()
    assert f'class {name}' in own and f'href="{folder}/report.html"' in page
  assert evaluate.is_finished(config, run, data_dir, prepare.scans(raw, options()))
  evaluate.evaluate(config, run, data_dir)  # replaces its own files, and the reports
  assert not (run / 'test' / 'consolidation' / 'report.html').exists()


def test_compared_class_by_class_and_with_a_run_of_one_of_them(made, raw, tmp_path):
  run, *_ = made
  one = (('consolidation', (2,)), ('background', (1,)))
  make(raw, tmp_path, one)
  same = compare.compare(run, run)
  assert list(same['classes']) == list(NAMES) and same['numbers']['dice']['difference'] == 0
  got = compare.compare(run, tmp_path / 'run')
  assert list(got['classes']) == ['consolidation'] and 'numbers' not in got
  dice = got['classes']['consolidation']['numbers']['dice']
  assert dice['run'] == result_files.read_numbers(run)['classes']['consolidation']['dice']
  assert dice['against'] == result_files.read_numbers(tmp_path / 'run')['dice']
  assert got['classes']['consolidation']['per_patient']['patients'] > 0
  with pytest.raises(UserError, match='overlays: the runs differ in data.classes'):
    side_by_side.pictures(run, tmp_path / 'run', tmp_path, 2)


def test_overlays_of_two_runs_are_of_each_class(made, tmp_path):
  run, _, data_dir = made
  pictures = side_by_side.pictures(run, run, data_dir, 1)
  assert sorted(name.split('/')[0] for name in pictures) == ['consolidation', 'ground_glass']
  for number, write in enumerate(pictures.values()):
    write(tmp_path / f'{number}.png')


def test_ignored_pixels_count_nowhere(raw, tmp_path):
  """Consolidations are ignored: numbers of ground glass are those of the logits on the other pixels."""
  config, data_dir = make(raw, tmp_path, (('ground glass', (1,)),), 2)
  logits, masks = logits_and_masks(config, tmp_path / 'run', data_dir)
  known, truth, called = masks < 128, masks == 1, logits[..., 0] >= 0
  result = result_files.read_numbers(tmp_path / 'run')
  assert (~known).sum() > 0 and 'classes' not in result
  assert result['tp'] + result['fp'] + result['fn'] + result['tn'] == known.sum()
  assert result['fp'] == (called & ~truth & known).sum() and result['fn'] == (truth & ~called).sum()
  part = result_files.read_parts(tmp_path / 'run', ('ground glass',))['ground glass']
  highest = np.where(known, logits[..., 0], -np.inf).max(axis=(1, 2))
  np.testing.assert_allclose(part.table['logit'], highest, rtol=1e-4, atol=1e-4)


def test_one_class_by_name_is_the_one_class(raw, tmp_path):
  """A run of one named class has the files and numbers of a run with lesion_labels."""
  make(raw, tmp_path / 'named', (('lesion', (1, 2)),))
  config = tiny(**{'data.lesion_labels': (1, 2), 'train.steps': 4})
  data_dir = prepare.prepare(str(raw), str(tmp_path / 'data'), SIZE, options=CohortOptions(lesion_labels=(1, 2)))
  train.train(config, tmp_path / 'run', data_dir)
  scans = prepare.scans(raw, CohortOptions(lesion_labels=(1, 2)))
  evaluate.evaluate(config, tmp_path / 'run', data_dir, scans)
  named, plain = (result_files.read_numbers(folder) for folder in (tmp_path / 'named' / 'run', tmp_path / 'run'))
  for key in plain.keys() - {'made_of', 'files', 'dataset'}:
    assert named[key] == plain[key], key
  np.testing.assert_array_equal(
    *(one_class.part(folder).table['tp'] for folder in (tmp_path / 'named/run', tmp_path / 'run'))
  )
