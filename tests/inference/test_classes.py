"""Several classes in prediction: masks, files, DICOM SEG, pages and bundles, compared with NumPy and other readers."""

import csv
import functools
import json
import re
import runpy
import shutil
import subprocess
import sys
import types

import dicom_series
import highdicom
import jax
import jax.numpy as jnp
import nibabel as nib
import numpy as np
import pytest
from conftest import SIZE, tiny
from PIL import Image
from scipy import special
from viewer_page import Page

from configs import cls, seg
from fusa_jax import tasks
from fusa_jax.inference import bundle, export, manifest, outputs, predict, predictor, trained, viewer
from fusa_jax.measures import masks as measured
from fusa_jax.runs import arguments, checkpoint, operating_point, patient_rule, run_config
from fusa_jax.scans import classes, dicom, dicom_seg, pictures, volume_files
from fusa_jax.system import meshes, own_files
from fusa_jax.system.errors import UserError

# Two kinds of lesions with values of their own, which may overlap in a prediction but not in a mask file.
KINDS = (('ground glass', (3,)), ('consolidation', (5, 6)))
NAMES = ('ground glass', 'consolidation')
TEMPERATURES = (1.25, 0.5)
SCAN = 'volume-phantom-A-0001_ct.nii.gz'


@functools.cache
def initial(count, seed=0, intensity='hu'):
  """Returns the initial weights of a network of several classes, and its logits of random slices."""
  config = tiny(seg, **{'data.intensity': intensity})
  config.data.classes = tuple((f'class {k}', (k + 1,)) for k in range(count))
  task = tasks.create(config)
  variables = jax.jit(lambda key: task.init(key, SIZE))(jax.random.key(seed))
  low, high = (-1000, 300) if intensity == 'hu' else (0, 256)
  slices = np.random.default_rng(0).integers(low, high, (2, SIZE, SIZE)).astype(np.int16)
  return variables, np.asarray(jax.jit(task.logits)(variables, slices), np.float64)


def save_run(folder, data_classes=KINDS, share=(0.3, 0.2), seed=0, intensity='hu', **options):
  """Saves a run with initial weights. Its thresholds mark about these shares of random pixels."""
  config = tiny(seg, **{'data.intensity': intensity})
  config.data.classes = data_classes
  variables, logits = initial(len(data_classes), seed, intensity)
  run_config.save_config(folder, config)
  with checkpoint.Checkpoints(folder) as checkpoints:
    checkpoints.save(0, variables, {'count': jnp.zeros(1)}, None)
  points = {}
  for number, (name, _) in enumerate(data_classes):
    temperature = TEMPERATURES[number]
    threshold = float(np.quantile(special.expit(logits[..., number] / temperature), 1 - share[number]))
    rule = patient_rule.PatientRule(('lesion_ml', 'maximum')[number], 1, (0.5, 0.9)[number], 'made')
    points[name] = operating_point.OperatingPoint(
      threshold=threshold, temperature=temperature, chosen_by='made', step=0, patient=rule, **options
    )
  operating_point.save_points(folder, points)


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  folder = tmp_path_factory.mktemp('classes') / 'run'
  save_run(folder)
  return folder


@pytest.fixture(scope='module')
def loaded(run):
  return predictor.load_predictor(run)


@pytest.fixture(scope='module')
def scan(raw_dir):
  return volume_files.read_scan(raw_dir / SCAN)


def expected_probability(workdir, slices):
  """float64 probabilities [..., classes] from the logits of a run."""
  config = run_config.load_config(workdir)
  (network,), _ = trained.load_networks([workdir], meshes.create_mesh())
  logits = jax.jit(tasks.create(config).logits)(network.variables, np.asarray(slices, np.int16))
  return special.expit(np.asarray(logits, np.float64) / np.array(network.temperatures))


def values_of(masks):
  """The mask values of KINDS for two masks: 3, 5, and 5 where both are."""
  return np.where(masks[1] > 0, 5, 3 * masks[0])


# ---- the model


def test_a_mean_of_networks_with_a_temperature_per_class():
  config = tiny(seg)
  config.data.classes = KINDS
  task, slices = tasks.create(config), np.random.default_rng(1).integers(-1000, 300, (2, SIZE, SIZE)).astype(np.int16)
  networks, expected = [], []
  logits = jax.jit(task.logits)
  for seed, temperatures in ((0, (0.5, 2.0)), (1, (1.0, 3.0))):
    variables, _ = initial(2, seed)
    networks.append(trained.Network(config, seed, variables, temperatures))
    plain, mirrored = (np.asarray(logits(variables, x), np.float64) for x in (slices, slices[:, :, ::-1]))
    mean = (special.expit(plain) + special.expit(mirrored)[:, :, ::-1]) / 2
    expected.append(special.expit(special.logit(mean) / temperatures))
  model = trained.create(networks, flips=True)
  got = np.asarray(jax.jit(model.function)(model.variables, slices))
  assert got.shape == (2, SIZE, SIZE, 2) and model.classes.names == NAMES
  np.testing.assert_allclose(got, np.mean(expected, axis=0), atol=2e-6)
  assert np.abs(got[..., 0] - got[..., 1]).max() > 0.01


def test_masks_and_numbers_of_each_class(run, loaded, scan):
  prediction, expected = loaded(scan), expected_probability(run, scan.values)
  assert prediction.probability.shape == (*scan.shape, 2)
  np.testing.assert_allclose(prediction.probability, expected, atol=2e-6)
  assert list(prediction.numbers) == ['model', 'step', 'values', 'flips', 'lungs', 'num_slices', 'classes']
  of_file = classes.chosen(KINDS, None).bits(prediction.mask)
  for k, name in enumerate(NAMES):
    numbers, point, mask = prediction.numbers['classes'][name], loaded.points[name], prediction.masks[name]
    clear = np.abs(expected[..., k] - point.threshold) > 1e-5
    np.testing.assert_array_equal(mask[clear], (expected[..., k] >= point.threshold)[clear])
    assert mask.dtype == np.uint8 and 0 < mask.mean() < 1
    assert numbers['lesion_ml'] == pytest.approx(mask.sum() * scan.voxel_ml)
    assert numbers['file_ml'] == pytest.approx(((of_file >> k) & 1).sum() * scan.voxel_ml)
    assert numbers['positive_slices'] == np.flatnonzero(mask.any(axis=(1, 2))).tolist()
    np.testing.assert_allclose(numbers['slice_scores'], expected[..., k].max(axis=(1, 2)), atol=6e-5)
    assert (numbers['threshold'], numbers['temperature']) == (point.threshold, TEMPERATURES[k])
    assert (numbers['value'], numbers['mask_values']) == (KINDS[k][1][0], list(KINDS[k][1]))
    assert numbers['colour'] == list(classes.COLOURS[k])
  first, second = (prediction.numbers['classes'][name] for name in NAMES)
  assert first['patient']['score'] == pytest.approx(first['lesion_ml']) and first['patient']['positive']
  assert second['patient']['score'] == pytest.approx(expected[..., 1].max(), abs=1e-4)
  both = prediction.masks[NAMES[0]] & prediction.masks[NAMES[1]]
  assert both.any()
  np.testing.assert_array_equal(prediction.mask, values_of(list(prediction.masks.values())))
  assert first['file_ml'] == pytest.approx(first['lesion_ml'] - both.sum() * scan.voxel_ml)
  assert second['file_ml'] == second['lesion_ml']


def test_options_of_each_class(run, loaded, scan):
  """A threshold and a smallest lesion of one class only; masks in the lungs; numbers that fit no class."""
  before, smallest = loaded(scan), 3 * scan.voxel_ml
  threshold = float(np.quantile(before.probability[..., 1], 0.98))
  options = {'threshold': {'consolidation': threshold}, 'smallest_ml': {'consolidation': smallest}}
  changed = predictor.load_predictor(run, **options)
  prediction = changed(scan)
  np.testing.assert_array_equal(prediction.masks['ground glass'], before.masks['ground glass'])
  whole = before.probability[..., 1] >= threshold
  labels, count = measured.components(whole)
  sizes = np.bincount(labels.ravel(), minlength=count + 1)
  kept = whole & (sizes[labels] >= 3)
  assert 0 < kept.sum() < whole.sum()
  np.testing.assert_array_equal(prediction.masks['consolidation'], kept)
  assert changed.sha256() != loaded.sha256()
  in_lungs = predictor.load_predictor(run, lungs=True)(scan)
  for name in NAMES:
    assert 0 < in_lungs.masks[name].sum() < before.masks[name].sum()
    assert not (in_lungs.masks[name] & ~before.masks[name] & 1).any()
  for options, reason in (
    (
      {'threshold': 0.4},
      r'^threshold: 0.4 is for one class, but the model has 2 \(ground glass, consolidation\)',
    ),
    ({'smallest_ml': {'mass': 1.0}}, r"^smallest_ml: the model has no class 'mass'; give one of ground glass, cons"),
    *(
      (
        {'threshold': {wrong: 0.5}},
        rf"^threshold: '{wrong}' is not the name of one class; give CLASS:NUMBER for each, separated by commas, for "
        "example 'ground glass:0.5,consolidation:0.5'$",
      )
      for wrong in (
        'ground glass:0.4;consolidation',
        'ground glass=0.4,consolidation',
        'ground glass:0.4 consolidation',
      )
    ),
  ):
    with pytest.raises(UserError, match=reason):
      predictor.load_predictor(run, **options)
  array = loaded(scan.values).numbers['classes']
  assert array['ground glass']['patient']['score'] is None and array['consolidation']['patient']['score'] > 0


@pytest.mark.parametrize(
  ('text', 'value'),
  [
    (None, None),
    ('0.4', 0.4),
    ('ground glass:0.4,consolidation:0.5', {'ground glass': 0.4, 'consolidation': 0.5}),
    (' a, b : 1e-2 , c:d:.3', {'a, b': 0.01, 'c:d': 0.3}),
    ('high', 'is not a number'),
    ('', 'is not a number'),
    ('0,4', 'is not a number'),
    ('a:0.4,b', "'b' is not CLASS:NUMBER"),
    ('a:0,4', "'4' is not CLASS:NUMBER"),
    ('a:0.4,a:0.5', "'a' is given twice"),
    ('a:', "'a:' is not CLASS:NUMBER"),
    (':0.4', "':0.4' is not CLASS:NUMBER"),
    ('a:x', "'x', for 'a', is not a number"),
  ],
)
def test_thresholds_in_a_flag(monkeypatch, text, value):
  flag = lambda text: types.SimpleNamespace(value=text)
  flags = {'threshold': flag(text), 'smallest_ml': flag(None)}
  fake = type('Flags', (), {'__getitem__': lambda _, name: flags[name], 'tta': None, 'lungs': True})()
  monkeypatch.setattr(arguments, 'FLAGS', fake)
  if isinstance(value, str):
    reason = (
      f'--threshold: {text!r}: {value}; give a number or, of several classes, CLASS:NUMBER for each, separated by'
    )
    with pytest.raises(UserError, match=f'^{re.escape(reason)} commas, for example --threshold="ground glass:0.4,cons'):
      arguments.operating_point()
  else:
    got = arguments.operating_point()
    assert got == {'threshold': value, 'flips': None, 'lungs': True, 'smallest_ml': None}


def test_runs_of_other_classes_are_not_averaged(run, tmp_path):
  for name, other in (('values', (KINDS[0], ('consolidation', (5,)))), ('names', (KINDS[0], ('mass', (5, 6))))):
    save_run(tmp_path / name, other)
    with pytest.raises(UserError, match=r'^workdir: .* has data.classes ground glass \(3,\), .*; give runs with the'):
      predictor.load_predictor([run, tmp_path / name])
  save_run(tmp_path / 'same', seed=1)
  together = predictor.load_predictor([run, tmp_path / 'same'])
  assert list(together.points) == list(NAMES) and together.points['consolidation'].chosen_by == 'mean of 2 runs'
  assert together.points['consolidation'].temperature == (TEMPERATURES[1],) * 2


# ---- files


@pytest.fixture(scope='module')
def predicted(loaded, raw_dir, tmp_path_factory):
  """(folder of one scan, folder of its results with probabilities)."""
  source, out = tmp_path_factory.mktemp('in'), tmp_path_factory.mktemp('out') / 'masks'
  shutil.copy(raw_dir / SCAN, source / 'a.nii.gz')
  predict.predict(loaded, source, out, probabilities=True)
  return source, out


def test_written_files(predicted, loaded, scan):
  source, out = predicted
  names = {path.name for path in out.iterdir() if not path.name.startswith('.')}
  assert names == {
    'a.json',
    'a_mask.nii.gz',
    'a_ground_glass_probability.nii.gz',
    'a_consolidation_probability.nii.gz',
    'labels.txt',
    'predictions.csv',
  }
  prediction = loaded(scan)
  stored = nib.load(out / 'a_mask.nii.gz')
  assert stored.get_data_dtype() == np.uint8 and set(np.unique(stored.dataobj)) == {0, 3, 5}
  np.testing.assert_array_equal(stored.affine, nib.load(source / 'a.nii.gz').affine)
  # The mask is one of the cohort that the run was trained on.
  again = volume_files.read_mask(out / 'a_mask.nii.gz', scan, classes.chosen(KINDS, None))
  bits = prediction.masks['ground glass'] + 2 * prediction.masks['consolidation']
  np.testing.assert_array_equal(again, np.where(bits == 3, 2, bits))
  for k, name in enumerate(('ground_glass', 'consolidation')):
    probability = volume_files.volumes.canonical(nib_stored(out / f'a_{name}_probability.nii.gz'), 'a')[0]
    np.testing.assert_array_equal(probability, prediction.probability[..., k])
  record = own_files.read_record(out / 'a.json')
  assert record['classes'] == json.loads(json.dumps(prediction.numbers['classes']))
  assert set(record['files']) == names - {'a.json', 'labels.txt', 'predictions.csv'}
  (row,) = csv.DictReader((out / 'predictions.csv').open())
  assert list(row) == [
    *('input', 'input_sha256', 'status', 'reason', 'seconds', 'run_sha256'),
    *('lesion_ml_ground_glass', 'patient_score_ground_glass', 'patient_positive_ground_glass'),
    *('lesion_ml_consolidation', 'patient_score_consolidation', 'patient_positive_consolidation'),
  ]
  for name in NAMES:
    numbers, ending = record['classes'][name], classes.file_name(name)
    assert float(row[f'lesion_ml_{ending}']) == numbers['lesion_ml']
    assert float(row[f'patient_score_{ending}']) == numbers['patient']['score']
    assert row[f'patient_positive_{ending}'] == str(int(numbers['patient']['positive']))


def nib_stored(path):
  image = nib.load(path)
  return volume_files.volumes.Stored(np.asarray(image.dataobj), image.affine, image.header)


def test_results_are_not_scans_and_a_second_prediction_changes_nothing(loaded, predicted, tmp_path):
  source, out = tmp_path / 'in', tmp_path / 'in'
  shutil.copytree(predicted[0], source)
  for _ in range(2):
    predict.predict(loaded, source, out, probabilities=True)
    written = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in out.glob('a*')}
    assert len(written) == 5  # with the scan
    assert len((out / 'predictions.csv').read_text().splitlines()) == 2
  before = written
  predict.predict(loaded, source, out, probabilities=True)
  assert {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in out.glob('a*')} == before


def test_labels_of_itk_snap(predicted):
  """Read as ITK-SNAP reads them: a line per label with seven numbers and a name in quotes; # begins a comment."""
  labels = {}
  for line in (predicted[1] / 'labels.txt').read_text().splitlines():
    if not line.startswith('#'):
      *numbers, name = re.fullmatch(r'\s*' + r'(\d+)\s+' * 7 + r'"([^"]*)"\s*', line).groups()
      labels[int(numbers[0])] = (*map(int, numbers[1:]), name)
  assert labels == {
    0: (0, 0, 0, 0, 0, 0, 'Clear Label'),
    3: (*classes.COLOURS[0], 1, 1, 1, 'ground glass'),
    5: (*classes.COLOURS[1], 1, 1, 1, 'consolidation'),
    6: (*classes.COLOURS[1], 1, 1, 1, 'consolidation'),
  }


def test_files_of_others_and_of_other_classes_are_not_replaced(loaded, predicted, predictors, tmp_path):
  source, out = predicted[0], tmp_path / 'out'
  shutil.copytree(predicted[1], out)
  files = lambda: {path.name: path.read_bytes() for path in out.iterdir()}
  labels = (out / 'labels.txt').read_text()
  own = (
    r'than those of the run \(3 ground glass, 5 consolidation, 6 consolidation\); give another folder, or add --over'
  )
  for text, reason in (
    (labels.replace('ground glass', 'GGO'), rf'is for other classes \(3 GGO, 5 conso.*n, 6 consolidation\) {own}'),
    (classes.label_file(classes.chosen({'a': (1,), 'b': (1, 2)}, None)), rf'is for other .* \(1 a \+ b, 2 b\) {own}'),
    (labels + '\n', 'exists, and this program did not write it, or it was changed'),
    (labels.replace('    1  1  1', '    1  0  1'), 'exists, and this program did not write it, or it was changed'),
  ):
    (out / 'labels.txt').write_text(text)
    before = files()
    with pytest.raises(UserError, match=f'^{out}/labels.txt: {reason}'):
      predict.predict(loaded, source, out, probabilities=True)
    assert files() == before
  other = (
    r'/predictions.csv: has rows of a run with other classes or another task, and other columns; give another folder'
  )
  with pytest.raises(UserError, match=other):
    predict.predict(predictors['seg'], source, out)  # one class has other columns
  assert files() == before
  predict.predict(loaded, source, out, probabilities=True, overwrite=True)
  assert (out / 'labels.txt').read_bytes() == (predicted[1] / 'labels.txt').read_bytes()
  predict.predict(predictors['seg'], source, tmp_path / 'one')
  with pytest.raises(UserError, match=other):
    predict.predict(loaded, source, tmp_path / 'one')


def test_nothing_is_written_for_an_input_that_is_refused(loaded, tmp_path):
  (tmp_path / 'a.nii.gz').write_bytes(b'no scan')
  with pytest.raises(UserError, match='not a NIfTI file'):
    predict.predict(loaded, tmp_path / 'a.nii.gz', tmp_path / 'out')
  assert not [path for path in (tmp_path / 'out').glob('*') if not path.name.startswith('.')]


def test_names_that_would_be_too_long_or_the_same_are_refused_first(loaded, predicted, tmp_path):
  """The limit of file systems is 255 bytes; a class of 64 characters may have 192 of them."""
  folder, out = tmp_path / 'in', tmp_path / 'out'
  folder.mkdir()
  longest = 255 - len('_consolidation_probability.nii.gz')
  for stem in ('a' * longest, 'b' * (longest + 1)):
    shutil.copy(predicted[0] / 'a.nii.gz', folder / f'{stem}.nii.gz')
  reason = rf'^input: .*/b+\.nii\.gz: the names of its .* than 255 bytes; give it a name of at most {longest} bytes'
  with pytest.raises(UserError, match=reason):
    predict.predict(loaded, folder, out, probabilities=True)
  assert not out.exists()

  def check(names, stems):
    kinds = classes.chosen({name: (k + 1,) for k, name in enumerate(names)}, None)
    model = types.SimpleNamespace(task='segmentation', classes=kinds)
    found = [volume_files.VolumeFile(tmp_path / f'{stem}.nii') for stem in stems]
    outputs.Outputs(types.SimpleNamespace(model=model), out, tmp_path, probabilities=True).check_names(found)

  with pytest.raises(UserError, match=r'^input: .*/x.nii and .*/x_Ground.nii would have the same result, x_Ground_gl'):
    check(('ground glass', 'glass'), ('x', 'x_Ground'))
  longest = 255 - len(f'_{"肺" * 64}_probability.nii.gz'.encode())
  check(('肺' * 64, 'mass'), ('a' * longest,))
  with pytest.raises(UserError, match=f'at most {longest} bytes'):
    check(('肺' * 64, 'mass'), ('a' * (longest + 1),))
  with pytest.raises(UserError, match='is not a name for files; .* at most 64 characters and 192 bytes'):
    check(('\U00020000' * 49, 'mass'), ('a',))
  # A refused archive has no result, so its name may be long.
  (folder / f'{"z" * 250}.zip').write_bytes(b'no archive')
  shutil.copy(predicted[0] / 'a.nii.gz', folder / 'c.nii.gz')
  assert predict.predict(loaded, folder, out) == (3, 1, 0)


def test_rows_of_a_killed_prediction(tmp_path):
  """Rows of the same classes are joined; those of other classes, with as many columns, are refused."""
  values = {'input': 'a', 'input_sha256': '0', 'status': 'predicted', 'reason': '', 'seconds': 1, 'run_sha256': '1'}
  named = lambda *names: manifest.columns_of(classes.Classes(names), has_masks=True)
  killed = manifest.Manifest(tmp_path, 0, named(*NAMES))
  killed.add({**values, 'lesion_ml_ground_glass': 1.5, 'patient_positive_consolidation': 1})
  killed.close()
  other = manifest.Manifest(tmp_path, 0, named('mass', 'nodule'))
  for rows in (other, manifest.Manifest(tmp_path, 0)):
    with pytest.raises(UserError, match=r'.predictions.0.csv: has rows of a run with other classes or anoth'):
      rows.check_own()
  again = manifest.Manifest(tmp_path, 0, named(*NAMES))
  again.check_own()
  again.begin()
  (row,) = csv.DictReader((tmp_path / 'predictions.csv').open())
  assert (row['lesion_ml_ground_glass'], row['lesion_ml_consolidation']) == ('1.5', '')
  assert row['patient_positive_consolidation'] == '1'
  with pytest.raises(UserError, match=r'/predictions.csv: has rows of a run with other classes'):
    manifest.Manifest(tmp_path, 0, named('mass', 'nodule')).check_own()
  assert manifest.refused(tmp_path) == set()


def test_one_class_with_a_value_of_its_own(scan, raw_dir, tmp_path):
  """The keys are those of one class; the mask has the value of the cohort."""
  save_run(tmp_path / 'run', (('consolidation', (7,)),))
  one = predictor.load_predictor(tmp_path / 'run')
  prediction = one(scan)
  assert set(np.unique(prediction.mask)) == {0, 7} and prediction.probability.shape == scan.shape
  numbers = prediction.numbers
  assert (numbers['class'], numbers['value'], numbers['mask_values']) == ('consolidation', 7, [7])
  assert numbers['lesion_ml'] == pytest.approx(prediction.masks['consolidation'].sum() * scan.voxel_ml)
  predict.predict(one, raw_dir / SCAN, tmp_path / 'out', probabilities=True)
  stem = SCAN.removesuffix('.nii.gz')
  assert {path.name for path in (tmp_path / 'out').glob('[!.]*')} == {
    *(f'{stem}{ending}' for ending in ('.json', '_mask.nii.gz', '_probability.nii.gz')),
    *('labels.txt', 'predictions.csv'),
  }
  (path,) = viewer.view(raw_dir / SCAN, tmp_path / 'out')
  canonical = np.asarray(Page(path).volume('mask0').dataobj).transpose(2, 1, 0)
  np.testing.assert_array_equal(canonical, prediction.masks['consolidation'])
  export.write_bundle([tmp_path / 'run'], tmp_path / 'bundle')
  assert json.loads((tmp_path / 'bundle' / 'bundle.json').read_text())['version'] == 3
  np.testing.assert_array_equal(predictor.load_predictor(tmp_path / 'bundle')(scan).mask, prediction.mask)


@pytest.mark.parametrize('is_exclusive', [False, True], ids=['a question per class', 'exclusive'])
def test_classes_of_slices_have_numbers_but_no_masks_and_labels(raw_dir, scan, tmp_path, is_exclusive):
  """Numbers and table of a classifier: a sigmoid and temperature per class, or a softmax and the highest class."""
  config = tiny(cls)
  config.data.classes = NAMES if is_exclusive else KINDS
  task = tasks.create(config)
  variables = jax.jit(lambda key: task.init(key, SIZE))(jax.random.key(0))
  temperatures = (1.0, 1.0) if is_exclusive else TEMPERATURES
  model = trained.create([trained.Network(config, 0, variables, temperatures)], flips=False)
  rule = patient_rule.PatientRule('maximum', 1, 0.5, 'made')
  points = dict.fromkeys(NAMES, operating_point.OperatingPoint(threshold=0.5, patient=rule))
  one = predictor.Predictor(model, points, meshes.create_mesh())
  predict.predict(one, raw_dir / SCAN, tmp_path)
  stem = SCAN.removesuffix('.nii.gz')
  assert {path.name for path in tmp_path.glob('[!.]*')} == {f'{stem}.json', 'predictions.csv'}
  images = task.inputs(scan.values)
  logits = np.asarray(jax.jit(lambda x: task.model.apply(variables, x, train=False))(images), np.float64)
  expected = special.softmax(logits, axis=1) if is_exclusive else special.expit(logits / temperatures)
  record = own_files.read_record(tmp_path / f'{stem}.json')
  (row,) = csv.DictReader((tmp_path / 'predictions.csv').open())
  assert list(row) == [
    *('input', 'input_sha256', 'status', 'reason', 'seconds', 'run_sha256'),
    *(('predicted_class',) if is_exclusive else ()),
    *('patient_score_ground_glass', 'patient_positive_ground_glass'),
    *('patient_score_consolidation', 'patient_positive_consolidation'),
  ]
  for k, name in enumerate(NAMES):
    numbers = record['classes'][name]
    np.testing.assert_allclose(numbers['slice_scores'], expected[:, k], atol=6e-5)
    assert numbers['positive_slices'] == [i for i, score in enumerate(numbers['slice_scores']) if score >= 0.5]
    assert 'lesion_ml' not in numbers
    assert float(row[f'patient_score_{classes.file_name(name)}']) == pytest.approx(expected[:, k].max(), abs=1e-4)
  if is_exclusive:
    highest = NAMES[int(expected.mean(axis=0).argmax())]
    assert row['predicted_class'] == record['predicted_class'] == highest
  # A result that was complete keeps its row.
  predict.predict(one, raw_dir / SCAN, tmp_path)
  assert [*csv.DictReader((tmp_path / 'predictions.csv').open())] == [row]
  assert viewer.view(raw_dir / SCAN, tmp_path)


def test_masks_of_pictures_hold_the_values(tmp_path):
  save_run(tmp_path / 'run', intensity='grey')
  grey, folder = predictor.load_predictor(tmp_path / 'run'), tmp_path / 'in'
  folder.mkdir()
  values = np.random.default_rng(0).integers(0, 256, (40, 48)).astype(np.uint8)
  Image.fromarray(values).save(folder / 'p.png')
  predict.predict(grey, folder, tmp_path / 'out', probabilities=True)
  expected = grey(values)
  assert expected.mask.shape == (40, 48) and set(np.unique(expected.mask)) == {0, 3, 5}
  stored = np.asarray(Image.open(tmp_path / 'out' / 'p_mask.png'))
  np.testing.assert_array_equal(stored, values_of(list(expected.masks.values())))
  bits = pictures.read_mask(tmp_path / 'out' / 'p_mask.png', (40, 48), classes.chosen(KINDS, None))
  np.testing.assert_array_equal(bits, np.select([stored == 5, stored == 3], [2, 1]))
  probability = np.asarray(Image.open(tmp_path / 'out' / 'p_consolidation_probability.png'))
  np.testing.assert_array_equal(probability, np.rint(expected.probability[..., 1] * 255))
  numbers = own_files.read_record(tmp_path / 'out' / 'p.json')['classes']['ground glass']
  assert numbers['lesion_pixels'] == expected.masks['ground glass'].sum() and numbers['score'] > numbers['threshold']
  assert numbers['file_pixels'] == (stored == 3).sum() and 'smallest_ml' not in numbers
  save_run(tmp_path / 'large', (KINDS[0], ('consolidation', (300,))), intensity='grey')
  with pytest.raises(UserError, match=r'p.png: the mask of a picture holds values up to 255, but .* has 300; giv'):
    predict.predict(predictor.load_predictor(tmp_path / 'large'), folder, tmp_path / 'none')
  assert not (tmp_path / 'none').exists()


@pytest.mark.filterwarnings('ignore')
def test_dicom_seg_has_a_segment_per_class(loaded, raw_dir, tmp_path):
  image = nib.load(raw_dir / SCAN)
  folder = dicom_series.save(tmp_path / 'in', dicom_series.slices(np.asarray(image.dataobj), image.affine, 3))
  predict.predict(loaded, folder, tmp_path / 'out', as_dicom=True)
  (path,) = (tmp_path / 'out').glob('*_mask.dcm')
  (series,) = dicom_series.find(folder)
  scan = dicom.read_series(series)
  masks = loaded(scan).masks
  made = highdicom.seg.segread(path)
  assert made.number_of_segments == 2
  headers, _ = series.grid
  for number, name in enumerate(NAMES, 1):
    described = made.get_segment_description(number)
    assert described.segment_label == name
    frames = made.get_pixels_by_source_instance(
      [header.SOPInstanceUID for header in headers],
      segment_numbers=[number],
      combine_segments=False,
      assert_missing_frames_are_empty=True,
    )[..., 0]
    own = dicom_seg.volumes.to_own_axes(masks[name], scan).transpose(2, 1, 0)
    np.testing.assert_array_equal(frames, own)
    parameters = described.SegmentationAlgorithmIdentificationSequence[0].AlgorithmParameters
    assert f'threshold={loaded.points[name].threshold}' in parameters
  codes = [made.get_segment_description(number).segmented_property_type for number in (1, 2)]
  assert [(code.value, code.scheme_designator) for code in codes] == [('112120', 'DCM'), ('95436008', 'SCT')]
  assert (masks[NAMES[0]] & masks[NAMES[1]]).any()  # overlaps are kept
  numbered = classes.chosen({'ground glass': (1,), 'consolidation': (2,)}, None)
  bits = masks['ground glass'] + 2 * masks['consolidation']
  np.testing.assert_array_equal(dicom_seg.read_seg(path, scan, numbered), bits)

  # dcmqi reads the same voxels at the same places in the patient. It leaves out the empty slices at both ends.
  command = ['segimage2itkimage', '--inputDICOM', path, '--outputDirectory', tmp_path, '-t', 'nifti', '-p', 'dcmqi']
  subprocess.run(command, check=True, capture_output=True, timeout=120)
  (written,) = (tmp_path / 'out').glob('*_mask.nii.gz')
  affine = nib.load(written).affine
  about = json.loads((tmp_path / 'dcmqi-meta.json').read_text())['segmentAttributes']
  assert [one[0]['SegmentLabel'] for one in about] == list(NAMES)
  for number, name in enumerate(NAMES, 1):
    theirs = nib.load(tmp_path / f'dcmqi-{number}.nii.gz')
    ours = dicom_seg.volumes.to_own_axes(masks[name], scan)
    places = [
      nib.affines.apply_affine(matrix, np.argwhere(voxels))
      for matrix, voxels in ((theirs.affine, theirs.dataobj), (affine, ours))
    ]
    np.testing.assert_allclose(*(np.array(sorted(map(tuple, one.round(2)))) for one in places), atol=0.02)


# ---- pages


def test_a_page_shows_each_class(predicted, loaded, scan, tmp_path):
  source, out = predicted[0], tmp_path / 'out'
  shutil.copytree(predicted[1], out)
  (path,) = viewer.view(source, out)
  page, prediction = Page(path), loaded(scan)
  written = values_of(list(prediction.masks.values()))
  for k, (name, values) in enumerate(KINDS):
    stored = np.asarray(page.volume(f'mask{k}').dataobj).transpose(2, 1, 0)
    np.testing.assert_array_equal(stored, written == values[0])
    numbers = prediction.numbers['classes'][name]
    shown = rf'{name},\s+threshold {numbers["threshold"]:.3g}:\s+{numbers["lesion_ml"]:.1f} mL of lesion'
    assert re.search(shown, page.text)
    assert f'.class{k} {{ --colour: rgb({",".join(map(str, classes.COLOURS[k]))})' in page.text
  rows = [attributes for tag, attributes in page.tags if tag == 'span' and 'score' in attributes.get('class', '')]
  assert len(rows) == 2 * len(scan.values)
  found = [sum('found' in row['class'] for row in rows[k::2]) for k in (0, 1)]
  assert found == [len(prediction.numbers['classes'][name]['positive_slices']) for name in NAMES]


def test_a_mask_that_was_changed_by_hand_is_measured_per_class(predicted, scan, tmp_path, caplog):
  source, out = tmp_path / 'in', tmp_path / 'out'
  for folder, to in zip(predicted, (source, out), strict=True):
    shutil.copytree(folder, to)
  for ending in ('.json', '_mask.nii.gz'):
    shutil.copy(out / f'a{ending}', out / f'b{ending}')
  shutil.copy(source / 'a.nii.gz', source / 'b.nii.gz')
  image = nib.load(out / 'a_mask.nii.gz')
  values = np.zeros(image.shape, np.uint8)
  values[3:8, 4:9, 2:4], values[3:5, 4:9, 5] = 6, 3  # 6 is also consolidation
  nib.save(nib.Nifti1Image(values, image.affine, image.header), out / 'a_mask.nii.gz')
  viewer.view(source, out)
  text = Page(out / 'a.html').text
  assert 'a_mask.nii.gz: changed since the prediction; the page shows its own volume' in caplog.text
  for name, voxels, slices in (('ground glass', 10, 1), ('consolidation', 50, 2)):
    assert re.search(
      rf'{name},\s+threshold \S+:\s+{voxels * scan.voxel_ml:.1f} mL of lesion,\s+{slices} of {len(scan.values)} slices',
      text,
    )
  cells = re.findall(
    r'<td>(ground glass|consolidation)</td><td class="n">([\d.]+)</td>', (out / 'view.html').read_text()
  )
  assert [name for name, _ in cells] == [*NAMES, *NAMES]
  assert [volume for _, volume in cells[:2]] == [f'{voxels * scan.voxel_ml:.1f}' for voxels in (10, 50)]
  values[0, 0, 0] = 9
  nib.save(nib.Nifti1Image(values, image.affine, image.header), out / 'a_mask.nii.gz')
  with pytest.raises(UserError, match='a_mask.nii.gz: the mask value 9 belongs to no class'):
    viewer.view(source / 'a.nii.gz', out)


@pytest.mark.parametrize(
  'damage',
  [
    lambda one: one.pop('mask_values'),
    lambda one: one.pop('slice_scores'),
    lambda one: one.pop('lesion_ml'),
    lambda one: one.update(colour=[1, 2, 'red); } body { display: none']),
    lambda one: one.update(positive_slices=[99]),
    lambda one: one.update(mask_values='x'),
  ],
)
def test_damaged_numbers_of_a_class_are_refused(predicted, tmp_path, damage):
  out = tmp_path / 'out'
  shutil.copytree(predicted[1], out)
  numbers = json.loads((out / 'a.json').read_text())
  damage(numbers['classes']['consolidation'])
  (out / 'a.json').write_text(json.dumps(numbers))
  with pytest.raises(UserError, match=r'a.json: damaged, or from another version \(.*\); run --mode=predict'):
    viewer.view(predicted[0], out)


# ---- bundles


@pytest.fixture(scope='module')
def bundled(run, tmp_path_factory):
  folder = tmp_path_factory.mktemp('bundle') / 'b'
  export.write_bundle([run], folder)
  return folder


def test_a_bundle_predicts_the_same_as_its_run(bundled, loaded, scan):
  about = json.loads((bundled / 'bundle.json').read_text())
  assert about['version'] == 3 and about['classes'] == {'ground glass': [3], 'consolidation': [5, 6]}
  assert about['mask_values'] == [0, 3, 5, 5]
  assert list(about['operating_point']['classes']) == list(NAMES)
  assert about['output'].endswith('(ground glass, consolidation), the last axis, per pixel, [batch, height, width, 2]')
  of_bundle, expected = (one(scan) for one in (predictor.load_predictor(bundled), loaded))
  np.testing.assert_allclose(of_bundle.probability, expected.probability, atol=1e-5)
  assert of_bundle.numbers.keys() == expected.numbers.keys()
  for name in NAMES:
    one, other = (each.numbers['classes'][name] for each in (of_bundle, expected))
    assert one.keys() == other.keys() and one['threshold'] == other['threshold'] and one['value'] == other['value']
    assert one['lesion_ml'] == pytest.approx(other['lesion_ml'], rel=1e-3)
  changed = predictor.load_predictor(bundled, threshold={'consolidation': 0.75})
  assert changed.points['consolidation'].threshold == 0.75


def test_the_program_takes_slices_of_any_size(bundled, loaded):
  slices = np.random.default_rng(2).integers(-1000, 300, (2, 40, 53)).astype(np.int16)
  model = predictor.load_predictor(bundled).model
  got = np.asarray(jax.jit(model.function)(model.variables, slices))
  probability = loaded.probabilities(loaded.prepare(list(slices)))
  expected = np.stack([export.resize(probability[..., k], 40, 53) for k in (0, 1)], axis=-1)
  np.testing.assert_allclose(got, expected, atol=1e-3)


def test_the_script_writes_probabilities_and_masks(bundled, loaded, scan, tmp_path, monkeypatch):
  np.save(tmp_path / 'slices.npy', scan.values)
  paths = [str(tmp_path / f'{name}.npy') for name in ('slices', 'probability', 'mask')]
  monkeypatch.setattr(sys, 'argv', ['run.py', *paths])
  runpy.run_path(str(bundled / 'run.py'))
  probability, mask = np.load(paths[1]), np.load(paths[2])
  np.testing.assert_allclose(probability, loaded(scan).probability, atol=1e-5)
  masks = [probability[..., k] >= loaded.points[name].threshold for k, name in enumerate(NAMES)]
  np.testing.assert_array_equal(mask, values_of([each.astype(int) for each in masks]))
  assert mask.dtype == np.uint8 and set(np.unique(mask)) == {0, 3, 5}


def test_the_card_names_the_classes(bundled, loaded):
  card = (bundled / 'README.md').read_text()
  for (name, values), point in zip(KINDS, loaded.points.values(), strict=True):
    assert f'| {name} | {values[0]} | {point.threshold:.4g} | made | all are kept |' in card
  assert 'It finds ground glass, consolidation, on axial slices' in card
  assert 'python run.py SLICES.npy PROBABILITY.npy MASK.npy' in card and 'not evaluated' in card
  assert (bundled / 'run.py').read_text() in card


def test_the_card_has_the_numbers_of_each_class(run, runs, tmp_path, monkeypatch):
  """The test of a run of several classes: the numbers of one class under its name, and what they share above them."""
  of_one = json.loads((runs['seg'] / 'test' / 'metrics.json').read_text())
  shared = {key: of_one[key] for key in ('dataset', 'split', 'num_slices', 'num_patients', 'step', 'made_of')} | {
    'step': 0
  }
  of_classes = {}
  for number, name in enumerate(NAMES):
    own = {key: value for key, value in of_one.items() if key not in shared}
    own |= {'dice': 0.25 + number / 2, 'intervals': own['intervals'] | {'dice': [0.125, 0.875]}}
    of_classes[name] = own | {'operating_point': own['operating_point'] | {'threshold': 0.125 + number}}
  result = shared | {'dice': 0.5, 'intervals': {'dice': [0.1, 0.9]}, 'operating_point': {}, 'classes': of_classes}
  monkeypatch.setattr(export.result_files, 'is_complete', lambda folder: True)
  monkeypatch.setattr(export.result_files, 'read_numbers', lambda folder: result)
  export.write_bundle([run], tmp_path / 'b')
  card = (tmp_path / 'b' / 'README.md').read_text()
  assert '| network | class | patients | slices | threshold | flips | dice |' in card
  counts = f'{of_one["num_patients"]} | {of_one["num_slices"]}'
  for number, name in enumerate(NAMES):
    assert f'| 0 | {name} | {counts} | 0.5 | without | {0.25 + number / 2:.4f} [0.1250, 0.8750] |' in card
    assert f'| 0 | {name} | {counts} | {0.125 + number} | without |' in card
    assert f'Detection of patients with {name}, network 0: ' in card
  assert '0.5000 [0.1000, 0.9000]' not in card  # the mean over the classes is no class


@pytest.mark.parametrize(
  'change',
  [
    {'classes': {'ground glass': [3]}},
    {'classes': {'ground glass': [3], 'consolidation': []}},
    {'classes': 7},
    {'operating_point': {'threshold': 0.5}},
  ],
)
def test_damaged_bundles_are_refused(bundled, tmp_path, change):
  shutil.copytree(bundled, tmp_path / 'b')
  path = tmp_path / 'b' / bundle.ABOUT
  path.write_text(json.dumps(json.loads(path.read_text()) | change))
  with pytest.raises(UserError, match=r'b/bundle.json: damaged \(') as error:
    predictor.load_predictor(tmp_path / 'b')
  assert len(str(error.value).splitlines()) == 1
