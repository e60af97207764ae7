"""A DICOM cohort gives the same dataset as NIfTI; problems of series and masks are reported by name."""

import logging
import pathlib
import re
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
from fusa_jax.scans import dicom, volume_files
from fusa_jax.system.errors import UserError
from fusa_jax.training import datasets


@pytest.fixture(scope='module')
def laid(raw_dir, tmp_path_factory):
  folder = tmp_path_factory.mktemp('dicom_pairs')
  dicom_pairs(raw_dir, folder)
  return folder


def test_the_dataset_equals_that_of_nifti(laid, data_dir, processes, tmp_path, monkeypatch):
  """Covers compressed and plain series, folders, an archive, and both kinds of masks. No temporary file is left."""
  (tmp_path / 'tmp').mkdir()
  monkeypatch.setenv('TMPDIR', str(tmp_path / 'tmp'))  # for the reading processes
  monkeypatch.setattr(tempfile, 'tempdir', None)  # for this process
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
  """Evaluation reads the scan and the mask of each patient on the grid of the series, without log lines."""
  caplog.set_level(logging.INFO)
  scans = prepare.scans(laid)
  assert len(scans) == 10
  for path, mask in files(raw_dir)[3:5]:  # an archive, and a folder with a SEG
    scan, read = scans[volume_files.stem(path).removesuffix('_ct')]()
    expected = volume_files.read_scan(path)
    np.testing.assert_array_equal(scan.values, expected.values)
    np.testing.assert_allclose(scan.affine, expected.affine, atol=1e-3)
    np.testing.assert_array_equal(read, volume_files.read_mask(mask, expected))
  assert not caplog.messages


def test_one_more_file_changes_the_fingerprint(laid, tmp_path):
  folder = tmp_path / 'raw'
  shutil.copytree(laid, folder)
  before = survey.fingerprint(find(folder)[1])
  assert survey.fingerprint(find(folder)[1]) == before
  path = next((folder / 'volume-phantom-A-0001').rglob('IM*'))
  shutil.copy(path, path.with_name('more'))
  after = survey.fingerprint(find(folder)[1])
  assert after != before and len(after) == len(before)


def test_problems_are_named(laid, raw_dir, tmp_path):
  """Each problem is one line that begins with the patient's folder; nothing is written."""
  folder = tmp_path / 'raw'
  shutil.copytree(laid, folder)
  name = lambda number: f'volume-phantom-A-{number:04d}'
  image = nib.load(files(raw_dir)[0][0])
  inner = np.random.default_rng(0).permutation(image.shape[2])[5]  # the file name that dicom_series.save gives
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
  assert lines[0] == f'01: {series(1)}: 1 slices are missing between the 15 present; copy the series again'
  assert lines[1].startswith(
    f'02: there must be exactly one CT series that the mask was drawn on, but there is {series(2)}, series77_'
  )
  assert lines[1].endswith(' (Chest 5.0); add it, or remove the others')
  assert lines[2].startswith(
    '03_mask.nii.gz: the mask has (16, 32, 31) voxels (slices, rows, columns), but its scan ser'
  )
  assert lines[3] == '04.zip: cannot be unpacked (BadZipFile); pack or copy it again'
  assert lines[4] == (
    '05: there must be exactly one CT series that SEG refers to, but there is none; add it, or remove the others'
  )
  assert lines[5] == '06: the mask is missing; add NAME_seg.nii.gz beside it or a DICOM SEG in it, or remove it'
  assert lines[6] == (
    f'07: {series(7)}: 1 file beside its slices is empty or damaged (IM000002), so slices may be missing; copy the '
    'series again'
  )
  assert lines[7] == (
    '08: there must be exactly one CT series that the mask was drawn on, but there is none (skipped: '
    f'{image.shape[2]} MR objects); add it, or remove the others'
  )
  assert lines[8] == '10: 2 DICOM SEGs (SEG, corrected); remove all but one'


def emptied(paths):
  for path in paths[-3:]:
    path.write_bytes(b'')


def all_emptied(paths):
  for path in paths:
    path.write_bytes(b'')


def second_folder_emptied(paths):
  folder = paths[0].parent / 'second'
  folder.mkdir()
  for path in paths[10:]:
    path.unlink()
    (folder / path.name).write_bytes(b'')


def cut(paths):
  paths[-1].write_bytes(paths[-1].read_bytes()[:-10])


def preamble_cut(paths):
  paths[0].write_bytes(bytes(64))


@pytest.mark.parametrize(
  ('damage', 'reason'),
  [
    (
      emptied,
      r'series\w+ \(Chest 5.0\): 3 files beside its slices are empty or damaged \(IM000013, IM000014, IM000015\)',
    ),
    (
      preamble_cut,
      r'series\w+ \(Chest 5.0\): 1 file beside its slices is empty or damaged \(IM000000\), so slices may',
    ),
    (cut, r'series\w+ \(Chest 5.0\): IM000015: cannot be decoded \('),
    (
      all_emptied,
      r'16 files \(IM000000, .* and 10 more\): empty or damaged, so slices may be missing; copy the series',
    ),
    (second_folder_emptied, r'6 files \(IM000010, IM000011, .*\): empty or damaged, so slices may be missing'),
  ],
)
def test_a_series_with_a_seg_is_never_shortened(laid, tmp_path, damage, reason):
  folder, name = tmp_path / 'raw', 'volume-phantom-A-0005'
  shutil.copytree(laid / name, folder / name)
  damage(sorted((folder / name).rglob('IM*')))
  with pytest.raises(UserError, match=rf'^{folder / name}: {reason}') as caught:
    read.volume(cohort.find(folder)[0])
  assert 'arker' not in str(caught.value)


def test_doubled_and_missing_names_are_reported(laid, tmp_path):
  def broken(change):
    folder = tmp_path / str(len(list(tmp_path.iterdir())))
    shutil.copytree(laid, folder)
    change(folder)
    with pytest.raises(UserError) as caught:
      find(folder)
    return str(caught.value).replace(f'{folder}/volume-phantom-A-00', '')

  mask = 'volume-phantom-A-0002_seg.nii.gz'
  assert broken(lambda f: copy(f / mask, f / mask.replace('_seg', '_mask'))) == (
    '02_seg.nii.gz: same patient as volume-phantom-A-0002_mask.nii.gz; remove one of the two'
  )
  assert broken(lambda f: shutil.rmtree(f / 'volume-phantom-A-0002')) == (
    '02_seg.nii.gz: the DICOM folder volume-phantom-A-0002 is missing; add it, or remove the mask'
  )
  twice = lambda f: shutil.copytree(f / 'volume-phantom-A-0001', f / 'volume-phantom-A-0004')
  assert broken(twice) == '04.zip: same patient as volume-phantom-A-0004; remove one of the two'


def test_nested_folders_are_read_and_grey_is_refused(laid, tmp_path):
  (tmp_path / 'a' / 'b').mkdir(parents=True)
  (tmp_path / 'a' / 'b' / 'release').symlink_to(laid)
  name, cases = find(tmp_path / 'a')
  assert name == 'dicom_pairs' and len(cases) == 10
  with pytest.raises(UserError, match=r'contains Hounsfield units, not 8-bit images'):
    find(laid, CohortOptions(intensity='grey'))


def test_dicom_originals_beside_nifti_pairs_are_ignored(laid, raw_dir, tmp_path):
  """DICOM originals beside NIfTI pairs do not change the layout, unless a mask has only a DICOM scan."""
  for scan, mask in files(raw_dir)[:2]:
    name = volume_files.stem(scan).removesuffix('_ct')
    copy(scan, tmp_path / f'{name}.nii.gz'), copy(mask, tmp_path / f'{name}_mask.nii.gz')
  one = tmp_path / 'volume-phantom-A-0001'
  original = next((laid / one.name).rglob('IM*'))
  for beside in (tmp_path / 'originals' / 'IM1', one / 'IM1', tmp_path / 'volume-phantom-A-0002.zip'):
    copy(original, beside)
    name, cases = find(tmp_path)
    assert name == 'pairs' and [case.ct.name for case in cases] == [f'{one.name}.nii.gz', f'{one.name[:-1]}2.nii.gz']
  beside.unlink()
  one.with_name(f'{one.name}.nii.gz').unlink()
  with pytest.raises(UserError, match=r'0002_mask.nii.gz: the DICOM folder .* is missing'):
    find(tmp_path)


def test_a_patients_folder_may_hold_only_archives(laid, tmp_path):
  """The mask lies beside the folder. Without a mask, an archive in a folder does not make a DICOM cohort."""
  name = 'volume-phantom-A-0001'
  (tmp_path / name).mkdir()
  shutil.make_archive(tmp_path / name / 'export', 'zip', laid / name)
  copy(laid / f'{name}_mask.nii.gz', tmp_path / f'{name}_mask.nii.gz')
  layout, (case,) = find(tmp_path)
  assert (layout, case.patient, case.ct) == ('dicom_pairs', name, tmp_path / name)
  assert read.volume(case)[1].any()
  (tmp_path / f'{name}_mask.nii.gz').unlink()
  (tmp_path / 'other').mkdir()
  assert not cohort.recognises(tmp_path)


def folders_of(folder, ids):
  """Makes a folder per PatientID, each with a series of two slices, and their masks."""
  for number, patient_id in enumerate(ids):
    made = dicom_series.slices(np.zeros((4, 4, 2), int), np.eye(4), number, PatientID=patient_id)
    dicom_series.save(folder / f'f{number}', made)
    nib.save(nib.Nifti1Image(np.zeros((4, 4, 2), np.uint8), np.eye(4)), folder / f'f{number}_mask.nii.gz')
  return folder


def owners(folder, quiet=False):
  return {case.patient: case.owner for case in find(folder, quiet=quiet)[1]}


def test_a_patient_id_is_an_owner_and_never_shown(tmp_path, caplog):
  """Folders and archives of one PatientID have one owner. The hash is the same on all machines."""
  caplog.set_level(logging.INFO)
  folder = folders_of(tmp_path, ['MARKER-1', 'marker-01', 'MARKER-2', ''])
  shutil.make_archive(folder / 'f4', 'zip', folder / 'f2')
  shutil.copy(folder / 'f2_mask.nii.gz', folder / 'f4_mask.nii.gz')
  found = owners(folder)
  assert found == {
    'f0': 'id-11b06664e6d936ab',
    'f1': 'id-11b06664e6d936ab',
    'f2': 'id-ad6ed90b43340507',
    'f3': '',
    'f4': 'id-ad6ed90b43340507',
  }
  empty, several = caplog.messages
  assert ': PatientID is empty, a placeholder, or the same for most in 1 of 5 folders, so each of these counts' in empty
  assert ': patients with several folders, by PatientID: f0 + f1, f2 + f4; patients.csv (scan,patient)' in several
  assert 'marker' not in f'{found}{caplog.text}'.lower()
  (folder / 'patients.csv').write_text('scan,patient\nf0,a\nf1,b\nf2,b\nf3,c\nf4,d\n')
  assert owners(folder) == {'f0': 'a', 'f1': 'b', 'f2': 'b', 'f3': 'c', 'f4': 'd'}


def test_a_first_file_without_patient_id_does_not_hide_that_of_the_slices(tmp_path):
  folder = folders_of(tmp_path, ['MARKER-1', 'MARKER-1', 'MARKER-2'])
  before = owners(folder)
  report = pydicom.dcmread(next((folder / 'f0').iterdir()))
  report.PatientID, report.Modality, report.SOPInstanceUID = '', 'SR', '1.2.3'
  report.save_as(folder / 'f0' / 'A dose report')
  assert owners(folder) == before and before['f0'] == before['f1'] != before['f2']


@pytest.mark.parametrize(
  'ids',
  [
    ['S1'] * 3,
    [''] * 3,
    ['ANONYMOUS', 'anonymous', 'A1'],
    ['xxxxx', 'xxxxx', 'A1'],
    ['0000', '0', 'B'],
    ['S'] * 11 + ['B'],
  ],
)
def test_ids_that_say_nothing_merge_nobody(tmp_path, caplog, ids):
  found = owners(folders_of(tmp_path, ids))
  assert sum(owner == '' for owner in found.values()) == sum(one == ids[0] or one in ('anonymous', '0') for one in ids)
  (line,) = caplog.messages
  assert 'each of these counts as one patient; if some show the same patient, list all in patients.csv' in line


def test_datasets_hold_no_patient_id(laid, tmp_path):
  """Two folders of one PatientID are in one fold, in a dataset that contains the ID nowhere."""
  for number in (2, 6, 8):  # folders with a mask beside them or a SEG
    name = f'volume-phantom-A-{number:04d}'
    shutil.copytree(laid / name, tmp_path / 'raw' / name)
    for mask in laid.glob(f'{name}_*'):
      copy(mask, tmp_path / 'raw' / mask.name)
    for path in (tmp_path / 'raw' / name).rglob('*'):
      if path.is_file():
        one = pydicom.dcmread(path)
        one.PatientID = 'MARKER-1' if number < 8 else 'MARKER-2'
        one.save_as(path)
  prepared = prepare.prepare(str(tmp_path / 'raw'), str(tmp_path / 'out'), SIZE)
  folds = [[(one['patient'][-1], one['owner']) for one in fold] for fold in datasets.folds(prepared)]
  assert sorted([number for number, _ in fold] for fold in folds) == [['2', '6'], ['8']]
  assert all(owner.startswith('id-') for fold in folds for _, owner in fold)
  written = b''.join(path.read_bytes() for path in (tmp_path / 'out').rglob('*') if path.is_file()).lower()
  assert b'volume-phantom' in written and b'marker' not in written


def test_a_folder_with_two_patients_is_refused(laid, tmp_path):
  name = 'volume-phantom-A-0002'
  shutil.copytree(laid / name, tmp_path / name), copy(laid / f'{name}_seg.nii.gz', tmp_path / f'{name}_seg.nii.gz')
  path = next((tmp_path / name).rglob('IM*'))
  report = pydicom.dcmread(path)
  report.PatientID, report.Modality, report.SOPInstanceUID = 'MARKER-9', 'SR', '1.2.3'
  report.SeriesInstanceUID = '1.2.4'
  report.save_as(tmp_path / name / 'A dose report')
  with pytest.raises(UserError) as caught:
    read.volume(cohort.find(tmp_path)[0])
  assert re.fullmatch(
    rf'{tmp_path / name}: A dose report and series\d+_\w+ \(Chest 5.0\) have different PatientIDs, so they may show '
    'two patients; put each patient in a folder of its own',
    str(caught.value),
  )
