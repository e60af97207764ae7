"""MobileNetV2 (Sandler et al. 2018), with the same layers as torchvision's."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from fusa_jax.models.layers import ImageHead, last_level, layers
from fusa_jax.models.precision import wide_dtype

# For each group: expansion, channels, number of blocks, stride of the first block (the paper's Table 2).
GROUPS = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


class MobileNetV2(nn.Module):
  """Images [B, H, W, any number of channels] -> float32 logits [B, num_classes].

  Attributes:
    width: channels of the first level; 32 is the paper's width multiplier of 1.
    dropout: dropout rate of the pooled features.
  """

  num_classes: int
  width: int = 32
  dropout: float = 0.2
  dtype: jnp.dtype | None = None

  @nn.compact
  def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
    parts = layers(train, self.dtype)
    scale = self.width / 32

    def unit(x, features, name, **options):
      x = parts['conv'](features, name=f'{name}_conv', **options)(x)
      return nn.relu6(parts['norm'](name=f'{name}_norm')(x))

    x = unit(images, _rounded(32 * scale), 'stem', kernel_size=(3, 3), strides=2, padding=1)
    number = 0
    for expansion, features, count, stride in GROUPS:
      for index in range(count):
        number += 1
        x = _InvertedResidual(
          _rounded(features * scale), expansion, stride if index == 0 else 1, **parts, name=f'block{number}'
        )(x)
    x = last_level(self, unit(x, _rounded(1280 * max(scale, 1)), 'last', kernel_size=(1, 1)))
    x = x.mean((1, 2), dtype=wide_dtype(x))
    x = nn.Dropout(self.dropout, deterministic=not train)(x)
    return ImageHead(self.num_classes, kernel_init=nn.initializers.normal(0.01))(x)


class _InvertedResidual(nn.Module):
  """1x1 convolution to more channels, 3x3 convolution per channel, 1x1 to fewer; adds the input if shapes match."""

  features: int
  expansion: int
  stride: int
  conv: Callable
  norm: Callable

  @nn.compact
  def __call__(self, x):
    y, hidden = x, x.shape[-1] * self.expansion
    if self.expansion > 1:
      y = nn.relu6(self.norm(name='expand_norm')(self.conv(hidden, (1, 1), name='expand_conv')(y)))
    y = self.conv(hidden, (3, 3), self.stride, 1, feature_group_count=hidden, name='depthwise_conv')(y)
    y = nn.relu6(self.norm(name='depthwise_norm')(y))
    y = self.norm(name='project_norm')(self.conv(self.features, (1, 1), name='project_conv')(y))
    return x + y if x.shape == y.shape else y


def _rounded(channels: float) -> int:
  """Rounds to the nearest multiple of 8; rounds up if that is more than a tenth lower (the authors' own rule)."""
  near = max(8, int(channels + 4) // 8 * 8)
  return near if near >= 0.9 * channels else near + 8
