"""A cohort that grew: patients keep their folds, and only new and changed scans are read and written."""

import logging
import shutil
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest
import tensorflow_datasets as tfds
from conftest import SIZE, SLICES

from data import earlier, prepare, read, shards, survey
from data.cohorts import Case
from fusa_jax.system.errors import UserError
from fusa_jax.training import datasets

NAME = 'volume-phantom-A-{:04d}'.format


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  monkeypatch.setattr(prepare, 'CACHE', tmp_path / 'cache')
  return tmp_path / 'cache'


@pytest.fixture
def raw(raw_dir, tmp_path):
  """The first nine patients of the cohort."""
  folder = tmp_path / 'raw'
  shutil.copytree(raw_dir, folder, ignore=lambda _, names: [name for name in names if NAME(10) in name])
  return folder


@pytest.fixture
def reads(monkeypatch):
  """The patients that are read, once for the survey and once to be written."""
  seen, real = [], read.slices
  monkeypatch.setattr(read, 'slices', lambda case: seen.append(case.patient) or real(case))
  return seen


def add(raw_dir, raw, number, name=None):
  for kind in ('ct', 'seg'):
    shutil.copy(raw_dir / f'{NAME(number)}_{kind}.nii.gz', raw / f'{name or NAME(number)}_{kind}.nii.gz')


def folds(dataset):
  return {entry['patient']: k for k, fold in enumerate(datasets.folds(dataset)) for entry in fold}


def slices_of(dataset):
  """The stored slices by patient and number, in the order of the metadata: the index of training."""
  builder, found = tfds.builder_from_directory(dataset), {}
  for fold, entries in builder.info.metadata['folds'].items():
    source = builder.as_data_source(split=fold)
    names = [(entry['patient'], number) for entry in entries for number in range(len(entry['lesion_voxels']))]
    assert len(names) == len(source)
    for index, (patient, number) in enumerate(names):
      example = source[index]
      assert (example['patient'].decode(), example['slice']) == (patient, number)
      found[patient, number] = example
  return found


def check_equal(dataset, raw, tmp_path, monkeypatch):
  """Each slice of a grown dataset equals that of one which was prepared with nothing known."""
  monkeypatch.setattr(earlier, 'find', lambda *_: [])
  fresh = slices_of(prepare.prepare(str(raw), str(tmp_path / 'fresh'), SIZE))
  grown = slices_of(dataset)
  assert fresh.keys() == grown.keys()
  for key, example in fresh.items():
    for name, value in example.items():
      np.testing.assert_array_equal(value, grown[key][name])


@pytest.mark.parametrize('least', [1, 12])
def test_only_the_new_scan_is_prepared(raw_dir, raw, tmp_path, reads, caplog, monkeypatch, least):
  monkeypatch.setattr(shards, '_LEAST', least)
  first = prepare.prepare(str(raw), '', SIZE)
  files = {path.stat().st_ino for path in first.glob('*array_record*')}
  assert sorted(reads) == sorted([NAME(n) for n in range(1, 10)] * 2)
  reads.clear(), add(raw_dir, raw, 10), caplog.set_level(logging.INFO)
  second = prepare.prepare(str(raw), '', SIZE)
  assert second != first and reads == [NAME(10)] * 2
  old, new = folds(first), folds(second)
  assert {name: new[name] for name in old} == old and new.keys() - old.keys() == {NAME(10)}
  assert files <= {path.stat().st_ino for path in second.glob('*array_record*')}
  text = caplog.text
  assert '9 of 10 patients keep their folds; 1 new' in text and f'1 of 10 scans are prepared; {first} has' in text
  assert f'so patients keep their folds; to assign all again, delete {first}' in text
  check_equal(second, raw, tmp_path, monkeypatch)


def test_changed_removed_and_renamed_scans(raw_dir, raw, tmp_path, reads, monkeypatch):
  """Patients of one shard with a changed scan are copied, not read. A renamed scan keeps its fold."""
  monkeypatch.setattr(shards, '_LEAST', 1)
  first = prepare.prepare(str(raw), '', SIZE)
  mask = nib.load(raw / f'{NAME(2)}_seg.nii.gz')
  nib.save(nib.Nifti1Image(np.zeros(mask.shape, np.uint8), None, mask.header), raw / f'{NAME(2)}_seg.nii.gz')
  for kind in ('ct', 'seg'):
    (raw / f'{NAME(3)}_{kind}.nii.gz').unlink()
    (raw / f'{NAME(4)}_{kind}.nii.gz').rename(raw / f'{NAME(40)}_{kind}.nii.gz')
  reads.clear(), add(raw_dir, raw, 10)
  second = prepare.prepare(str(raw), '', SIZE)
  assert sorted(reads) == sorted([NAME(2), NAME(10), NAME(40)] * 2)
  old, new = folds(first), folds(second)
  assert new[NAME(40)] == old[NAME(4)]
  assert all(new[name] == k for name, k in old.items() if name not in (NAME(3), NAME(4)))
  check_equal(second, raw, tmp_path, monkeypatch)
  # A patient who was removed and comes back is in the old fold.
  add(raw_dir, raw, 3)
  monkeypatch.undo()
  monkeypatch.setattr(prepare, 'CACHE', tmp_path / 'cache')
  assert folds(prepare.prepare(str(raw), '', SIZE))[NAME(3)] == old[NAME(3)]


def test_an_older_state_in_data_dir_is_refused_and_says_how(raw_dir, raw, tmp_path, reads, cache):
  first = prepare.prepare(str(raw), str(tmp_path / 'one'), SIZE)
  shutil.rmtree(cache)  # as on another machine
  add(raw_dir, raw, 10), reads.clear()
  how = 'use another folder: its patients will keep these folds, and only what differs is prepared'
  with pytest.raises(UserError, match=rf'one was prepared from other files .* \(3 files .* differ\); {how}$'):
    prepare.prepare(str(raw), str(tmp_path / 'one'), SIZE)
  second = prepare.prepare(str(raw), str(tmp_path / 'two'), SIZE)
  assert reads == [NAME(10)] * 2
  old, new = folds(first), folds(second)
  assert {name: new[name] for name in old} == old


def test_without_the_old_dataset_all_are_dealt(raw_dir, raw, reads):
  first = prepare.prepare(str(raw), '', SIZE)
  shutil.rmtree(first)
  add(raw_dir, raw, 10), reads.clear()
  prepare.prepare(str(raw), '', SIZE)
  assert len(reads) == 20


def cut(path):
  path.write_bytes(path.read_bytes()[:100])


@pytest.mark.parametrize('name', ['*-fold1.array_record-*', 'thumbnails.npy'])
@pytest.mark.parametrize('damage', [lambda path: path.unlink(), cut], ids=['missing', 'cut'])
def test_of_an_incomplete_old_dataset_only_the_folds_are_kept(raw_dir, raw, reads, caplog, name, damage):
  first = prepare.prepare(str(raw), '', SIZE)
  damage(next(first.glob(name)))
  add(raw_dir, raw, 10), reads.clear()
  second = prepare.prepare(str(raw), '', SIZE)
  assert len(reads) == 20 and len(slices_of(second)) == 10 * SLICES
  old, new = folds(first), folds(second)
  assert {name: new[name] for name in old} == old
  assert f'{first}: files are missing or damaged, so only its folds are kept' in caplog.text


def test_an_old_dataset_that_cannot_be_read_is_named(raw_dir, raw, caplog):
  first = prepare.prepare(str(raw), '', SIZE)
  (first / 'dataset_info.json').write_text('{')
  add(raw_dir, raw, 10)
  prepare.prepare(str(raw), '', SIZE)
  assert f'{first}: damaged or of another version' in caplog.text
  assert 'so the folds of its patients are not kept' in caplog.text


def person(name, burden=1.0, owner=''):
  return survey.Patient(Case(name, None, None, owner=owner), (1,), burden)


def dealt(patients, earlier_folds):
  fold_of = {name: k for k, fold in enumerate(earlier_folds) for name in fold}
  folds = survey.deal(patients, lambda patient: fold_of.get(patient.case.patient))
  return [[one.case.patient for one in fold] for fold in folds]


def test_new_persons_go_to_the_smallest_folds():
  """By hand: x to the fold with one person, y to the same, which has the least burden (7.5), z to the first of two."""
  old = [person(name, burden) for name, burden in zip('abcdefghi', (9, 8, 7, 6, 5, 1, 2, 3, 4), strict=True)]
  earlier_folds = ['af', 'bg', 'ch', 'di', 'e']
  new = [person('x', 2.5), person('y', 2), person('z', 1)]
  assert dealt(old + new, earlier_folds) == [['a', 'f', 'z'], ['b', 'g'], ['c', 'h'], ['d', 'i'], ['e', 'x', 'y']]
  assert dealt(old[::-1] + new, earlier_folds) == dealt(new + old, earlier_folds)


def test_a_person_moves_only_with_a_warning(caplog):
  """Two scans that were two patients and are now one; and a fold that has lost all patients."""
  patients = [person('a', owner='p'), person('b', owner='p'), *map(person, 'cdefg')]
  assert dealt(patients, ['ac', 'bd', 'e', 'f', 'g'])[:2] == [['a', 'b', 'c'], ['d']]
  assert 'a, b were in several folds and now belong to one patient; all are in fold 0 now' in caplog.messages
  caplog.clear()
  assert dealt(list(map(person, 'abcd')), ['a', 'b', 'c', 'x', 'd']) == [['a'], ['b'], ['c'], ['d']]
  assert 'a fold of the earlier dataset has no patients left, so all patients get new folds' in caplog.messages


@pytest.mark.parametrize('seed', range(20))
def test_shards_are_few_and_hold_everything_once(seed):
  """Hundreds of additions of one to three patients: never more than 40 shards per fold, and no slice is lost."""
  rng = np.random.default_rng(seed)
  items = [shards.Item(f'{k}', int(rng.integers(1, 400))) for k in range(rng.integers(1, 300))]
  plan = shards.plan(items, [], 512)
  assert [item for shard in plan for item in shard.items] == items  # the order of the slices stays
  assert min(len(items), 12) <= len(plan) <= 32 and all(shard.items for shard in plan)
  for step in range(100):
    stored = [shard._replace(linked='file') for shard in plan]
    new = [shards.Item(f'{step}-{k}', int(rng.integers(1, 400))) for k in range(rng.integers(1, 4))]
    items, plan = items + new, shards.plan(new, stored, 512)
    assert len(plan) <= 40 and sorted(item for shard in plan for item in shard.items) == sorted(items)
  assert max(shard.slices for shard in plan) < 20 * sum(item.slices for item in items) / len(plan)


@pytest.mark.slow
def test_few_open_files_are_enough(raw_dir, tmp_path):
  """100 scans of 32 slices are prepared, trained on and evaluated with at most 80 open files."""
  raw, rng = tmp_path / 'raw', np.random.default_rng(0)
  raw.mkdir()
  for number in range(100):
    images = [nib.load(raw_dir / f'{NAME(1 + number % 10)}_{kind}.nii.gz') for kind in ('ct', 'seg')]
    ct, mask = (np.repeat(np.asarray(image.dataobj), 2, axis=2) for image in images)
    ct, shift = ct + rng.integers(-400, 400, ct.shape), rng.integers(0, SIZE, 2)  # so that no two look alike
    for kind, values in (('ct', ct.astype(np.int16)), ('seg', mask.astype(np.uint8))):
      image = nib.Nifti1Image(np.roll(values, shift, (0, 1)), images[0].affine)
      nib.save(image, raw / f'p{number:03d}_{kind}.nii')
  command = f'ulimit -n 80 && exec {sys.executable} launch.py --config=configs/seg.py:demo '
  command += f'--config.data.raw_dir={raw} --config.data.dir={tmp_path / "out"} --workdir={tmp_path / "run"} '
  command += f'--config.data.image_size={SIZE} --config.train.steps=2 --config.train.warmup_steps=1 '
  command += '--config.train.evaluate_every=2 --config.train.batch_size=16 --config.model.width=4'
  result = subprocess.run(['bash', '-c', command], capture_output=True, text=True)
  assert result.returncode == 0, result.stderr[-3000:]
  assert (tmp_path / 'run' / 'test' / 'metrics.json').exists()
