"""Deep supervision: in training, lower levels of a decoder also predict masks (Lee et al., AISTATS 2015; nnU-Net).

The heads of these levels belong to the train state, not to the model. Checkpoints for evaluation, and bundles, do not
hold them.
"""

import functools
from collections.abc import Callable, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from fusa_jax.models.layers import PixelHead
from fusa_jax.models.precision import wide
from fusa_jax.scans.classes import IGNORED


class Heads(nn.Module):
  """A 1x1 convolution per level: features {name: [B, h, w, C]} -> float32 logits {name: [B, h, w, num_classes]}."""

  num_classes: int = 1

  @nn.compact
  def __call__(self, features: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: PixelHead(self.num_classes, (1, 1), name=name)(wide(x)) for name, x in features.items()}


def features(levels: Mapping[str, tuple[jax.Array]]) -> dict[str, jax.Array]:
  """Returns the features of a decoder's levels, the largest first, from the collection `levels` of the model."""
  stored = {name: value for name, (value,) in levels.items()}
  return dict(sorted(stored.items(), key=lambda item: -item[1].shape[1]))


def loss(
  of_level: Callable[[jax.Array, jax.Array], jax.Array],
  logits: jax.Array,
  deep: Mapping[str, jax.Array],
  truth: jax.Array,
  has_ignored: bool = False,
) -> jax.Array:
  """The weighted mean of a loss over the levels, with weights 1, 1/2, 1/4, ... from the full resolution down.

  Args:
    of_level: the loss of one level.
    logits: of the full resolution, [B, H, W, classes].
    deep: logits of the lower levels, the largest first, from `Heads`.
    truth: the mask [B, H, W], whose bits are classes. A lower level has a class in a pixel if at least half of the area
      has. It is unknown if any of the area is.
    has_ignored: whether the truth may be unknown somewhere.
  """
  outputs = [logits, *deep.values()]
  weights = [2.0**-level for level in range(len(outputs))]
  reduced = [_reduced(truth, truth.shape[1] // level.shape[1], level.shape[-1], has_ignored) for level in outputs]
  losses = [of_level(level, mask) for level, mask in zip(outputs, reduced, strict=True)]
  return sum(weight * value for weight, value in zip(weights, losses, strict=True)) / sum(weights)


def _reduced(mask, factor, classes, has_ignored):
  if factor == 1:
    return mask
  if classes == 1 and not has_ignored:
    return _majority(mask, factor)
  bits = [_majority(mask >> number & 1, factor) << number for number in range(classes)]
  if has_ignored:
    bits.append((_shares(mask // IGNORED, factor) > 0).astype(mask.dtype) * IGNORED)
  return functools.reduce(jnp.bitwise_or, bits)


def _majority(mask, factor):
  return (2 * _shares(mask, factor) >= factor**2).astype(mask.dtype)


def _shares(mask, factor):
  """Returns the number of pixels of a mask {0, 1} in each block."""
  batch, height, width = mask.shape
  blocks = mask.reshape(batch, height // factor, factor, width // factor, factor)
  return blocks.sum(axis=(2, 4), dtype=jnp.int32)
