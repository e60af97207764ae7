"""VGG-16 (Simonyan and Zisserman 2015) with batch norm, with the same layers as torchvision's `vgg16_bn`."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from fusa_jax.models.layers import ImageHead, adaptive_mean, check_sides, last_level, layers, max_pool

# For each of the five max-pools: the number of convolutions before it, and their channels relative to the first level.
STAGES = ((2, 1), (2, 2), (3, 4), (3, 8), (3, 8))


class VGG16(nn.Module):
  """Images [B, H, W, any number of channels] -> float32 logits [B, num_classes].

  Attributes:
    width: channels of the first level; the two hidden dense layers have 64 times as many.
    dropout: dropout rate of the hidden dense layers.

  Raises:
    UserError: height or width is less than 32.
  """

  num_classes: int
  width: int = 64
  dropout: float = 0.5
  dtype: jnp.dtype | None = None

  @nn.compact
  def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
    check_sides(images, 'VGG', least=32)
    parts, x = layers(train, self.dtype), images
    for stage, (count, multiple) in enumerate(STAGES, start=1):
      for index in range(1, count + 1):
        # A norm follows, but these convolutions have a bias, as in torchvision and its published weights.
        x = parts['conv'](self.width * multiple, (3, 3), padding=1, use_bias=True, name=f'conv{stage}_{index}')(x)
        x = nn.relu(parts['norm'](name=f'norm{stage}_{index}')(x))
      if stage == len(STAGES):
        x = last_level(self, x)  # the last convolution, before its pool: as in the paper of Grad-CAM
      x = max_pool(x, 2, 2)
    x = adaptive_mean(x, 7)
    x = x.reshape(x.shape[0], -1)  # not len(x): in an exported function the batch size is symbolic
    for name in ('dense1', 'dense2'):
      x = nn.relu(nn.Dense(64 * self.width, kernel_init=_small, dtype=self.dtype, name=name)(x))
      x = nn.Dropout(self.dropout, deterministic=not train)(x)
    return ImageHead(self.num_classes, kernel_init=_small)(x)


_small = nn.initializers.normal(0.01)
