"""Each part compared with SciPy; image and mask stay aligned; points are drawn from the foreground."""

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


def test_a_crop_is_not_placed_on_unknown_pixels():
  """Lesion pixels and pixels of unknown truth are in opposite corners; each crop contains lesion."""
  mask = np.zeros((16, 64, 64), np.uint8)
  mask[:, :4, :4], mask[:, -16:, -16:] = 2, 1 << 7
  image = jnp.full(mask.shape, -1000, jnp.int16)
  options = augment.Augmentation(crop_probability=1.0, crop_fractions=(1 / 4,), has_ignored=True)
  _, out = augment.augment(jax.random.key(0), image, jnp.asarray(mask), options)
  assert set(np.unique(out)) <= {0, 2} and (out == 2).any(axis=(1, 2)).all()


def test_an_image_does_not_depend_on_its_batch():
  image, mask = batch()
  parts = {f'{part}_probability': 0.5 for part in PARTS}
  options = augment.Augmentation(0.5, flip=True, hu_shift=30, hu_scale=0.1, rotation=20.0, noise=30.0, **parts)
  run = jax.jit(lambda image, mask: augment.augment(jax.random.key(1), image, mask, options))
  whole, part = run(image, mask), run(image[:3], mask[:3])
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
  config.augment.update({f'{part}_probability': 0.5 for part in PARTS})
  key = jax.random.key(3)
  # Grey values have no air below the window.
  out, out_mask = augment.augment(key, hu, mask, augment.create(config)._replace(outside=-1000.0))
  config.data.intensity = 'grey'
  grey_out, grey_mask = augment.augment(key, grey, mask, augment.create(config))
  np.testing.assert_array_equal(grey_mask, out_mask)
  seen = window.grey_input(grey_out)
  np.testing.assert_allclose(seen, window.network_input(out, (-1000, 300)), atol=1e-4)
  assert np.abs(np.asarray(seen)[..., 0] - np.asarray(window.grey_input(grey))[..., 0]).max() > 0.05


@pytest.mark.parametrize(
  ('matrix', 'outside'),
  [
    ([[0.94, -0.33, 5.1], [0.35, 0.93, -4.3]], -1024.0),
    ([[-0.8, 1.1, 9.0], [-1.1, -0.8, 40.5]], -1024.0),  # most of the output lies outside
    ([[0.3, 0.01, 12.2], [-0.02, 0.31, 3.4]], 0.0),
    ([[1.0, 0.0, -100.0], [0.0, 1.0, 100.0]], -1024.0),
  ],
)
def test_affine_equals_scipys_interpolation(matrix, outside):
  rng = np.random.default_rng(0)
  shape = 32, 24
  image, mask = rng.integers(-1000, 300, shape), rng.integers(0, 2, shape).astype(np.uint8)
  arrays = jnp.asarray(image, jnp.float32), jnp.asarray(mask), jnp.asarray(matrix, jnp.float32)
  out, out_mask = jax.jit(augment.affine, static_argnums=3)(*arrays, outside)
  matrix = np.round(np.float32(matrix).astype(float) * 2**16) / 2**16
  places = np.einsum('ij,j...->i...', matrix[:, :2], np.indices(shape)) + matrix[:, 2, None, None]
  sampled = lambda array, order, value: ndimage.map_coordinates(
    array.astype(float), places, order=order, mode='grid-constant', cval=value, prefilter=False
  )
  np.testing.assert_allclose(out, sampled(image, 1, outside), atol=1e-3)
  # At half of a pixel, 'nearest' is undefined.
  clear = (np.abs(places - np.floor(places) - 0.5) > 1e-6).all(axis=0)
  np.testing.assert_array_equal(np.asarray(out_mask)[clear], sampled(mask, 0, 0)[clear])
  assert clear.mean() > 0.95


def test_affine_has_no_errors_of_rounding_on_a_large_slice():
  """With float32 coordinates, compiled programs took a wrong neighbour at a few of these points."""
  side, angle = 512, 0.2
  rng = np.random.default_rng(0)
  image = jnp.asarray(rng.integers(-1000, 300, (side, side)), jnp.float32)
  matrix = augment.about_centre(augment.linear(jnp.float32(angle), 1.0, 0.0), 1.0, 0.0, image.shape)
  out, _ = jax.jit(augment.affine, static_argnums=3)(image, jnp.zeros(image.shape, jnp.uint8), matrix, -1024.0)
  matrix = np.round(np.asarray(matrix, float) * 2**16) / 2**16
  places = np.einsum('ij,j...->i...', matrix[:, :2], np.indices(image.shape)) + matrix[:, 2, None, None]
  expected = ndimage.map_coordinates(np.asarray(image, float), places, order=1, mode='grid-constant', cval=-1024.0)
  np.testing.assert_allclose(out, expected, atol=1e-3)


def test_the_map_rotates_enlarges_and_shears_about_the_centre_of_the_crop():
  """Follows three points by hand. Rows point down, so a positive angle turns the picture anticlockwise."""
  shape = (40, 40)
  centre = 19.5
  place = lambda matrix, row, column: np.asarray(matrix) @ [row, column, 1]
  quarter = augment.about_centre(augment.linear(jnp.float32(np.pi / 2), 1.0, 0.0), 1.0, 0.0, shape)
  np.testing.assert_allclose(place(quarter, centre, centre + 10), [centre - 10, centre], atol=1e-4)
  double = augment.about_centre(augment.linear(jnp.float32(0.0), 2.0, 0.0), 1.0, 0.0, shape)
  np.testing.assert_allclose(place(double, centre + 10, centre + 4), [centre + 5, centre + 2], atol=1e-4)
  shear = augment.about_centre(augment.linear(jnp.float32(0.0), 1.0, 0.25), 1.0, 0.0, shape)
  np.testing.assert_allclose(place(shear, centre + 8, centre), [centre + 8, centre + 2], atol=1e-4)
  # A crop with half of the side, from (4, 10): pixel 0 of the output is centred at a quarter of a pixel.
  half = augment.about_centre(jnp.eye(2), 0.5, jnp.asarray([4.0, 10.0]), shape)
  np.testing.assert_allclose(place(half, 0, 0), [3.75, 9.75], atol=1e-4)


def test_a_crop_within_an_affine_map_equals_a_crop():
  """Inside the image, the two paths agree; at its edge, one blends with air and the other repeats the edge."""
  image, mask = batch()
  options = augment.Augmentation(crop_probability=1.0, crop_fractions=(1 / 2, 1 / 4))
  cropped = augment.augment(jax.random.key(5), image, mask, options)
  mapped = augment.augment(jax.random.key(5), image, mask, options._replace(affine_probability=1e-9))
  np.testing.assert_allclose(mapped[0][:, 1:-1, 1:-1], cropped[0][:, 1:-1, 1:-1], atol=0.1)
  assert (np.asarray(mapped[1]) != np.asarray(cropped[1])).mean() < 1e-3


def test_affine_keeps_image_and_mask_aligned_and_air_outside():
  image, mask = batch()
  options = augment.Augmentation(affine_probability=1.0, rotation=180.0, scaling=(0.5, 0.7), shear=0.1)
  out, out_mask = augment.augment(jax.random.key(0), image, mask, options)
  agree = (out > 0) == (out_mask > 0)
  assert agree.mean() > 0.97
  assert (np.asarray(out)[:, 0, 0] == -1024).all()  # the reduced slice does not reach the corner
  change = np.asarray(out_mask).sum(axis=(1, 2)) / np.asarray(mask).sum(axis=(1, 2))
  assert (change > 0.2).all() and (change < 0.55).all() and np.ptp(change) > 0.1


@pytest.mark.parametrize('width', [0.5, 0.83, 1.0])
def test_blur_equals_scipys(width):
  image = np.random.default_rng(0).normal(size=(20, 24)).astype(np.float32)
  out = jax.jit(augment.blur, static_argnums=2)(image, width, 1.0)
  expected = ndimage.gaussian_filter(image.astype(float), width, mode='nearest', radius=4)
  np.testing.assert_allclose(out, expected, atol=2e-6)


@pytest.mark.parametrize('zoom', [0.5, 0.7, 0.93])
def test_low_resolution_equals_scipys_interpolation(zoom):
  image = np.random.default_rng(0).normal(size=(32, 30)).astype(np.float32)
  out = jax.jit(augment.low_resolution)(image, jnp.float32(zoom))
  counts = [round(n * zoom) for n in image.shape]
  taken = [
    np.floor((np.arange(count) + 0.5) * n / count).astype(int) for n, count in zip(image.shape, counts, strict=True)
  ]
  reduced = image.astype(float)[np.ix_(*taken)]
  places = [(np.arange(n) + 0.5) * count / n - 0.5 for n, count in zip(image.shape, counts, strict=True)]
  expected = ndimage.map_coordinates(reduced, np.meshgrid(*places, indexing='ij'), order=1, mode='nearest')
  np.testing.assert_allclose(out, expected, atol=1e-5)


def test_contrast_and_gamma_equal_their_formulas():
  image = np.random.default_rng(0).uniform(-1400, 900, (16, 16))
  windowed = np.clip(image, -1000, 300)
  got = augment.change_contrast(jnp.asarray(image, jnp.float32), 1.2, -1000.0, 300.0)
  expected = np.clip(windowed.mean() + 1.2 * (windowed - windowed.mean()), -1000, 300)
  np.testing.assert_allclose(got, expected, atol=1e-2)
  level = (windowed + 1000) / 1300
  for invert, expected in ((False, level**0.7), (True, 1 - (1 - level) ** 0.7)):
    got = augment.change_gamma(jnp.asarray(image, jnp.float32), 0.7, invert, -1000.0, 300.0)
    np.testing.assert_allclose(got, -1000 + 1300 * expected, atol=1e-2)


def test_noise_has_the_drawn_standard_deviations():
  image = jnp.zeros((64, 32, 32), jnp.int16)
  options = augment.Augmentation(noise_probability=0.5, noise=60.0)
  out, _ = augment.augment(jax.random.key(0), image, jnp.zeros((64, 32, 32), jnp.uint8), options)
  deviations = np.asarray(out).std(axis=(1, 2))
  noisy = deviations[deviations > 0]
  assert 20 <= len(noisy) <= 44
  assert noisy.max() < 65 and stats.kstest(noisy / 60, 'uniform').pvalue > 1e-3
  assert (
    stats.kstest((np.asarray(out) / np.maximum(deviations, 1e-9)[:, None, None])[deviations > 0].ravel(), 'norm').pvalue
    > 1e-3
  )


PARTS = ('affine', 'noise', 'blur', 'low_resolution', 'contrast', 'gamma')


def test_each_part_happens_with_its_probability():
  """Each part alone changes about half of 64 slices, by its own random numbers, and leaves the others as they are."""
  rng = np.random.default_rng(0)
  image = jnp.asarray(rng.integers(-900, 250, (64, 16, 16)), jnp.int16)
  changed = []
  for part in PARTS:
    config = seg.get_config('demo')
    config.augment.update({'flip': False, f'{part}_probability': 0.5})
    options = augment.create(config)
    out = jax.jit(lambda image, mask, options=options: augment.augment(jax.random.key(0), image, mask, options)[0])(
      image, jnp.zeros(image.shape, jnp.uint8)
    )
    changed.append((np.asarray(out) != np.asarray(image)).any(axis=(1, 2)))
  assert all(20 <= each.sum() <= 44 for each in changed)
  assert len({each.tobytes() for each in changed}) == len(PARTS)


def test_new_random_numbers_leave_the_earlier_ones():
  """The crops, mirror images, shifts and contrasts of a seed stay those of earlier versions."""
  key = jax.random.key(7)
  earlier = jax.random.key_data(jax.random.split(key, 7))
  now = [jax.random.key_data(jax.random.fold_in(key, number)) for number in range(7)]
  np.testing.assert_array_equal(now, earlier)
  assert augment._STREAMS[:7] == ('crop', 'fraction', 'point', 'place', 'flip', 'shift', 'scale')


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
