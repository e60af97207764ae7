"""Slices with their neighbours as channels (data.context), from a dataset through training to prediction and bundle."""

import collections
import concurrent.futures
import contextlib
import dataclasses
import json
import logging
import re
import runpy
import sys
import threading
import time

import jax
import layouts
import nibabel as nib
import numpy as np
import one_class
import pytest
from conftest import PATIENTS, SIZE, SLICES, tiny
from PIL import Image
from scipy import special

from configs import seg
from data import prepare
from data.cohorts import CohortOptions
from fusa_jax import tasks
from fusa_jax.inference import export, predict, predictor, trained
from fusa_jax.runs import run_config
from fusa_jax.scans import pictures, volume_files, volumes
from fusa_jax.scans.neighbours import Context
from fusa_jax.system import meshes
from fusa_jax.system.errors import UserError
from fusa_jax.training import augment, datasets, evaluate, input_pipeline, side_by_side, stacks, train

# Millimetres. The slices of some phantoms of this size are closer, those of others farther apart.
MM = 25.0
CONTEXT = {'data.context': 1, 'data.context_mm': MM}


@pytest.fixture(scope='module')
def dataset(data_dir):
  return datasets.load_dataset(data_dir, 0, SIZE, Context(1, MM))


@pytest.fixture(scope='module')
def scans(raw_dir):
  paths = {path.name.removesuffix('_ct.nii.gz'): path for path in raw_dir.glob('*_ct.nii.gz')}
  return {name: volume_files.read_scan(path) for name, path in paths.items()}


def by_hand(scan, number):
  """The input [H, W, 3] of a slice, or [S, H, W, 3] of a scan's slices if `number` is a list."""
  if not isinstance(number, int):
    return np.stack([by_hand(scan, one) for one in number])
  is_near = scan.spacing[0] <= MM
  below = scan.values[number - 1] if is_near and number > 0 else scan.values[number]
  above = scan.values[number + 1] if is_near and number < len(scan.values) - 1 else scan.values[number]
  return np.dstack([below, scan.values[number], above])


# ---- reading


class Source:
  """Two patients with 3 and 4 slices, 5 mm and 9 mm apart; each slice holds its own number. Counts what is decoded."""

  spacing = (5.0,) * 3 + (9.0,) * 4

  def __init__(self):
    self.decoded, self._lock = collections.Counter(), threading.Lock()

  def __len__(self):
    return 7

  def __getitem__(self, row):
    with self._lock:
      self.decoded[row] += 1
    time.sleep(0.001)  # other threads ask for the same slice meanwhile
    spacing = np.array([self.spacing[row], 1, 1], np.float32)
    return {'image': np.full((2, 2), row, np.int16), 'label': row % 2, 'spacing': spacing}


def test_neighbours_stay_within_their_scan_and_its_distance():
  source = stacks.Stacks(Source(), [3, 4], Context(2, 10.0))
  expected = [[0, 0, 0, 1, 2], [0, 0, 1, 2, 2], [0, 1, 2, 2, 2]]  # 10 mm are two slices of the first patient
  expected += [[3, 3, 3, 4, 4], [3, 3, 4, 5, 5], [4, 4, 5, 6, 6], [5, 5, 6, 6, 6]]  # and one of the second
  read = [source[row] for row in range(len(source))]
  assert [one['image'][1, 0].tolist() for one in read] == expected
  assert [one['label'] for one in read] == [0, 1, 0, 1, 0, 1, 0]
  assert read[0]['image'].dtype == np.int16


def test_each_slice_is_decoded_once_by_all_threads():
  single = Source()
  source = stacks.Stacks(single, [3, 4], Context(1, 10.0))
  with concurrent.futures.ThreadPoolExecutor(4) as pool:
    list(pool.map(source.__getitem__, range(7)))
  assert single.decoded == dict.fromkeys(range(7), 1)


def test_a_slice_that_cannot_be_read_is_tried_again():
  class Broken(Source):
    def __getitem__(self, row):
      if row == 1 and not self.decoded[row]:
        self.decoded[row] += 1
        raise OSError('a lost disk')
      return super().__getitem__(row)

  source = stacks.Stacks(Broken(), [3, 4], Context(1, 10.0))
  with pytest.raises(OSError, match='a lost disk'):
    source[0]
  assert source[0]['image'][0, 0].tolist() == [0, 0, 1]


def test_the_phantoms_have_near_and_far_neighbours(scans):
  spacings = [scan.spacing[0] for scan in scans.values()]
  assert min(spacings) < MM < max(spacings)


def test_batches_hold_the_neighbours_of_the_files(dataset, data_dir, scans):
  """The order of slices, masks and labels are those without neighbours, on any mesh."""

  def batches(split, mesh):
    options = {'batch_size': 8, 'seed': 0, 'first_step': 3, 'last_step': 6, 'balanced': True}
    with contextlib.closing(input_pipeline.train_batches(split, mesh, **options)) as iterator:
      return [jax.device_get(batch) for batch in iterator]

  alone = batches(datasets.load_dataset(data_dir, 0, SIZE).train, meshes.create_mesh())
  for mesh in (meshes.create_mesh(), meshes.create_mesh(4, 2)):
    for plain, batch in zip(alone, batches(dataset.train, mesh), strict=True):
      assert batch['image'].shape == (8, SIZE, SIZE, 3) and batch['image'].dtype == np.int16
      np.testing.assert_array_equal(batch['image'][..., 1], plain['image'])
      for key in ('mask', 'label', 'index'):
        np.testing.assert_array_equal(batch[key], plain[key])
      for image, index in zip(batch['image'], batch['index'], strict=True):
        scan = scans[str(dataset.train.patient[index])]
        np.testing.assert_array_equal(image, by_hand(scan, int(dataset.train.slice[index])))


# ---- augmentation


def test_slices_of_an_input_are_augmented_alike():
  """Each channel equals the same slice augmented alone, which test_augment.py compares with SciPy."""
  parts = {f'{part}_probability': 1.0 for part in ('crop', 'affine', 'blur', 'low_resolution', 'gamma')}
  ranges = {'rotation': 20.0, 'scaling': (0.8, 1.25), 'shear': 0.1, 'gamma': (0.7, 1.5)}
  options = augment.Augmentation(**parts, **ranges, flip=True, hu_shift=20.0, hu_scale=0.05)
  rng, key = np.random.default_rng(0), jax.random.key(1)
  image = rng.integers(-1000, 300, (2, 16, 16, 3)).astype(np.int16)
  mask = (rng.random((2, 16, 16)) < 0.2).astype(np.uint8)
  run = jax.jit(lambda image, mask: augment.augment(key, image, mask, options))
  got, got_mask = run(image, mask)
  assert got.shape == image.shape and got.dtype == np.float32
  for channel in range(3):
    expected, expected_mask = run(image[..., channel], mask)
    np.testing.assert_allclose(got[..., channel], expected, rtol=1e-5, atol=1e-2)
    np.testing.assert_array_equal(got_mask, expected_mask)
  assert np.abs(np.asarray(got) - image).max() > 100
  crop, crop_mask = jax.jit(lambda *a: augment.crop(*a, np.array([3.0, 5.0]), 0.5))(
    image[0].astype(np.float32), mask[0]
  )
  alone = augment.crop(image[0, ..., 2].astype(np.float32), mask[0], np.array([3.0, 5.0]), 0.5)
  np.testing.assert_allclose(crop[..., 2], alone[0], atol=1e-3)
  np.testing.assert_array_equal(crop_mask, alone[1])


def test_a_crop_without_lesion_is_placed_by_the_middle_slice():
  options = augment.Augmentation(crop_probability=1.0, crop_fractions=(1 / 8,))
  image = np.full((16, 16, 16, 3), -1000, np.int16)
  image[..., 0], image[:, 12, 3, 1] = 100, 100
  cropped, _ = augment.augment(jax.random.key(0), image, np.zeros((16, 16, 16), np.uint8), options)
  assert (np.asarray(cropped[..., 1]).max(axis=(1, 2)) > -1000).all()


def test_noise_differs_between_slices_and_contrast_does_not():
  image = np.random.default_rng(0).integers(-1000, 300, (1, 64, 64, 3)).astype(np.int16)
  mask = np.zeros((1, 64, 64), np.uint8)
  noisy, _ = augment.augment(jax.random.key(0), image, mask, augment.Augmentation(noise_probability=1.0, noise=60.0))
  noise = (np.asarray(noisy) - image)[0].reshape(-1, 3)
  deviation = noise.std(axis=0)
  assert deviation.min() > 1 and np.ptp(deviation) < 0.1 * deviation.mean()  # one level
  assert np.abs(np.corrcoef(noise.T) - np.eye(3)).max() < 0.1
  options = augment.Augmentation(contrast_probability=1.0, contrast=(0.8, 0.8001))
  changed = np.asarray(augment.augment(jax.random.key(0), image, mask, options)[0])
  mean = np.clip(image, -1000, 300).mean(dtype=np.float64)
  np.testing.assert_allclose(changed, mean + (image - mean) * 0.8, atol=0.2)


# ---- a run


@pytest.fixture(scope='module')
def run(raw_dir, data_dir, tmp_path_factory):
  """The folder of a segmentation run of two steps with one neighbour on each side, evaluated; and the log."""
  workdir = tmp_path_factory.mktemp('context') / 'run'
  config = tiny(seg, **CONTEXT, **{'train.steps': 2, 'augment.crop_probability': 0.5})
  train.train(config, workdir, data_dir)
  evaluate.evaluate(config, workdir, data_dir, prepare.scans(raw_dir))
  return workdir


@pytest.fixture(scope='module')
def loaded(run):
  return predictor.load_predictor(run)


def expected_probability(workdir, inputs):
  """The model of a run on inputs [B, H, W, 3] in HU, with the window in NumPy."""
  config = run_config.load_config(workdir)
  (network,), _ = trained.load_networks([workdir], meshes.create_mesh())
  low, high = config.data.window
  images = np.clip((inputs.astype(np.float32) - low) / (high - low) * 2 - 1, -1, 1)
  model = tasks.create(config).model
  logits = jax.jit(lambda variables, x: model.apply(variables, x, train=False))(network.variables, images)
  return special.expit(np.asarray(logits, np.float64)[..., 0])


def test_a_step_trains_a_first_layer_of_three_channels(run, data_dir, tmp_path, caplog):
  (network,), _ = trained.load_networks([run], meshes.create_mesh())
  stem = network.variables['params']['stem']
  assert stem['conv1']['kernel'].shape[:3] == (3, 3, 3)
  config = run_config.load_config(run)
  start = jax.jit(lambda key: tasks.create(config).init(key, SIZE))(jax.random.key(config.seed))['params']['stem']
  # The block starts as its shortcut, so that only the shortcut has a gradient in so few steps.
  change = np.abs(stem['shortcut_conv']['kernel'] - np.asarray(start['shortcut_conv']['kernel'])).max(axis=(0, 1, 3))
  assert change.shape == (3,) and (change > 1e-4).all()
  with caplog.at_level(logging.INFO):
    datasets.say_which_are_near(datasets.load_dataset(data_dir, 0, SIZE, Context(1, MM)).train, Context(1, MM))
  assert re.search(r'of 6 training scans, [1-5] have no neighbouring slice within 25 mm; slices are', caplog.text)


def test_prediction_equals_the_model_on_a_hand_made_stack(run, loaded, raw_dir, scans):
  near, far = (min if pick == 'near' else max for pick in ('near', 'far'))
  for pick in (near, far):
    name = pick(scans, key=lambda one: scans[one].spacing[0])
    expected = expected_probability(run, by_hand(scans[name], range(SLICES)))
    prediction = loaded(raw_dir / f'{name}_ct.nii.gz')
    assert np.ptp(expected) > 0.01
    np.testing.assert_allclose(prediction.probability, expected, atol=1e-5)
    assert (prediction.numbers['context'], prediction.numbers['context_mm']) == (1, MM)
    array = loaded(scans[name].values, spacing=scans[name].spacing)
    np.testing.assert_allclose(array.probability, expected, atol=1e-5)


def test_the_test_fold_is_scored_with_its_neighbours(run, dataset, scans):
  table = one_class.part(run).table
  for row in (0, 5, len(table['score']) - 1):
    scan, number = scans[str(table['patient'][row])], int(table['slice'][row])
    highest = expected_probability(run, by_hand(scan, number)[None]).max()
    assert table['score'][row] == pytest.approx(highest, abs=1e-5)


def test_files_of_a_prediction_and_flips(run, raw_dir, tmp_path, scans):
  name = min(scans, key=lambda one: scans[one].spacing[0])
  flipped = predictor.load_predictor(run, flips=True)
  predict.predict(flipped, raw_dir / f'{name}_ct.nii.gz', tmp_path, probabilities=True)
  inputs = by_hand(scans[name], range(SLICES))
  plain, mirrored = (expected_probability(run, x) for x in (inputs, inputs[:, :, ::-1]))
  stored = nib.load(tmp_path / f'{name}_ct_probability.nii.gz').get_fdata()
  stored = volumes.to_canonical_axes(stored, scans[name])
  np.testing.assert_allclose(stored, (plain + mirrored[:, :, ::-1]) / 2, atol=1e-5)
  assert json.loads((tmp_path / f'{name}_ct.json').read_text())['context'] == 1


def test_a_bundle_and_its_script_equal_the_run(run, loaded, raw_dir, scans, tmp_path, monkeypatch):
  export.write_bundle([run], tmp_path / 'bundle')
  bundled = predictor.load_predictor(tmp_path / 'bundle')
  assert bundled.model.context == Context(1, MM)
  about = json.loads((tmp_path / 'bundle' / 'bundle.json').read_text())
  assert about['version'] == 2 and about['inputs']['slices'].startswith('int16 [batch, height, width, 3] of any size')
  card = (tmp_path / 'bundle' / 'README.md').read_text()
  assert 'It sees 3 slices at once' in card and 'run.py SLICES.npy PROBABILITY.npy MM' in card
  for pick in (min, max):
    name = pick(scans, key=lambda one: scans[one].spacing[0])
    expected = loaded(raw_dir / f'{name}_ct.nii.gz').probability
    np.testing.assert_allclose(bundled(raw_dir / f'{name}_ct.nii.gz').probability, expected, atol=1e-5)
    np.save(tmp_path / 'slices.npy', scans[name].values)
    arguments = [tmp_path / 'slices.npy', tmp_path / 'out.npy', scans[name].spacing[0]]
    monkeypatch.setattr(sys, 'argv', ['run.py', *map(str, arguments)])
    runpy.run_path(str(tmp_path / 'bundle' / 'run.py'))
    np.testing.assert_allclose(np.load(tmp_path / 'out.npy'), expected, atol=1e-5)


def test_a_bundles_program_takes_slices_of_any_size(run, tmp_path):
  """It resizes each channel as it resizes a slice alone, which test_export.py compares with Pillow."""
  (network,), _ = trained.load_networks([run], meshes.create_mesh(devices=jax.devices()[:1]))
  program = export.program([network], flips=False)
  slices = np.random.default_rng(0).integers(-1000, 300, (1, 40, 53, 3)).astype(np.int16)
  got = jax.jit(program.call)(export.weights_of([network]), slices)
  resized = np.stack([np.rint(export.resize(slices[..., c], SIZE, SIZE)) for c in range(3)], axis=-1)
  expected = export.resize(expected_probability(run, resized), 40, 53)
  np.testing.assert_allclose(got, expected, atol=1e-4)


# ---- what is refused


def test_pictures_are_refused(loaded, tmp_path):
  grey = predictor.Predictor(dataclasses.replace(loaded.model, values='grey'), loaded.points, meshes.create_mesh())
  picture = np.random.default_rng(0).integers(0, 255, (40, 40)).astype(np.uint8)
  (tmp_path / 'in').mkdir()
  pictures.write_picture(tmp_path / 'in' / 'P1.png', picture)
  reason = r'P1.png: a single picture, but the model sees 3 neighbouring slices at once \(data.context\); give a scan'
  for options in ({}, {'strict': True}):
    with pytest.raises(UserError, match=reason):
      predict.predict(grey, tmp_path / 'in', tmp_path / 'out', **options)
  with pytest.raises(UserError, match='array: a single picture'):
    grey(picture)
  with pytest.raises(UserError, match='spacing: missing, but needed to tell which slices are neighbours'):
    loaded(np.zeros((3, 40, 40), np.int16))
  assert not (tmp_path / 'out').exists()


def test_runs_of_another_context_are_not_averaged_or_drawn_side_by_side(run, runs, data_dir):
  with pytest.raises(UserError, match=r'has data.context 0, but .* has 1; give runs with the same data.context'):
    predictor.load_predictor([run, runs['seg']])
  with pytest.raises(UserError, match=r'overlays: the runs differ in data.context \(1, 0\)'):
    side_by_side.pictures(run, runs['seg'], data_dir, 1)


def test_side_by_side_reads_neighbours(run, data_dir, tmp_path):
  drawn = side_by_side.pictures(run, run, data_dir, 1)
  for name, write in drawn.items():
    write(tmp_path / name)
  assert len(drawn) == 1 and all((tmp_path / name).stat().st_size for name in drawn)


@pytest.mark.parametrize(
  ('metadata', 'reason'),
  [
    ({'patients': 'each_slice'}, 'the patients of slices are unknown'),
    ({'masks': False}, 'pictures in a folder per class have no order'),
    ({'folds': {'fold0': [{'lesion_voxels': [1], 'lesion_ml': None}]}}, 'each patient has a single slice'),
  ],
)
def test_datasets_without_order_are_refused(metadata, reason):
  known = {'patients': 'named', 'masks': True, 'folds': {'fold0': [{'lesion_voxels': [1, 0], 'lesion_ml': 1.0}]}}
  datasets._check_order('FOLDER', known)
  with pytest.raises(UserError, match=f'data.context: FOLDER has no neighbouring slices, because {reason}; leave'):
    datasets._check_order('FOLDER', known | metadata)


def test_pictures_have_neighbours_in_the_order_of_their_names(raw_dir, tmp_path, caplog):
  layouts.slices(raw_dir, tmp_path)
  options = CohortOptions(intensity='grey')
  prepared = prepare.prepare(str(tmp_path), str(tmp_path / 'prepared'), SIZE, options=options)
  config = tiny(seg, **CONTEXT, **{'data.intensity': 'grey'})
  with caplog.at_level(logging.INFO):
    split = datasets.load_dataset_for(config, prepared).test
  assert 'the distances between the pictures of a patient are unknown' in caplog.text
  numbered = {patient: number for number, patient in enumerate(sorted(f'p{k:02d}' for k in range(1, PATIENTS + 1)))}
  for row in (0, 7, SLICES - 1):
    own = numbered[str(split.patient[row])] * SLICES
    numbers = [own + min(max(int(split.slice[row]) + offset, 0), SLICES - 1) for offset in (-1, 0, 1)]
    pictures_of_row = [np.asarray(Image.open(tmp_path / 'images' / f'{number:04d}.jpg')) for number in numbers]
    np.testing.assert_array_equal(split.source[row]['image'], np.dstack(pictures_of_row))


def test_unknown_distances_are_said_once(caplog):
  known = {'patients': 'named', 'masks': True, 'folds': {'fold0': [{'lesion_voxels': [1, 0], 'lesion_ml': None}]}}
  with caplog.at_level(logging.INFO):
    datasets._check_order('PICTURES', known)
    datasets._check_order('PICTURES', known)
  assert [record.message for record in caplog.records if 'PICTURES' in record.message] == [
    'PICTURES: the distances between the pictures of a patient are unknown, so that data.context takes the next ones '
    'in the order of their names as neighbours'
  ]


def test_a_refused_context_leaves_no_workdir(data_dir, tmp_path):
  config = tiny(seg, **{'data.context': 1, 'data.patients': 'each_slice'})
  with pytest.raises(UserError, match=r'data.context: slices of unknown patients have no neighbours'):
    train.train(config, tmp_path / 'run', data_dir)
  assert not (tmp_path / 'run').exists()


def test_the_distance_matters_to_a_run_only_with_neighbours(tmp_path):
  """Runs of earlier versions stored no distance, and the demo has another one than the default."""
  stored = tiny(seg).to_dict()
  del stored['data']['context'], stored['data']['context_mm']
  (tmp_path / 'old').mkdir()
  (tmp_path / 'old' / 'config.json').write_text(json.dumps(stored))
  run_config.save_config(tmp_path / 'old', tiny(seg))
  run_config.save_config(tmp_path / 'new', tiny(seg, **CONTEXT))
  with pytest.raises(UserError, match=r'data.context_mm \(25.0 -> 10.0\)'):
    run_config.save_config(tmp_path / 'new', tiny(seg, **CONTEXT | {'data.context_mm': 10.0}))


def test_folds_hold_whole_scans(dataset):
  for split in (dataset.train, dataset.validation, dataset.test):
    assert collections.Counter(split.patient.tolist()) == dict.fromkeys(split.patients, SLICES)
  assert sum(len(one.patients) for one in (dataset.train, dataset.validation, dataset.test)) == PATIENTS
