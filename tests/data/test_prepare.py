"""Preparing a dataset from files: its contents, refused files, and interruptions."""

import gzip
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time

import nibabel as nib
import numpy as np
import pytest
import tensorflow_datasets as tfds
from conftest import PATIENTS, SIZE, SLICES

from data import prepare, survey, workers
from data.cohorts import Case, covid19_20
from data.find import find
from fusa_jax.scans import volume_files, volumes
from fusa_jax.system.errors import UserError


def test_every_slice_is_stored_in_order_with_its_metadata(data_dir, raw_dir):
  builder = tfds.builder_from_directory(data_dir)
  assert sorted(builder.info.splits) == [f'fold{k}' for k in range(5)]
  assert builder.info.splits.total_num_examples == PATIENTS * SLICES
  seen = []
  for fold, entries in builder.info.metadata['folds'].items():
    source = builder.as_data_source(split=fold)
    examples = iter(source[i] for i in range(len(source)))
    for entry in entries:
      scan = volume_files.read_scan(raw_dir / f'{entry["patient"]}_ct.nii.gz')
      mask = volume_files.read_mask(raw_dir / f'{entry["patient"]}_seg.nii.gz', scan)
      assert entry['lesion_voxels'] == mask.sum(axis=(1, 2)).tolist()
      assert entry['lesion_ml'] == pytest.approx(mask.sum() * scan.voxel_ml)
      for index in range(SLICES):
        example = next(examples)
        np.testing.assert_array_equal(example['image'], scan.values[index])
        np.testing.assert_array_equal(example['mask'], mask[index])
        assert example['image'].dtype == np.int16 and example['mask'].dtype == np.uint8
        assert example['label'] == mask[index].any()
        assert example['patient'] == entry['patient'].encode()
        assert example['slice'] == index
        np.testing.assert_allclose(example['spacing'], scan.spacing, rtol=1e-6)
      seen.append(entry['patient'])
    assert next(examples, None) is None
  assert sorted(seen) == [f'volume-phantom-A-{n:04d}' for n in range(1, PATIENTS + 1)]


def test_other_sizes_are_resized(raw_dir, tmp_path):
  (tmp_path / 'raw').mkdir()
  for number in (1, 2):
    for kind in ('ct', 'seg'):
      shutil.copy(raw_dir / f'volume-phantom-A-{number:04d}_{kind}.nii.gz', tmp_path / 'raw')
  builder = tfds.builder_from_directory(prepare.prepare(str(tmp_path / 'raw'), str(tmp_path / 'out'), 16))
  example = builder.as_data_source(split='fold0')[SLICES // 2]
  assert example['image'].shape == example['mask'].shape == (16, 16)
  scan = volume_files.read_scan(raw_dir / f'{example["patient"].decode()}_ct.nii.gz')
  np.testing.assert_array_equal(example['image'], volumes.network_slices(scan.values, 16)[SLICES // 2])


def test_processes_write_the_same_as_a_thread(raw_dir, data_dir, processes, tmp_path, monkeypatch):
  monkeypatch.setattr(workers, 'ProcessPoolExecutor', processes)
  monkeypatch.setattr(prepare, 'CACHE', tmp_path / 'cache')  # otherwise it would link the shards of data_dir
  written = prepare.prepare(str(raw_dir), str(tmp_path / 'out'), SIZE)
  assert not multiprocessing.active_children()
  assert sorted(path.name for path in written.iterdir()) == sorted(path.name for path in data_dir.iterdir())
  sources = [tfds.builder_from_directory(folder).as_data_source() for folder in (written, data_dir)]
  examples = [[source[fold][i] for fold in sorted(source) for i in range(len(source[fold]))] for source in sources]
  assert len(examples[0]) == PATIENTS * SLICES
  for a, b in zip(*examples, strict=True):
    assert all(np.array_equal(a[key], b[key]) for key in a.keys() | b.keys())


def patient(name, load):
  return survey.Patient(Case(name, None, None), (1,), load)


def test_folds_are_stratified_and_do_not_depend_on_order():
  rng = np.random.default_rng(0)
  patients = [patient(f'p{i:03d}', load) for i, load in enumerate(rng.lognormal(3, 1.5, 199))]
  folds = survey.deal(patients)
  assert sorted(map(len, folds)) == [39, 40, 40, 40, 40]
  assert sorted(p.case.patient for fold in folds for p in fold) == sorted(p.case.patient for p in patients)
  shuffled = [patients[i] for i in rng.permutation(199)]
  assert survey.deal(shuffled) == folds
  # The quartiles of each fold are much closer to those of the cohort than by chance.
  whole = np.quantile([p.lesion_ml for p in patients], [0.25, 0.5, 0.75])
  for fold in folds:
    np.testing.assert_allclose(np.quantile([p.lesion_ml for p in fold], [0.25, 0.5, 0.75]), whole, rtol=0.15)


@pytest.mark.parametrize(('count', 'folds'), [(2, 2), (4, 4), (5, 5), (11, 5)])
def test_small_cohorts(count, folds):
  dealt = survey.deal([patient(f'p{i}', float(i)) for i in range(count)])
  assert len(dealt) == folds
  assert min(map(len, dealt)) >= 1


def test_one_patient_is_not_enough():
  with pytest.raises(UserError, match='1 patient in the cohort; at least 2'):
    survey.deal([patient('p', 1.0)])


def test_a_finished_dataset_is_reused_and_another_cohort_is_refused(raw_dir, tmp_path, monkeypatch):
  out, temporary = tmp_path / 'out', tmp_path / 'temporary'
  temporary.mkdir()
  monkeypatch.setattr(tempfile, 'tempdir', str(temporary))
  first = prepare.prepare(str(raw_dir), str(out), SIZE)
  before = {path: path.stat().st_mtime_ns for path in first.iterdir()}
  assert prepare.prepare(str(raw_dir), str(out), SIZE) == first
  assert before == {path: path.stat().st_mtime_ns for path in first.iterdir()}
  assert not list(temporary.iterdir())
  other = tmp_path / 'raw'
  shutil.copytree(raw_dir, other)
  for path in other.glob('*0006*'):
    path.unlink()
  with pytest.raises(UserError, match='was prepared from other files'):
    prepare.prepare(str(other), str(out), SIZE)


def test_the_cache_is_keyed_by_the_content_of_the_files(raw_dir, tmp_path, monkeypatch):
  """New times change nothing. A corrected mask counts, even with the size and times of the old one."""
  monkeypatch.setattr(prepare, 'CACHE', tmp_path / 'cache')
  raw, mask = tmp_path / 'raw', 'volume-phantom-A-0001_seg.nii.gz'
  shutil.copytree(raw_dir, raw)
  first = prepare.prepare(str(raw), '', SIZE)
  os.utime(raw / mask)
  assert prepare.prepare(str(raw), '', SIZE) == first
  state, content = (raw / mask).stat(), gzip.decompress((raw / mask).read_bytes())
  corrected = bytearray(content)
  corrected[-5] ^= 1
  for change in (content, bytes(corrected)):  # uncompressed files of equal size, in a new name each
    (raw / mask).unlink(missing_ok=True)
    (raw / mask.removesuffix('.gz')).write_bytes(change)
    os.utime(raw / mask.removesuffix('.gz'), ns=(state.st_atime_ns, state.st_mtime_ns))
    again = prepare.prepare(str(raw), '', SIZE)
    assert again != first
    first = again


def test_copies_are_used_and_changes_are_named(raw_dir, tmp_path):
  raw, copied = tmp_path / 'raw', tmp_path / 'scratch'
  shutil.copytree(raw_dir, raw)
  first = prepare.prepare(str(raw), str(tmp_path / 'out'), SIZE)
  shutil.copytree(raw, copied / 'raw', copy_function=shutil.copyfile)
  shutil.copytree(tmp_path / 'out', copied / 'out', copy_function=shutil.copyfile)
  second = prepare.prepare(str(copied / 'raw'), str(copied / 'out'), SIZE)
  assert second.relative_to(copied) == first.relative_to(tmp_path)
  changed = copied / 'raw' / 'volume-phantom-A-0005_seg.nii.gz'
  shutil.copy(raw / 'volume-phantom-A-0001_seg.nii.gz', changed)
  with pytest.raises(
    UserError, match=rf'prepared from other files .* contains now \(1 file \({changed.name}\) differ\)'
  ):
    prepare.prepare(str(copied / 'raw'), str(copied / 'out'), SIZE)
  shutil.copy(raw / changed.name, changed)
  shard = next(second.glob('*fold1*array_record*'))
  shard.unlink()
  with pytest.raises(UserError, match=r'is incomplete \(10 of 10 patients, 1 files are missing\); delete it, and run'):
    prepare.prepare(str(copied / 'raw'), str(copied / 'out'), SIZE)
  first.rename(first.with_name('1.3.0'))
  with pytest.raises(UserError, match=r'is of version 1.3.0, but this program writes 1.6.0; delete it, or use another'):
    prepare.prepare(str(raw), str(tmp_path / 'out'), SIZE)
  first.with_name('1.3.0').rename(first)
  (first / 'dataset_info.json').write_text('{"name"')
  with pytest.raises(UserError, match=r'data.dir: the dataset in .*out is damaged \(.*\); delete it, or use another'):
    prepare.prepare(str(raw), str(tmp_path / 'out'), SIZE)


def test_files_that_change_while_they_are_read(raw_dir, tmp_path, monkeypatch):
  raw = tmp_path / 'raw'
  shutil.copytree(raw_dir, raw)
  image = nib.load(raw / 'volume-phantom-A-0001_seg.nii.gz')
  nib.save(nib.Nifti1Image(np.zeros(image.shape, np.uint8), None, image.header), tmp_path / 'other.nii.gz')
  real = survey.deal

  def deal(patients, *_):
    shutil.copy(tmp_path / 'other.nii.gz', raw / 'volume-phantom-A-0001_seg.nii.gz')
    return real(patients, *_)

  monkeypatch.setattr(survey, 'deal', deal)
  with pytest.raises(UserError, match=r'raw: files changed while they were read; run the same command again'):
    prepare.prepare(str(raw), str(tmp_path / 'out'), SIZE)
  assert not list((tmp_path / 'out').rglob('*array_record*'))


PREPARE_CACHED = """
import pathlib, sys, time
from data import prepare, workers
import concurrent.futures
workers.ProcessPoolExecutor = lambda *_: concurrent.futures.ThreadPoolExecutor(1)
prepare.CACHE = pathlib.Path(sys.argv[2])
print('ready', flush=True)
sys.stdin.readline()
if sys.argv[1]:
  print(prepare.prepare(sys.argv[1], '', 32))
else:
  print(prepare.prepare_phantom('', 32, patients=2, slices=16, seed=0))
"""


@pytest.mark.slow
@pytest.mark.parametrize('is_demo', [False, True])
def test_several_processes_share_one_cache(raw_dir, tmp_path, is_demo):
  """One builds, the others wait and use it. All start at the same time."""
  (tmp_path / 'raw').mkdir()
  for number in (1, 2):
    for kind in ('ct', 'seg'):
      shutil.copy(raw_dir / f'volume-phantom-A-{number:04d}_{kind}.nii.gz', tmp_path / 'raw')
  source = '' if is_demo else str(tmp_path / 'raw')
  command = [sys.executable, '-c', PREPARE_CACHED, source, str(tmp_path / 'cache')]
  pipes = {'stdin': subprocess.PIPE, 'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, 'text': True}
  processes = [subprocess.Popen(command, cwd=os.getcwd(), **pipes) for _ in range(3)]
  assert [process.stdout.readline() for process in processes] == ['ready\n'] * 3
  outputs = []
  for process in processes:
    process.stdin.write('\n'), process.stdin.flush()
  for process in processes:
    output, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    outputs.append(output)
  assert len(set(outputs)) == 1
  builder = tfds.builder_from_directory(outputs[0].strip())
  assert builder.info.splits.total_num_examples == 2 * SLICES
  assert not list((tmp_path / 'cache').rglob('incomplete*'))


def test_the_lock_of_a_killed_process_is_no_lock(raw_dir, tmp_path, caplog):
  (tmp_path / 'raw').mkdir()
  for number in (1, 2):
    for kind in ('ct', 'seg'):
      shutil.copy(raw_dir / f'volume-phantom-A-{number:04d}_{kind}.nii.gz', tmp_path / 'raw')
  out = tmp_path / 'out'
  left = out / 'covid_ct' / f'covid19_20_{SIZE}' / 'incomplete.ABCDEF_1.6.0'
  left.mkdir(parents=True)
  code = f"""
import filelock, time
lock = filelock.FileLock({str(out / '.dataset.lock')!r})
lock.acquire()
print(flush=True)
time.sleep(60)
"""
  process = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE)
  process.stdout.readline()
  caplog.set_level('INFO')
  waiting = f'{out}: another process prepares its dataset; waiting'

  def kill_when_waited_for():
    while waiting not in caplog.messages:
      time.sleep(0.05)
    process.kill()

  threading.Thread(target=kill_when_waited_for, daemon=True).start()
  prepare.prepare(str(tmp_path / 'raw'), str(out), SIZE)
  assert process.wait() == -signal.SIGKILL
  assert not left.exists()


def test_incomplete_phantoms_are_drawn_again(tmp_path, monkeypatch):
  monkeypatch.setattr(prepare, 'CACHE', tmp_path)
  folder = prepare.draw_phantoms(32, 2, 16, 0)
  mask = folder / 'volume-phantom-A-0002_seg.nii.gz'
  content, drawn = mask.read_bytes(), (folder / 'volume-phantom-A-0001_ct.nii.gz').stat().st_mtime_ns
  assert prepare.draw_phantoms(32, 2, 16, 0) == folder
  assert (folder / 'volume-phantom-A-0001_ct.nii.gz').stat().st_mtime_ns == drawn
  mask.unlink()
  assert prepare.draw_phantoms(32, 2, 16, 0) == folder
  assert mask.read_bytes() == content


def test_folders_that_cannot_be_written(raw_dir, tmp_path, monkeypatch):
  """A file in place of a folder: root may write to read-only folders."""
  (tmp_path / 'file').write_bytes(b'')
  out = tmp_path / 'file' / 'out'
  with pytest.raises(UserError, match=rf'^data.dir: {out}: cannot be written \(Not a directory\); use another folder$'):
    prepare.prepare(str(raw_dir), str(out), SIZE)
  monkeypatch.setattr(prepare, 'CACHE', out)
  advice = 'set XDG_CACHE_HOME to a folder that you may write to'
  for start in (
    lambda: prepare.prepare(str(raw_dir), '', SIZE),
    lambda: prepare.prepare_phantom(str(tmp_path / 'data'), 32, patients=2, slices=16, seed=0),
  ):
    with pytest.raises(UserError, match=rf'^{out}.*: cannot be written \(Not a directory\); {advice}$'):
      start()
  # With a folder for the dataset, none is needed for the cache.
  assert prepare.prepare(str(raw_dir), str(tmp_path / 'data'), SIZE).is_dir()


def test_names_that_are_not_utf8_are_prepared(raw_dir, tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  raw = tmp_path / 'raw'
  raw.mkdir()
  for number, name in enumerate((b'M\xfcller', b'Jos\xe9'), start=1):
    for kind in ('ct', 'seg'):
      target = raw / os.fsdecode(name + f'_{kind}.nii.gz'.encode())
      shutil.copy(raw_dir / f'volume-phantom-A-{number:04d}_{kind}.nii.gz', target)
  prepared = prepare.prepare('~/raw', '~/out', SIZE)
  assert prepared.is_relative_to(tmp_path / 'out')
  assert sorted(prepare.scans('~/raw')) == [r'Jos\xe9', r'M\xfcller']
  builder = tfds.builder_from_directory(prepared)
  stored = {builder.as_data_source(split=f'fold{k}')[0]['patient'].decode() for k in (0, 1)}
  assert stored == {r'Jos\xe9', r'M\xfcller'}
  assert prepare.prepare('~/raw', '~/out', SIZE) == prepared


def test_all_bad_files_are_listed_and_nothing_is_written(raw_dir, tmp_path):
  raw = tmp_path / 'raw'
  shutil.copytree(raw_dir, raw)
  ct1, seg2, ct3 = (raw / f'volume-phantom-A-{n:04d}_{k}.nii.gz' for n, k in ((1, 'ct'), (2, 'seg'), (3, 'ct')))
  ct1.write_bytes(ct1.read_bytes()[:1000])
  image = nib.load(seg2)
  nib.save(nib.Nifti1Image(np.asarray(image.dataobj) * 2, image.affine, image.header), seg2)
  ct3.write_bytes(gzip.compress(b'nothing'))
  with pytest.raises(UserError) as caught:
    prepare.prepare(str(raw), str(tmp_path / 'out'), SIZE)
  lines = str(caught.value).splitlines()
  assert [line.split(': ')[0] for line in lines] == [str(ct1), str(seg2), str(ct3)]
  assert 'truncated' in lines[0] and 'must be 0 and 1' in lines[1] and 'not a NIfTI file' in lines[2]
  assert not list((tmp_path / 'out').rglob('*array_record*'))
  assert not list((tmp_path / 'out').rglob('dataset_info.json'))


def test_scan_and_mask_of_a_patient_are_both_listed(raw_dir, tmp_path):
  for number in (1, 2):
    for kind in ('ct', 'seg'):
      shutil.copy(raw_dir / f'volume-phantom-A-{number:04d}_{kind}.nii.gz', tmp_path)
      if number == 1:
        (tmp_path / f'volume-phantom-A-0001_{kind}.nii.gz').write_bytes(b'nothing')
  with pytest.raises(UserError) as caught:
    survey.survey(find(tmp_path)[1])
  lines = str(caught.value).splitlines()
  assert [line.split(': ')[0] for line in lines] == [
    str(tmp_path / f'volume-phantom-A-0001_{kind}.nii.gz') for kind in ('ct', 'seg')
  ]


def test_scans_without_masks_are_listed(raw_dir, tmp_path):
  raw = tmp_path / 'raw'
  shutil.copytree(raw_dir, raw)
  for number in (2, 5):
    (raw / f'volume-phantom-A-{number:04d}_seg.nii.gz').unlink()
  with pytest.raises(UserError, match=r'0002_ct.*0002_seg.nii.gz is missing.*\n.*0005_ct.*0005_seg'):
    covid19_20.find(raw)


def test_release_folder_and_its_train_folder_are_equal(raw_dir, tmp_path):
  shutil.copytree(raw_dir, tmp_path / 'Train')
  (tmp_path / 'Validation').mkdir()
  shutil.copy(raw_dir / 'volume-phantom-A-0001_ct.nii.gz', tmp_path / 'Validation')
  assert covid19_20.find(tmp_path) == covid19_20.find(tmp_path / 'Train')
  assert len(covid19_20.find(tmp_path)) == PATIENTS


@pytest.mark.parametrize(
  ('make', 'reason'),
  [(False, 'data.raw_dir: .* is not a folder'), (True, 'no known layout of scans and masks')],
)
def test_folders_without_scans(tmp_path, make, reason):
  if make:
    (tmp_path / 'raw').mkdir()
    (tmp_path / 'raw' / 'notes.txt').write_text('')
  with pytest.raises(UserError, match=reason):
    find(tmp_path / 'raw')


PREPARE = 'import sys; from data import prepare; prepare.prepare(sys.argv[1], sys.argv[2], 32)'


@pytest.mark.slow
@pytest.mark.parametrize('how', [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_build_is_done_again(raw_dir, tmp_path, how):
  out = tmp_path / 'out'
  command = [sys.executable, '-c', PREPARE, str(raw_dir), str(out)]
  process = subprocess.Popen(command, cwd=os.getcwd(), stderr=subprocess.DEVNULL, start_new_session=True)
  deadline = time.time() + 60
  while not list(out.rglob('*array_record*')) and time.time() < deadline:
    time.sleep(0.005)
  os.killpg(process.pid, how)
  process.wait()
  assert list(out.rglob('*array_record*')) or how == signal.SIGINT
  path = prepare.prepare(str(raw_dir), str(out), SIZE)
  assert tfds.builder_from_directory(path).info.splits.total_num_examples == PATIENTS * SLICES


def test_preparing_and_reading_do_not_import_tensorflow(data_dir):
  """Runs in a new interpreter, because another test may have imported TensorFlow in this one."""
  code = f"""
import sys
from data import prepare
from fusa_jax.training import datasets
dataset = datasets.load_dataset({str(data_dir)!r}, 0, {SIZE})
dataset.test.source[0]
assert 'tensorflow' not in sys.modules
"""
  subprocess.run([sys.executable, '-c', code], check=True, cwd=os.getcwd())
