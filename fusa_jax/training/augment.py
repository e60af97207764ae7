"""Random changes to a training batch, made on the device inside the step (paper, section III-B).

Functions of one image [H, W] and its mask are written for one row and mapped over the batch; every row has a key of
its own, so that what happens to it does not depend on how the batch is spread over devices.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections

from fusa_jax.tasks import window


class Augmentation(NamedTuple):
  """What is done to a training row; each part is off at its default.

  Attributes:
    crop_probability: of cropping; otherwise the whole slice is kept.
    crop_fractions: sides of a crop relative to the slice's, one drawn for each row (the paper: 1/2, 1/4, 1/8).
    flip: mirror left and right with probability 1/2.
    hu_shift: up to so much, up or down, is added to all of a slice.
    hu_scale: up to this fraction a slice's contrast around water is raised or lowered.
    water: the value of water, 0 HU.
    tissue: above this value is tissue: where there is no lesion to crop around, a crop shows some of the body.
  """

  crop_probability: float = 0.0
  crop_fractions: Sequence[float] = (1 / 2, 1 / 4, 1 / 8)
  flip: bool = False
  hu_shift: float = 0.0
  hu_scale: float = 0.0
  water: float = 0.0
  tissue: float = -500.0


def create(config: ml_collections.ConfigDict) -> Augmentation:
  """What config.augment asks for, in the values of config.data; black and white of grey are the HU window's ends."""
  options = Augmentation(**config.augment)
  if config.data.intensity == 'hu':
    return options
  (black, white), (low, high) = window.GREY, config.data.window
  a_hu = (white - black) / (high - low)
  return options._replace(
    hu_shift=options.hu_shift * a_hu,
    water=black + (options.water - low) * a_hu,
    tissue=black + (options.tissue - low) * a_hu,
  )


def augment(key: jax.Array, image: jax.Array, mask: jax.Array, options: Augmentation) -> tuple[jax.Array, jax.Array]:
  """image and mask {0, 1}, both [B, H, W] -> the same, float32 and uint8, changed row by row at random."""
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
  """A place [2] = (row, column), each of those where `where` [H, W] holds equally likely; any place if there is none.

  First a row by how many it has, then a column of it: two draws, instead of one random number for each pixel.
  """
  weight = jnp.where(where.any(), where, True).astype(jnp.float32)
  row_key, column_key = jax.random.split(key)
  row = _draw(row_key, weight.sum(axis=1))
  return jnp.stack([row, _draw(column_key, weight[row])])


def _draw(key, weights):
  """An index with a probability proportional to `weights`, by inverting the distribution function."""
  total = jnp.cumsum(weights)
  # In (0, 1]: an index of weight zero is never the first one whose sum reaches the drawn value.
  drawn = (1 - jax.random.uniform(key)) * total[-1]
  return jnp.minimum(jnp.searchsorted(total, drawn, side='left'), len(weights) - 1)


def crop_around(key: jax.Array, point: jax.Array, fraction: jax.Array, shape: tuple[int, int]) -> jax.Array:
  """The top left corner [2], in pixels, of a crop that lies inside the image and has `point` somewhere in it."""
  side = fraction * jnp.asarray(shape, jnp.float32)
  corner = point + 0.5 - jax.random.uniform(key, (2,)) * side
  return jnp.clip(corner, 0, jnp.asarray(shape, jnp.float32) - side)


def crop(image: jax.Array, mask: jax.Array, top_left: jax.Array, fraction: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The crop at `top_left` with sides of `fraction` of the image's, resized to the image's shape.

  The image is interpolated linearly (two small matrix products), the mask takes the nearest pixel; both sample the
  same points, centres of the output's pixels laid over the crop.
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
