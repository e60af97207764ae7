"""LinkNet (Chaurasia and Culurciello 2017) as in segmentation_models_pytorch: a ResNet, then a decoder with sums."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from fusa_jax.models.layers import PixelHead, check_sides, layers
from fusa_jax.models.precision import wide
from fusa_jax.models.resnet import encoder_of


class LinkNet(nn.Module):
  """Images [B, H, W, any number of channels] -> float32 logits [B, H, W, num_classes].

  Five blocks lead up from stride 32. Each block has three convolutions: 1x1 to a quarter of the channels, transposed
  4x4 with stride 2, and 1x1 to the channels of the encoder's features at the new stride. The decoder adds these
  features to the block's output.

  Attributes:
    encoder: resnet18, resnet34 or resnet50.
    width: channels of the encoder's first level; the last block has half as many.
    attention: attention module of the encoder's residual blocks (FUSA), or None.

  Raises:
    UserError: height or width is not a multiple of 32; the message names the next size that fits.
  """

  num_classes: int
  encoder: str = 'resnet18'
  width: int = 64
  attention: Callable | None = None
  dtype: jnp.dtype | None = None

  @nn.compact
  def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
    check_sides(images, 'LinkNet', multiple=32)
    encoder = encoder_of(self.encoder, width=self.width, attention=self.attention, dtype=self.dtype)
    *skips, x = encoder(images, train)
    for index, skip in enumerate([*reversed(skips), None]):
      features = self.width // 2 if skip is None else skip.shape[-1]
      x = _Up(features, **layers(train, self.dtype), dtype=self.dtype, name=f'decoder{index}')(x)
      if skip is not None:
        x += skip
    return PixelHead(self.num_classes, (1, 1))(wide(x))


class _Up(nn.Module):
  """Doubles height and width, in a bottleneck with a quarter of the channels."""

  features: int
  conv: Callable
  norm: Callable
  dtype: jnp.dtype | None

  @nn.compact
  def __call__(self, x):
    narrow = x.shape[-1] // 4
    x = nn.relu(self.norm(name='reduce_norm')(self.conv(narrow, (1, 1), name='reduce_conv')(x)))
    x = nn.ConvTranspose(narrow, (4, 4), (2, 2), 'SAME', dtype=self.dtype, name='up_conv')(x)
    x = nn.relu(self.norm(name='up_norm')(x))
    return nn.relu(self.norm(name='expand_norm')(self.conv(self.features, (1, 1), name='expand_conv')(x)))
