"""Each test slice is evaluated once for any batch size and devices; the written files have the documented contents."""

import csv
import dataclasses
import errno
import json
import shutil

import jax
import numpy as np
import one_class
import pytest
from conftest import SIZE, SLICES, tiny
from PIL import Image
from scipy import ndimage, special
from sklearn import metrics as sk

from configs import cls, seg
from data import prepare
from fusa_jax import tasks
from fusa_jax.inference import predict, predictor, trained
from fusa_jax.measures import histogram, statistics
from fusa_jax.runs import figures, operating_point, result_files, run_config, split
from fusa_jax.scans import lungs, volume_files
from fusa_jax.system import files, meshes, own_files, provenance
from fusa_jax.system.errors import UserError
from fusa_jax.training import datasets, evaluate, scorer, train

MODULES = {'seg': seg, 'cls': cls}


def read(workdir):
  with (workdir / 'test' / 'slices.csv').open(newline='') as file:
    return list(csv.DictReader(file)), json.loads((workdir / 'test' / 'metrics.json').read_text())


@pytest.mark.parametrize('kind', ['seg', 'cls'])
def test_slices_csv_has_every_test_slice_once(runs, data_dir, kind):
  rows, result = read(runs[kind])
  test = datasets.load_dataset(data_dir, 0, SIZE).test
  assert list(rows[0]) == ['patient', 'slice', 'label', 'score', 'tp', 'fp', 'fn', 'tn', 'owner']
  assert [(r['patient'], int(r['slice'])) for r in rows] == list(
    zip(test.patient.tolist(), test.slice.tolist(), strict=True)
  )
  assert [int(r['label']) for r in rows] == test.label.astype(int).tolist()
  assert result['num_slices'] == len(rows) == len(set(test.patient)) * SLICES
  assert result['num_patients'] == len(set(test.patient))
  pixels = 1 if kind == 'cls' else SIZE * SIZE
  assert all(sum(int(r[key]) for key in ('tp', 'fp', 'fn', 'tn')) == pixels for r in rows)


def test_segmentation_numbers_follow_from_the_masks(runs, data_dir):
  """Recomputes the numbers with scikit-learn from the probabilities of one slice at a time."""
  config = tiny()
  task = tasks.create(config)
  _, variables = trained.load_best(config, task, runs['seg'], meshes.create_mesh())
  test = datasets.load_dataset(data_dir, 0, SIZE).test
  run = jax.jit(task.probabilities)
  examples = [test.source[i] for i in range(len(test))]
  probability = np.concatenate([run(variables, example['image'][None]) for example in examples])
  truth = np.stack([example['mask'] for example in examples]).ravel()
  rows, result = read(runs['seg'])
  predicted = (probability >= 0.5).ravel()
  assert result['dice'] == pytest.approx(sk.f1_score(truth, predicted), abs=1e-4)
  assert result['dice_macro'] == pytest.approx(sk.f1_score(truth, predicted, average='macro'), abs=1e-4)
  assert result['recall'] == pytest.approx(sk.recall_score(truth, predicted), abs=1e-4)
  scores = np.array([float(r['score']) for r in rows])
  np.testing.assert_allclose(scores, probability.max(axis=(1, 2, 3)), atol=1e-4)


def test_classification_numbers_follow_from_the_table(runs):
  rows, result = read(runs['cls'])
  label, score = (np.array([float(r[key]) for r in rows]) for key in ('label', 'score'))
  # The ranking uses logits: probabilities near 0 and 1 round to the same number.
  logit = one_class.part(runs['cls']).table['logit']
  np.testing.assert_allclose(1 / (1 + np.exp(-logit)), score, atol=1e-6)
  assert result['auc'] == pytest.approx(sk.roc_auc_score(label, logit))
  assert result['accuracy'] == pytest.approx(sk.accuracy_score(label, score >= 0.5))
  assert {'precision', 'recall', 'f1', 'tp', 'fp', 'fn', 'tn', 'step', 'dataset', 'commit'} <= result.keys()
  assert result['step'] in (2, 4)
  assert result['dataset'].startswith('covid_ct/')


@pytest.mark.parametrize(('batch_size', 'data', 'space'), [(7, 1, 1), (7, 4, 2)])
def test_table_does_not_depend_on_batch_size_or_devices(runs, data_dir, batch_size, data, space):
  """The batch size does not divide the number of slices; on one device and on eight."""
  config = tiny(cls)
  task = tasks.create(config)
  mesh = meshes.create_mesh(data, space, jax.devices()[: data * space])
  _, variables = trained.load_best(config, task, runs['cls'], mesh)
  split = datasets.load_dataset(data_dir, 0, SIZE).test
  # A bin in the middle of the logits, so that both its sides have slices.
  stored = one_class.part(runs['cls']).table
  chosen = int(np.median(stored['logit']) * 16) + histogram.HALF
  table = scorer.Scorer(task, mesh, batch_size).tables(variables, split, bins={'lesion': chosen})['lesion']
  # The histogram of all slices, counted again from the logits, without the rows that fill the last batch.
  bins = np.clip(np.floor(table['logit'] * 16) + histogram.HALF, 0, histogram.BINS - 1).astype(int)
  expected = [np.bincount(bins[table['label'] == truth], minlength=histogram.BINS) for truth in (0, 1)]
  assert table['histogram'].tolist() == [[expected[0].tolist(), expected[1].tolist()]]
  called = table['logit'] >= histogram.edges()[chosen]
  assert 0 < called.sum() < len(called)
  assert table['tp_chosen'].tolist() == (called & (table['label'] == 1)).astype(int).tolist()
  assert table['tn_chosen'].tolist() == (~called & (table['label'] == 0)).astype(int).tolist()
  assert sum(values.nbytes for values in table.values()) < 1000 * len(split) + table['histogram'].nbytes
  rows, _ = read(runs['cls'])
  np.testing.assert_allclose(table['score'], [float(r['score']) for r in rows], atol=1e-5)
  assert table['tp'].tolist() == [int(r['tp']) for r in rows]


def test_an_image_that_cannot_be_shared_is_refused(runs, data_dir, monkeypatch):
  three = meshes.create_mesh(1, 3, jax.devices()[:3])
  monkeypatch.setattr(meshes, 'create_mesh', lambda *_: three)
  before = (runs['cls'] / 'test' / 'metrics.json').stat()
  with pytest.raises(UserError, match=r'data.image_size: 32 must be a multiple of mesh.space=3; give 30 or 33'):
    evaluate.evaluate(tiny(cls), runs['cls'], data_dir)
  assert (runs['cls'] / 'test' / 'metrics.json').stat() == before


def test_every_number_has_an_interval_or_none(runs):
  """Checks every float of metrics.json by name. Scores have one interval, numbers at a threshold one per threshold."""
  for kind, workdir in runs.items():
    result = read(workdir)[1]
    assert result['intervals'].items() >= statistics.method().items()
    point, half = result['operating_point'], result['intervals']
    for block, others in (
      (result, {'threshold'}),
      (point, {'threshold', 'temperature', 'smallest_ml'}),
      (point['slices'], set()),
      (point['slices']['at_prevalence'][0], {'prevalence'}),
    ):
      numbers = {name for name, value in block.items() if isinstance(value, float) or value is None} - others
      assert numbers == block['intervals'].keys() - statistics.method().keys()
    # With two patients, one of them almost without lesion, too many draws leave most numbers undefined; not these.
    assert half['specificity' if kind == 'seg' else 'accuracy'] is not None
    assert set(tasks.type_of(tiny(MODULES[kind]).task).shown) <= result['intervals'].keys()
    assert set(result['intervals']) - set(point['intervals']) - statistics.method().keys() == (
      {'brier', 'ece'} if kind == 'seg' else {'brier', 'ece', 'auc'}
    )


@pytest.mark.parametrize('kind', ['seg', 'cls'])
def test_numbers_of_patients_follow_from_the_written_tables(runs, kind):
  """Aggregates the saved logits and volumes by hand, and compares with scikit-learn."""
  table, result = one_class.part(runs[kind]).table, read(runs[kind])[1]
  got, rule = result['patient'], one_class.point(runs[kind]).patient
  assert rule.about() == {name: got[name] for name in rule.about()} == result['operating_point']['patient']
  assert rule.score_name == {'seg': 'lesion_ml', 'cls': 'mean_of_highest'}[kind]
  names = list(dict.fromkeys(table['patient'].tolist()))
  label = np.array([table['label'][table['patient'] == name].max() for name in names])
  assert 0 < label.sum() < len(label)  # else the test shows nothing
  probability = [np.sort(special.expit(table['logit'][table['patient'] == name]))[::-1] for name in names]
  count = int(np.ceil(rule.highest * SLICES)) if rule.highest < 1 else rule.highest
  scores = {
    'mean_of_highest': [one[:count].mean() for one in probability],
    'noisy_or': [1 - np.prod(1 - one) for one in probability],
    'maximum': [one[0] for one in probability],
  }
  if kind == 'seg':
    volumes = {row['case']: row['predicted_ml'] for row in one_class.part(runs[kind]).volumes}
    scores['lesion_ml'] = [volumes[name] for name in names]
  with (runs[kind] / 'test' / 'patients.csv').open(newline='') as file:
    rows = list(csv.DictReader(file))
  assert [row['patient'] for row in rows] == names and [int(row['label']) for row in rows] == label.tolist()
  for name, score in scores.items():
    area = sk.roc_auc_score(label, np.round(score, 12))
    assert got['auc_by_score'][name]['auc'] == pytest.approx(area, abs=1e-9)
    np.testing.assert_allclose([float(row[name]) for row in rows], score, atol=1e-9)
  called = np.array(scores[rule.score_name]) >= rule.threshold
  assert [int(row['positive']) for row in rows] == called.astype(int).tolist()
  assert got['auc'] == got['auc_by_score'][rule.score_name]['auc']
  assert got['sensitivity'] == pytest.approx(sk.recall_score(label, called), abs=1e-9)
  assert got['specificity'] == pytest.approx(sk.recall_score(1 - label, ~called), abs=1e-9)
  assert [row['prevalence'] for row in got['at_prevalence']] == list(tiny().evaluate.prevalences)


def test_numbers_at_the_operating_point_use_its_threshold(runs, data_dir):
  """Recomputes the numbers with scikit-learn from probabilities and the threshold in metrics.json."""
  config, (_, result) = tiny(), read(runs['seg'])
  task = tasks.create(config)
  _, variables = trained.load_best(config, task, runs['seg'], meshes.create_mesh())
  test = datasets.load_dataset(data_dir, 0, SIZE).test
  examples = [test.source[i] for i in range(len(test))]
  probability = np.asarray(jax.jit(task.probabilities)(variables, np.stack([e['image'] for e in examples])))
  truth = np.stack([example['mask'] for example in examples])
  point = result['operating_point']
  called = probability >= point['threshold']
  assert point['threshold'] != 0.5
  assert point['dice'] == pytest.approx(sk.f1_score(truth.ravel(), called.ravel()), abs=1e-4)
  assert point['recall'] == pytest.approx(sk.recall_score(truth.ravel(), called.ravel()), abs=1e-4)
  slices = truth.any(axis=(1, 2)), called.any(axis=(1, 2))
  assert point['slices']['sensitivity'] == pytest.approx(sk.recall_score(*slices))
  assert point['slices']['auc'] == pytest.approx(sk.roc_auc_score(slices[0], probability.max(axis=(1, 2))), abs=1e-3)
  brier = sk.brier_score_loss(truth.ravel(), probability.ravel().astype(np.float64))
  assert result['brier'] == pytest.approx(brier, rel=1e-3)


class Untouchable:
  """Replaces a test fold that must not be read yet."""

  def __getattr__(self, name):
    raise AssertionError(f'the test fold was looked at ({name})')

  def __len__(self):
    raise AssertionError('the test fold was looked at')

  def __getitem__(self, index):
    raise AssertionError('the test fold was looked at')


def test_the_test_fold_is_not_read_before_the_threshold_is_saved(runs, raw_dir, data_dir, tmp_path, monkeypatch):
  """With an unreadable test fold, evaluation still chooses and saves the operating point, and then fails."""
  shutil.copytree(runs['seg'] / 'checkpoints', tmp_path / 'checkpoints')
  original = datasets.load_dataset

  def hidden(*args):
    dataset = original(*args)
    return dataclasses.replace(dataset, test=dataclasses.replace(dataset.test, source=Untouchable()))

  monkeypatch.setattr(datasets, 'load_dataset', hidden)
  with pytest.raises(AssertionError, match='the test fold was looked at'):
    evaluate.evaluate(tiny(), tmp_path, data_dir, prepare.scans(raw_dir))
  point = one_class.point(tmp_path)
  assert point == one_class.point(runs['seg'])
  assert point.validation['chosen']['dice'] >= point.validation['half']['dice']


def copy_of(run, folder):
  shutil.copytree(run, folder, ignore=shutil.ignore_patterns('test', 'tensorboard'))
  return folder


def test_training_patients_in_the_test_set_are_refused(runs, data_dir, tmp_path):
  """Added files change the folds of a cohort; patients of the training set can then be in the test set."""
  workdir = copy_of(runs['seg'], tmp_path / 'run')
  data = split.load_split(workdir)
  assert data == json.loads(json.dumps(datasets.load_dataset(data_dir, 0, SIZE).description()))
  changed_split(workdir, train=data['train'] + data['test'][:1], test=data['test'][1:])
  with pytest.raises(
    UserError, match=rf'validated on 1 of the test patients \(for example {data["test"][0]}\), because files were'
  ):
    evaluate.evaluate(tiny(), workdir, data_dir)
  assert not (workdir / 'test').exists()
  with pytest.raises(UserError, match='the run was started with other patients in its folds'):
    train.train(tiny(), workdir, data_dir)


def changed_split(workdir, **changes):
  """Changes split.json of a run, as if the run had been made with other data; returns it."""
  data = json.loads((workdir / 'split.json').read_text()) | changes
  (workdir / 'split.json').write_text(json.dumps(data))
  return data


def renamed(data):
  """A description of data with other names, scans and masks."""
  parts = {part: [f'other-{name}' for name in data[part]] for part in split.PARTS}
  patients = {
    f'other-{name}': {'owner': f'other-{name}', 'images': ['other'], 'truth': 'other'} for name in data['patients']
  }
  return {**parts, 'patients': patients, 'sha256': 'other'}


def test_on_another_cohort_the_run_keeps_its_own_operating_point_and_test(runs, data_dir, tmp_path):
  """The same slices count as another cohort. The saved operating point is used; the validation fold is not read."""
  workdir = tmp_path / 'run'
  shutil.copytree(runs['seg'], workdir)
  changed_split(workdir, **renamed(split.load_split(workdir)))
  own = {path: path.read_bytes() for path in (workdir / 'test').rglob('*') if path.is_file()}
  before = one_class.point(workdir)
  (workdir / 'operating_point.json').write_text(
    json.dumps(dataclasses.asdict(before) | {'threshold': 0.75, 'bin': 273, 'flips': True})
  )
  result = evaluate.evaluate(tiny(), workdir, data_dir)
  kept = one_class.point(workdir)
  assert result['operating_point']['threshold'] == kept.threshold == 0.75
  assert result['operating_point']['flips'] and kept.flips
  assert result['brier'] != read(runs['seg'])[1]['brier']  # with flips
  # The rule needs volumes, and this call has no scans: nothing is guessed from the slices.
  assert kept.patient == before.patient and result['patient']['score_name'] == 'lesion_ml'
  assert result['patient']['auc'] is None and 'unknown for all test patients' in result['patient']['reason']
  (folder,) = workdir.glob('test-*')
  assert folder.name.startswith(f'test-{data_dir.name}-')
  assert result_files.read_numbers(workdir, folder.name)['brier'] == result['brier']
  assert {path: path.read_bytes() for path in own} == own
  with pytest.raises(UserError, match='evaluate.target_sensitivity: the operating point is chosen on the validation'):
    evaluate.evaluate(tiny(**{'evaluate.target_sensitivity': 0.9}), workdir, data_dir)


def test_on_another_cohort_the_run_keeps_its_rule_for_patients(runs, data_dir, tmp_path):
  workdir = tmp_path / 'run'
  shutil.copytree(runs['cls'], workdir)
  changed_split(workdir, **renamed(split.load_split(workdir)))
  point = json.loads((workdir / 'operating_point.json').read_text())
  point['patient'] |= {'highest': 10, 'threshold': 0.999}
  (workdir / 'operating_point.json').write_text(json.dumps(point))
  got = evaluate.evaluate(tiny(cls), workdir, data_dir)['patient']
  assert (got['highest'], got['threshold'], got['tp'], got['fp']) == (10, 0.999, 0, 0)
  assert json.loads((workdir / 'operating_point.json').read_text()) == point
  del point['patient']  # as in a run of an earlier version
  (workdir / 'operating_point.json').write_text(json.dumps(point))
  got = evaluate.evaluate(tiny(cls), workdir, data_dir)['patient']
  assert got['auc'] is None and got['reason'] == operating_point.NO_RULE_FOR_OTHER_DATA


def test_slices_of_unknown_patients_leave_a_rule_without_a_call(runs, raw_dir, data_dir, tmp_path, monkeypatch):
  workdir, load = copy_of(runs['cls'], tmp_path / 'run'), datasets.load_dataset_for
  monkeypatch.setattr(
    datasets, 'load_dataset_for', lambda *arguments: dataclasses.replace(load(*arguments), by_patient=False)
  )
  result = evaluate.evaluate(tiny(cls), workdir, data_dir)
  assert result['patient']['auc'] is None and result['patient']['reason'] == 'the patients of the slices are unknown'
  assert evaluate.is_finished(tiny(cls), workdir, data_dir)
  scan = raw_dir / f'{split.load_split(workdir)["test"][0]}_ct.nii.gz'
  answer = predictor.load_predictor(workdir)(scan).numbers['patient']
  assert answer['positive'] is None and answer['reason'] == 'not chosen: the patients of the slices are unknown'


def test_scores_of_masks_need_masks_and_scans(runs, data_dir, tmp_path):
  with pytest.raises(UserError, match='evaluate.patient_score: lesion_ml applies to masks only, and classification'):
    evaluate.evaluate(tiny(cls, **{'evaluate.patient_score': 'lesion_ml'}), runs['cls'], data_dir)
  with pytest.raises(UserError, match="evaluate.patient_score: mean must be one of mean_of_highest, .*, or ''"):
    evaluate.evaluate(tiny(cls, **{'evaluate.patient_score': 'mean'}), runs['cls'], data_dir)
  workdir = copy_of(runs['seg'], tmp_path / 'run')
  with pytest.raises(UserError, match='evaluate.patient_score: lung_share needs the released scans and masks'):
    evaluate.evaluate(tiny(seg, **{'evaluate.patient_score': 'lung_share'}), workdir, data_dir)
  assert not (workdir / 'test').exists()
  with pytest.raises(UserError, match='evaluate.patient_score: lesion_ml needs the released scans and masks'):
    evaluate.check_scans(tiny(seg, **{'evaluate.patient_score': 'lesion_ml'}), None)  # before the training


def test_the_share_of_the_lungs_can_be_the_score(runs, raw_dir, data_dir, tmp_path):
  workdir = copy_of(runs['seg'], tmp_path / 'run')
  config = tiny(seg, **{'evaluate.patient_score': 'lung_share'})
  got = evaluate.evaluate(config, workdir, data_dir, prepare.scans(raw_dir))['patient']
  run = predictor.load_predictor(workdir)
  table = one_class.part(workdir).patients
  shares = []
  for name in table['owner']:
    scan = volume_files.read_scan(raw_dir / f'{name}_ct.nii.gz')
    prediction = run(scan)
    shares.append(prediction.mask.sum() / lungs.field(scan).sum())
    assert prediction.numbers['patient']['score'] == pytest.approx(shares[-1])
  np.testing.assert_allclose(table['lung_share'], shares, rtol=1e-9)
  assert got['score_name'] == 'lung_share' and {'lung_share', 'lesion_ml', 'maximum'} <= got['auc_by_score'].keys()
  assert got['auc'] == pytest.approx(sk.roc_auc_score(table['label'], shares), abs=1e-9)


def test_corrected_masks_are_noticed(runs, data_dir, tmp_path):
  """The masks of one test patient changed after the training: no training goes on, and a test gets its own folder."""
  workdir = tmp_path / 'run'
  shutil.copytree(runs['cls'], workdir)
  data = split.load_split(workdir)
  name = data['test'][0]
  patients = data['patients'] | {name: data['patients'][name] | {'truth': 'before the correction'}}
  changed_split(workdir, patients=patients, sha256='before the correction')
  with pytest.raises(UserError, match=f'since the run was started, the lesion masks or labels of {name} changed; rest'):
    train.train(tiny(cls), workdir, data_dir)
  assert not evaluate.is_finished(tiny(cls), workdir, data_dir)
  before = (workdir / 'test' / 'metrics.json').read_bytes()
  evaluate.evaluate(tiny(cls), workdir, data_dir)
  assert (workdir / 'test' / 'metrics.json').read_bytes() == before
  assert len(list(workdir.glob('test-*/metrics.json'))) == 1


@pytest.mark.parametrize(
  ('key', 'words'), [('images', 'has the same images as'), ('owner', 'is of the same person as')]
)
def test_renamed_training_scans_and_other_scans_of_a_training_patient_are_refused(runs, data_dir, tmp_path, key, words):
  workdir = copy_of(runs['cls'], tmp_path / 'run')
  data = split.load_split(workdir)
  other, tested = renamed(data), data['test'][1]
  seen = other['train'][2]
  other['patients'][seen][key] = data['patients'][tested][key]
  changed_split(workdir, **other)
  with pytest.raises(UserError, match=f'test patient {tested} {words} {seen}, which the run was trained or validated'):
    evaluate.evaluate(tiny(cls), workdir, data_dir)
  assert not list(workdir.glob('test*'))


def test_finished_means_made_of_what_is_asked(runs, data_dir, tmp_path, monkeypatch):
  """Other options, another checkpoint, another code or a changed table: the run is not finished."""
  workdir = tmp_path / 'run'
  shutil.copytree(runs['cls'], workdir)
  config = tiny(cls)
  finished = lambda config=config: evaluate.is_finished(config, workdir, data_dir)
  made_of = read(workdir)[1]['made_of']
  assert finished()
  assert made_of['options'] | {'fold': 0, 'dtype': 'float32', 'flips': False} == made_of['options']
  assert made_of['checkpoint']['step'] == read(workdir)[1]['step']
  for key, value in (('flips', True), ('target_sensitivity', 0.95), ('fit_temperature', True)):
    assert not finished(tiny(cls, **{f'evaluate.{key}': value}))
  evaluate.evaluate(tiny(cls, **{'evaluate.flips': True}), workdir, data_dir)
  assert not finished() and finished(tiny(cls, **{'evaluate.flips': True}))
  evaluate.evaluate(config, workdir, data_dir)
  assert finished()
  with monkeypatch.context() as patch:
    patch.setattr(provenance, 'code_sha256', lambda: 'another code')
    assert not finished()
  (workdir / 'test' / 'table.npz').write_bytes(b'changed')
  assert not finished()


@pytest.mark.parametrize('content', ['other point', 'damaged', 'missing'])
def test_a_run_with_another_operating_point_than_its_test_is_not_finished(runs, data_dir, tmp_path, content):
  """An evaluation that is killed after it saved the operating point leaves the test at the point before."""
  workdir = copy_of(runs['cls'], tmp_path / 'run')
  path = workdir / 'operating_point.json'
  point = one_class.point(workdir)
  if content == 'other point':
    changed = dataclasses.replace(point, threshold=0.25, bin=point.bin - 1)
    operating_point.save_points(workdir, {'lesion': changed})
  else:
    path.write_text('{') if content == 'damaged' else path.unlink()
  assert not evaluate.is_finished(tiny(cls), workdir, data_dir)
  evaluate.evaluate(tiny(cls), workdir, data_dir)
  assert one_class.point(workdir) == point and evaluate.is_finished(tiny(cls), workdir, data_dir)


def test_volumes_that_were_edited_are_not_used(runs, tmp_path):
  shutil.copytree(runs['seg'] / 'test', tmp_path / 'test')
  path, rows = tmp_path / 'test' / 'volumes.csv', one_class.part(tmp_path).volumes
  assert len(rows) == 2 and rows[0]['true_ml'] > 0
  path.write_text(path.read_text().replace('0.', '1.', 1))
  with pytest.raises(UserError, match='volumes.csv: was changed since the test; restore it, or replace it with'):
    one_class.part(tmp_path)


@pytest.mark.parametrize('is_link', [False, True])
def test_a_file_in_place_of_the_folder_of_the_test_is_refused(runs, data_dir, tmp_path, is_link):
  workdir = copy_of(runs['cls'], tmp_path / 'run')
  if is_link:
    (workdir / 'test').symlink_to(tmp_path / 'nothing')
  else:
    (workdir / 'test').write_text('mine')
  with pytest.raises(UserError, match='run/test: is not a folder; move it away, or rename it$'):
    evaluate.evaluate(tiny(cls), workdir, data_dir)


def test_a_test_replaces_only_its_own_files(runs, data_dir, tmp_path):
  workdir = tmp_path / 'run'
  shutil.copytree(runs['cls'], workdir)
  notes, edited = workdir / 'test' / 'notes.txt', workdir / 'test' / 'patients.csv'
  notes.write_text('mine')
  with edited.open('a') as file:
    file.write('mine\n')
  with pytest.raises(UserError, match='patients.csv: exists, and this program did not write it, or it was'):
    evaluate.evaluate(tiny(cls), workdir, data_dir)
  assert edited.read_text().endswith('mine\n')
  evaluate.evaluate(tiny(cls), workdir, data_dir, overwrite=True)
  assert not edited.read_text().endswith('mine\n') and notes.read_text() == 'mine'
  assert own_files.is_complete(workdir / 'test', own_files.read_record(workdir / 'test' / 'metrics.json'))


def test_an_interrupted_test_is_written_again(runs, data_dir, tmp_path, monkeypatch):
  """The disk is full at the last file: no result looks complete, and the next evaluation needs no --overwrite."""
  workdir = tmp_path / 'run'
  shutil.copytree(runs['cls'], workdir)
  original = files.os.replace

  def full(source, target):
    if target.name == 'table.npz':
      raise OSError(errno.ENOSPC, 'No space left on device')
    original(source, target)

  with monkeypatch.context() as patch:
    patch.setattr(files.os, 'replace', full)
    with pytest.raises(UserError, match='cannot be written'):
      evaluate.evaluate(tiny(cls), workdir, data_dir)
  assert not result_files.is_complete(workdir / 'test')
  evaluate.evaluate(tiny(cls), workdir, data_dir)
  assert result_files.is_complete(workdir / 'test')
  assert not list((workdir / 'test').rglob('.*'))


def test_a_run_without_split_and_point_is_evaluated_and_resumed(runs, data_dir, tmp_path):
  workdir = copy_of(runs['cls'], tmp_path / 'run')
  for name in ('split.json', 'operating_point.json'):
    (workdir / name).unlink()
  result = evaluate.evaluate(run_config.load_config(workdir), workdir, data_dir)
  assert result['auc'] == read(runs['cls'])[1]['auc']
  train.train(tiny(cls), workdir, data_dir)  # finished: does nothing, and is not refused


@pytest.mark.parametrize('name', ['split.json', 'starts.json'])
@pytest.mark.parametrize('content', ['{"test": []}', '[1]', '[{}]'])
def test_a_record_with_other_content_is_one_line(runs, data_dir, tmp_path, name, content):
  workdir = copy_of(runs['cls'], tmp_path / 'run')
  (workdir / name).write_text(content)
  with pytest.raises(UserError, match=rf'{name}: damaged \(it does not list .* of the run\); (restore|delete) it'):
    evaluate.evaluate(tiny(cls), workdir, data_dir)


def test_logits_that_are_not_finite_are_an_error(runs, data_dir):
  config = tiny(cls)
  task, mesh = tasks.create(config), meshes.create_mesh()
  _, variables = trained.load_best(config, task, runs['cls'], mesh)
  broken = jax.tree.map(lambda x: x * np.nan, variables)
  split = datasets.load_dataset(data_dir, 0, SIZE).test
  with pytest.raises(UserError, match='the model gives 32 of 32 slices a logit that is not finite'):
    scorer.Scorer(task, mesh, 8).tables(broken, split)


def test_a_target_sensitivity_is_met_on_the_validation_fold(runs, data_dir, tmp_path):
  shutil.copytree(runs['cls'] / 'checkpoints', tmp_path / 'checkpoints')
  config = tiny(cls, **{'evaluate.target_sensitivity': 0.9, 'evaluate.fit_temperature': True})
  result = evaluate.evaluate(config, tmp_path, data_dir)
  point = one_class.point(tmp_path)
  assert point.validation['chosen']['sensitivity'] >= 0.9
  assert result['operating_point']['chosen_by'] == 'sensitivity of at least 0.9 on the validation fold'
  assert result['operating_point']['temperature'] == point.temperature != 1
  before = read(runs['cls'])[1]
  assert result['auc'] == before['auc'] and result['tp'] == before['tp']  # both ignore temperature


def test_volumes_equal_those_of_prediction(runs, raw_dir, tmp_path):
  """Scores the masks of --mode=predict for the test patients against the released masks with scikit-learn."""
  with (runs['seg'] / 'test' / 'volumes.csv').open(newline='') as file:
    rows = list(csv.DictReader(file))
  patients = sorted({row['patient'] for row in read(runs['seg'])[0]})
  assert sorted(row['case'] for row in rows) == patients
  for row in rows:
    name = row['case']
    predict.predict(predictor.load_predictor(runs['seg']), raw_dir / f'{name}_ct.nii.gz', tmp_path)
    scan = volume_files.read_scan(raw_dir / f'{name}_ct.nii.gz')
    truth = volume_files.read_mask(raw_dir / f'{name}_seg.nii.gz', scan)
    mask = volume_files.read_mask(tmp_path / f'{name}_ct_mask.nii.gz', scan)
    if truth.any() or mask.any():
      assert float(row['dice']) == pytest.approx(sk.f1_score(truth.ravel(), mask.ravel()))
    assert float(row['predicted_ml']) == pytest.approx(mask.sum() * scan.voxel_ml)
  assert read(runs['seg'])[1]['volumes']['num_volumes'] == len(rows)
  assert 'volumes' not in read(runs['cls'])[1]


@pytest.mark.slow
def test_flips_lungs_and_smallest_lesion(runs, raw_dir, data_dir, tmp_path):
  """Scores are the mean over both flips. Masks are cut to the lungs, and lesions that are too small are removed."""
  shutil.copytree(runs['seg'], tmp_path / 'run')
  overrides = {f'evaluate.{key}': True for key in ('flips', 'lungs', 'fit_smallest')}
  config, scans = tiny(**overrides), prepare.scans(raw_dir)
  result = evaluate.evaluate(config, tmp_path / 'run', data_dir, scans)
  point = one_class.point(tmp_path / 'run')
  assert point.flips and point.lungs and len(point.validation['dice_of_volumes']) == len(operating_point.SMALLEST_ML)
  assert result['operating_point']['smallest_ml'] == point.smallest_ml

  task = tasks.create(config)
  _, variables = trained.load_best(config, task, runs['seg'], meshes.create_mesh())
  test, program = datasets.load_dataset(data_dir, 0, SIZE).test, jax.jit(task.probabilities)
  probabilities = lambda *inputs: program(*inputs)[..., 0]
  images = np.stack([test.source[i]['image'] for i in range(len(test))])
  both = [probabilities(variables, images), probabilities(variables, images[:, :, ::-1])[:, :, ::-1]]
  scores = np.array([float(row['score']) for row in read(tmp_path / 'run')[0]])
  np.testing.assert_allclose(scores, np.mean(both, axis=0).max(axis=(1, 2)), atol=2e-5)
  assert np.abs(scores - both[0].max(axis=(1, 2))).max() > 1e-4

  # At this low threshold much is marked, so that the next steps have something to remove.
  whole = predictor.load_predictor(tmp_path / 'run', threshold=float(np.median(both[0])), lungs=False, smallest_ml=0)
  (name,) = list(scans)[:1]
  scan, _ = scans[name]()
  marked, field = whole(scan).mask, lungs.field(scan)
  whole.points = operating_point.with_options(whole.points, lungs=True, smallest_ml=20)
  labels, count = ndimage.label(marked & field, np.ones((3, 3, 3)))
  sizes = ndimage.sum_labels(np.full(labels.shape, scan.voxel_ml), labels, np.arange(1, count + 1))
  kept = np.isin(labels, 1 + np.flatnonzero(sizes >= 20))
  assert marked.sum() > (marked & field).sum() > kept.sum() > 0
  np.testing.assert_array_equal(whole(scan).mask, kept)


def test_fit_smallest_needs_scans(runs, data_dir):
  evaluate.check_scans(tiny(), None)
  for scans in (None, {}):
    with pytest.raises(UserError, match=r'evaluate.fit_smallest: needs the released scans and masks'):
      evaluate.check_scans(tiny(**{'evaluate.fit_smallest': True}), scans)


def test_pictures(runs):
  charts = {
    'confusion_matrix.png',
    'roc.png',
    'roc_of_patients.png',
    'precision_recall.png',
    'calibration.png',
    'patients.png',
    'overview.png',
  }
  for workdir in runs.values():
    names = {path.name for path in (workdir / 'test' / 'figures').iterdir()}
    assert charts <= names
    overlays = sorted(names - charts)
    assert len(overlays) == 2
    for name in overlays:
      picture = Image.open(workdir / 'test' / 'figures' / name)
      # Two images side by side, with 12 x 12 pixels per pixel of the slice, and space for the text.
      assert picture.size == (2 * 384 + 8, 384 + 74)


def test_overlay_has_the_colours_of_the_paper_and_the_pixels_of_the_slice(tmp_path):
  """Colours of Fig. 4: blue for true positives, green for false positives, red for false negatives."""
  rng = np.random.default_rng(0)
  hu = rng.integers(-1000, 300, (48, 48)).astype(np.int16)
  mask, predicted = np.zeros((2, 48, 48), bool)
  mask[:24], predicted[:, :24] = True, True
  figures.write_overlay(tmp_path / 'a.png', hu, mask, {'run': predicted}, (-1000, 300), 'hu', 'patient a')
  picture = np.asarray(Image.open(tmp_path / 'a.png').convert('RGB')).astype(float) / 255
  image = picture[44 : 44 + 384]
  blocks = lambda side: image[:, side : side + 384].reshape(48, 8, 48, 8, 3)
  for side in (0, 392):
    assert np.ptp(blocks(side), axis=(1, 3)).max() == 0  # nothing is interpolated
  plain, coloured = (blocks(side)[:, 0, :, 0] for side in (0, 392))
  grey = ((hu + 1000) / 1300)[..., None]
  np.testing.assert_allclose(plain, np.broadcast_to(grey, plain.shape), atol=1 / 255)
  expected = np.broadcast_to(grey, plain.shape).copy()
  for where, colour in (
    (mask & predicted, (0.1, 0.35, 1.0)),
    (~mask & predicted, (0.1, 0.8, 0.2)),
    (mask & ~predicted, (0.95, 0.1, 0.1)),
  ):
    expected[where] = (expected[where] + colour) / 2
  np.testing.assert_allclose(coloured, expected, atol=1 / 255)


def test_telling_slices_take_the_worst_and_the_best_patients_in_turn():
  table = {
    'patient': np.array(['well', 'good', 'good', 'middle', 'bad']),
    'owner': np.array(['well', 'good', 'good', 'middle', 'bad']),
    'label': np.array([0, 1, 1, 1, 1]),
    'score': np.array([0.1, 0.9, 0.9, 0.6, 0.2]),
    'logit': np.zeros(5),
    'tp_chosen': np.array([0, 5, 9, 5, 1]),
    'fn_chosen': np.array([0, 0, 0, 5, 8]),
    'fp_chosen': np.array([0, 1, 0, 0, 0]),
    'tn_chosen': np.array([9, 0, 0, 0, 0]),
    'reliability': np.zeros((5, 3, 20)),
    'squared_error': np.zeros(5),
  }
  assert figures.telling_slices(table, 9) == [4, 2, 3, 0]
  assert figures.telling_slices(table, 2) == [4, 2]
  # 'well' has no lesion, so no Dice measures it.
  title = '{} of 3 patients with lesion, Dice {}'.format
  assert figures.typical_slices(table) == {
    title('best', '0.97'): 2,
    title('median', '0.67'): 3,
    title('worst', '0.20'): 4,
  }


def test_files_of_an_earlier_evaluation_are_removed(runs, data_dir, tmp_path):
  """Old pictures, volumes and comparisons beside new numbers would be misleading."""
  test = tmp_path / 'test'
  shutil.copytree(runs['cls'] / 'checkpoints', tmp_path / 'checkpoints')
  old = {test / name: lambda path: path.write_text('old') for name in ('figures/other_003.png', 'volumes.csv')}
  own_files.write_together(test / 'metrics.json', {}, old, ())
  own_files.write_together(
    test / 'against-a-b.json', {}, {test / 'against-a-b' / 'p_001.png': old[test / 'volumes.csv']}, ()
  )
  (test / 'report.html').write_text(own_files.sealed('old'))
  (test / 'against-other.json').write_text('not ours')
  evaluate.evaluate(tiny(cls), tmp_path, data_dir)
  kept = {path.name for path in test.rglob('*')}
  assert kept.isdisjoint(
    {'other_003.png', 'volumes.csv', 'against-a-b.json', 'against-a-b', 'p_001.png', 'report.html'}
  )
  assert kept >= {'metrics.json', 'against-other.json'}


def test_a_missing_or_damaged_table_is_one_line(runs, tmp_path):
  expected = r'test: the run was not evaluated, .*; evaluate the run with --mode=evaluate'
  with pytest.raises(UserError, match=expected):
    one_class.part(tmp_path)
  shutil.copytree(runs['cls'] / 'test', tmp_path / 'test')
  whole = (tmp_path / 'test' / result_files.TABLE).read_bytes()
  for content in (b'', whole[:200], whole[: len(whole) // 2], b'no archive'):
    (tmp_path / 'test' / result_files.TABLE).write_bytes(content)
    with pytest.raises(UserError, match=expected):
      one_class.part(tmp_path)
  (tmp_path / 'test' / result_files.TABLE).write_bytes(whole)
  one_class.part(tmp_path)
  (tmp_path / 'test' / 'metrics.json').write_text('{')
  with pytest.raises(UserError, match=expected):
    result_files.read_numbers(tmp_path)
