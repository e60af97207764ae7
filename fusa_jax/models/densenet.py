"""DenseNet-121 (Huang et al. 2017), with the same layers as torchvision's."""

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from fusa_jax.models.layers import ImageHead, check_sides, last_level, layers, max_pool
from fusa_jax.models.precision import wide_dtype


class DenseNet121(nn.Module):
  """Images [B, H, W, any number of channels] -> float32 logits [B, num_classes].

  Attributes:
    width: channels of the first level; each dense layer adds half as many (the growth rate).
    block_sizes: number of layers in each dense block.

  Raises:
    UserError: height or width is less than 32.
  """

  num_classes: int
  width: int = 64
  block_sizes: Sequence[int] = (6, 12, 24, 16)
  dtype: jnp.dtype | None = None

  @nn.compact
  def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
    check_sides(images, 'DenseNet', least=32)
    parts = layers(train, self.dtype)
    conv, norm = parts['conv'], parts['norm']
    x = conv(self.width, (7, 7), 2, 3, name='conv0')(images)
    x = nn.relu(norm(name='norm0')(x))
    x = max_pool(x, 3, 2, padding=1)
    for block, size in enumerate(self.block_sizes, start=1):
      for index in range(1, size + 1):
        new = _DenseLayer(self.width // 2, **parts, name=f'block{block}_layer{index}')(x)
        x = jnp.concatenate([x, new], axis=-1)
      if block < len(self.block_sizes):
        x = nn.relu(norm(name=f'transition{block}_norm')(x))
        x = conv(x.shape[-1] // 2, (1, 1), name=f'transition{block}_conv')(x)
        x = nn.avg_pool(x, (2, 2), (2, 2))
    x = last_level(self, nn.relu(norm(name='norm5')(x)))
    return ImageHead(self.num_classes)(x.mean((1, 2), dtype=wide_dtype(x)))


class _DenseLayer(nn.Module):
  """Norm, ReLU, 1x1 convolution to 4 * growth channels; then norm, ReLU, 3x3 convolution to growth channels."""

  growth: int
  conv: Callable
  norm: Callable

  @nn.compact
  def __call__(self, x):
    x = self.conv(4 * self.growth, (1, 1), name='conv1')(nn.relu(self.norm(name='norm1')(x)))
    return self.conv(self.growth, (3, 3), padding=1, name='conv2')(nn.relu(self.norm(name='norm2')(x)))
