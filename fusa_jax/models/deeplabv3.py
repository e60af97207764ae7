"""DeepLabV3 (Chen et al. 2017) as in segmentation_models_pytorch: dilated convolutions at stride 8."""

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from fusa_jax.models.layers import PixelHead, check_sides, layers, resize_corners
from fusa_jax.models.precision import wide, wide_dtype
from fusa_jax.models.resnet import encoder_of

_STRIDE = 8


class DeepLabV3(nn.Module):
  """Images [B, H, W, any number of channels] -> float32 logits [B, H, W, num_classes].

  The encoder's last two stages use dilation to stay at stride 8. Spatial pyramid pooling concatenates a 1x1
  convolution, three dilated 3x3 convolutions and the mean of the image. A 3x3 convolution and upsampling by 8 follow.

  Attributes:
    encoder: resnet18, resnet34 or resnet50.
    width: channels of the encoder's first level; the decoder has four times as many.
    attention: attention module of the encoder's residual blocks (FUSA), or None.
    rates: dilations of the three convolutions.
    dropout: share of the pyramid's values that training drops.

  Raises:
    UserError: height or width is not a multiple of 8; the message names the next size that fits.
  """

  num_classes: int
  encoder: str = 'resnet50'
  width: int = 64
  attention: Callable | None = None
  rates: Sequence[int] = (12, 24, 36)
  dropout: float = 0.5
  dtype: jnp.dtype | None = None

  @nn.compact
  def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
    check_sides(images, 'DeepLabV3', multiple=_STRIDE)
    parts = layers(train, self.dtype)
    encoder = encoder_of(
      self.encoder, width=self.width, attention=self.attention, output_stride=_STRIDE, dtype=self.dtype
    )
    x = encoder(images, train)[-1]
    _, height, width, _ = x.shape

    def unit(x, name, size=1, dilation=1):
      padding = dilation * (size // 2)
      x = parts['conv'](4 * self.width, (size, size), padding=padding, kernel_dilation=dilation, name=f'{name}conv')(x)
      return nn.relu(parts['norm'](name=f'{name}norm')(x))

    pyramid = [unit(x, 'aspp0_')]
    for index, rate in enumerate(self.rates, start=1):
      pyramid.append(unit(x, f'aspp{index}_', size=3, dilation=rate))
    mean = x.mean((1, 2), keepdims=True, dtype=wide_dtype(x)).astype(x.dtype)
    mean = unit(mean, f'aspp{len(self.rates) + 1}_')
    pyramid.append(jnp.broadcast_to(mean, pyramid[0].shape))
    x = unit(jnp.concatenate(pyramid, axis=-1), 'project_')
    x = nn.Dropout(self.dropout, deterministic=not train)(x)
    x = unit(x, '', size=3)
    x = PixelHead(self.num_classes, (1, 1))(wide(x))
    return resize_corners(x, height * _STRIDE, width * _STRIDE)
