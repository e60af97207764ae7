"""ResNet-18/34/50 (He et al. 2016), and with `attention=FUSA` the paper's FUSA-ResNet (section II-B, Fig. 2).

The layers are the same as torchvision's: a bottleneck has its stride on the 3x3 convolution, padding is symmetric, and
batch norm has epsilon 1e-5. Classifiers and segmentation decoders share `Encoder`.
"""

import functools
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from fusa_jax.models.layers import ImageHead, ProjectionKernel, last_level, layers, max_pool, relu
from fusa_jax.models.precision import wide_dtype
from fusa_jax.system.errors import UserError


class _Residual(nn.Module):
  """relu(attention(F(x)) + shortcut(x)); the shortcut is a projection if the shape changes.

  The last norm of F starts with scale zero, so the block starts as its shortcut (Goyal et al. 2017, 5.1). The input may
  be a tuple of packed maps, a join, if `conv` takes them (tpu/packing.py).
  """

  features: int
  conv: Callable
  norm: Callable
  stride: int = 1
  dilation: int = 1
  attention: Callable | None = None

  expansion = 1
  # Whether the branch ends with a 1x1 convolution. On GPUs, such a convolution also applies its norm and adds the other
  # branch (gpu/projection.py). For images of one channel this always saves bytes: there it is a multiplication.
  joined = False

  def conv3x3(self, stride: int = 1, name: str | None = None):
    return self.conv(self.features, (3, 3), stride, self.dilation, kernel_dilation=self.dilation, name=name)

  @nn.compact
  def __call__(self, x):
    y = self.branch(x, self.attention and self.attention(name='attention'))
    if isinstance(x, tuple) or x.shape != y.shape:
      x = self.shortcut(x, self.features * self.expansion)
    return relu(y + x)

  def shortcut(self, x, features):
    if self.joined or (not isinstance(x, tuple) and x.shape[-1] == 1):
      return self.projection(x, features, self.stride, 'shortcut_conv', 'shortcut_norm')
    x = self.conv(features, (1, 1), self.stride, name='shortcut_conv')(x)
    return self.norm(name='shortcut_norm')(x)

  def projection(self, x, features, stride, conv, norm, **options):
    """A 1x1 convolution and its norm as one operation, for GPUs."""
    kernel = ProjectionKernel(features, name=conv)(x)
    return self.norm(name=norm, **options)(x, kernel, stride)


class BasicBlock(_Residual):
  """Two 3x3 convolutions."""

  def branch(self, x, attention):
    x = self.conv3x3(self.stride, name='conv1')(x)
    x = self.norm(relu=True, name='norm1')(x)
    x = self.conv3x3(name='conv2')(x)
    return self.norm(scale_init=nn.initializers.zeros, name='norm2')(x, attention=attention)


class Bottleneck(_Residual):
  """A 1x1, a 3x3 and a 1x1 convolution; the last one has four times the features."""

  expansion = 4
  joined = True

  def branch(self, x, attention):
    x = self.norm(relu=True, name='norm1')(self.conv(self.features, (1, 1), name='conv1')(x))
    x = self.norm(relu=True, name='norm2')(self.conv3x3(self.stride, name='conv2')(x))
    features, options = self.features * self.expansion, {'scale_init': nn.initializers.zeros}
    if attention is None:
      return self.projection(x, features, 1, 'conv3', 'norm3', **options)
    x = self.conv(features, (1, 1), name='conv3')(x)
    return self.norm(**options, name='norm3')(x, attention=attention)


class Encoder(nn.Module):
  """Stem and up to four stages: x [B, H, W, any] -> a list of features at strides 2, 4, 8, 16 and 32.

  Attributes:
    stage_sizes: number of blocks in each stage; fewer stages make a shallower encoder.
    output_stride: the largest stride. Stages that would exceed it use dilation instead of stride. The dilation applies
      to all of their 3x3 convolutions, as in segmentation_models_pytorch.
    remat: keep only the input of each block for the backward pass, which computes the rest again.
  """

  stage_sizes: Sequence[int]
  block: type[_Residual]
  width: int = 64
  attention: Callable | None = None
  output_stride: int = 32
  dtype: jnp.dtype | None = None
  remat: bool = False

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> list[jax.Array]:
    parts = layers(train, self.dtype)
    block = nn.remat(self.block) if self.remat and train else self.block
    x = parts['conv'](self.width, (7, 7), 2, 3, name='conv1')(x)
    x = parts['norm'](relu=True, name='norm1')(x)
    features = [x]
    x = max_pool(x, 3, 2, padding=1)
    for stage, size in enumerate(self.stage_sizes):
      dilation = max(4 * 2**stage // self.output_stride, 1)
      for index in range(size):
        x = block(
          self.width * 2**stage,
          stride=2 if stage > 0 and index == 0 and dilation == 1 else 1,
          dilation=dilation,
          attention=self.attention,
          **parts,
          name=f'stage{stage + 1}_{index}',
        )(x)
      features.append(x)
    return features


class ResNet(nn.Module):
  """Images [B, H, W, any number of channels] -> float32 logits [B, num_classes]."""

  num_classes: int
  stage_sizes: Sequence[int]
  block: type[_Residual]
  width: int = 64
  attention: Callable | None = None
  dtype: jnp.dtype | None = None
  remat: bool = False

  @nn.compact
  def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
    options = {'dtype': self.dtype, 'remat': self.remat}
    encoder = Encoder(self.stage_sizes, self.block, self.width, self.attention, **options, name='encoder')
    x = last_level(self, encoder(images, train)[-1])
    return ImageHead(self.num_classes)(x.mean((1, 2), dtype=wide_dtype(x)))


_STAGES = {
  'resnet18': {'stage_sizes': (2, 2, 2, 2), 'block': BasicBlock},
  'resnet34': {'stage_sizes': (3, 4, 6, 3), 'block': BasicBlock},
  'resnet50': {'stage_sizes': (3, 4, 6, 3), 'block': Bottleneck},
}
ResNet18, ResNet34, ResNet50 = (functools.partial(ResNet, **_STAGES[name]) for name in _STAGES)


def encoder_of(name: str, depth: int = 5, **options) -> Encoder:
  """Creates the encoder of a segmentation model, a submodule named `encoder` with features at `depth` strides.

  Raises:
    UserError: the name is not resnet18, resnet34 or resnet50.
  """
  if name not in _STAGES:
    raise UserError(f'model.encoder: {name!r} is unknown; give one of {", ".join(_STAGES)}')
  sizes, block = _STAGES[name]['stage_sizes'], _STAGES[name]['block']
  return Encoder(sizes[: depth - 1], block, **options, name='encoder')
