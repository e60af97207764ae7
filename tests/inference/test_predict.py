"""Masks have each scan's grid (shape, affines, codes), and the same world positions for any stored orientation."""

import collections
import copy
import csv
import dataclasses
import errno
import gzip
import itertools
import json
import logging
import os
import pathlib
import shutil
import signal
import tempfile
import threading
import time
import weakref
import zipfile

import dicom_series
import jax
import nibabel as nib
import numpy as np
import one_class
import pydicom
import pytest
import several_hosts
from conftest import SIZE, SLICES
from nibabel import orientations

from fusa_jax.inference import predict, predictor, viewer
from fusa_jax.runs import operating_point
from fusa_jax.scans import nifti, volume_files
from fusa_jax.system import meshes, own_files
from fusa_jax.system.errors import UserError


@pytest.fixture(scope='module')
def predictions(predictors, raw_dir, tmp_path_factory):
  """One scan in three orientations, predicted with probabilities: (folder of scans, folder of results)."""
  scans, out = tmp_path_factory.mktemp('scans'), tmp_path_factory.mktemp('out')
  image = nib.load(raw_dir / 'volume-phantom-A-0001_ct.nii.gz')
  for codes in ('LPS', 'RAS', 'IPL'):
    turn = orientations.ornt_transform(orientations.io_orientation(image.affine), orientations.axcodes2ornt(codes))
    nib.save(image.as_reoriented(turn), scans / f'{codes}_ct.nii.gz')
  shutil.copy(raw_dir / 'volume-phantom-A-0001_seg.nii.gz', scans / 'LPS_seg.nii.gz')
  predict.predict(predictors['seg'], scans, out, probabilities=True)
  return scans, out


def test_written_files(predictions):
  _, out = predictions
  kinds = ('_mask.nii.gz', '_probability.nii.gz', '.json')
  assert listed(out) == sorted(f'{c}_ct{k}' for c in ('LPS', 'RAS', 'IPL') for k in kinds)


@pytest.mark.parametrize('codes', ['LPS', 'RAS', 'IPL'])
def test_masks_are_on_the_scans_own_grid(predictions, codes):
  scans, out = predictions
  scan, mask = nib.load(scans / f'{codes}_ct.nii.gz'), nib.load(out / f'{codes}_ct_mask.nii.gz')
  probability = nib.load(out / f'{codes}_ct_probability.nii.gz')
  assert mask.shape == probability.shape == scan.shape
  assert nib.aff2axcodes(mask.affine) == tuple(codes)
  for image in (mask, probability):
    for field in ('qform_code', 'sform_code', 'pixdim', 'srow_x', 'quatern_b', 'qoffset_z'):
      np.testing.assert_array_equal(image.header[field], scan.header[field])
  threshold = json.loads((out / f'{codes}_ct.json').read_text())['threshold']
  np.testing.assert_array_equal(mask.get_fdata(), probability.get_fdata() >= threshold)
  assert mask.get_data_dtype() == np.uint8 and probability.get_data_dtype() == np.float32


def test_the_mask_in_the_world_does_not_depend_on_storage(predictions):
  _, out = predictions
  closest = [nib.as_closest_canonical(nib.load(out / f'{c}_ct_probability.nii.gz')) for c in ('LPS', 'RAS', 'IPL')]
  assert np.ptp(closest[0].get_fdata()) > 0
  for other in closest[1:]:
    np.testing.assert_allclose(other.affine, closest[0].affine, atol=1e-4)
    np.testing.assert_array_equal(other.get_fdata(), closest[0].get_fdata())


def test_numbers_follow_from_the_mask(predictions):
  _, out = predictions
  result = json.loads((out / 'LPS_ct.json').read_text())
  mask = nib.load(out / 'LPS_ct_mask.nii.gz')
  data = np.asarray(mask.dataobj)
  assert result['lesion_ml'] == pytest.approx(data.sum() * np.prod(mask.header.get_zooms()) / 1000, rel=1e-5)
  assert result['positive_slices'] == np.flatnonzero(data.any(axis=(0, 1))).tolist()
  assert len(result['slice_scores']) == result['num_slices'] == SLICES
  others = [json.loads((out / f'{codes}_ct.json').read_text()) for codes in ('RAS', 'IPL')]
  assert all(other['positive_slices'] == result['positive_slices'] for other in others)


def test_predictions_equal_those_of_evaluation(predictors, runs, raw_dir, data_dir, tmp_path):
  """The highest probability of each slice of a test patient equals its score in slices.csv."""
  lines = (runs['seg'] / 'test' / 'slices.csv').read_text().splitlines()[1:]
  patient = lines[0].split(',')[0]
  predict.predict(predictors['seg'], raw_dir / f'{patient}_ct.nii.gz', tmp_path)
  result = json.loads((tmp_path / f'{patient}_ct.json').read_text())
  expected = [float(line.split(',')[3]) for line in lines if line.startswith(patient)]
  np.testing.assert_allclose(result['slice_scores'], expected, atol=1e-3)


@pytest.mark.parametrize('kind', ['seg', 'cls'])
def test_the_answer_for_a_patient_is_that_of_the_test(predictors, runs, raw_dir, kind):
  """The score and the call of a scan equal those of patients.csv, which were computed from logits."""
  with (runs[kind] / 'test' / 'patients.csv').open(newline='') as file:
    tested = list(csv.DictReader(file))
  rule = one_class.point(runs[kind]).patient
  for row in tested:
    answer = predictors[kind](raw_dir / f'{row["patient"]}_ct.nii.gz').numbers['patient']
    assert answer['score'] == pytest.approx(float(row['score']), rel=1e-4)
    assert answer['score'] == pytest.approx(float(row[rule.score_name]), rel=1e-4)
    assert answer['positive'] == bool(int(row['positive'])) and answer['reason'] is None
    assert answer.items() >= rule.about().items()


def test_the_answer_is_left_out_where_it_would_be_a_guess(predictors, runs, raw_dir, tmp_path):
  """A run of an earlier version; another threshold than that of the volumes; an array without spacing."""
  scan, old = raw_dir / 'volume-phantom-A-0001_ct.nii.gz', tmp_path / 'old'
  shutil.copytree(runs['seg'], old)
  point = json.loads((old / 'operating_point.json').read_text())
  del point['patient']
  (old / 'operating_point.json').write_text(json.dumps(point))
  run = predictor.load_predictor(old)
  assert run(scan).numbers['patient'] == {'score': None, 'positive': None, 'reason': operating_point.NO_RULE}
  assert run.sha256() != predictors['seg'].sha256()
  given = predictor.load_predictor(runs['seg'], threshold=0.25)(scan).numbers
  assert given['patient']['score'] == given['lesion_ml'] and given['patient']['positive'] is None
  assert given['patient']['reason'] == 'not chosen: it was chosen with another threshold'
  array = predictors['seg'](volume_files.read_scan(scan).values).numbers['patient']
  assert array['score'] is None and 'no spacing' in array['reason']
  grey = copy.copy(predictors['seg'])
  grey.model = dataclasses.replace(grey.model, values='grey')
  assert 'patient' not in grey(np.arange(SIZE**2).reshape(SIZE, SIZE).astype(np.uint8)).numbers


def test_classification_writes_numbers_only(predictors, raw_dir, tmp_path):
  predict.predict(predictors['cls'], raw_dir / 'volume-phantom-A-0002_ct.nii.gz', tmp_path)
  (path,) = tmp_path.glob('*.json')
  assert listed(tmp_path) == [path.name]
  result = json.loads(path.read_text())
  assert result['positive_slices'] == [i for i, s in enumerate(result['slice_scores']) if s >= result['threshold']]
  assert 'lesion_ml' not in result
  assert viewer.view(raw_dir / 'volume-phantom-A-0002_ct.nii.gz', tmp_path)


def test_predictions_can_be_viewed(predictions, tmp_path):
  scans, out = predictions
  for path in [*out.glob('*.json'), *out.glob('*_mask.nii.gz')]:
    shutil.copy(path, tmp_path)
  pages = [f'{codes}_ct.html' for codes in ('IPL', 'LPS', 'RAS')]
  assert [path.name for path in viewer.view(scans, tmp_path)] == ['view.html', *pages]


def test_images_may_be_shared_between_devices(runs, predictions, tmp_path):
  """Two devices per image give the same scores. Three devices cannot share 32 rows."""
  scans, out = predictions
  predict.predict(predictor.load_predictor(runs['seg'], meshes.create_mesh(4, 2)), scans / 'LPS_ct.nii.gz', tmp_path)
  shared, alone = (json.loads((folder / 'LPS_ct.json').read_text()) for folder in (tmp_path, out))
  np.testing.assert_allclose(shared['slice_scores'], alone['slice_scores'], atol=2e-4)
  three = meshes.create_mesh(1, 3, jax.devices()[:3])
  with pytest.raises(UserError, match=r'data.image_size: 32 must be a multiple of mesh.space=3; give 30 or 33'):
    predict.predict(predictor.load_predictor(runs['seg'], three), scans / 'LPS_ct.nii.gz', tmp_path / 'none')
  assert not (tmp_path / 'none').exists()


def test_strict_names_all_refused_scans_before_anything_is_written(predictors, raw_dir, tmp_path):
  folder = tmp_path / 'in'
  folder.mkdir()
  good = volume_files.read_scan(raw_dir / 'volume-phantom-A-0001_ct.nii.gz')
  for name, values in (
    ('a', good.values),
    ('b', np.clip(good.values, -160, 240)),
    ('c', (good.values + 1024).clip(0, 255)),
  ):
    nifti.write_volume(folder / f'{name}.nii.gz', values.astype(np.int16), good)
  with pytest.raises(UserError) as caught:
    predict.predict(predictors['seg'], folder, tmp_path / 'out', strict=True)
  lines = str(caught.value).splitlines()
  assert [line.split(': ')[0] for line in lines] == [str(folder / 'b.nii.gz'), str(folder / 'c.nii.gz')]
  assert all('HU' in line for line in lines)
  assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize(
  ('source', 'workdir', 'reason'),
  [
    ('nowhere.nii.gz', None, r'input: .*nowhere.nii.gz does not exist'),
    ('', None, r'no scan \(.nii, .nii.gz, .*, DICOM\) in'),
    ('', 'nowhere', r'no run in it \(config.json is missing\)'),
  ],
)
def test_missing_inputs(runs, tmp_path, source, workdir, reason):
  with pytest.raises(UserError, match=reason):
    predict.predict(
      predictor.load_predictor(tmp_path / workdir if workdir else runs['seg']), tmp_path / source, tmp_path / 'out'
    )


def test_the_threshold_of_the_run_is_used_unless_another_is_given(predictors, runs, raw_dir, tmp_path):
  scan = raw_dir / 'volume-phantom-A-0001_ct.nii.gz'
  own = json.loads((runs['seg'] / 'operating_point.json').read_text())
  predict.predict(predictors['seg'], scan, tmp_path / 'own')
  predict.predict(predictor.load_predictor(runs['seg'], threshold=0.25), scan, tmp_path / 'given', probabilities=True)
  results = {k: json.loads((tmp_path / k / 'volume-phantom-A-0001_ct.json').read_text()) for k in ('own', 'given')}
  assert (results['own']['threshold'], results['own']['chosen_by']) == (own['threshold'], own['chosen_by'])
  assert (results['given']['threshold'], results['given']['chosen_by']) == (0.25, 'given')
  mask, probability = (
    nib.load(tmp_path / 'given' / f'volume-phantom-A-0001_ct_{kind}.nii.gz').get_fdata()
    for kind in ('mask', 'probability')
  )
  np.testing.assert_array_equal(mask, probability >= 0.25)
  with pytest.raises(UserError, match=r'threshold: 50.0 must be between 0 and 1'):
    predict.predict(predictor.load_predictor(runs['seg'], threshold=50.0), scan, tmp_path / 'none')


def test_an_operating_point_of_another_checkpoint_is_not_used(runs, raw_dir, tmp_path, caplog):
  workdir = tmp_path / 'run'
  shutil.copytree(runs['cls'], workdir)
  point = json.loads((workdir / 'operating_point.json').read_text())
  (workdir / 'operating_point.json').write_text(json.dumps(point | {'step': 1}))
  predict.predict(predictor.load_predictor(workdir), raw_dir / 'volume-phantom-A-0001_ct.nii.gz', tmp_path / 'out')
  result = json.loads((tmp_path / 'out' / 'volume-phantom-A-0001_ct.json').read_text())
  assert result['threshold'] == 0.5
  assert 'no operating point for step' in caplog.text


@pytest.fixture(scope='module')
def of_dicom(predictors, raw_dir, tmp_path_factory):
  """(folder of scans, folder of results). One scan as two DICOM series and one NIfTI file, and a localizer."""
  source, out = tmp_path_factory.mktemp('dicom'), tmp_path_factory.mktemp('of_dicom')
  image = nib.load(raw_dir / 'volume-phantom-A-0001_ct.nii.gz')
  for number, syntax in ((3, 'jpeg lossless'), (4, 'jpeg 2000')):
    made = dicom_series.slices(np.asarray(image.dataobj), image.affine, number)
    dicom_series.save(source / 'a' / 'mixed', made, syntax, name=f'{number}{{:03d}}')
  made = dicom_series.slices(np.asarray(image.dataobj), image.affine, 1, ImageType=['ORIGINAL', 'PRIMARY', 'LOCALIZER'])
  dicom_series.save(source / 'b', made[:1])
  shutil.copy(raw_dir / 'volume-phantom-A-0001_ct.nii.gz', source / 'b' / 'phantom.nii.gz')
  (source / 'notes.txt').write_text('no scan')
  predict.predict(predictors['seg'], source, out, probabilities=True)
  return source, out


def test_dicom_series_get_the_same_masks_as_nifti(of_dicom):
  """The masks agree in world coordinates, and the numbers are equal."""
  names = {path.name.removesuffix('.json') for path in of_dicom[1].glob('*.json')}
  assert sorted(name.partition('_')[0] for name in names) == ['phantom', 'series3', 'series4']
  assert listed(of_dicom[1]) == sorted(
    f'{name}{kind}' for name in names for kind in ('.json', '_mask.nii.gz', '_probability.nii.gz')
  )
  for name in names - {'phantom'}:
    for kind in ('mask', 'probability'):
      image, expected = (
        nib.as_closest_canonical(nib.load(of_dicom[1] / f'{stem}_{kind}.nii.gz')) for stem in (name, 'phantom')
      )
      np.testing.assert_allclose(image.affine, expected.affine, atol=1e-4)
      np.testing.assert_array_equal(image.get_fdata(), expected.get_fdata())
      assert image.get_fdata().any()
    result, of_nifti = (json.loads((of_dicom[1] / f'{stem}.json').read_text()) for stem in (name, 'phantom'))
    assert result.pop('scan') == name and of_nifti.pop('scan') == 'phantom.nii.gz'
    assert result.pop('lesion_ml') == pytest.approx(of_nifti.pop('lesion_ml'), rel=1e-5)
    made_of, of_file = result.pop('made_of'), of_nifti.pop('made_of')
    assert made_of['run_sha256'] == of_file['run_sha256'] and made_of['input_sha256'] != of_file['input_sha256']
    assert len(result.pop('files')) == len(of_nifti.pop('files')) == 2
    del result['sha256_of_this_record'], of_nifti['sha256_of_this_record']
    assert result == of_nifti


def test_an_archive_is_predicted_as_its_folder(predictors, of_dicom, tmp_path, monkeypatch):
  """As a file and in a folder; no temporary file is left."""
  source, out = of_dicom
  (tmp_path / 'in').mkdir()
  archive = shutil.make_archive(tmp_path / 'in' / 'some', 'zip', source)
  (tmp_path / 'tmp').mkdir()
  monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path / 'tmp'))
  for number, given in enumerate((pathlib.Path(archive), tmp_path / 'in')):
    predict.predict(predictors['seg'], given, tmp_path / str(number), probabilities=True)
    assert listed(tmp_path / str(number)) == listed(out)
    for name in listed(out):
      one, other = out / name, tmp_path / str(number) / name
      if name.endswith('.json'):
        one, other = (own_files.read_record(path) for path in (one, other))
        assert one['made_of'].pop('path_sha256') != other['made_of'].pop('path_sha256') and one == other
      else:
        assert one.read_bytes() == other.read_bytes()
  with zipfile.ZipFile(tmp_path / 'broken.zip', 'w') as packed:
    packed.writestr('bad.nii.gz', 'no scan')
  with pytest.raises(UserError, match=r'^broken.zip/bad.nii.gz: '):
    predict.predict(predictors['seg'], tmp_path / 'broken.zip', tmp_path / 'none')
  assert not list((tmp_path / 'tmp').glob('fusa-jax-*'))


@pytest.fixture(scope='module')
def dicom_only(of_dicom, tmp_path_factory):
  """The folder of `of_dicom` without the NIfTI file."""
  folder = tmp_path_factory.mktemp('dicom_only') / 'in'
  shutil.copytree(of_dicom[0], folder, ignore=shutil.ignore_patterns('*.nii.gz'))
  return folder


def test_dicom_seg_beside_the_mask_and_nothing_else_names_the_patient(
  predictors, dicom_only, of_dicom, tmp_path, caplog, capfd
):
  """Looks for names, numbers and dates of the headers in all written files, messages and errors."""
  caplog.set_level(logging.DEBUG)
  predict.predict(predictors['seg'], dicom_only, tmp_path / 'out', probabilities=True, as_dicom=True)
  bad = tmp_path / 'bad'
  shutil.copytree(dicom_only, bad)
  for path in sorted((bad / 'a' / 'mixed').iterdir())[3::16]:
    path.unlink()
  with pytest.raises(UserError, match=r'1 slices are missing') as caught:
    predict.predict(predictors['seg'], bad, tmp_path / 'none', as_dicom=True)
  written = {path.name: path.read_bytes() for path in (tmp_path / 'out').iterdir()}
  names = ' '.join(written)
  segs = [written.pop(name) for name in list(written) if name.endswith('.dcm')]
  unpacked = [gzip.decompress(content) for name, content in written.items() if name.endswith('.gz')]
  printed = capfd.readouterr()
  texts = [caplog.text, str(caught.value), printed.out, printed.err, names]
  everything = b'\n'.join([*written.values(), *unpacked, *(text.encode() for text in texts)]).lower()
  assert b'series3_' in everything and b'chest 5.0' in everything and b'skipped: 1 localizers' in everything
  for value in dicom_series.PERSONAL.values():
    for part in value.lower().split('^'):
      assert part.encode() not in everything
  assert len(segs) == 2 and all(b'Markername' in seg and b'MARKERID-4711' in seg for seg in segs)
  for path in (tmp_path / 'out').glob('*_mask.dcm'):
    seg, nifti = pydicom.dcmread(path), path.with_suffix('.nii.gz')
    assert nifti.read_bytes() == (of_dicom[1] / nifti.name).read_bytes()
    assert seg.pixel_array.sum() == nib.load(nifti).get_fdata().sum() > 0
    result = json.loads(path.with_name(path.name.replace('_mask.dcm', '.json')).read_text())
    parameters = seg.SegmentSequence[0].SegmentationAlgorithmIdentificationSequence[0].AlgorithmParameters
    assert all(f'{key}={result[key]}' in parameters for key in ('model', 'step', 'threshold', 'flips', 'smallest_ml'))


def test_options_that_do_not_apply_are_refused_first(predictors, of_dicom, dicom_only, tmp_path):
  no_series = r'^dicom: phantom.nii.gz is not a DICOM series; give only DICOM series, or leave out --dicom$'
  no_masks = 'applies to masks only, and this model gives none; leave it out$'
  for run, source, option, reason in (
    ('seg', of_dicom[0], 'as_dicom', no_series),
    ('cls', dicom_only, 'as_dicom', f'^dicom: {no_masks}'),
    ('cls', dicom_only, 'probabilities', f'^probabilities: {no_masks}'),
  ):
    with pytest.raises(UserError, match=reason):
      predict.predict(predictors[run], source, tmp_path / 'out', **{option: True})
    assert not (tmp_path / 'out').exists()


@pytest.fixture
def folder(raw_dir, tmp_path):
  """Ten scans, a to j, as links to one scan of the cohort."""
  (tmp_path / 'in').mkdir()
  for name in 'abcdefghij':
    (tmp_path / 'in' / f'{name}.nii.gz').symlink_to(raw_dir / 'volume-phantom-A-0001_ct.nii.gz')
  return tmp_path / 'in'


def written(*names):
  return sorted(f'{name}{kind}' for name in names for kind in ('.json', '_mask.nii.gz'))


def listed(folder):
  """The names of the results in a folder, without predictions.csv."""
  return sorted(path.name for path in folder.iterdir() if 'predictions.' not in path.name)


def test_reading_computing_and_writing_overlap_in_order(predictors, folder, tmp_path, monkeypatch, caplog):
  """The first write waits until the second scan is computed and the fourth read. At most four scans are in memory."""
  caplog.set_level(logging.INFO)
  run, read, write = predictor.Predictor.probabilities, volume_files.VolumeFile.read_image, nifti.write_volume_to
  begun, scans, alive, computed = collections.Counter(), [], [], threading.Event()
  fourth = threading.Event()

  def reading(source, values):
    begun[source.name] += 1
    scan = read(source, values)
    scans.append(weakref.ref(scan))
    alive.append(sum(ref() is not None for ref in scans))
    if source.name == 'd.nii.gz':
      fourth.set()
    return scan

  def computing(self, *arguments):
    probability = run(self, *arguments)
    if computing_counts[0]:
      computed.set()
    computing_counts[0] += 1
    return probability

  def writing(*arguments, **options):
    assert computed.wait(60) and fourth.wait(60)
    write(*arguments, **options)

  computing_counts = [0]
  monkeypatch.setattr(volume_files.VolumeFile, 'read_image', reading)
  monkeypatch.setattr(predictor.Predictor, 'probabilities', computing)
  monkeypatch.setattr(nifti, 'write_volume_to', writing)
  predict.predict(predictors['seg'], folder, tmp_path / 'out')
  assert listed(tmp_path / 'out') == written(*'abcdefghij')
  assert [m.partition('.nii.gz: ')[0] for m in caplog.messages if '.nii.gz: ' in m] == list('abcdefghij')
  assert set(begun.values()) == {1} and len(scans) == 10
  assert 2 <= max(alive) <= 4


def test_a_failed_write_stops_after_earlier_results(predictors, folder, tmp_path, monkeypatch):
  """The disk is full at the third mask: no later result is written, and no file is incomplete."""
  write, count = nifti.write_volume_to, itertools.count(1)

  def writing(*arguments, **options):
    if next(count) == 3:
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    write(*arguments, **options)

  monkeypatch.setattr(nifti, 'write_volume_to', writing)
  with pytest.raises(UserError, match=r'out/c_mask.nii.gz: cannot be written \(No space left on device\); free sp'):
    predict.predict(predictors['seg'], folder, tmp_path / 'out')
  assert listed(tmp_path / 'out') == written('a', 'b')


@pytest.mark.slow
def test_an_interruption_leaves_only_complete_files(runs, folder, tmp_path):
  """Ctrl-C in a folder of two thousand scans: exit code 130, and all written files are complete."""
  for number in range(2000):
    (folder / f'more{number}.nii.gz').symlink_to((folder / 'a.nii.gz').resolve())
  out = tmp_path / 'out'
  command = ['--mode=predict', f'--workdir={runs["seg"]}', f'--input={folder}', f'--output={out}']
  process = several_hosts.start(command, 1, tmp_path / 'log', tmp_path / 'notes')
  try:
    until = time.monotonic() + 240
    while not (out / 'b.json').exists():
      assert process.poll() is None and time.monotonic() < until, (tmp_path / 'log').read_text()
      time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130
  finally:
    process.kill()
    process.wait()
  assert (tmp_path / 'log').read_text().splitlines()[-1].startswith('interrupted; ')
  names = listed(out)
  done = [name.removesuffix('.json') for name in names if name.endswith('.json')]
  assert 2 <= len(done) < 2000 and names == written(*done)
  rows = list(csv.DictReader((out / 'predictions.csv').open()))
  assert {row['input'] for row in rows} <= {f'{name}.nii.gz' for name in done} and len(rows) >= len(done) - 1
  for name in done:
    assert nib.load(out / f'{name}_mask.nii.gz').get_fdata().shape == nib.load(folder / 'a.nii.gz').shape


def test_the_first_failure_is_reported():
  """A full disk is reported even if the next file read is damaged."""

  def items():
    yield 'written'
    raise UserError('damaged')

  def write(item):
    raise OSError(f'{item}: disk full')

  with predict._readers() as pool, pytest.raises(OSError, match='disk full') as caught:
    list(predict._overlapping(pool, write, items(), 2))
  assert str(caught.value.__cause__) == 'damaged'


def test_a_flag_decides_where_runs_differ(runs, tmp_path):
  other = tmp_path / 'other'
  shutil.copytree(runs['seg'], other)
  point = json.loads((other / 'operating_point.json').read_text())
  (other / 'operating_point.json').write_text(json.dumps(point | {'lungs': True}))
  both = [runs['seg'], other]
  assert (
    predictor.load_predictor(both, lungs=True).points['lesion'].lungs
    and not predictor.load_predictor(both, lungs=False).points['lesion'].lungs
  )
  with pytest.raises(UserError, match=r'workdir: the runs differ in evaluate.lungs; give --lungs or --nolungs'):
    predictor.load_predictor(both)


def test_a_scan_in_code_is_predicted_as_its_file(predictors, raw_dir, tmp_path):
  """Given as a path, as a DICOM folder, and as an array; an array needs its spacing for the mL."""
  path, run = raw_dir / 'volume-phantom-A-0001_ct.nii.gz', predictors['seg']
  scan = volume_files.read_scan(path)
  expected = run(scan)
  image = nib.load(path)
  dicom_series.save(tmp_path / 'series', dicom_series.slices(np.asarray(image.dataobj), image.affine, 3))
  for given, spacing in ((str(path), None), (tmp_path / 'series', None), (scan.values, np.array(scan.spacing))):
    prediction = run(given, spacing)
    np.testing.assert_array_equal(prediction.mask, expected.mask)
    np.testing.assert_array_equal(prediction.probability, expected.probability)
    assert prediction.numbers['lesion_ml'] == pytest.approx(expected.numbers['lesion_ml'], rel=1e-4)
  assert run(scan.values).numbers['lesion_ml'] == pytest.approx(expected.mask.sum() / 1000)
  with pytest.raises(UserError, match=r'array: has 2 dimensions; give slices \[S, H, W\]$'):
    run(scan.values[0])
