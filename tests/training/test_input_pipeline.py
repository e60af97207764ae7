"""Batches: which slices they hold, for which seed, step and devices; and how the folds are split."""

import contextlib
import dataclasses

import grain
import jax
import numpy as np
import pytest
from conftest import PATIENTS, SIZE, SLICES

from fusa_jax.scans import volume_files
from fusa_jax.system import meshes
from fusa_jax.system.errors import UserError
from fusa_jax.training import datasets, input_pipeline


@pytest.fixture(scope='module')
def dataset(data_dir):
  return datasets.load_dataset(data_dir, fold=0, image_size=SIZE)


@pytest.fixture(scope='module')
def mesh():
  return meshes.create_mesh()


def batches(dataset, mesh, **options):
  options = {'batch_size': 8, 'seed': 0, 'first_step': 0, 'last_step': 12, 'balanced': True} | options
  with contextlib.closing(input_pipeline.train_batches(dataset.train, mesh, **options)) as iterator:
    return [jax.device_get(batch) for batch in iterator]


def indices(batches):
  return np.stack([batch['index'] for batch in batches])


def test_folds_share_no_patient_and_cover_all(data_dir):
  tested = []
  for fold in range(5):
    dataset = datasets.load_dataset(data_dir, fold, SIZE)
    parts = [set(split.patient) for split in (dataset.train, dataset.validation, dataset.test)]
    assert sum(map(len, parts)) == PATIENTS == len(set.union(*parts))
    assert len(dataset.train) + len(dataset.validation) + len(dataset.test) == PATIENTS * SLICES
    following = datasets.load_dataset(data_dir, (fold + 1) % 5, SIZE)
    assert parts[1] == set(following.test.patient)
    tested += parts[2]
  assert sorted(tested) == sorted(set(tested)) and len(tested) == PATIENTS


def test_a_batch_equals_the_files(dataset, mesh, raw_dir):
  (batch,) = batches(dataset, mesh, last_step=1)
  assert {key: (value.dtype, value.shape) for key, value in batch.items()} == {
    'image': (np.int16, (8, SIZE, SIZE)),
    'mask': (np.uint8, (8, SIZE, SIZE)),
    'label': (np.int32, (8,)),
    'index': (np.int32, (8,)),
  }
  for row, index in enumerate(batch['index']):
    patient, number = dataset.train.patient[index], dataset.train.slice[index]
    scan = volume_files.read_scan(raw_dir / f'{patient}_ct.nii.gz')
    mask = volume_files.read_mask(raw_dir / f'{patient}_seg.nii.gz', scan)
    np.testing.assert_array_equal(batch['image'][row], scan.values[number])
    np.testing.assert_array_equal(batch['mask'][row], mask[number])
    assert batch['label'][row] == mask[number].any() == dataset.train.label[index]


def test_a_batch_depends_only_on_seed_and_step(dataset, mesh):
  whole = indices(batches(dataset, mesh))
  np.testing.assert_array_equal(whole[7:], indices(batches(dataset, mesh, first_step=7)))
  one_device = meshes.create_mesh(1, 1, devices=jax.devices()[:1])
  np.testing.assert_array_equal(whole, indices(batches(dataset, one_device)))
  assert (whole != indices(batches(dataset, mesh, seed=1))).any()


def test_positives_and_negatives_are_drawn_one_to_one_and_all_are_used(dataset, mesh):
  drawn = indices(batches(dataset, mesh, last_step=60)).ravel()
  label = dataset.train.label
  assert label[drawn].mean() == 0.5
  assert set(drawn) == set(range(len(label)))
  for members in (label, ~label):
    own = drawn[members[drawn]]
    epochs = own[: len(own) // members.sum() * members.sum()].reshape(-1, members.sum())
    assert all(len(set(epoch)) == members.sum() for epoch in epochs)  # without replacement
    assert (epochs[0] != epochs[1]).any()  # in a new order each epoch


def test_unbalanced_sampling_uses_all_slices(dataset, mesh):
  drawn = indices(batches(dataset, mesh, last_step=len(dataset.train) // 8, balanced=False)).ravel()
  np.testing.assert_array_equal(np.sort(drawn), np.arange(len(dataset.train)))


@pytest.mark.parametrize('batch_size', [8, 40])
def test_every_test_slice_is_read_once(dataset, mesh, batch_size):
  read = [jax.device_get(b) for b in input_pipeline.test_batches(dataset.test, mesh, batch_size=batch_size)]
  index = np.concatenate([batch['index'] for batch in read])
  np.testing.assert_array_equal(index[index >= 0], np.arange(len(dataset.test)))
  assert len(index) % batch_size == 0


def test_a_host_reads_only_its_rows(dataset, monkeypatch):
  reads = []

  class Counted:
    def __len__(self):
      return len(dataset.train)

    def __getitem__(self, index):
      reads.append(index)
      return dataset.train.source[index]

  split = dataclasses.replace(dataset.train, source=Counted())
  monkeypatch.setattr(meshes, 'local_rows', lambda *_: np.array([2, 3, 6, 7]))
  monkeypatch.setattr(meshes, 'to_devices', lambda mesh, size, rows, local: local)
  mesh = meshes.create_mesh()
  options = {'batch_size': 8, 'seed': 0, 'first_step': 0, 'last_step': 3, 'balanced': True}
  mine = np.stack([b['index'] for b in input_pipeline.train_batches(split, mesh, **options)])
  monkeypatch.undo()
  np.testing.assert_array_equal(mine, indices(batches(dataset, mesh, last_step=3))[:, [2, 3, 6, 7]])
  assert sorted(reads) == sorted(mine.ravel())


def test_two_patients_give_no_validation_fold(tmp_path, raw_dir):
  import shutil

  from data import prepare

  for number in (1, 2):
    for kind in ('ct', 'seg'):
      shutil.copy(raw_dir / f'volume-phantom-A-{number:04d}_{kind}.nii.gz', tmp_path)
  dataset = datasets.load_dataset(prepare.prepare(str(tmp_path), str(tmp_path / 'out'), SIZE), 1, SIZE)
  assert dataset.validation is None
  assert set(dataset.train.patient).isdisjoint(dataset.test.patient)


@pytest.mark.parametrize(
  ('options', 'reason'),
  [
    ({'fold': 5}, 'data.fold: 5 is not a fold of .*; give 0 to 4'),
    ({'fold': -1}, 'data.fold: -1'),
    ({'image_size': 64}, 'data.image_size: 64, but .* was prepared at 32'),
    ({'data_dir': 'nowhere'}, 'data.dir: nowhere is not a folder'),
    ({'data_dir': 'empty'}, 'data.dir: no prepared dataset in'),
  ],
)
def test_invalid_data_options_are_refused(data_dir, tmp_path, options, reason):
  if options.get('data_dir') == 'empty':
    options = options | {'data_dir': tmp_path}
  with pytest.raises(UserError, match=reason):
    datasets.load_dataset(**{'data_dir': data_dir, 'fold': 0, 'image_size': SIZE} | options)


def test_balanced_sampling_needs_positives_and_negatives():
  groups = {'with lesion': np.zeros(5, bool), 'without lesion': np.ones(5, bool)}
  with pytest.raises(UserError, match='data.balanced: the training slices include none with lesion'):
    input_pipeline.sampled_indices(groups, 0, True)
  assert isinstance(input_pipeline.sampled_indices(groups, 0, False), grain.MapDataset)


def test_balanced_sampling_draws_each_exclusive_class_equally_often():
  number = np.repeat([0, 1, 2], [20, 5, 2])
  groups = {str(k): number == k for k in range(3)}
  order = input_pipeline.sampled_indices(groups, 0, True)
  drawn = [int(order[k]) for k in range(60)]
  np.testing.assert_array_equal(np.bincount(number[drawn]), [20, 20, 20])
  assert set(drawn) == set(range(27))  # twenty draws visit every slice of each class
