"""Augments training batches on the device, inside the training step (paper, section III-B; nnU-Net's recipe).

Functions are written for one image [H, W] and its mask, and mapped over the batch. Every row has its own random key, so
its augmentation does not depend on the distribution of the batch over devices. A part with probability 0 costs nothing.
Any other part is computed for every row: a mapped program has no branches.

An image may have neighbouring slices as channels, [H, W, C] (data.context). Its mask is that of the middle slice. All
slices of an image share one geometric map and one set of random intensities; noise is drawn for each slice.

All parts change stored values (HU or grey). The window follows, as at test time.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections

from fusa_jax.scans import volumes
from fusa_jax.scans.classes import IGNORED
from fusa_jax.scans.neighbours import middle
from fusa_jax.tasks import window

# Each random number of a row has its own key, by its place in this list. Append new names: an inserted name would
# change the numbers of the names after it.
_STREAMS = (
  *('crop', 'fraction', 'point', 'place', 'flip', 'shift', 'scale'),
  *('affine', 'rotation', 'scaling', 'shear'),
  *('noise', 'noise_level', 'noise_values', 'blur', 'blur_width', 'low_resolution', 'zoom'),
  *('contrast', 'contrast_factor', 'gamma', 'gamma_power', 'inverted'),
)
# Bits after the binary point of a coordinate in `affine`, so that coordinates reach 2^15 pixels.
_BITS = 16


class Augmentation(NamedTuple):
  """The augmentation of a training row. By default it changes nothing.

  Attributes:
    crop_probability: probability of a crop; otherwise the whole slice is kept.
    crop_fractions: possible sides of a crop as fractions of the slice's side (the paper: 1/2, 1/4, 1/8).
    flip: mirror left to right with probability 1/2.
    hu_shift: a number from -hu_shift to hu_shift is added to the whole slice.
    hu_scale: the contrast around water is multiplied by a number from 1 - hu_scale to 1 + hu_scale.
    affine_probability: probability of a rotation, scaling and shear, about the centre of the slice or of its crop.
    rotation: the angle is from -rotation to rotation, in degrees.
    scaling: the smallest and the largest magnification; its logarithm is drawn uniformly.
    shear: rows are shifted by -shear to shear pixels per row.
    noise_probability: probability of Gaussian noise.
    noise: its standard deviation is from 0 to `noise`, in HU.
    blur_probability: probability of a Gaussian blur.
    blur: the smallest and the largest standard deviation of the blur, in pixels.
    low_resolution_probability: probability of sampling the slice at fewer pixels and resizing it back.
    low_resolution: the smallest and the largest side of the reduced slice, as fractions of the side.
    contrast_probability: probability of a change of contrast around the mean of the windowed slice.
    contrast: the smallest and the largest factor of the contrast.
    gamma_probability: probability of a power of the windowed values, scaled to 0 to 1.
    gamma: the smallest and the largest power.
    gamma_inverted: probability that the power applies to 1 - value instead.
    water: the stored value of water, 0 HU.
    tissue: higher values are tissue. A slice without lesion is cropped around a pixel of tissue.
    outside: the stored value of what lies outside the image: air.
    black, white: the stored values at the limits of the window.
    has_ignored: whether the truth may be unknown somewhere (data.ignore_label).
  """

  crop_probability: float = 0.0
  crop_fractions: Sequence[float] = (1 / 2, 1 / 4, 1 / 8)
  flip: bool = False
  hu_shift: float = 0.0
  hu_scale: float = 0.0
  affine_probability: float = 0.0
  rotation: float = 0.0
  scaling: Sequence[float] = (1.0, 1.0)
  shear: float = 0.0
  noise_probability: float = 0.0
  noise: float = 0.0
  blur_probability: float = 0.0
  blur: Sequence[float] = (0.5, 1.0)
  low_resolution_probability: float = 0.0
  low_resolution: Sequence[float] = (0.5, 1.0)
  contrast_probability: float = 0.0
  contrast: Sequence[float] = (1.0, 1.0)
  gamma_probability: float = 0.0
  gamma: Sequence[float] = (1.0, 1.0)
  gamma_inverted: float = 0.0
  water: float = 0.0
  tissue: float = -500.0
  outside: float = volumes.AIR
  black: float = -1000.0
  white: float = 300.0
  has_ignored: bool = False


def create(config: ml_collections.ConfigDict) -> Augmentation:
  """Returns the augmentation of a config, converted to grey values if config.data.intensity is 'grey'.

  The conversion maps the HU window linearly to the grey values from black to white.
  """
  low, high = config.data.window
  options = Augmentation(**config.augment, black=low, white=high, has_ignored=config.data.ignore_label is not None)
  if config.data.intensity == 'hu':
    return options
  black, white = window.GREY
  per_hu = (white - black) / (high - low)
  return options._replace(
    hu_shift=options.hu_shift * per_hu,
    noise=options.noise * per_hu,
    water=black + (options.water - low) * per_hu,
    tissue=black + (options.tissue - low) * per_hu,
    outside=black,
    black=black,
    white=white,
  )


def augment(key: jax.Array, image: jax.Array, mask: jax.Array, options: Augmentation) -> tuple[jax.Array, jax.Array]:
  """Augments each row of a batch, with one key per row; shapes stay the same.

  Args:
    key: the key of the batch.
    image: int16 [B, H, W] or [B, H, W, C].
    mask: bits of classes (`scans.classes`), uint8 [B, H, W], of the middle slice; {0, 1} with one class.
    options: the augmentation.

  Returns:
    (image in float32, mask in uint8).
  """
  keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(len(image)))
  return jax.vmap(lambda *row: _row(*row, options))(keys, image.astype(jnp.float32), mask)


def _row(key, image, mask, options):
  keys = {name: jax.random.fold_in(key, number) for number, name in enumerate(_STREAMS)}
  uniform = lambda name, low, high: jax.random.uniform(keys[name], minval=low, maxval=high)
  happens = lambda name: jax.random.bernoulli(keys[name], getattr(options, f'{name}_probability'))
  fraction, top_left = 1.0, 0.0
  if options.crop_probability:
    fraction = jax.random.choice(keys['fraction'], jnp.asarray(options.crop_fractions, jnp.float32))
    fraction = jnp.where(happens('crop'), fraction, 1.0)
    lesion = mask & (IGNORED - 1) if options.has_ignored else mask
    foreground = jnp.where(lesion.any(), lesion > 0, middle(image) > options.tissue)
    top_left = crop_around(keys['place'], random_point(keys['point'], foreground), fraction, mask.shape)
  if options.affine_probability:
    angle = jnp.deg2rad(uniform('rotation', -options.rotation, options.rotation))
    scaling = jnp.exp(uniform('scaling', *map(math.log, options.scaling)))
    changed = linear(angle, scaling, uniform('shear', -options.shear, options.shear))
    changed = jnp.where(happens('affine'), changed, jnp.eye(2))
    # A crop is part of the map, so that the image is interpolated only once.
    image, mask = affine(image, mask, about_centre(changed, fraction, top_left, mask.shape), options.outside)
  elif options.crop_probability:
    image, mask = crop(image, mask, top_left, fraction)
  if options.flip:
    flip = jax.random.bernoulli(keys['flip'])
    image, mask = (jnp.where(flip, array[:, ::-1], array) for array in (image, mask))
  if options.hu_shift:
    image += uniform('shift', -options.hu_shift, options.hu_shift)
  if options.hu_scale:
    contrast = 1 + uniform('scale', -options.hu_scale, options.hu_scale)
    image = options.water + (image - options.water) * contrast
  # The order of nnU-Net (Isensee et al., Nature Methods 2021).
  if options.noise_probability:
    level = jnp.where(happens('noise'), uniform('noise_level', 0.0, options.noise), 0.0)
    image += level * jax.random.normal(keys['noise_values'], image.shape)
  if options.blur_probability:
    width = uniform('blur_width', *options.blur)
    image = jnp.where(happens('blur'), blur(image, width, most=options.blur[1]), image)
  if options.contrast_probability:
    factor = jnp.where(happens('contrast'), uniform('contrast_factor', *options.contrast), 1.0)
    image = jnp.where(factor == 1.0, image, change_contrast(image, factor, options.black, options.white))
  if options.low_resolution_probability:
    zoom = uniform('zoom', *options.low_resolution)
    image = jnp.where(happens('low_resolution'), low_resolution(image, zoom), image)
  if options.gamma_probability:
    power, invert = (
      uniform('gamma_power', *options.gamma),
      jax.random.bernoulli(keys['inverted'], options.gamma_inverted),
    )
    changed = change_gamma(image, power, invert, options.black, options.white)
    image = jnp.where(happens('gamma'), changed, image)
  return image, mask


def random_point(key: jax.Array, where: jax.Array) -> jax.Array:
  """Draws a pixel [2] = (row, column) uniformly from the True pixels of `where` [H, W], or from all if none is True.

  It draws a row in proportion to its number of True pixels, and then a column. This needs two random numbers instead of
  one per pixel.
  """
  weight = jnp.where(where.any(), where, True).astype(jnp.float32)
  row_key, column_key = jax.random.split(key)
  row = _draw(row_key, weight.sum(axis=1))
  return jnp.stack([row, _draw(column_key, weight[row])])


def _draw(key, weights):
  """Draws an index with probability proportional to `weights`, by inverting the distribution function."""
  total = jnp.cumsum(weights)
  # 1 - uniform is in (0, 1], so the drawn value is above 0 and the search never returns an index of weight 0.
  drawn = (1 - jax.random.uniform(key)) * total[-1]
  return jnp.minimum(jnp.searchsorted(total, drawn, side='left'), len(weights) - 1)


def crop_around(key: jax.Array, point: jax.Array, fraction: jax.Array, shape: tuple[int, int]) -> jax.Array:
  """Draws the top left corner [2], in pixels, of a crop that contains `point` and lies inside the image."""
  side = fraction * jnp.asarray(shape, jnp.float32)
  corner = point + 0.5 - jax.random.uniform(key, (2,)) * side
  return jnp.clip(corner, 0, jnp.asarray(shape, jnp.float32) - side)


def crop(image: jax.Array, mask: jax.Array, top_left: jax.Array, fraction: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Crops at `top_left`, with sides of `fraction` times the image's sides, and resizes to the image's shape.

  The image is interpolated linearly (two small matrix products), the mask by nearest neighbour. Both are sampled at the
  centres of the output pixels.
  """
  scale = 1 / fraction
  image = jax.image.scale_and_translate(
    image, image.shape, (0, 1), jnp.stack([scale, scale]), -top_left * scale, method='linear', antialias=False
  )
  rows, columns = (
    jnp.clip(jnp.floor((jnp.arange(n) + 0.5) * fraction + start).astype(jnp.int32), 0, n - 1)
    for n, start in zip(mask.shape, top_left, strict=True)
  )
  return image, mask[rows][:, columns]


def linear(angle: jax.Array, scaling: jax.Array, shear: jax.Array) -> jax.Array:
  """The matrix [2, 2] from an offset (row, column) in the output to the offset in the input.

  Objects appear rotated by `angle` in radians, `scaling` times as large, and sheared along the rows.
  """
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  rotation = [[cos, -sin], [sin, cos]]
  rows = [[row[0] + row[1] * shear, row[1]] for row in rotation]  # rotation @ [[1, 0], [shear, 1]]
  return jnp.asarray(rows) / scaling


def about_centre(matrix: jax.Array, fraction: jax.Array, top_left: jax.Array, shape: tuple[int, int]) -> jax.Array:
  """Returns the map [2, 3] from a pixel (row, column, 1) of the output to its place in the input.

  The centre of the output is at the centre of the crop with corner `top_left`. `matrix` [2, 2] applies around it, and
  `fraction` is the side of the crop.
  """
  shape = jnp.asarray(shape, jnp.float32)
  matrix = matrix * fraction
  # Elementwise: a TPU would multiply matrices in bfloat16.
  start = top_left + fraction * shape / 2 - 0.5 - (matrix * ((shape - 1) / 2)).sum(axis=1)
  return jnp.concatenate([matrix, start[:, None]], axis=1)


def affine(image: jax.Array, mask: jax.Array, matrix: jax.Array, outside: float) -> tuple[jax.Array, jax.Array]:
  """Samples image [H, W] or [H, W, C] and mask [H, W] at the places `matrix` [2, 3] @ (row, column, 1), in pixels.

  The image is interpolated linearly between its pixels and `outside`, the mask by nearest neighbour and 0. This is
  scipy.ndimage.map_coordinates with order 1 and 0 and mode 'grid-constant'.

  A compiler may compute a coordinate twice and round it differently. The pixels of one rounding with the weights of the
  other are wrong by a whole pixel (seen on CPUs, 2 of 262,144 points). Coordinates are therefore whole multiples of
  2^-16 pixels, computed with integers, and have no rounding.

  Each point is read with five element gathers that share their indices. GPUs and CPUs fuse these with the
  interpolation. Rotations by three shears need no gather, but interpolate three times, which blurs and does not equal
  bilinear interpolation.
  """
  height, width = mask.shape
  (to_row, to_column) = jnp.round(matrix * (1 << _BITS)).astype(jnp.int32)
  rows, columns = jnp.arange(height)[:, None], jnp.arange(width)[None]
  # One pixel of padding before the first pixel and two after the last: place 0 in the padded arrays is pixel -1.
  place = lambda m, n: jnp.clip(m[0] * rows + m[1] * columns + m[2] + (1 << _BITS), 0, (n + 1) << _BITS)
  row, column = place(to_row, height), place(to_column, width)
  around = lambda array: [(1, 2), (1, 2), *[(0, 0)] * (array.ndim - 2)]
  image, mask = (
    jnp.pad(array, around(array), constant_values=value).reshape(-1, *array.shape[2:])
    for array, value in ((image, outside), (mask, 0))
  )
  at = lambda array, down, right: array.at[((row + down) >> _BITS) * (width + 3) + ((column + right) >> _BITS)].get(
    mode='promise_in_bounds'
  )
  whole, half = 1 << _BITS, 1 << (_BITS - 1)
  below, beside = ((place & (whole - 1)).astype(jnp.float32) / whole for place in (row, column))
  if image.ndim > 1:  # channels
    below, beside = below[..., None], beside[..., None]
  top, bottom = (at(image, down, 0) * (1 - beside) + at(image, down, whole) * beside for down in (0, whole))
  return top * (1 - below) + bottom * below, at(mask, half, half)


def blur(image: jax.Array, width: jax.Array, most: float) -> jax.Array:
  """Gaussian blur of each slice with standard deviation `width`, at most `most`, in pixels; edges are repeated.

  It is scipy.ndimage.gaussian_filter with mode 'nearest' and a radius of 4 times `most`.
  """
  radius = math.ceil(4 * most)
  offsets = jnp.arange(-radius, radius + 1)
  weights = jnp.exp(-0.5 * jnp.square(offsets / width))
  weights /= weights.sum()
  for axis in (0, 1):
    padded = jnp.pad(image, [(radius, radius) if each == axis else (0, 0) for each in range(image.ndim)], mode='edge')
    parts = (
      weight * jax.lax.slice_in_dim(padded, start, start + image.shape[axis], axis=axis)
      for start, weight in enumerate(weights)
    )
    image = sum(parts)
  return image


def low_resolution(image: jax.Array, zoom: jax.Array) -> jax.Array:
  """Samples each slice at round(zoom * side) pixels per side by nearest neighbour, and resizes it back linearly."""
  sides = image.shape[:2]
  counts = [jnp.maximum(jnp.round(zoom * n), 1) for n in sides]
  sources = []
  for n, count in zip(sides, counts, strict=True):
    # The array keeps its static shape. Only its first `count` pixels are used, and the last of these is repeated.
    pixel = jnp.minimum(jnp.arange(n), count - 1)
    sources.append(jnp.clip(jnp.floor((pixel + 0.5) * n / count).astype(jnp.int32), 0, n - 1))
  rows, columns = sources
  scale = jnp.stack([n / count for n, count in zip(sides, counts, strict=True)])
  return jax.image.scale_and_translate(
    image[rows][:, columns], image.shape, (0, 1), scale, jnp.zeros(2), method='linear', antialias=False
  )


def change_contrast(image: jax.Array, factor: jax.Array, black: float, white: float) -> jax.Array:
  """Multiplies the distance from the mean of the windowed image by `factor`; the result is in the window.

  The mean is that of all slices of the image, so that a value becomes the same value in each of them.
  """
  windowed = jnp.clip(image, black, white)
  mean = windowed.mean()
  return jnp.clip(mean + (windowed - mean) * factor, black, white)


def change_gamma(image: jax.Array, power: jax.Array, invert: jax.Array, black: float, white: float) -> jax.Array:
  """Scales the window of an image to 0 to 1 and raises it to `power`; if `invert`, 1 minus the value instead."""
  level = jnp.clip((image - black) / (white - black), 0, 1)
  level = jnp.where(invert, 1 - level, level) ** power
  return black + (white - black) * jnp.where(invert, 1 - level, level)
