"""PSPNet (Zhao et al. 2017) as segmentation_models_pytorch has it: pooled context at stride 8, then one enlargement."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from fusa_jax.models.layers import Conv, adaptive_mean, check_sides, layers, resize_corners, wide
from fusa_jax.models.resnet import encoder_of

_STRIDE = 8


class PSPNet(nn.Module):
  """Images [B, H, W, any number of channels] -> float32 logits [B, H, W, num_classes].

  The encoder ends at stride 8, after its second stage. Its features are averaged over 1, 4, 9 and 36 bins, each set is
  brought to a quarter of the channels and enlarged again, and all are joined, before the features themselves.

  Attributes:
    encoder: resnet18, resnet34 or resnet50.
    width: channels of the encoder's first level; the decoder has eight times as many.
    attention: of the encoder's residual blocks (FUSA), or None.
    dropout: share of the decoder's channels that are dropped in training, whole maps at a time.

  Raises UserError where height or width is not a multiple of 8, naming the next size that is.
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
    kinds = layers(train, self.dtype)
    encoder = encoder_of(self.encoder, depth=3, width=self.width, attention=self.attention, dtype=self.dtype)
    x = encoder(images, train)[-1]
    _, height, width, channels = x.shape
    joined = []
    for bins in (1, 2, 3, 6):
      pooled = adaptive_mean(x, bins).astype(x.dtype)
      # One bin has no norm: there is nothing to take statistics of when the batch is one image.
      pooled = kinds['conv'](channels // 4, (1, 1), use_bias=bins == 1, name=f'pool{bins}_conv')(pooled)
      if bins > 1:
        pooled = kinds['norm'](name=f'pool{bins}_norm')(pooled)
      joined.append(resize_corners(nn.relu(pooled), height, width))
    x = kinds['conv'](8 * self.width, (1, 1), name='conv')(jnp.concatenate([*joined, x], axis=-1))
    x = nn.relu(kinds['norm'](name='norm')(x))
    x = nn.Dropout(self.dropout, broadcast_dims=(1, 2), deterministic=not train)(x)
    x = Conv(self.num_classes, (3, 3), padding=1, name='head')(wide(x))
    return resize_corners(x, height * _STRIDE, width * _STRIDE)
