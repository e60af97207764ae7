"""Lungs found from HU compared with the lungs drawn into phantoms."""

import pathlib

import numpy as np
import pytest

from data.cohorts import phantom
from fusa_jax.inference import postprocessing
from fusa_jax.scans import lungs, volumes


def scan_of(hu, spacing):
  return volumes.from_volume(
    hu.transpose(2, 1, 0), np.diag([-spacing[2], -spacing[1], spacing[0], 1.0]), pathlib.Path('a scan')
  )


@pytest.mark.parametrize('number', [2, 5])
def test_lungs_equal_the_drawn_ones(number):
  """With and without lesions: lungs and lesions are inside; skin, arms, table and most of the belly are outside."""
  size = {'size': 64, 'slices': 32}
  hu, mask, drawn = phantom.patient(8, number, **size)
  scan = scan_of(hu, phantom.spacing(8, number, **size))
  field = lungs.field(scan)
  assert field.shape == hu.shape and field.dtype == bool
  assert field[drawn > 0].mean() > 0.98
  assert not mask.any() or field[mask > 0].mean() > 0.95
  body = hu > -200
  assert field[body & (drawn == 0)].mean() < 0.3
  assert field.sum() < 2 * drawn.sum()
  # Air outside the body is not lung.
  outside = np.ones_like(body)
  outside[:, 3:-3, 3:-3] = False
  assert not field[outside].any()


def test_a_lung_at_the_edge_of_the_field_of_view_is_found():
  """The scan is cut through a lung; the lungs in the rest are still found."""
  hu, _, drawn = phantom.patient(8, 5, size=64, slices=32)
  spacing = phantom.spacing(8, 5, size=64, slices=32)
  first = np.flatnonzero(drawn.any(axis=(0, 1)))[0] + 3
  assert drawn[:, :, first].any()
  cut = lungs.field(scan_of(hu[:, :, first:], spacing))
  assert cut[drawn[:, :, first:] > 0].mean() > 0.97


def test_lungs_do_not_depend_on_voxel_size():
  hu, _, _ = phantom.patient(8, 3, size=64, slices=32)
  spacing = phantom.spacing(8, 3, size=64, slices=32)
  fine = scan_of(hu.repeat(2, axis=1).repeat(2, axis=2), (spacing[0], spacing[1] / 2, spacing[2] / 2))
  coarse, fine_field = lungs.field(scan_of(hu, spacing)), lungs.field(fine)[:, ::2, ::2]
  assert (coarse != fine_field).mean() < 0.01


def test_without_lungs_no_mark_is_removed(caplog):
  hu = np.random.default_rng(0).normal(-1000, 9, (8, 40, 40)).astype(np.int16)
  hu[:, 5:35, 5:35] += 1040
  hu[:, 18:22, 18:22] -= 900  # 1 mL of gas in the middle
  scan = scan_of(hu, (2.0, 2.0, 2.0))
  assert lungs.field(scan).all()
  assert 'no lungs found' in caplog.text
  mask = np.zeros(hu.shape, np.uint8)
  mask[3, 30, 30] = 1
  np.testing.assert_array_equal(postprocessing.refine(mask, scan, in_lungs=True), mask)
