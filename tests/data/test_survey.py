"""One scan under two names: equal voxels in any storage are refused; similar scans give a warning."""

import logging
import shutil

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from data import prepare, survey
from data.cohorts import covid19_20, phantom
from fusa_jax.scans import volume_files
from fusa_jax.system.errors import UserError


def path_of(folder, number, kind='ct', suffix='.nii.gz'):
  return folder / f'volume-phantom-A-{number:04d}_{kind}{suffix}'


@pytest.fixture
def raw(raw_dir, tmp_path):
  """Three patients of the cohort; tests may change them."""
  folder = tmp_path / 'raw'
  folder.mkdir()
  for number in (1, 2, 3):
    for kind in ('ct', 'seg'):
      shutil.copy(path_of(raw_dir, number, kind), folder)
  return folder


def add(folder, number, hu, scan):
  """Adds a scan [S, H, W] on the grid of `scan`, without lesions."""
  for kind, volume in (('ct', hu), ('seg', np.zeros_like(hu))):
    nib.save(nib.Nifti1Image(volume.transpose(2, 1, 0), scan.affine), path_of(folder, number, kind))


def warnings(caplog):
  return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_scan_under_two_names_is_refused_in_any_storage(raw, tmp_path):
  shutil.copy(path_of(raw, 1), path_of(raw, 7))
  shutil.copy(path_of(raw, 1, 'seg'), path_of(raw, 7, 'seg'))
  # Patient 8 is patient 2 with another orientation, voxel type, scaling, compression and mask.
  image = nib.load(path_of(raw, 2))
  turned = image.as_reoriented([[1, 1], [0, -1], [2, -1]])
  other = nib.Nifti1Image(turned.get_fdata() + 3, turned.affine, dtype=np.float32)
  other.header.set_slope_inter(1, -3)
  nib.save(other, path_of(raw, 8, suffix='.nii'))
  nib.save(nib.Nifti1Image(np.zeros(other.shape, np.uint8), other.affine), path_of(raw, 8, 'seg', '.nii'))
  path_of(raw, 3).write_bytes(b'nothing')
  with pytest.raises(UserError) as caught:
    prepare.prepare(str(raw), str(tmp_path / 'out'), 32)
  lines = str(caught.value).splitlines()
  assert [line.split(': ')[0] for line in lines] == [
    str(path) for path in (path_of(raw, 3), path_of(raw, 7), path_of(raw, 8, suffix='.nii'))
  ]
  for line, known in zip(lines[1:], (1, 2), strict=True):
    assert f'the same image as {path_of(raw, known).name}' in line and 'remove one of the two' in line
  assert not list((tmp_path / 'out').rglob('*array_record*'))


def test_other_reconstructions_of_a_scan_are_warned_of(raw, caplog):
  scan = volume_files.read_scan(path_of(raw, 1))
  sharper = 2.0 * scan.values - ndimage.gaussian_filter(scan.values.astype(float), (0, 1, 1))
  add(raw, 7, np.rint(sharper).astype(np.int16), scan)
  scan = volume_files.read_scan(path_of(raw, 2))
  add(raw, 8, scan.values.reshape(-1, 2, *scan.values.shape[1:]).mean(axis=1).astype(np.int16), scan)
  assert len(survey.survey(covid19_20.find(raw))) == 5
  lines = warnings(caplog)
  assert len(lines) == 2
  for line, number, known in zip(lines, (7, 8), (1, 2), strict=True):
    assert line.startswith(f'{path_of(raw, number)}: looks like {path_of(raw, known).name} (correlation 0.9')
    assert 'remove one of the two' in line


def test_different_patients_give_no_warning(raw_dir, caplog):
  survey.survey(covid19_20.find(raw_dir))
  assert not warnings(caplog)


def test_smoothing_changes_a_thumbnail_less_than_another_patient():
  """Coarse matrices are the hard case: a blur of one pixel changes much. At the paper's size the gap is wider."""
  volumes = [phantom.patient(0, number, size=96, slices=24)[0].astype(np.float32) for number in range(1, 9)]
  smoother = [ndimage.gaussian_filter(volume, (0, 1, 1)) for volume in volumes]
  one, other = (np.stack([survey._thumbnail(volume, 'hu') for volume in each]) for each in (volumes, smoother))
  np.testing.assert_allclose(np.linalg.norm(one, axis=1), 1, rtol=1e-5)
  correlations = one @ other.T
  assert np.diag(correlations).min() > survey._ALIKE
  assert np.max(correlations - 2 * np.eye(8)) < survey._ALIKE - 0.05
