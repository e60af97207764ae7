"""ResUNet, and with `attention=FUSA` the paper's FUSA-ResUnet (section II-C, Fig. 3): a U-Net of residual blocks."""

import functools
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from fusa_jax.models.layers import Doubling, PixelHead, check_sides, layers, max_pool
from fusa_jax.models.precision import HIGHEST, wide
from fusa_jax.models.resnet import BasicBlock
from fusa_jax.models.tpu import packing


class ResUNet(nn.Module):
  """Images [B, H, W, any number of channels] -> float32 logits [B, H, W, num_classes].

  The encoder starts with a residual block to `width` channels. Four levels down follow, each with 2x2 max-pooling and a
  residual block with twice the channels. Each level up has a 2x2 transposed convolution, the concatenation with the
  encoder's features of the same size, and a residual block. The block is ResNet's basic block with its projection
  shortcut. The first block has no attention: the paper calls it "a residual module" and the blocks after it "global
  attention residual modules".

  Attributes:
    width: channels at full resolution; the five levels have width * (1, 2, 4, 8, 16).
    multiples: channels of each level, relative to `width`; one number per level.
    attention: constructor of the module that scales each block's branch (FUSA), or None for the plain baseline.
    packed: keep two neighbouring pixels in one channel axis at full resolution, if both fit 128 channels. It is faster
      on TPUs (models/tpu/packing.py). Parameters and results are the same.
    remat: keep only the input of each block for the backward pass, which computes the rest again.

  Raises:
    UserError: height or width is not a multiple of 16; the message names the next size that fits.
  """

  num_classes: int
  width: int = 64
  multiples: Sequence[int] = (1, 2, 4, 8, 16)
  attention: Callable | None = None
  dtype: jnp.dtype | None = None
  packed: bool = False
  remat: bool = False

  @nn.compact
  def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
    check_sides(images, 'ResUNet', multiple=2 ** (len(self.multiples) - 1))
    top = 2 if self.packed and 2 * self.width <= 128 and images.shape[2] % 2 == 0 else 1
    pixels = [top] + [1] * (len(self.multiples) - 1)  # of each level's maps
    block_type = nn.remat(BasicBlock) if self.remat and train else BasicBlock

    def block(x, level, name, attention=self.attention):
      parts = layers(train, self.dtype, pixels[level])
      if attention is not None and pixels[level] > 1:
        attention = functools.partial(attention, pixels=pixels[level])
      return block_type(self.width * self.multiples[level], attention=attention, **parts, name=name)(x)

    skips = [block(packing.pack(images, top) if top > 1 else images, 0, 'stem', attention=None)]
    for level in range(1, len(self.multiples)):
      halved = packing.halve(skips[-1]) if pixels[level - 1] > 1 else max_pool(skips[-1], 2, 2)
      skips.append(block(halved, level, f'down{level}'))
    x = skips.pop()
    for level in reversed(range(len(self.multiples) - 1)):
      x = Doubling(self.width * self.multiples[level], self.dtype, pixels[level], name=f'up{level}_conv')(x)
      joined = (skips.pop(), x)
      x = block(joined if pixels[level] > 1 else jnp.concatenate(joined, axis=-1), level, f'up{level}')
      if level and not self.is_initializing():
        self.sow('levels', f'level{level}', x)  # for deep supervision (fusa_jax/tasks/supervision.py)
    if top == 1:
      return PixelHead(self.num_classes, (1, 1))(wide(x))
    head = packing.Conv(self.num_classes, (1, 1), pixels=top, precision=HIGHEST, name='head')
    return packing.unpack(head(wide(x)), top)
