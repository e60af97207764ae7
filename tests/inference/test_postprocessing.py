"""Lesions of known sizes: those below the limit are removed, the others do not change."""

import pathlib

import numpy as np
import pytest

from fusa_jax.inference import postprocessing
from fusa_jax.scans import volumes


@pytest.fixture(scope='module')
def scan():
  """Voxels of 2 x 1 x 0.5 mm, 0.001 mL."""
  hu = np.random.default_rng(0).normal(-900, 9, (6, 20, 20)).astype(np.int16)
  return volumes.from_volume(hu.transpose(2, 1, 0), np.diag([-0.5, -1, 2, 1.0]), pathlib.Path('a scan'))


@pytest.fixture(scope='module')
def mask():
  """Lesions of 12, 3 and 1 voxels; the voxels of the second one touch at corners only."""
  mask = np.zeros((6, 20, 20), np.uint8)
  mask[1:3, 2:5, 2:4] = 1
  for k in range(3):
    mask[k, 10 + k, 10 + k] = 1
  mask[5, 19, 19] = 1
  return mask


@pytest.mark.parametrize(
  ('smallest_ml', 'voxels'), [(0, 16), (0.001, 16), (0.0025, 15), (0.003, 15), (0.004, 12), (1, 0)]
)
def test_lesions_below_a_volume_are_removed(scan, mask, smallest_ml, voxels):
  refined = postprocessing.refine(mask, scan, smallest_ml=smallest_ml)
  assert refined.dtype == np.uint8 and refined.sum() == voxels
  assert not (refined & ~mask).any()


def test_true_volume_of_each_lesion(scan, mask):
  truth = np.zeros_like(mask)
  truth[1, 2:5, 2:4] = truth[0, 0, 0] = truth[5, 19, 19] = 1
  sizes, overlaps, true_ml = postprocessing.true_volumes(mask, truth, scan.voxel_ml)
  assert sorted(zip(sizes.round(6), overlaps.round(6), strict=True)) == [(0.001, 0.001), (0.003, 0), (0.012, 0.006)]
  assert true_ml == pytest.approx(0.008)
