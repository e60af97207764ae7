"""Hounsfield units from stored values: padding, rescale and bits; values that are not HU are refused."""

import dicom_series
import numpy as np
import pydicom
import pytest
from dicom_series import affine_of, all_changed, find
from nifti_files import chest
from pydicom import uid

from fusa_jax.scans import dicom_pixels, volumes
from fusa_jax.system.errors import UserError

CORNER = np.s_[:2, :3]


def made(stored, dtype, intercept=-1024, **elements):
  """A series of stored values [x, y, z]."""
  series = dicom_series.slices(np.zeros(stored.shape), affine_of('LPS'), intercept=intercept)
  for index, one in enumerate(series):
    one.PixelRepresentation = int(np.dtype(dtype).kind == 'i')
    one.PixelData = stored[:, :, index].T.astype(np.dtype(dtype).newbyteorder('<')).tobytes()
    for key, value in elements.items():
      setattr(one, key, value)
  return series


def read(folder, series, syntax='uncompressed'):
  (found,) = find(dicom_series.save(folder, series, syntax))
  return found.read_image('hu').values.transpose(2, 1, 0)


# dtype of the stored values, padding in it, VR and value of PixelPaddingValue, PixelPaddingRangeLimit
PADDINGS = {
  'signed': ('int16', -2000, 'SS', -2000, None),
  'lowest': ('int16', -32768, 'SS', -32768, None),
  'written without sign': ('int16', -2000, 'US', 63536, None),
  'unsigned': ('uint16', 63536, 'US', 63536, None),
  'unsigned, written with sign': ('uint16', 63536, 'SS', -2000, None),
  'highest': ('uint16', 65535, 'US', 65535, None),
  'zero': ('uint16', 0, 'US', 0, None),
  'a range': ('int16', -1900, 'SS', -2000, -1800),
  'a range that runs down': ('int16', -1900, 'SS', -1800, -2000),
  'as tissue': ('int16', 1024, 'SS', 1024, None),
}


@pytest.mark.parametrize('syntax', ['uncompressed', 'implicit', 'rle', 'jpeg lossless'])
@pytest.mark.parametrize('name', PADDINGS)
def test_padding_becomes_air(tmp_path, name, syntax):
  """Padding is air in the scan, and is told from air before (int16's lowest value)."""
  dtype, stored_padding, vr, value, limit = PADDINGS[name]
  hu = chest()
  stored = hu.astype(int) + 1024
  stored[CORNER] = stored_padding
  series = made(stored, dtype)
  for one in series:
    one.add_new('PixelPaddingValue', vr, value)
    if limit is not None:
      one.add_new('PixelPaddingRangeLimit', vr, limit)
  expected = hu.copy()
  expected[CORNER] = volumes.AIR
  np.testing.assert_array_equal(read(tmp_path, series, syntax), expected)
  image = dicom_pixels.decoded(str(tmp_path / 'IM000000'), hu.shape[1::-1])
  assert (image.T[CORNER] == -32768).all() and image.T[2:].min() > -1001 and image.T[:2, 3:].min() > -1001


def test_tissue_with_the_value_of_padding_is_kept(tmp_path):
  hu = chest((9, 9, 3))
  hu[:2], hu[4:6, 4:6] = 40, 40
  stored = hu.astype(int) + 1024
  expected = hu.copy()
  expected[:2] = volumes.AIR
  np.testing.assert_array_equal(read(tmp_path, made(stored, 'int16', PixelPaddingValue=1064)), expected)


def bits(series, stored, high=None):
  for one in series:
    one.BitsStored, one.HighBit = stored, stored - 1 if high is None else high
  return series


def test_overlays_in_unused_bits_do_not_count(tmp_path):
  """PS3.5 8.1.1: the bits above HighBit may hold an overlay. They are not a part of the value."""
  hu = chest()
  stored = (hu.astype(int) + 1024) | np.random.default_rng(0).integers(0, 2, hu.shape) << 12
  series = bits(made(stored, 'uint16'), 12)
  for one in series:
    one.add_new(0x60000100, 'US', 16)
    one.add_new(0x60000102, 'US', 12)
  np.testing.assert_array_equal(read(tmp_path / 'a', series), hu)
  stored = hu.astype(int) & 0xFFF | np.random.default_rng(0).integers(0, 2, hu.shape) << 12
  series = bits(made(stored, 'int16', intercept=0), 12)
  for one in series:
    one.add_new(0x60020102, 'US', 12)
  np.testing.assert_array_equal(read(tmp_path / 'b', series), hu)


@pytest.mark.parametrize('syntax', ['uncompressed', 'rle', 'jpeg lossless', 'jpeg-ls', 'jpeg 2000'])
@pytest.mark.parametrize(('dtype', 'intercept'), [('uint16', -1024), ('int16', 0)])
def test_twelve_bits(tmp_path, syntax, dtype, intercept):
  hu = chest((24, 20, 3))
  series = bits(made(hu.astype(int) - intercept, dtype, intercept=intercept), 12)
  np.testing.assert_array_equal(read(tmp_path, series, syntax), hu)


@pytest.mark.parametrize(
  'elements',
  [
    {'RescaleSlope': None},
    {'RescaleSlope': None, 'RescaleType': None},
    {'RescaleType': 'US'},
    {'RescaleType': ''},
    {'PhotometricInterpretation': 'MONOCHROME1'},
    {'Units': 'HU'},
  ],
  ids=str,
)
def test_headers_that_are_accepted(tmp_path, elements):
  hu = chest()
  series = made(hu.astype(int) + 1024, 'uint16', **elements)
  np.testing.assert_array_equal(read(tmp_path / 'a', series), hu)


def test_values_without_rescale_are_hu(tmp_path):
  hu = chest()
  series = made(hu, 'int16', RescaleSlope=None, RescaleIntercept=None)
  np.testing.assert_array_equal(read(tmp_path / 'a', series), hu)
  for one in series:
    del one.RescaleSlope, one.RescaleIntercept, one.RescaleType
  np.testing.assert_array_equal(read(tmp_path / 'b', series), hu)


def lost(*keys, of=slice(None)):
  def change(series):
    for one in series[of]:
      for key in keys:
        delattr(one, key)
    return series

  return change


def with_table(series):
  for one in series:
    table = pydicom.Dataset()
    table.LUTDescriptor, table.ModalityLUTType = [4096, 0, 16], 'US'
    one.ModalityLUTSequence = [table]
  return series


def all_signed(series):
  """Values of -1024 and more, which the header calls unsigned."""
  for one in series:
    values = np.frombuffer(one.PixelData, '<u2').astype(int) - 1024
    one.PixelData, one.RescaleIntercept = values.astype('<i2').tobytes(), 0
  return series


RAW = r'raw scanner values, not HU'
# How the series (unsigned values, intercept -1024) is changed, and the reason.
REFUSALS = {
  'no rescale': (lost('RescaleSlope', 'RescaleIntercept', 'RescaleType'), RAW),
  'empty rescale': (all_changed(RescaleSlope=None, RescaleIntercept=None), RAW),
  'some without intercept': (lost('RescaleIntercept', of=slice(3, None)), r'2 of 5 slices lack RescaleIntercept'),
  'some with empty slope': (
    lambda series: all_changed(RescaleSlope='2')(series[:4]) + all_changed(RescaleSlope=None)(series[4:]),
    r'1 of 5 slices lack RescaleSlope',
  ),
  'slope 0': (all_changed(RescaleSlope='0'), r'RescaleSlope is not valid; export it again'),
  'two slopes': (all_changed(RescaleSlope=['1', '1']), r'RescaleSlope is not valid; export it again'),
  'optical density': (all_changed(RescaleType='OD'), r'the values are not HU \(RescaleType is OD\); give the original'),
  'atomic numbers': (all_changed(RescaleType='Z_EFF'), r'not HU \(RescaleType is Z_EFF\)'),
  'counts': (all_changed(Units='BQML'), r'not HU \(Units is BQML\)'),
  'a table': (with_table, r'numbers of a lookup table \(ModalityLUTSequence\)'),
  'sign': (all_signed, r'values up to 65\d+ are not HU \(PixelRepresentation or the rescale is wrong'),
  'large slope': (all_changed(RescaleSlope='100'), r'values up to \d+ are not HU'),
  'bits': (lambda series: bits(series, 9), r'values need more than the 9 bits of BitsStored; export it again'),
  'high bit': (lambda series: bits(series, 12, 15), r'HighBit is 15, but must be BitsStored - 1; export it again'),
  'no bits': (lost('BitsStored'), r'cannot be decoded \(no BitsStored\); copy it again'),
  'no pixels': (lost('PixelData'), r'cannot be decoded \(no PixelData\); copy it again'),
  'no sign': (lost('PixelRepresentation'), r'cannot be decoded \(no PixelRepresentation\); copy it again'),
}


@pytest.mark.parametrize('name', REFUSALS)
def test_refusals_name_the_reason(tmp_path, name):
  change, reason = REFUSALS[name]
  with pytest.raises(UserError, match=reason) as caught:
    read(tmp_path, change(made(chest().astype(int) + 1024, 'uint16')))
  assert str(caught.value).startswith('series3_') and '\n' not in str(caught.value)


def test_compressed_pixels_without_a_transfer_syntax_are_refused(tmp_path):
  dicom_series.save(tmp_path, made(chest() + 1024, 'uint16'), 'rle')
  for path in tmp_path.iterdir():
    image = pydicom.dcmread(path)
    image.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    image['PixelData'].is_undefined_length = True
    del image.file_meta.TransferSyntaxUID
    image.save_as(path, implicit_vr=False, little_endian=True, enforce_file_format=False)
  (series,) = find(tmp_path)
  with pytest.raises(UserError, match=r'compressed, but its header does not say how \(TransferSyntaxUID\); export it'):
    series.read_image('hu')
