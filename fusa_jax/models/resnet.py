"""ResNet-18/34/50 (He et al. 2016), and with `attention=FUSA` the paper's FUSA-ResNet (section II-B, Fig. 2).

Layer for layer torchvision's networks: stride on the 3x3 convolution of a bottleneck, symmetric padding, batch norm
with epsilon 1e-5. `Encoder` is the part that segmentation decoders share with the classifier.
"""

import functools
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

# torchvision's initialisation of convolutions: normal, variance 2 / fan_out.
kaiming = nn.initializers.variance_scaling(2.0, 'fan_out', 'normal')


def layers(train: bool, dtype) -> dict[str, Callable]:
  """The partials `conv` and `norm` that every block takes, so that no block knows of dtypes or of training."""
  return {
    'conv': functools.partial(nn.Conv, use_bias=False, kernel_init=kaiming, dtype=dtype),
    'norm': functools.partial(nn.BatchNorm, use_running_average=not train, momentum=0.9, epsilon=1e-5, dtype=dtype),
  }


class _Residual(nn.Module):
  """relu(attention(F(x)) + shortcut(x)); the shortcut is a projection where the shape changes.

  The last norm of F starts with scale zero, so that the block starts as its shortcut (Goyal et al. 2017, 5.1).
  """

  features: int
  conv: Callable
  norm: Callable
  stride: int = 1
  dilation: int = 1
  attention: Callable | None = None

  expansion = 1

  def conv3x3(self, stride: int = 1, name: str | None = None):
    return self.conv(self.features, (3, 3), stride, self.dilation, kernel_dilation=self.dilation, name=name)

  @nn.compact
  def __call__(self, x):
    y = self.branch(x)
    if self.attention is not None:
      y = self.attention(name='attention')(y)
    if x.shape != y.shape:
      x = self.conv(y.shape[-1], (1, 1), self.stride, name='shortcut_conv')(x)
      x = self.norm(name='shortcut_norm')(x)
    return nn.relu(y + x)


class BasicBlock(_Residual):
  """Two 3x3 convolutions."""

  def branch(self, x):
    x = self.conv3x3(self.stride, name='conv1')(x)
    x = nn.relu(self.norm(name='norm1')(x))
    x = self.conv3x3(name='conv2')(x)
    return self.norm(scale_init=nn.initializers.zeros, name='norm2')(x)


class Bottleneck(_Residual):
  """1x1, 3x3 and 1x1 convolution, the last one to four times the features."""

  expansion = 4

  def branch(self, x):
    x = nn.relu(self.norm(name='norm1')(self.conv(self.features, (1, 1), name='conv1')(x)))
    x = nn.relu(self.norm(name='norm2')(self.conv3x3(self.stride, name='conv2')(x)))
    x = self.conv(self.features * self.expansion, (1, 1), name='conv3')(x)
    return self.norm(scale_init=nn.initializers.zeros, name='norm3')(x)


class Encoder(nn.Module):
  """Stem and four stages: x [B, H, W, any] -> features at strides 2, 4, 8, 16 and 32, a list of five."""

  stage_sizes: Sequence[int]
  block: type[_Residual]
  width: int = 64
  attention: Callable | None = None
  dtype: jnp.dtype | None = None

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> list[jax.Array]:
    kinds = layers(train, self.dtype)
    x = kinds['conv'](self.width, (7, 7), 2, 3, name='conv1')(x)
    x = nn.relu(kinds['norm'](name='norm1')(x))
    features = [x]
    x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
    for stage, size in enumerate(self.stage_sizes):
      for index in range(size):
        stride = 2 if stage > 0 and index == 0 else 1
        x = self.block(
          self.width * 2**stage, stride=stride, attention=self.attention, **kinds, name=f'stage{stage + 1}_{index}'
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

  @nn.compact
  def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
    encoder = Encoder(self.stage_sizes, self.block, self.width, self.attention, self.dtype, name='encoder')
    x = encoder(images, train)[-1].mean((1, 2), dtype=jnp.promote_types(images.dtype, jnp.float32))
    return nn.Dense(self.num_classes, name='head')(x)


ResNet18 = functools.partial(ResNet, stage_sizes=(2, 2, 2, 2), block=BasicBlock)
ResNet34 = functools.partial(ResNet, stage_sizes=(3, 4, 6, 3), block=BasicBlock)
ResNet50 = functools.partial(ResNet, stage_sizes=(3, 4, 6, 3), block=Bottleneck)
