"""Deep supervision: in training, lower levels of a decoder also predict masks (Lee et al., AISTATS 2015; nnU-Net).

The heads of these levels belong to the train state, not to the model. Checkpoints for evaluation, and bundles, do not
hold them.
"""

from collections.abc import Callable, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from fusa_jax.models.layers import PixelHead
from fusa_jax.models.precision import wide


class Heads(nn.Module):
  """A 1x1 convolution per level: features {name: [B, h, w, C]} -> float32 logits {name: [B, h, w, 1]}."""

  @nn.compact
  def __call__(self, features: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: PixelHead(1, (1, 1), name=name)(wide(x)) for name, x in features.items()}


def features(levels: Mapping[str, tuple[jax.Array]]) -> dict[str, jax.Array]:
  """Returns the features of a decoder's levels, the largest first, from the collection `levels` of the model."""
  stored = {name: value for name, (value,) in levels.items()}
  return dict(sorted(stored.items(), key=lambda item: -item[1].shape[1]))


def loss(
  of_level: Callable[[jax.Array, jax.Array], jax.Array],
  logits: jax.Array,
  deep: Mapping[str, jax.Array],
  truth: jax.Array,
) -> jax.Array:
  """The weighted mean of a loss over the levels, with weights 1, 1/2, 1/4, ... from the full resolution down.

  Args:
    of_level: the loss of one level.
    logits: of the full resolution, [B, H, W, 1].
    deep: logits of the lower levels, the largest first, from `Heads`.
    truth: the mask [B, H, W]. A lower level has lesion in a pixel if at least half of the area has.
  """
  outputs = [logits, *deep.values()]
  weights = [2.0**-level for level in range(len(outputs))]
  losses = [of_level(output, _reduced(truth, truth.shape[1] // output.shape[1])) for output in outputs]
  return sum(weight * value for weight, value in zip(weights, losses, strict=True)) / sum(weights)


def _reduced(mask, factor):
  if factor == 1:
    return mask
  batch, height, width = mask.shape
  blocks = mask.reshape(batch, height // factor, factor, width // factor, factor)
  return (2 * blocks.sum(axis=(2, 4), dtype=jnp.int32) >= factor**2).astype(mask.dtype)
