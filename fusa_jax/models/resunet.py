"""ResUNet, and with `attention=FUSA` the paper's FUSA-ResUnet (section II-C, Fig. 3): a U-Net of residual blocks."""

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from fusa_jax.models.layers import Doubling, PixelHead, check_sides, layers, max_pool, wide
from fusa_jax.models.resnet import BasicBlock


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
    remat: keep only the input of each block for the backward pass, which computes the rest again.

  Raises:
    UserError: height or width is not a multiple of 16; the message names the next size that fits.
  """

  num_classes: int
  width: int = 64
  multiples: Sequence[int] = (1, 2, 4, 8, 16)
  attention: Callable | None = None
  dtype: jnp.dtype | None = None
  remat: bool = False

  @nn.compact
  def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
    check_sides(images, 'ResUNet', multiple=2 ** (len(self.multiples) - 1))
    parts = layers(train, self.dtype)
    block_type = nn.remat(BasicBlock) if self.remat and train else BasicBlock

    def block(x, level, name, attention=self.attention):
      return block_type(self.width * self.multiples[level], attention=attention, **parts, name=name)(x)

    skips = [block(images, 0, 'stem', attention=None)]
    for level in range(1, len(self.multiples)):
      skips.append(block(max_pool(skips[-1], 2, 2), level, f'down{level}'))
    x = skips.pop()
    for level in reversed(range(len(self.multiples) - 1)):
      x = Doubling(self.width * self.multiples[level], dtype=self.dtype, name=f'up{level}_conv')(x)
      x = block(jnp.concatenate([skips.pop(), x], axis=-1), level, f'up{level}')
      if level and not self.is_initializing():
        self.sow('levels', f'level{level}', x)  # for deep supervision (fusa_jax/tasks/supervision.py)
    return PixelHead(self.num_classes, (1, 1))(wide(x))
