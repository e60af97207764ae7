"""A format needs only its module and a line in the list; its files are then found, read, predicted and viewed."""

import json
import os
import shutil
import zipfile

import dicom_series
import numpy as np
import pytest
from nifti_files import chest, save
from PIL import Image

from fusa_jax.inference import predict, viewer
from fusa_jax.scans import dicom, formats, pictures, sources, volume_files, volumes
from fusa_jax.system.errors import UserError

SCANS, PICTURES = volume_files.VolumeFile.endings, pictures.PictureFile.endings


class ArrayFile(formats.FileSource):
  """An example format: an array [x, y, z] of HU as .npy, with voxels of 2 x 2 x 5 mm."""

  endings = '.npy'

  @classmethod
  def claims(cls, path):
    return path.suffix == '.npy'

  def read_image(self, values):
    return volumes.from_volume(np.load(self.path), np.diag([-2, -2, 5, 1]), self, values)


@pytest.fixture
def with_arrays(monkeypatch):
  monkeypatch.setattr(sources, 'FORMATS', (ArrayFile, *sources.FORMATS))


def found(path, values, tmp_path):
  unpacked = tmp_path / 'unpacked'
  shutil.rmtree(unpacked, ignore_errors=True)
  unpacked.mkdir()
  return sources.find_sources(path, values, unpacked)


@pytest.fixture
def mixture(tmp_path):
  """A folder of every format, with masks, hidden files and an archive."""
  folder = tmp_path / 'in'
  save_nifti = lambda name: save(folder / name, chest())
  dicom_series.save(folder / 'series', dicom_series.slices(chest((9, 8, 4)), dicom_series.affine_of('LPS')))
  for name in ('b.nii.gz', 'a.nii', 'b_seg.nii.gz', '.hidden.nii'):
    save_nifti(name)
  for name in ('p.png', 'q.JPEG', 'p_mask.png'):
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(folder / name)
  np.save(folder / 'n.npy', chest())
  np.save(folder / 'n_seg.npy', chest())
  (folder / 'notes.txt').write_text('no scan')
  with zipfile.ZipFile(folder / 'packed.zip', 'w') as packed:
    packed.write(folder / 'a.nii', 'c.nii')
  return folder


def test_each_file_goes_to_one_format(mixture, tmp_path):
  of_all = found(mixture, 'grey', tmp_path)
  types = [volume_files.VolumeFile] * 3 + [pictures.PictureFile] * 2 + [dicom.Series]
  assert [type(source) for source in of_all] == types
  series = of_all[-1]
  assert [source.stem for source in of_all] == ['a', 'b', 'c', 'p', 'q', series.name]
  assert [source.name for source in of_all] == ['a.nii', 'b.nii.gz', 'c.nii', 'p.png', 'q.JPEG', series.name]
  assert [source.title for source in of_all[:-1]] == ['a.nii', 'b.nii.gz', 'packed.zip/c.nii', 'p.png', 'q.JPEG']
  assert str(of_all[0]) == str(mixture / 'a.nii') and series.title == str(series) == f'{series.name} (Chest 5.0)'
  for values in ('hu', None):
    assert [source.stem for source in found(mixture, values, tmp_path)] == ['a', 'b', 'c', series.name]
  np.testing.assert_array_equal(of_all[0].read_image('hu').values, volume_files.read_scan(mixture / 'a.nii').values)
  np.testing.assert_array_equal(of_all[3].read_image('grey'), pictures.read_picture(mixture / 'p.png'))
  np.testing.assert_array_equal(series.read_image('hu').values, dicom.read_series(series).values)


@pytest.mark.parametrize(
  ('names', 'stems'),
  [
    (['s1/ct.nii.gz', 's2/ct.nii.gz', 'other.nii'], ['other', 's1', 's2']),
    (['site1/P1/ct.nii', 'site1/P2/ct.nii', 'site2/P1/ct.nii'], ['site1_P1', 'site1_P2', 'site2_P1']),
    (['s1/a.nii', 's2/A.NII', 's3/b.nii'], ['s1_a', 's2_A', 'b']),
    (['ct.nii', 's1/ct.nii'], ['ct', 's1']),
    (['s1/ct.nii', 's2/ct.nii', 's1.nii'], ['s1', 's1_ct', 's2']),
    (['M\u00fcller.nii', 'x/Mu\u0308ller.nii'], ['M\u00fcller', 'x_Mu\u0308ller']),
  ],
)
def test_files_of_one_name_are_named_by_the_part_of_their_path_that_differs(tmp_path, names, stems):
  for name in names:
    save(tmp_path / 'in' / name, chest())
  assert sorted(source.stem for source in found(tmp_path / 'in', 'hu', tmp_path)) == sorted(stems)


def test_long_and_odd_names_get_stems_that_fit(tmp_path):
  """Results of names near 255 bytes, also of characters of several bytes, and of names that are not UTF-8."""
  names = ['a' * 244 + '.nii.gz', 'a' * 243 + 'b.nii.gz', '\u00fc' * 120 + '.nii', os.fsdecode(b'M\xfcller.nii')]
  for name in names:
    save(tmp_path / 'in' / 'x.nii', chest()).rename(tmp_path / 'in' / name)
  of_all = found(tmp_path / 'in', 'hu', tmp_path)
  stems = {source.stem for source in of_all}
  assert len(stems) == 4 and os.fsdecode(b'M\xfcller') in stems
  for source in of_all:
    (tmp_path / f'{source.stem}_gradcam_explanation.nii.gz').write_bytes(b'')
    source.place.encode()  # it can be written to a table
    assert source.read_image('hu').values.shape == chest().shape[::-1]


def test_links_are_followed_and_left_out_files_are_named(tmp_path, caplog):
  caplog.set_level('INFO')
  folder = tmp_path / 'in'
  save(tmp_path / 'elsewhere' / 'deep' / 'b.nii.gz', chest())
  save(tmp_path / 'elsewhere' / 'c.nii', chest())
  folder.mkdir()
  (folder / 'linked').symlink_to(tmp_path / 'elsewhere')
  (folder / 'loop').symlink_to(folder)
  (folder / 'd.nii').symlink_to(tmp_path / 'elsewhere' / 'c.nii')
  (folder / 'broken.nii').symlink_to(tmp_path / 'nowhere')
  (folder / 'broken').symlink_to(tmp_path / 'nowhere')
  for name in ('__MACOSX/._c.nii', '._c.nii', '.DS_Store', 'Thumbs.db'):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b'\0\5\26\7')
  (folder / 'notes.txt').touch()
  (folder / 'c_MASK.nii').touch()
  all_found = found(folder, 'hu', tmp_path)
  assert [source.place for source in all_found] == ['broken.nii', 'd.nii', 'linked/c.nii', 'linked/deep/b.nii.gz']
  with pytest.raises(UserError, match=r'broken\.nii: a link to a file that is missing; '):
    all_found[0].read_image('hu')
  assert 'left out: 3 files (broken, notes.txt, c_MASK.nii)' in caplog.text


def test_a_named_file_is_read_or_refused_for_any_name(mixture, tmp_path):
  (mask,) = found(mixture / 'b_seg.nii.gz', 'hu', tmp_path)
  assert mask == volume_files.VolumeFile(mixture / 'b_seg.nii.gz')
  (notes,) = found(mixture / 'notes.txt', 'hu', tmp_path)
  with pytest.raises(UserError, match=r'notes\.txt: not a NIfTI file'):
    notes.read_image('hu')


@pytest.mark.parametrize(
  ('name', 'values', 'message'),
  [
    (
      'nowhere',
      'hu',
      f'input: {{}} does not exist; give a scan ({SCANS}; for 8-bit images also {PICTURES}), or a folder or .zip of '
      'scans or DICOM series',
    ),
    (
      '',
      'hu',
      f'input: no scan ({SCANS}, DICOM) in {{}}; give a scan, or a folder of scans',
    ),
    (
      '',
      None,
      f'input: no scan ({SCANS}, DICOM) in {{}}; give a scan, or a folder of scans',
    ),
    (
      '',
      'grey',
      f'input: no scan ({SCANS}) or picture ({PICTURES}) in {{}}; give a scan, or a folder of scans',
    ),
  ],
)
def test_missing_scans_are_reported_with_the_endings_of_the_formats(tmp_path, name, values, message):
  folder = tmp_path / 'in'
  folder.mkdir()
  with pytest.raises(UserError) as caught:
    found(folder / name, values, tmp_path)
  assert str(caught.value) == message.format(folder / name)


def test_a_format_in_the_list_is_found_named_and_read(with_arrays, mixture, tmp_path):
  of_all = found(mixture, 'hu', tmp_path)
  assert [source.stem for source in of_all[:-1]] == ['n', 'a', 'b', 'c'] and sources.format_of(mixture) is None
  scan = of_all[0].read_image('hu')
  assert scan.values.shape == chest().shape[::-1] and scan.path.name == 'n.npy'
  (tmp_path / 'empty').mkdir()
  with pytest.raises(UserError, match=r'no scan \(\.npy, \.nii, \.nii\.gz, .*, DICOM\) in'):
    found(tmp_path / 'empty', 'hu', tmp_path)
  (mixture / 'a.npy').touch()
  for source in [one for one in found(mixture, 'hu', tmp_path) if one.place in ('a.nii', 'a.npy')]:
    with pytest.raises(UserError, match=r'a\.n..: its results would have the same name as those of a\.n..; rename one'):
      source.read_image('hu')


def test_a_format_in_the_list_is_predicted_and_viewed(with_arrays, predictors, raw_dir, tmp_path):
  """Predicts the same as for NIfTI. With --dicom it is refused first."""
  scan = volume_files.read_scan(raw_dir / 'volume-phantom-A-0001_ct.nii.gz')
  path, out = tmp_path / 'mine.npy', tmp_path / 'out'
  np.save(path, scan.values.transpose(2, 1, 0))
  with pytest.raises(UserError, match=r'^dicom: mine\.npy is not a DICOM series'):
    predict.predict(predictors['seg'], path, out, as_dicom=True)
  predict.predict(predictors['seg'], path, out)
  assert sorted(made.name for made in out.iterdir()) == [
    '.predictions.lock',
    'mine.json',
    'mine_mask.nii.gz',
    'predictions.csv',
  ]
  assert json.loads((out / 'mine.json').read_text())['scan'] == 'mine.npy'
  expected = predictors['seg'](scan.values, (5, 2, 2))
  np.testing.assert_array_equal(volume_files.read_labels(out / 'mine_mask.nii.gz').mask, expected.mask)
  np.testing.assert_array_equal(predictors['seg'](path).mask, expected.mask)
  assert viewer.view(path, out) == [out / 'mine.html']
