"""ResUNet, and with `attention=FUSA` the paper's FUSA-ResUnet (section II-C, Fig. 3): a U-Net of residual blocks."""

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from fusa_jax.models.layers import Conv, Doubling, check_sides, layers, max_pool, wide
from fusa_jax.models.resnet import BasicBlock


class ResUNet(nn.Module):
  """Images [B, H, W, any number of channels] -> float32 logits [B, H, W, num_classes].

  A residual block to `width` channels, four times (max-pool 2, residual block of twice the channels), then back up:
  2x2 transposed convolution, concatenation with the encoder's features of that size, residual block. The block is
  ResNet's basic block, its projection shortcut included. The first block carries no attention: the paper's text has
  "a residual module" there and "global attention residual modules" after it.

  Attributes:
    width: channels at full resolution; the five levels have width * (1, 2, 4, 8, 16).
    attention: a constructor of the module that scales each block's branch (FUSA), or None for the plain baseline.

  Raises UserError where height or width is not a multiple of 16, naming the next size that is.
  """

  num_classes: int
  width: int = 64
  multiples: Sequence[int] = (1, 2, 4, 8, 16)
  attention: Callable | None = None
  dtype: jnp.dtype | None = None

  @nn.compact
  def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
    check_sides(images, 'ResUNet', multiple=2 ** (len(self.multiples) - 1))
    kinds = layers(train, self.dtype)

    def block(x, level, name, attention=self.attention):
      return BasicBlock(self.width * self.multiples[level], attention=attention, **kinds, name=name)(x)

    skips = [block(images, 0, 'stem', attention=None)]
    for level in range(1, len(self.multiples)):
      skips.append(block(max_pool(skips[-1], 2, 2), level, f'down{level}'))
    x = skips.pop()
    for level in reversed(range(len(self.multiples) - 1)):
      x = Doubling(self.width * self.multiples[level], dtype=self.dtype, name=f'up{level}_conv')(x)
      x = block(jnp.concatenate([skips.pop(), x], axis=-1), level, f'up{level}')
    return Conv(self.num_classes, (1, 1), name='head')(wide(x))
