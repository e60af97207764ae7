"""Surface distances compared with MONAI and with the definition computed voxel by voxel."""

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from fusa_jax.measures import surface

FAR = 1000.0


def blobs(seed, shape=(14, 40, 36), share=0.1):
  """Returns two similar masks of a few lesions, some of them cut by the border of the volume."""
  rng = np.random.default_rng(seed)
  noise = [ndimage.gaussian_filter(rng.normal(size=shape), (1, 3, 3)) for _ in range(2)]
  fields = noise[0], 0.8 * noise[0] + 0.5 * noise[1]
  return tuple(field > np.quantile(field, 1 - share) for field in fields)


def written_out(first, second, steps):
  """Computes the distances between all boundary voxels; a boundary voxel lacks at least one of six neighbours."""
  points = []
  for mask in (first, second):
    padded, own = np.pad(mask, 1), []
    for place in np.argwhere(mask):
      neighbours = [sign * np.eye(3, dtype=int)[axis] for axis in range(3) for sign in (-1, 1)]
      if not all(padded[tuple(place + 1 + neighbour)] for neighbour in neighbours):
        own.append(sum(n * step for n, step in zip(place, steps, strict=True)))
    points.append(np.array(own))
  apart = np.linalg.norm(points[0][:, None] - points[1][None], axis=-1)
  return apart.min(axis=1), apart.min(axis=0)


@pytest.mark.filterwarnings('ignore:monai:FutureWarning')
@pytest.mark.parametrize('seed', range(4))
@pytest.mark.parametrize('spacing', [(5.0, 0.7, 0.7), (1.0, 0.9, 1.3)])
def test_equal_to_monai(seed, spacing):
  metrics, torch = pytest.importorskip('monai.metrics'), pytest.importorskip('torch')
  masks = blobs(seed)
  tensors = [torch.from_numpy(mask)[None, None].float() for mask in masks]
  distances = surface.distances(*masks, np.diag(spacing), FAR)
  theirs = metrics.compute_hausdorff_distance(*tensors, include_background=True, percentile=95, spacing=spacing)
  assert surface.hd95(distances) == pytest.approx(float(theirs), abs=1e-4)
  for tolerance in (1.0, 2.0, 6.0):
    theirs = metrics.compute_surface_dice(*tensors, [tolerance], include_background=True, spacing=spacing)
    assert 0 < float(theirs) < 1
    assert surface.surface_dice(distances, tolerance) == pytest.approx(float(theirs), abs=1e-6)


@pytest.mark.parametrize('seed', range(4))
@pytest.mark.parametrize(
  'steps',
  [
    np.diag([2.5, 0.7, 1.1]),
    np.diag([2.5, 0.7, 1.1]) @ nib.eulerangles.euler2mat(0.3, -0.7, 1.1),
    [[2.5, 1.2, 0], [0, 0.7, 0], [0, 0, 1.1]],
    [[8.0, -6.0, 3.0], [0.2, 0.7, 0], [0, -0.4, 1.1]],
  ],
  ids=['axial', 'oblique', 'tilted gantry', 'no right angle'],
)
def test_equal_to_the_definition(seed, steps):
  masks, steps = blobs(seed, (5, 8, 7), share=0.3), np.array(steps)
  for ours, theirs in zip(surface.distances(*masks, steps, FAR), written_out(*masks, steps), strict=True):
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_a_shift_by_hand():
  """A cube moved by two voxels of 1 mm: of 26 boundary voxels, 9 are at distance 0, 8 at 1 mm and 9 at 2 mm."""
  first, second = np.zeros((2, 7, 7, 9), bool)
  first[2:5, 2:5, 2:5] = second[2:5, 2:5, 4:7] = True
  distances = surface.distances(first, second, np.eye(3), FAR)
  for each in distances:
    assert np.bincount(each.astype(int)).tolist() == [9, 8, 9]
  assert surface.hd95(distances) == 2
  assert surface.surface_dice(distances, 1) == pytest.approx(17 / 26)
  assert surface.surface_dice(distances, 2) == 1


def test_exactly_the_tolerance_is_within_it():
  """Ten slices of 0.2 mm, stored in the header as float32, are 2 mm."""
  first, second = np.zeros((2, 30, 4, 4), bool)
  first[3, 1, 1] = second[13, 1, 1] = True
  spacing = (float(np.float32(0.2)), 1, 1)
  assert surface.surface_dice(surface.distances(first, second, np.diag(spacing), FAR), 2) == 1


def test_the_border_of_the_volume_counts_as_outside():
  """A mask that fills the whole volume also has a boundary."""
  full = np.ones((4, 5, 6), bool)
  first, second = surface.distances(full, full, np.eye(3), FAR)
  assert len(first) == len(second) == full.size - 2 * 3 * 4
  assert not first.any() and not second.any()


def test_empty_masks():
  empty, some = np.zeros((2, 4, 5, 6), bool)
  some[1, 2, 3] = True
  for masks in ((empty, some), (some, empty)):
    missed = surface.distances(*masks, np.eye(3), FAR)
    assert surface.hd95(missed) == FAR and surface.surface_dice(missed, 2) == 0
  for nothing in (empty, empty[:0]):
    both = surface.distances(nothing, nothing, np.eye(3), FAR)
    assert np.isnan(surface.hd95(both)) and np.isnan(surface.surface_dice(both, 2))
