"""Packed maps: several neighbouring pixels of a row share the channel axis, [B, H, W / pixels, pixels * C].

A TPU stores and computes channels in rows of 128. A map with 64 channels fills half of each row, and its convolutions a
quarter of the matrix unit. With two pixels per row nothing is empty. Packing keeps the order of the numbers in memory
as JAX sees it, so `pack` and `unpack` are reshapes; on a TPU they still move data, so whole levels of a network stay
packed. Parameters keep their shapes; the results are the same.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.typing import Dtype, Initializer

from fusa_jax.models.cpu.convolution import convolve


def pack(x: jax.Array, pixels: int) -> jax.Array:
  """[B, H, W, C] -> [B, H, W / pixels, pixels * C]."""
  batch, height, width, channels = x.shape
  return x.reshape(batch, height, width // pixels, pixels * channels)


def unpack(x: jax.Array, pixels: int) -> jax.Array:
  """[B, H, W / pixels, pixels * C] -> [B, H, W, C]."""
  batch, height, width, channels = x.shape
  return x.reshape(batch, height, width * pixels, channels // pixels)


def pack_kernel(kernel: jax.Array, pixels: int) -> jax.Array:
  """The kernel [h, w', pixels * I, pixels * O] that does on packed maps what `kernel` [h, w, I, O] does on maps.

  The width w is odd; the convolution has stride 1 and keeps the width of the map. The packed kernel has many zeros.
  """
  height, width, inputs, outputs = kernel.shape
  reach = width // 2
  groups = -(-reach // pixels)  # neighbours to each side, in groups of pixels
  # Output pixel `o` reads pixel `i` of group `group` by this tap, if there is one.
  group, i, o = np.ogrid[-groups : groups + 1, :pixels, :pixels]
  taps = group * pixels + i - o + reach
  none = jnp.zeros_like(kernel[:, 0])
  parts = jnp.stack([kernel[:, tap] if 0 <= tap < width else none for tap in taps.flat])
  parts = parts.reshape(*taps.shape, height, inputs, outputs).transpose(3, 0, 1, 4, 2, 5)
  return parts.reshape(height, 2 * groups + 1, pixels * inputs, pixels * outputs)


class Conv(nn.Module):
  """layers.Conv on packed maps, with the same parameters; strides are 1 and the output has the size of the input.

  The arguments `strides`, `padding` and `kernel_dilation` exist because residual blocks pass them to any convolution.
  """

  features: int
  kernel_size: tuple[int, int]
  strides: int = 1
  padding: int | str = 'SAME'
  kernel_dilation: int = 1
  use_bias: bool = True
  dtype: Dtype | None = None
  precision: jax.lax.PrecisionLike = None
  kernel_init: Initializer = nn.initializers.lecun_normal()
  pixels: int = 2

  @nn.compact
  def __call__(self, x: jax.Array | tuple[jax.Array, ...]) -> jax.Array:
    """x: a packed map, or several; of several, the convolution takes all channels of a pixel."""
    assert self.strides == self.kernel_dilation == 1
    maps = x if isinstance(x, tuple) else (x,)
    channels = [part.shape[-1] // self.pixels for part in maps]
    kernel = self.param('kernel', self.kernel_init, (*self.kernel_size, sum(channels), self.features))
    bias = self.param('bias', nn.initializers.zeros, (self.features,)) if self.use_bias else None
    # Joining the channels pixel by pixel would move each number within its row of 128. The kernel is small.
    kernels = jnp.split(kernel, np.cumsum(channels)[:-1], axis=2)
    kernel = jnp.concatenate([pack_kernel(part, self.pixels) for part in kernels], axis=2)
    x = jnp.concatenate(maps, axis=-1)
    x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
    out = convolve(x, kernel, (1, 1), 'SAME', precision=self.precision)
    return out if bias is None else out + jnp.tile(bias, self.pixels)


def halve(x: jax.Array) -> jax.Array:
  """2 x 2 max-pooling with stride 2 of a map packed by two: [B, H, W / 2, 2 C] -> [B, H / 2, W / 2, C], not packed.

  If several values of a window are the largest, the first one gets the gradient, as in `max_pool`.
  """
  larger = lambda first, second: jnp.where((first >= second) | jnp.isnan(first), first, second)
  rows = larger(*jnp.split(x, 2, axis=-1))
  batch, height, width, channels = rows.shape
  rows = rows.reshape(batch, height // 2, 2, width, channels)
  return larger(rows[:, :, 0], rows[:, :, 1])
