"""A cohort of DICOM: the dataset of the same volumes in NIfTI, and what is wrong with series and masks by name."""

import logging
import pathlib
import shutil
import tempfile

import dicom_series
import nibabel as nib
import numpy as np
import pydicom
import pytest
from conftest import SIZE
from layouts import copy, dicom_pairs, files

from data import prepare, read, survey, workers
from data.cohorts import CohortOptions
from data.cohorts import dicom_pairs as cohort
from data.find import find
from fusa_jax.scans import dicom, nifti
from fusa_jax.system.errors import UserError
from fusa_jax.training import datasets


@pytest.fixture(scope='module')
def laid(raw_dir, tmp_path_factory):
  folder = tmp_path_factory.mktemp('dicom_pairs')
  dicom_pairs(raw_dir, folder)
  return folder


def test_the_dataset_is_that_of_the_same_volumes_in_nifti(laid, data_dir, processes, tmp_path, monkeypatch):
  """Compressed or not, in folders and an archive, with masks of both kinds. Nothing that was unpacked stays behind."""
  (tmp_path / 'tmp').mkdir()
  monkeypatch.setenv('TMPDIR', str(tmp_path / 'tmp'))  # of the processes that read
  monkeypatch.setattr(tempfile, 'tempdir', None)  # and of this one
  monkeypatch.setattr(workers, 'ProcessPoolExecutor', processes)
  prepared = prepare.prepare(str(laid), str(tmp_path / 'out'), SIZE)
  assert not list((tmp_path / 'tmp').glob('fusa-jax-*'))
  lesions = 0
  for part in ('train', 'validation', 'test'):
    ours, of_nifti = (getattr(datasets.load_dataset(each, 0, SIZE), part) for each in (prepared, data_dir))
    assert len(ours) == len(of_nifti) > 0
    for index in range(len(ours)):
      one, other = ours.source[index], of_nifti.source[index]
      assert one.keys() == other.keys()
      for key, value in one.items():
        if key == 'spacing':
          np.testing.assert_allclose(value, other[key], rtol=1e-5)
        else:
          np.testing.assert_array_equal(value, other[key])
      lesions += one['mask'].any()
  assert lesions > 20
  metadata = b''.join(path.read_bytes() for path in pathlib.Path(prepared).iterdir()).lower()
  assert b'volume-phantom-a-0001' in metadata and b'marker' not in metadata


def test_masks_are_scored_as_volumes(laid, raw_dir, caplog):
  """What evaluation reads: the scan and the mask of each patient, on the series' own grid; no line for each."""
  caplog.set_level(logging.INFO)
  scans = prepare.scans(laid)
  assert len(scans) == 10
  for path, mask in files(raw_dir)[3:5]:  # an archive, and a folder with a SEG
    scan, read = scans[nifti.stem(path).removesuffix('_ct')]()
    expected = nifti.read_scan(path)
    np.testing.assert_array_equal(scan.values, expected.values)
    np.testing.assert_allclose(scan.affine, expected.affine, atol=1e-3)
    np.testing.assert_array_equal(read, nifti.read_mask(mask, expected))
  assert not caplog.messages


def test_a_file_more_is_another_cohort(laid, tmp_path):
  folder = tmp_path / 'raw'
  shutil.copytree(laid, folder)
  before = survey.fingerprint(find(folder)[1])
  assert survey.fingerprint(find(folder)[1]) == before
  path = next((folder / 'volume-phantom-A-0001').rglob('IM*'))
  shutil.copy(path, path.with_name('more'))
  after = survey.fingerprint(find(folder)[1])
  assert after != before and len(after) == len(before)


def test_what_is_wrong_is_named(laid, raw_dir, tmp_path):
  """Each patient's own trouble in a line that begins with its folder; nothing is written."""
  folder = tmp_path / 'raw'
  shutil.copytree(laid, folder)
  name = lambda number: f'volume-phantom-A-{number:04d}'
  image = nib.load(files(raw_dir)[0][0])
  inner = np.random.default_rng(0).permutation(image.shape[2])[5]  # as they are named by dicom_series.save
  next((folder / name(1)).rglob(f'IM{inner:06d}')).unlink()
  dicom_series.save(folder / name(2) / 'more', dicom_series.slices(np.asarray(image.dataobj), image.affine, 77))
  broken = nib.load(folder / f'{name(3)}_mask.nii.gz')
  nib.save(nib.Nifti1Image(np.asarray(broken.dataobj)[1:], broken.affine), folder / f'{name(3)}_mask.nii.gz')
  (folder / f'{name(4)}.zip').write_bytes(b'PK')
  seg = pydicom.dcmread(folder / name(5) / 'SEG')
  seg.ReferencedSeriesSequence[0].SeriesInstanceUID = '1.2.3'
  seg.save_as(folder / name(5) / 'SEG')
  (folder / f'{name(6)}_seg.nii.gz').unlink()
  path = next((folder / name(7)).rglob('IM000002'))
  path.write_bytes(path.read_bytes()[:200])
  shutil.rmtree(folder / name(8) / 'study')
  dicom_series.save(folder / name(8), dicom_series.slices(np.asarray(image.dataobj), image.affine, 8, Modality='MR'))
  shutil.copy(folder / name(10) / 'SEG', folder / name(10) / 'corrected')
  with pytest.raises(UserError) as caught:
    prepare.prepare(str(folder), str(tmp_path / 'out'), SIZE)
  assert not list((tmp_path / 'out').rglob('*array_record*'))
  text = str(caught.value).replace(f'{folder}/volume-phantom-A-00', '')
  assert 'arker' not in text
  series = lambda number: next(str(one) for one in dicom.find_series((laid / name(number)).rglob('IM*')))
  lines = text.splitlines()
  assert len(lines) == 9
  assert lines[0] == f'01: {series(1)}: 1 slices are missing between the 15 that are there; copy it again'
  assert lines[1].startswith(
    f'02: there must be one CT series, the one that the mask was drawn on, and there is {series(2)}, series77_'
  )
  assert lines[1].endswith(' (Chest 5.0); add it, or take the others out')
  assert lines[2].startswith(
    '03_mask.nii.gz: the mask has (16, 32, 31) voxels (slices, rows, columns) and its scan ser'
  )
  assert lines[3] == '04.zip: cannot be unpacked (BadZipFile); pack or copy it again'
  assert lines[4] == (
    '05: there must be one CT series that SEG refers to, and there is none; add it, or take the others out'
  )
  assert lines[5] == '06: its mask is missing; add NAME_seg.nii.gz beside it or a DICOM SEG in it, or take it out'
  assert lines[6] == '07: IM000002: a damaged DICOM file (cut before its image); copy it again'
  assert lines[7] == (
    '08: there must be one CT series, the one that the mask was drawn on, and there is none (left out: '
    f'{image.shape[2]} MR objects); add it, or take the others out'
  )
  assert lines[8] == '10: 2 DICOM SEGs (SEG, corrected); take all but one out'


def test_names_that_are_there_twice_or_alone(laid, tmp_path):
  def broken(change):
    folder = tmp_path / str(len(list(tmp_path.iterdir())))
    shutil.copytree(laid, folder)
    change(folder)
    with pytest.raises(UserError) as caught:
      find(folder)
    return str(caught.value).replace(f'{folder}/volume-phantom-A-00', '')

  mask = 'volume-phantom-A-0002_seg.nii.gz'
  assert broken(lambda f: copy(f / mask, f / mask.replace('_seg', '_mask'))) == (
    '02_mask.nii.gz: beside volume-phantom-A-0002_seg.nii.gz; take one of the two out'
  )
  assert broken(lambda f: shutil.rmtree(f / 'volume-phantom-A-0002')) == (
    '02_seg.nii.gz: its folder of DICOM, volume-phantom-A-0002, is missing; add it, or take the mask out'
  )
  twice = lambda f: shutil.copytree(f / 'volume-phantom-A-0001', f / 'volume-phantom-A-0004')
  assert broken(twice) == '04.zip: beside volume-phantom-A-0004; take one of the two out'


def test_as_it_was_unpacked_and_not_as_grey(laid, tmp_path):
  (tmp_path / 'a' / 'b').mkdir(parents=True)
  (tmp_path / 'a' / 'b' / 'release').symlink_to(laid)
  name, cases = find(tmp_path / 'a')
  assert name == 'dicom_pairs' and len(cases) == 10
  with pytest.raises(UserError, match=r'holds Hounsfield units, not grey values'):
    find(laid, CohortOptions(intensity='grey'))


def test_pairs_of_nifti_stay_pairs_whatever_lies_beside_them(laid, raw_dir, tmp_path):
  """Their originals in one folder or one each, an archive of a scan's name; but not where a mask has DICOM alone."""
  for scan, mask in files(raw_dir)[:2]:
    name = nifti.stem(scan).removesuffix('_ct')
    copy(scan, tmp_path / f'{name}.nii.gz'), copy(mask, tmp_path / f'{name}_mask.nii.gz')
  one = tmp_path / 'volume-phantom-A-0001'
  original = next((laid / one.name).rglob('IM*'))
  for beside in (tmp_path / 'originals' / 'IM1', one / 'IM1', tmp_path / 'volume-phantom-A-0002.zip'):
    copy(original, beside)
    name, cases = find(tmp_path)
    assert name == 'pairs' and [case.ct.name for case in cases] == [f'{one.name}.nii.gz', f'{one.name[:-1]}2.nii.gz']
  beside.unlink()
  one.with_name(f'{one.name}.nii.gz').unlink()
  with pytest.raises(UserError, match=r'0002_mask.nii.gz: its folder of DICOM, .*, is missing'):
    find(tmp_path)


def test_a_patients_folder_may_hold_archives_alone(laid, tmp_path):
  """With its mask beside it; pictures in folders are no DICOM because there is an archive of them."""
  name = 'volume-phantom-A-0001'
  (tmp_path / name).mkdir()
  shutil.make_archive(tmp_path / name / 'export', 'zip', laid / name)
  copy(laid / f'{name}_mask.nii.gz', tmp_path / f'{name}_mask.nii.gz')
  found, (case,) = find(tmp_path)
  assert (found, case.patient, case.ct) == ('dicom_pairs', name, tmp_path / name)
  assert read.volume(case)[1].any()
  (tmp_path / f'{name}_mask.nii.gz').unlink()
  (tmp_path / 'other').mkdir()
  assert not cohort.recognises(tmp_path)
