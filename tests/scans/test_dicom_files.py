"""Files without preamble are read; damaged files never shorten a series: the series is refused with their names."""

import logging
import os

import dicom_series
import numpy as np
import pydicom
import pytest
from dicom_series import affine_of, find
from nifti_files import chest, save
from PIL import Image

from fusa_jax.scans import dicom, dicom_files, formats
from fusa_jax.system.errors import UserError


def series_in(folder, number=3, name='IM{:06d}', **elements):
  return dicom_series.save(folder, dicom_series.slices(chest(), affine_of('LPS'), number, **elements), name=name)


def without_preamble(path, encoding):
  """Writes a file again as old programs do."""
  image = pydicom.dcmread(path)
  if encoding == 'big endian':
    image.PixelData = np.frombuffer(image.PixelData, '<u2').astype('>u2').tobytes()
    image = pydicom.Dataset(image)
  meta = image.file_meta if encoding == 'with file meta' else None
  bare = pydicom.Dataset(image)
  if meta:
    bare.file_meta, bare.preamble = meta, None
  options = {'implicit_vr': encoding == 'implicit', 'little_endian': encoding != 'big endian'}
  pydicom.dcmwrite(path, bare, enforce_file_format=False, **options)
  assert path.read_bytes()[128:132] != b'DICM'


def without_syntax(path):
  image = pydicom.dcmread(path)
  del image.file_meta.TransferSyntaxUID
  image.save_as(path, enforce_file_format=False, implicit_vr=False, little_endian=True)
  assert 'TransferSyntaxUID' not in pydicom.dcmread(path).file_meta


@pytest.mark.parametrize('name', ['IM{:06d}', '{}.dcm'])
@pytest.mark.parametrize('encoding', ['explicit', 'implicit', 'big endian', 'with file meta', 'without syntax'])
def test_files_without_preamble_or_syntax_are_read(tmp_path, encoding, name):
  paths = sorted(series_in(tmp_path / 'in', name=name).iterdir())
  for path in paths[::2] if encoding == 'explicit' else paths:
    without_syntax(path) if encoding == 'without syntax' else without_preamble(path, encoding)
  (series,) = find(tmp_path / 'in')
  assert sorted(series.files()) == paths and all(map(dicom_files.is_dicom, paths))
  np.testing.assert_array_equal(dicom.read_series(series).values, chest().transpose(2, 1, 0))


def test_other_files_are_not_taken_for_dicom(tmp_path):
  Image.new('L', (40, 40)).save(tmp_path / 'a.png')
  Image.new('L', (40, 40)).save(tmp_path / 'a.tif')
  save(tmp_path / 'a.nii', chest())
  save(tmp_path / 'a.nii.gz', chest())
  (tmp_path / 'a.json').write_text('{"a": 1}')
  (tmp_path / 'a.txt').write_text('08 00 05 00 CS')
  np.save(tmp_path / 'a.npy', chest())
  np.savez(tmp_path / 'a.zip', chest())
  (tmp_path / 'empty').write_bytes(b'')
  (tmp_path / 'zeros').write_bytes(bytes(1000))
  (tmp_path / 'eights').write_bytes(b'\x08\0' * 500)
  assert not [path.name for path in tmp_path.iterdir() if dicom_files.is_dicom(path)]


def empty(path):
  path.write_bytes(b'')


def zeros(path):
  path.write_bytes(bytes(path.stat().st_size))


def cut_in_preamble(path):
  path.write_bytes(path.read_bytes()[:100])


def cut_behind_preamble(path):
  path.write_bytes(path.read_bytes()[:132])


def cut_in_header(path):
  path.write_bytes(path.read_bytes()[:600])


def cut_in_the_series_uid(path):
  raw = path.read_bytes()
  path.write_bytes(raw[: raw.index(pydicom.dcmread(path).SeriesInstanceUID.encode()) + 40])


def cut_without_preamble(path):
  without_preamble(path, 'implicit')
  raw = path.read_bytes()
  path.write_bytes(raw[: raw.index(b'1.2.840.10008.5.1.4.1.1.2') + 9])


def other_content(path):
  path.write_text('<html>404 Not Found</html>')


def without_uid(path):
  image = pydicom.dcmread(path)
  del image.SeriesInstanceUID
  image.save_as(path)


def broken_link(path):
  path.unlink()
  path.symlink_to(path.parent / 'gone')


def invalid(path):
  image = pydicom.dcmread(path)
  image.NumberOfFrames = ['1', '1']
  image.save_as(path)


DAMAGES = (
  empty,
  zeros,
  cut_in_preamble,
  cut_behind_preamble,
  cut_in_header,
  cut_in_the_series_uid,
  cut_without_preamble,
)
DAMAGES += (other_content, broken_link, without_uid, invalid)
TOP = {'IM{:06d}': ('IM000002', 'IM000004'), 'CT{}.dcm': ('CT2.dcm', 'CT4.dcm'), '1.2.{}': ('1.2.2', '1.2.4')}


@pytest.mark.parametrize('name', TOP)
@pytest.mark.parametrize('damage', DAMAGES)
def test_a_damaged_slice_refuses_its_series_only(tmp_path, damage, name):
  """Each kind of damage: the series is refused with the names of the files, the other series is read."""
  series_in(tmp_path / 'in' / 'a', 3, name)
  series_in(tmp_path / 'in' / 'b', 4, name)
  for file in TOP[name]:
    damage(tmp_path / 'in' / 'a' / file)
  listed = ', '.join(TOP[name])
  first, second = find(tmp_path / 'in')
  reason = (
    rf'^series3_\w+ \(Chest 5.0\): 2 files beside its slices are empty or damaged \({listed}\), so slices may be '
    'missing; copy the series again$'
  )
  with pytest.raises(UserError, match=reason):
    first.read_image('hu')
  np.testing.assert_array_equal(second.read_image('hu').values, chest().transpose(2, 1, 0))


@pytest.mark.parametrize('syntax', ['uncompressed', 'rle', 'jpeg lossless'])
def test_cut_pixels_are_refused_with_all_names(tmp_path, syntax):
  dicom_series.save(tmp_path / 'in', dicom_series.slices(chest(), affine_of('LPS')), syntax)
  for name in ('IM000001', 'IM000003'):
    raw = (tmp_path / 'in' / name).read_bytes()
    (tmp_path / 'in' / name).write_bytes(raw[:-20])
  (series,) = find(tmp_path / 'in')
  with pytest.raises(
    UserError, match=r'^series3_\w+ \(Chest 5.0\): IM000001, IM000003: cannot be decoded \(.*\); copy'
  ):
    series.read_image('hu')


def test_only_the_series_of_a_damaged_file_is_refused_in_a_mixed_folder(tmp_path):
  """A file that still tells its series concerns that one. Any other file concerns all series of its folder."""
  for number in (3, 4):
    series_in(tmp_path / 'in', number, f'{number}_{{}}')
  invalid(tmp_path / 'in' / '3_1')
  first, second = find(tmp_path / 'in')
  assert first.damaged == ['3_1'] and second.damaged == []
  empty(tmp_path / 'in' / '3_1')
  assert [one.damaged for one in find(tmp_path / 'in')] == [['3_1']] * 2


def test_unrelated_files_beside_slices_do_not_matter(tmp_path):
  series_in(tmp_path / 'in')
  for name in ('README.txt', 'dose.json', 'report.pdf', 'IM000001.json', 'IM000001.jpg', 'VERSION', '._IM000001'):
    (tmp_path / 'in' / name).write_text('text')
  for name in ('log.txt', '.done', 'index.html'):
    (tmp_path / 'in' / name).write_bytes(b'')
  (tmp_path / 'in' / 'IM000009').mkdir()
  (series,) = find(tmp_path / 'in')
  np.testing.assert_array_equal(series.read_image('hu').values, chest().transpose(2, 1, 0))


def test_damaged_files_without_a_series_are_refused_by_name(tmp_path):
  """Also if the only sound file of a series is no volume."""
  series_in(tmp_path / 'in' / 'one')
  for path in sorted((tmp_path / 'in' / 'one').iterdir())[1:3]:
    path.write_bytes(b'')
  for path in sorted((tmp_path / 'in' / 'one').iterdir())[3:]:
    path.unlink()
  (tmp_path / 'in' / 'two').mkdir()
  (tmp_path / 'in' / 'two' / 'a.dcm').write_bytes(b'')
  (tmp_path / 'in' / 'two' / 'b.IMA').write_text('no DICOM')
  (tmp_path / 'in' / 'two' / 'IM1').write_bytes(bytes(128) + b'DICM')
  refused = find(tmp_path / 'in')
  assert all(type(one) is formats.Refused for one in refused)
  assert sorted(one.name for one in refused) == ['IM000001', 'IM000002', 'IM1', 'a.dcm', 'b.IMA']
  assert all(one.files()[0].name == one.name for one in refused)
  for one in refused:
    with pytest.raises(
      UserError, match=rf'^{one.name}: (damaged DICOM file \(.*\)|empty or damaged file beside DICOM)'
    ):
      one.read_image('hu')


def test_links_to_one_file_are_one_slice(tmp_path):
  folder = series_in(tmp_path / 'in')
  os.symlink(folder, tmp_path / 'in' / 'again', target_is_directory=True)
  (tmp_path / 'in' / 'copy').symlink_to(folder / 'IM000002')
  paths = [*folder.glob('IM*'), *(tmp_path / 'in' / 'again').glob('IM*'), folder / 'copy']
  (series,) = dicom.find_series(paths)
  assert len(series.files()) == 5
  np.testing.assert_array_equal(series.read_image('hu').values, chest().transpose(2, 1, 0))


@pytest.mark.filterwarnings('ignore')  # of pydicom, while the test writes files
@pytest.mark.parametrize('charset', ['ISO_IR 100', 'latin1', 'ISO_IR 999', ['', 'ISO 2022 IR 87'], 'UTF-8', None])
def test_any_character_set_is_read(tmp_path, charset, caplog):
  """Names in Latin-1 or an unknown character set neither stop nor appear in messages."""
  caplog.set_level(logging.DEBUG)
  series_in(tmp_path / 'in')
  for path in (tmp_path / 'in').iterdir():
    image = pydicom.dcmread(path)
    image.SpecificCharacterSet = charset
    image.add_new('PatientName', 'PN', b'Markername^Jose' + b'\xe9')
    image.add_new('SeriesDescription', 'LO', b'Thorax native \xfcber 5 mm')
    image.save_as(path)
  (series,) = find(tmp_path / 'in')
  np.testing.assert_array_equal(series.read_image('hu').values, chest().transpose(2, 1, 0))
  str(series).encode()  # a file or terminal in UTF-8 can show it
  assert str(series).startswith(f'{series.name} (Thorax native ') and not caplog.messages
