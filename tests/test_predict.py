"""Masks on each scan's own grid: its shape, affines and codes; the same in the world however the scan is stored."""

import json
import shutil

import jax
import nibabel as nib
import numpy as np
import pytest
from conftest import SLICES
from nibabel import orientations

from fusa_jax import ct, predict, sharding
from fusa_jax.errors import UserError


@pytest.fixture(scope='module')
def predictions(runs, raw_dir, tmp_path_factory):
  """One scan, stored three ways, predicted with probabilities: (folder of scans, folder of results)."""
  scans, out = tmp_path_factory.mktemp('scans'), tmp_path_factory.mktemp('out')
  image = nib.load(raw_dir / 'volume-phantom-A-0001_ct.nii.gz')
  for codes in ('LPS', 'RAS', 'IPL'):
    turn = orientations.ornt_transform(orientations.io_orientation(image.affine), orientations.axcodes2ornt(codes))
    nib.save(image.as_reoriented(turn), scans / f'{codes}_ct.nii.gz')
  shutil.copy(raw_dir / 'volume-phantom-A-0001_seg.nii.gz', scans / 'LPS_seg.nii.gz')
  predict.predict(runs['seg'], scans, out, probabilities=True)
  return scans, out


def test_what_is_written(predictions):
  _, out = predictions
  kinds = ('_mask.nii.gz', '_probability.nii.gz', '.json')
  assert sorted(p.name for p in out.iterdir()) == sorted(f'{c}_ct{k}' for c in ('LPS', 'RAS', 'IPL') for k in kinds)


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


def test_predictions_are_the_evaluations(runs, raw_dir, data_dir, tmp_path):
  """The highest probability of each slice of a test patient is what slices.csv has for it."""
  lines = (runs['seg'] / 'test' / 'slices.csv').read_text().splitlines()[1:]
  patient = lines[0].split(',')[0]
  predict.predict(runs['seg'], raw_dir / f'{patient}_ct.nii.gz', tmp_path)
  result = json.loads((tmp_path / f'{patient}_ct.json').read_text())
  expected = [float(line.split(',')[3]) for line in lines if line.startswith(patient)]
  np.testing.assert_allclose(result['slice_scores'], expected, atol=1e-3)


def test_classification_writes_numbers_only(runs, raw_dir, tmp_path):
  predict.predict(runs['cls'], raw_dir / 'volume-phantom-A-0002_ct.nii.gz', tmp_path)
  (path,) = tmp_path.iterdir()
  result = json.loads(path.read_text())
  assert result['positive_slices'] == [i for i, s in enumerate(result['slice_scores']) if s >= result['threshold']]
  assert 'lesion_ml' not in result


def test_images_may_be_shared_between_devices(runs, predictions, tmp_path):
  """Two devices for each image: the same scores. Three cannot share 32 rows."""
  scans, out = predictions
  predict.predict(runs['seg'], scans / 'LPS_ct.nii.gz', tmp_path, mesh=sharding.create_mesh(4, 2))
  shared, alone = (json.loads((folder / 'LPS_ct.json').read_text()) for folder in (tmp_path, out))
  np.testing.assert_allclose(shared['slice_scores'], alone['slice_scores'], atol=2e-4)
  three = sharding.create_mesh(1, 3, jax.devices()[:3])
  with pytest.raises(UserError, match=r'data.image_size: 32 does not divide over mesh.space=3; 30 or 33 does'):
    predict.predict(runs['seg'], scans / 'LPS_ct.nii.gz', tmp_path / 'none', mesh=three)
  assert not (tmp_path / 'none').exists()


def test_refused_scans_are_all_named_before_anything_is_written(runs, raw_dir, tmp_path):
  folder = tmp_path / 'in'
  folder.mkdir()
  good = ct.read(raw_dir / 'volume-phantom-A-0001_ct.nii.gz')
  for name, values in (
    ('a', good.values),
    ('b', np.clip(good.values, -160, 240)),
    ('c', (good.values + 1024).clip(0, 255)),
  ):
    ct.write(folder / f'{name}.nii.gz', values.astype(np.int16), good)
  with pytest.raises(UserError) as caught:
    predict.predict(runs['seg'], folder, tmp_path / 'out')
  lines = str(caught.value).splitlines()
  assert [line.split(': ')[0] for line in lines] == [str(folder / 'b.nii.gz'), str(folder / 'c.nii.gz')]
  assert all('HU' in line for line in lines)
  assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize(
  ('source', 'workdir', 'reason'),
  [
    ('nowhere.nii.gz', None, r'--input: .*nowhere.nii.gz does not exist'),
    ('', None, r'no .nii or .nii.gz scan in'),
    ('', 'nowhere', r'no run in it \(config.json is missing\)'),
  ],
)
def test_missing_inputs(runs, tmp_path, source, workdir, reason):
  with pytest.raises(UserError, match=reason):
    predict.predict(tmp_path / workdir if workdir else runs['seg'], tmp_path / source, tmp_path / 'out')


def test_the_threshold_is_the_runs_own_unless_another_is_given(runs, raw_dir, tmp_path):
  scan = raw_dir / 'volume-phantom-A-0001_ct.nii.gz'
  own = json.loads((runs['seg'] / 'operating_point.json').read_text())
  predict.predict(runs['seg'], scan, tmp_path / 'own')
  predict.predict(runs['seg'], scan, tmp_path / 'given', probabilities=True, threshold=0.25)
  results = {k: json.loads((tmp_path / k / 'volume-phantom-A-0001_ct.json').read_text()) for k in ('own', 'given')}
  assert (results['own']['threshold'], results['own']['chosen_by']) == (own['threshold'], own['chosen_by'])
  assert (results['given']['threshold'], results['given']['chosen_by']) == (0.25, '--threshold')
  mask, probability = (
    nib.load(tmp_path / 'given' / f'volume-phantom-A-0001_ct_{kind}.nii.gz').get_fdata()
    for kind in ('mask', 'probability')
  )
  np.testing.assert_array_equal(mask, probability >= 0.25)
  with pytest.raises(UserError, match=r'--threshold: 50.0 is no probability; give one from 0 to 1'):
    predict.predict(runs['seg'], scan, tmp_path / 'none', threshold=50.0)


def test_an_operating_point_of_another_checkpoint_is_not_used(runs, raw_dir, tmp_path, caplog):
  workdir = tmp_path / 'run'
  shutil.copytree(runs['cls'], workdir)
  point = json.loads((workdir / 'operating_point.json').read_text())
  (workdir / 'operating_point.json').write_text(json.dumps(point | {'step': 1}))
  predict.predict(workdir, raw_dir / 'volume-phantom-A-0001_ct.nii.gz', tmp_path / 'out')
  result = json.loads((tmp_path / 'out' / 'volume-phantom-A-0001_ct.json').read_text())
  assert result['threshold'] == 0.5
  assert 'no operating point for step' in caplog.text
