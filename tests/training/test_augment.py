"""Crops compared with scipy's interpolation; image and mask stay aligned; points are drawn from the foreground."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage, stats

from configs import seg
from fusa_jax.tasks import window
from fusa_jax.training import augment


@pytest.mark.parametrize(
  ('fraction', 'top_left'), [(0.5, (3.0, 7.0)), (0.25, (10.3, 0.0)), (0.125, (27.9, 12.4)), (1.0, (0, 0))]
)
def test_crop_equals_scipys_interpolation(fraction, top_left):
  rng = np.random.default_rng(0)
  image, mask = rng.normal(size=(32, 32)).astype(np.float32), rng.integers(0, 2, (32, 32)).astype(np.uint8)
  out, out_mask = jax.jit(augment.crop)(image, mask, jnp.asarray(top_left, jnp.float32), jnp.float32(fraction))
  # The centre of output pixel i is at start + (i + 1/2) * fraction; the centre of input pixel j is at j + 1/2.
  places = np.meshgrid(*[(np.arange(32) + 0.5) * fraction + start - 0.5 for start in top_left], indexing='ij')
  expected = ndimage.map_coordinates(image.astype(np.float64), places, order=1, mode='nearest')
  np.testing.assert_allclose(out, expected, atol=2e-5)
  nearest = [np.clip(np.floor(place + 0.5).astype(int), 0, 31) for place in places]
  np.testing.assert_array_equal(out_mask, mask[tuple(nearest)])


def batch(side=64):
  """Returns images and their masks: one disc of 1000 HU per image, -1000 HU around it."""
  rng = np.random.default_rng(0)
  y, x = np.mgrid[:side, :side]
  centres = rng.integers(12, side - 12, (16, 2, 1, 1))
  mask = ((y - centres[:, 0]) ** 2 + (x - centres[:, 1]) ** 2 < 64).astype(np.uint8)
  return jnp.asarray(mask.astype(np.int16) * 2000 - 1000), jnp.asarray(mask)


def test_image_and_mask_stay_aligned():
  image, mask = batch()
  options = augment.Augmentation(crop_probability=1.0, flip=True)
  run = jax.jit(lambda key: augment.augment(key, image, mask, options))
  for seed in range(4):
    out, out_mask = run(jax.random.key(seed))
    # The border lies at 0 HU, except in pixels that interpolation blends.
    agree = (out > 0) == (out_mask > 0)
    assert agree.mean() > 0.97
    assert ((out_mask > 0).any(axis=(1, 2))).all()
    assert set(np.unique(out_mask)) <= {0, 1}
  sizes = np.asarray(out_mask.mean(axis=(1, 2)))
  assert sizes.max() > 4 * sizes.min()


def test_without_lesion_the_crop_shows_tissue():
  side = 64
  image = np.full((16, side, side), -1000, np.int16)
  image[:, 40:48, 8:16] = 50
  options = augment.Augmentation(crop_probability=1.0, crop_fractions=(1 / 8,))
  out, _ = augment.augment(jax.random.key(0), jnp.asarray(image), jnp.zeros((16, side, side), jnp.uint8), options)
  assert (out.max(axis=(1, 2)) > -500).all()


def test_an_image_does_not_depend_on_its_batch():
  image, mask = batch()
  options = augment.Augmentation(0.5, flip=True, hu_shift=30, hu_scale=0.1)
  whole = augment.augment(jax.random.key(1), image, mask, options)
  part = augment.augment(jax.random.key(1), image[:3], mask[:3], options)
  np.testing.assert_array_equal(whole[0][:3], part[0])
  np.testing.assert_array_equal(whole[1][:3], part[1])


def test_disabled_augmentation_changes_nothing():
  image, mask = batch()
  out, out_mask = augment.augment(jax.random.key(0), image, mask, augment.Augmentation())
  np.testing.assert_array_equal(out, image)
  np.testing.assert_array_equal(out_mask, mask)


def test_intensity_changes_are_within_their_bounds():
  image, mask = batch()
  options = augment.Augmentation(hu_shift=30.0, hu_scale=0.1)
  out, out_mask = augment.augment(jax.random.key(0), image, mask, options)
  np.testing.assert_array_equal(out_mask, mask)
  high, low = out.max(axis=(1, 2)), out.min(axis=(1, 2))
  assert (np.abs(high - 1000) <= 133.1).all() and np.std(high) > 10
  scale, shift = (high - low) / 2000, (high + low) / 2
  assert (np.abs(scale - 1) <= 0.1001).all() and np.std(scale) > 0.02
  assert (np.abs(shift / scale) <= 30.01).all() and np.std(shift) > 5


def test_grey_and_hu_are_augmented_alike():
  """Grey values are the HU window scaled to 0 to 255. Augmentation then gives the same network input for both."""
  hu, mask = batch()
  hu = np.clip(hu, -1000, 300)
  grey = (hu + 1000) * (255 / 1300)
  config = seg.get_config('demo')
  config.augment.update(crop_probability=1.0, hu_shift=40.0, hu_scale=0.2)
  key = jax.random.key(3)
  out, out_mask = augment.augment(key, hu, mask, augment.create(config))
  config.data.intensity = 'grey'
  grey_out, grey_mask = augment.augment(key, grey, mask, augment.create(config))
  np.testing.assert_array_equal(grey_mask, out_mask)
  seen = window.grey_input(grey_out)
  np.testing.assert_allclose(seen, window.network_input(out, (-1000, 300)), atol=1e-4)
  assert np.abs(np.asarray(seen)[..., 0] - np.asarray(window.grey_input(grey))[..., 0]).max() > 0.05


def test_points_are_uniform_over_the_foreground():
  where = np.zeros((8, 8), bool)
  where[2, 3] = where[2, 6] = where[5, 1] = where[7, 7] = where[7, 0] = True
  draw = jax.jit(jax.vmap(augment.random_point, (0, None)))
  points = np.asarray(draw(jax.random.split(jax.random.key(0), 5000), jnp.asarray(where)))
  counts = np.zeros((8, 8), int)
  np.add.at(counts, tuple(points.T), 1)
  assert counts[~where].sum() == 0
  assert stats.chisquare(counts[where]).pvalue > 1e-4
  anywhere = np.asarray(draw(jax.random.split(jax.random.key(1), 2000), jnp.zeros((8, 8), bool)))
  assert len(np.unique(anywhere, axis=0)) == 64


@pytest.mark.parametrize('fraction', [0.5, 0.25, 0.125])
def test_the_crop_lies_in_the_image_and_holds_the_point(fraction):
  keys = jax.random.split(jax.random.key(0), 500)
  points = jax.random.randint(jax.random.key(1), (500, 2), 0, 64)
  crop = jax.vmap(lambda key, point: augment.crop_around(key, point, fraction, (64, 64)))
  corner = np.asarray(crop(keys, points))
  assert (corner >= 0).all() and (corner + fraction * 64 <= 64).all()
  centre = np.asarray(points) + 0.5
  assert (corner <= centre).all() and (centre <= corner + fraction * 64).all()
