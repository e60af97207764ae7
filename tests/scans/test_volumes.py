"""Which values are Hounsfield units: padding, scanner values, filled and lost parts."""

import logging
import pathlib
import re

import nibabel as nib
import numpy as np
import pytest
from nifti_files import chest
from scipy import ndimage

from fusa_jax.scans import volume_files, volumes
from fusa_jax.system.errors import UserError

SHAPE = (24, 24, 6)
AFFINE = np.diag([-1, -1, 5, 1.0])
PADDING = [-600, -1000, -1024, -1500, -2000, -3024, -32768]
REAL = pathlib.Path(__file__).parents[3] / 'shared' / 'ct' / 'Train'


def outside(shape=SHAPE):
  """The voxels [x, y, z] outside the round field of view."""
  x, y = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape[:2]), indexing='ij')
  return np.broadcast_to((x**2 + y**2 > 1)[..., None], shape)


def read(values):
  """The values of the scan, on the axes of `values`."""
  return volumes.from_volume(values, AFFINE, 'a').values.transpose(2, 1, 0)


@pytest.mark.parametrize('dtype', [np.int16, np.float32])
@pytest.mark.parametrize('padding', PADDING)
def test_padding_is_no_air(padding, dtype):
  hu = chest(SHAPE).astype(dtype)
  hu[outside()] = padding
  np.testing.assert_array_equal(read(hu), np.maximum(hu, -1024))
  raw = chest(SHAPE).astype(dtype) + 1024
  raw[outside()] = padding
  low = raw[~outside()].min()
  with pytest.raises(
    UserError, match=rf'^a: values {low:g} to {raw.max():g} \(apart from padding, {padding}\) are raw scanner values'
  ):
    read(raw)


def test_two_paddings_are_no_air():
  raw = chest(SHAPE) + 1024
  raw[outside()], raw[:3] = -2000, -3024
  with pytest.raises(UserError, match=r'\(apart from padding, -3024\) are raw scanner values, not HU'):
    read(raw)
  read(np.where(raw < 0, raw, raw - 1024))


@pytest.mark.parametrize('padding', [-1024, -2000, -3024])
def test_interpolated_padding_is_no_air(padding):
  """Interpolation leaves all values between the padding and the tissue, also those of air."""
  body = np.where(ndimage.binary_erosion(~outside(), np.ones((9, 9, 1))), 40, -1000)
  hu = body + np.random.default_rng(0).normal(0, 20, SHAPE)
  for values, is_hu in ((hu, True), (hu + 1024, False)):
    turned = ndimage.rotate(np.where(outside(), padding, values), 10, order=1, reshape=False, mode='nearest')
    assert ((turned >= -1024) & (turned < -500)).mean() > 0.005
    if is_hu:
      np.testing.assert_array_equal(read(turned), np.maximum(np.rint(turned), -1024))
    else:
      with pytest.raises(UserError, match=r'raw scanner values, not HU: \d+% of all voxels are above 800'):
        read(turned)


@pytest.mark.parametrize(
  ('place', 'value', 'warning'),
  [
    (np.s_[..., [1, 4]], 0, r'2 of 6 slices have one constant value \(0\)'),
    (np.s_[..., [1, 4]], [-1024, 57], r'2 of 6 slices have one constant value \(-1024, 57\)'),
    (np.s_[..., 5], -3024, r'1 of 6 slices have one constant value \(-1024\)'),
    (outside(), 0, r'{share:.1f}% of all voxels have exactly 0 HU, as water'),
    (outside(), 31743, r'{share:.1f}% of all voxels have the highest value, 31743'),
    (outside(), 32767, r'{share:.1f}% of all voxels have the highest value, 32767'),
  ],
)
def test_lost_and_filled_parts_are_said(caplog, place, value, warning):
  hu = chest(SHAPE)
  read(hu)
  assert not caplog.records
  hu[place] = value
  np.testing.assert_array_equal(read(hu), np.maximum(hu, -1024))
  share = 100 * np.mean(hu == np.ravel(value)[0])
  assert re.search(f'^a: {warning.format(share=share)}', caplog.records[0].getMessage())
  assert caplog.records[0].levelno == logging.WARNING


@pytest.mark.skipif(not REAL.exists(), reason='no real CT')
@pytest.mark.parametrize('number', [1, 2])
def test_a_real_scan_is_read_without_a_warning(caplog, number):
  path = REAL / f'volume-lung{number}_ct.nii.gz'
  scan = volume_files.read_scan(path)
  assert not caplog.records
  stored = np.asarray(nib.load(path).dataobj)
  np.testing.assert_array_equal(scan.values, stored.transpose(2, 1, 0))
  with pytest.raises(UserError, match=r'\(apart from padding, -2000\) are raw scanner values'):
    volumes.from_volume(np.where(outside(stored.shape), -2000, stored + 1024), AFFINE, 'a')
