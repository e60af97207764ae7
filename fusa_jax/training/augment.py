"""Augments training batches on the device, inside the training step (paper, section III-B).

Functions are written for one image [H, W] and its mask, and mapped over the batch. Every row has its own random key, so
its augmentation does not depend on the distribution of the batch over devices.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections

from fusa_jax.tasks import window


class Augmentation(NamedTuple):
  """The augmentation of a training row. By default it changes nothing.

  Attributes:
    crop_probability: probability of a crop; otherwise the whole slice is kept.
    crop_fractions: possible sides of a crop as fractions of the slice's side (the paper: 1/2, 1/4, 1/8).
    flip: mirror left to right with probability 1/2.
    hu_shift: a number from -hu_shift to hu_shift is added to the whole slice.
    hu_scale: the contrast around water is multiplied by a number from 1 - hu_scale to 1 + hu_scale.
    water: the stored value of water, 0 HU.
    tissue: higher values are tissue. A slice without lesion is cropped around a pixel of tissue.
  """

  crop_probability: float = 0.0
  crop_fractions: Sequence[float] = (1 / 2, 1 / 4, 1 / 8)
  flip: bool = False
  hu_shift: float = 0.0
  hu_scale: float = 0.0
  water: float = 0.0
  tissue: float = -500.0


def create(config: ml_collections.ConfigDict) -> Augmentation:
  """Returns the augmentation of a config, converted to grey values if config.data.intensity is 'grey'.

  The conversion maps the HU window linearly to the grey values from black to white.
  """
  options = Augmentation(**config.augment)
  if config.data.intensity == 'hu':
    return options
  (black, white), (low, high) = window.GREY, config.data.window
  per_hu = (white - black) / (high - low)
  return options._replace(
    hu_shift=options.hu_shift * per_hu,
    water=black + (options.water - low) * per_hu,
    tissue=black + (options.tissue - low) * per_hu,
  )


def augment(key: jax.Array, image: jax.Array, mask: jax.Array, options: Augmentation) -> tuple[jax.Array, jax.Array]:
  """Augments each row of a batch: image and mask {0, 1}, both [B, H, W] -> the same shapes, float32 and uint8."""
  keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(len(image)))
  return jax.vmap(lambda *row: _row(*row, options))(keys, image.astype(jnp.float32), mask)


def _row(key, image, mask, options):
  keys = dict(
    zip(('crop', 'fraction', 'point', 'place', 'flip', 'shift', 'scale'), jax.random.split(key, 7), strict=True)
  )
  if options.crop_probability:
    fraction = jax.random.choice(keys['fraction'], jnp.asarray(options.crop_fractions, jnp.float32))
    fraction = jnp.where(jax.random.bernoulli(keys['crop'], options.crop_probability), fraction, 1.0)
    foreground = jnp.where(mask.any(), mask > 0, image > options.tissue)
    top_left = crop_around(keys['place'], random_point(keys['point'], foreground), fraction, image.shape)
    image, mask = crop(image, mask, top_left, fraction)
  if options.flip:
    flip = jax.random.bernoulli(keys['flip'])
    image, mask = (jnp.where(flip, array[:, ::-1], array) for array in (image, mask))
  if options.hu_shift:
    image += jax.random.uniform(keys['shift'], minval=-options.hu_shift, maxval=options.hu_shift)
  if options.hu_scale:
    contrast = 1 + jax.random.uniform(keys['scale'], minval=-options.hu_scale, maxval=options.hu_scale)
    image = options.water + (image - options.water) * contrast
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
