"""PSPNet (Zhao et al. 2017) as in segmentation_models_pytorch: pooled context at stride 8, then upsampling by 8."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from fusa_jax.models.layers import PixelHead, adaptive_mean, check_sides, layers, resize_corners
from fusa_jax.models.precision import wide
from fusa_jax.models.resnet import encoder_of

_STRIDE = 8


class PSPNet(nn.Module):
  """Images [B, H, W, any number of channels] -> float32 logits [B, H, W, num_classes].

  The encoder ends at stride 8, after its second stage. The decoder averages the features over 1, 4, 9 and 36 bins. A
  1x1 convolution reduces each set to a quarter of the channels, and resizing brings it back to stride 8. The decoder
  then concatenates the four sets and the features themselves, in this order.

  Attributes:
    encoder: resnet18, resnet34 or resnet50.
    width: channels of the encoder's first level; the decoder has eight times as many.
    attention: attention module of the encoder's residual blocks (FUSA), or None.
    dropout: share of the decoder's channels that training drops, as whole maps.

  Raises:
    UserError: height or width is not a multiple of 8; the message names the next size that fits.
  """

  num_classes: int
  encoder: str = 'resnet50'
  width: int = 64
  attention: Callable | None = None
  dropout: float = 0.2
  dtype: jnp.dtype | None = None

  @nn.compact
  def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
    check_sides(images, 'PSPNet', multiple=_STRIDE)
    parts = layers(train, self.dtype)
    encoder = encoder_of(self.encoder, depth=3, width=self.width, attention=self.attention, dtype=self.dtype)
    x = encoder(images, train)[-1]
    _, height, width, channels = x.shape
    joined = []
    for bins in (1, 2, 3, 6):
      pooled = adaptive_mean(x, bins).astype(x.dtype)
      # No norm for one bin: with a batch of one image it would compute statistics of a single value.
      pooled = parts['conv'](channels // 4, (1, 1), use_bias=bins == 1, name=f'pool{bins}_conv')(pooled)
      if bins > 1:
        pooled = parts['norm'](name=f'pool{bins}_norm')(pooled)
      joined.append(resize_corners(nn.relu(pooled), height, width))
    x = parts['conv'](8 * self.width, (1, 1), name='conv')(jnp.concatenate([*joined, x], axis=-1))
    x = nn.relu(parts['norm'](name='norm')(x))
    x = nn.Dropout(self.dropout, broadcast_dims=(1, 2), deterministic=not train)(x)
    x = PixelHead(self.num_classes, (3, 3), padding=1)(wide(x))
    return resize_corners(x, height * _STRIDE, width * _STRIDE)
