"""Layers that the architectures share: convolutions and norms as in PyTorch, pooling and resizing to any size."""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from fusa_jax.fusa import FUSA, Norm, stored
from fusa_jax.models.cpu import pooling
from fusa_jax.models.cpu.convolution import convolve
from fusa_jax.models.gpu import norms, projection
from fusa_jax.models.precision import HIGHEST, wide, wide_dtype
from fusa_jax.models.tpu import packing
from fusa_jax.system.errors import UserError

# torchvision's initialisation of convolutions: normal, variance 2 / fan_out.
kaiming = nn.initializers.variance_scaling(2.0, 'fan_out', 'normal')


# nn.Conv with the same parameters and results; `convolve` only computes it faster on CPUs.
Conv = functools.partial(nn.Conv, conv_general_dilated_cls=lambda: convolve)

# The last layer of a model: logits of pixels or of images, in at least float32 if x is.
PixelHead = functools.partial(
  nn.Conv, precision=HIGHEST, name='head', conv_general_dilated_cls=lambda: _convolve_to_logits
)
ImageHead = functools.partial(nn.Dense, precision=HIGHEST, name='head')


def _convolve_to_logits(x, kernel, *window, **options):
  """`convolve`; on GPUs, a 1x1 convolution is a sum over channels, which reads the activations as they are stored."""
  general = lambda x, kernel: convolve(x, kernel, *window, **options)
  if kernel.shape[:2] != (1, 1):
    return general(x, kernel)
  sums = lambda x, kernel: jnp.stack([(x * weights).sum(-1) for weights in kernel[0, 0].T], axis=-1)
  return jax.lax.platform_dependent(x, kernel, cuda=sums, default=general)


class BatchNorm(nn.Module):
  """Batch norm over all axes except the last, as in PyTorch; the variables are named as in nn.BatchNorm.

  In training it normalises by the biased variance of the batch, sum / n. For the running variance PyTorch, and this
  class, use the unbiased variance, sum / (n - 1); Flax uses the biased one. The difference is largest if a norm
  sees few values, as in the last stages of small images.

  Attributes:
    pixels: above 1, x is a packed map [..., pixels * C] (tpu/packing.py).
    relu: also apply a ReLU; only without a kernel and without attention. GPUs then compute both at once (gpu/norms.py).
  """

  use_running_average: bool
  momentum: float
  epsilon: float
  scale_init: Callable = nn.initializers.ones
  dtype: jnp.dtype | None = None
  relu: bool = False
  pixels: int = 1

  @nn.compact
  def __call__(
    self, x: jax.Array, kernel: jax.Array | None = None, stride: int = 1, attention: FUSA | None = None
  ) -> jax.Array:
    """Normalises x [..., C].

    With a kernel [1, 1, C, O], it normalises the 1x1 convolution of x [B, H, W, C] with this kernel. With `attention`,
    it returns what that returns for the normalised x. GPUs compute these together with the norm.
    """
    shape = ((x if kernel is None else kernel).shape[-1] // self.pixels,)
    mean = self.variable('batch_stats', 'mean', jnp.zeros, shape, jnp.float32)
    var = self.variable('batch_stats', 'var', jnp.ones, shape, jnp.float32)
    scale = self.param('scale', self.scale_init, shape)
    bias = self.param('bias', nn.initializers.zeros, shape)
    dtype = nn.dtypes.canonicalize_dtype(x, scale, bias, dtype=self.dtype)
    if self.use_running_average:
      x = x if kernel is None else project(x, kernel, stride, dtype)
      inverse = jax.lax.rsqrt(var.value + self.epsilon)
      activation = nn.relu if self.relu else lambda x: x
      apply = lambda x: (activation(_affine(x, mean.value, inverse, scale, bias).astype(dtype)), ())
      affine = lambda x: ((mean.value, inverse * scale, bias), ())
    else:
      if self.relu:
        form = batch_norm_relu
      elif kernel is None:
        form = batch_norm
      else:
        form = lambda x, *rest: norm_of_projection(x, kernel, stride, *rest)
      apply = lambda x: _with_statistics(form(x, scale, bias, self.epsilon, dtype))
      affine = lambda x: _affine_of_batch(x, scale, bias, self.epsilon)
    out, statistics = attention.after(Norm(apply, affine, dtype), x) if attention else apply(x)
    if statistics and not self.is_initializing():
      count = out.size // mean.value.size
      kept = lambda old, new: self.momentum * old + (1 - self.momentum) * new
      batch_mean, batch_var = statistics
      mean.value = kept(mean.value, batch_mean)
      var.value = kept(var.value, batch_var * (count / max(count - 1, 1)))
    return out


def _with_statistics(out_mean_var):
  return out_mean_var[0], out_mean_var[1:]


def _affine_of_batch(x, scale, bias, epsilon):
  mean, var = statistics(x)
  return (mean, jax.lax.rsqrt(var + epsilon) * scale, bias), (mean, var)


def _affine(x, mean, inverse, scale, bias):
  # Subtract the mean first: if it is much larger than the deviation, rounding x * slope would cost precision.
  repeated = lambda vector: _repeated(vector, x)
  return (wide(x) - repeated(mean)) * repeated(inverse * scale) + repeated(bias)


def _repeated(vector, x):
  """The vector [C] for each pixel of a packed map x [..., pixels * C]."""
  return vector if vector.size == x.shape[-1] else jnp.tile(vector, x.shape[-1] // vector.size)


def _over_pixels(reduce, x, channels):
  """Reduces x [..., pixels * C] over all axes, and the pixels of a packed map: [C]."""
  vector = reduce(x, axis=tuple(range(x.ndim - 1)))
  return vector if vector.size == channels else reduce(vector.reshape(-1, channels), axis=0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def batch_norm(x, scale, bias, epsilon, dtype):
  """Normalises x [..., C] over all other axes, scales and shifts it; returns (output in dtype, mean [C], variance [C]).

  The backward pass (Ioffe & Szegedy 2015, section 3) reads the stored x behind a barrier. Without the barrier, a TPU's
  compiler keeps x - mean in float32 from the forward pass (docs/models.md). The output supports reverse-mode
  differentiation only; mean and variance have no gradient.
  """
  return _batch_norm_forward(x, scale, bias, epsilon, dtype)[0]


@jax.custom_vjp
def statistics(x):
  """Mean and variance [C] of x [..., C] over all other axes."""
  return _moments(x, x.shape[-1])


def _moments(x, channels):
  mean, mean_square = (_over_pixels(jnp.mean, terms, channels) for terms in (wide(x), jnp.square(wide(x))))
  return mean, jnp.maximum(mean_square - jnp.square(mean), 0)


def _statistics_forward(x):
  mean, var = statistics(x)
  return (mean, var), (x, mean)


def _statistics_backward(residuals, cotangents):
  x, mean = residuals
  d_mean, d_var = cotangents
  return (((d_mean + 2 * d_var * (wide(x) - mean)) / (x.size // x.shape[-1])).astype(x.dtype),)


statistics.defvjp(_statistics_forward, _statistics_backward)


def _batch_norm_forward(x, scale, bias, epsilon, dtype):
  mean, var = _moments(x, scale.size)
  inverse = jax.lax.rsqrt(var + epsilon)
  return (_affine(x, mean, inverse, scale, bias).astype(dtype), mean, var), (x, mean, inverse, scale)


def _batch_norm_backward(epsilon, dtype, residuals, cotangents):
  x, mean, inverse, scale = residuals
  x, g = map(wide, stored(x, cotangents[0]))
  normal = (x - _repeated(mean, x)) * _repeated(inverse, x)
  d_bias, d_scale = (_over_pixels(jnp.sum, terms, scale.size) for terms in (g, g * normal))
  count = x.size // scale.size
  dx = _repeated(scale * inverse, x) * (g - _repeated(d_bias / count, x) - normal * _repeated(d_scale / count, x))
  return dx.astype(residuals[0].dtype), d_scale.astype(scale.dtype), d_bias.astype(scale.dtype)


batch_norm.defvjp(_batch_norm_forward, _batch_norm_backward)


def project(x, kernel, stride, dtype):
  """The 1x1 convolution of x [B, H, W, C] with a kernel [1, 1, C, O], as nn.Conv computes it."""
  x, kernel = nn.dtypes.promote_dtype(x, kernel, dtype=dtype)
  return convolve(x, kernel, (stride, stride), 'VALID')


def norm_of_projection(x, kernel, stride, scale, bias, epsilon, dtype):
  """`batch_norm` of `project`; returns (output, mean, variance). GPUs do not store its input (gpu/projection.py)."""
  general = lambda x, kernel, scale, bias: batch_norm(project(x, kernel, stride, dtype), scale, bias, epsilon, dtype)
  on_gpu = lambda *arrays: projection.normalised(*arrays, stride, epsilon, dtype)
  x, kernel = nn.dtypes.promote_dtype(x, kernel, dtype=dtype)
  return jax.lax.platform_dependent(x, kernel, scale, bias, cuda=on_gpu, default=general)


def batch_norm_relu(x, scale, bias, epsilon, dtype):
  """relu of `batch_norm`; returns (output, mean, variance)."""

  def general(x, scale, bias):
    out, *moments = batch_norm(x, scale, bias, epsilon, dtype)
    return nn.relu(out), *moments

  if x.shape[-1] != scale.size:  # a packed map, which only TPUs use
    return general(x, scale, bias)
  on_gpu = lambda *arrays: norms.batch_norm_relu(*arrays, epsilon, dtype)
  return jax.lax.platform_dependent(x, scale, bias, cuda=on_gpu, default=general)


def relu(x: jax.Array) -> jax.Array:
  """max(x, 0) of a sum x that nothing else reads. GPUs store only the output (gpu/norms.py)."""
  return jax.lax.platform_dependent(x, cuda=norms.relu, default=nn.relu)


class ProjectionKernel(nn.Module):
  """Creates the kernel of a 1x1 convolution as `Conv` does (name, layout, initialiser), but does not apply it."""

  features: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    return self.param('kernel', kaiming, (1, 1, x.shape[-1], self.features))


class Doubling(nn.Module):
  """2x2 transposed convolution with stride 2 and bias: doubles height and width. Parameters as in nn.ConvTranspose.

  Each output pixel depends on one input pixel. The layer is therefore a matrix product to four times the features,
  which are then arranged as 2 x 2 pixels. As a convolution, its gradients would be dilated convolutions, which XLA's
  CPU backend computes slowly. They took 2.7 of the 5.8 s of a training step of ResUNet (docs/benchmarks.md).
  With `pixels` above 1, the output is a packed map (tpu/packing.py).
  """

  features: int
  dtype: jnp.dtype | None = None
  pixels: int = 1

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    kernel = self.param('kernel', nn.initializers.lecun_normal(), (2, 2, x.shape[-1], self.features))
    bias = self.param('bias', nn.initializers.zeros, (self.features,))
    x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
    batch, height, width, _ = x.shape
    # XLA on GPUs would compute a ReLU within the product, and store its input beside its output.
    (x,) = jax.lax.platform_dependent((x,), cuda=jax.lax.optimization_barrier, default=lambda x: x)
    # lax.conv_transpose mirrors its kernel, so this does too. The kernel is transposed once, here. Otherwise XLA would
    # transpose it in each of the three products of a training step.
    matrix = kernel[::-1, ::-1].transpose(2, 0, 1, 3).reshape(x.shape[-1], -1)
    out = jnp.einsum('bhwi,io->bhwo', x, matrix).reshape(batch, height, width, 2, 2, self.features) + bias
    return out.swapaxes(2, 3).reshape(batch, 2 * height, 2 * width // self.pixels, self.pixels * self.features)


def max_pool(x: jax.Array, size: int, stride: int, padding: int = 0) -> jax.Array:
  """[B, H, W, C] -> the largest value of each size x size window, as nn.max_pool. Reverse-mode gradients only."""
  return pooling.max_pool(x, (size, stride, padding))


def last_level(model: nn.Module, x: jax.Array) -> jax.Array:
  """Marks x [B, h, w, C] as the last level of a classifier: the features that its head pools. Returns x.

  Each classifier calls it once, in `__call__`. Explanations read x from the collection 'intermediates', and its
  gradient from 'perturbations', both as 'last_level' (inference/explanation.py). Otherwise it does nothing:
  variables, programs and their cost stay the same.
  """
  model.sow('intermediates', 'last_level', x)
  # Otherwise `init` would return the perturbation with the parameters.
  return x if model.is_initializing() else model.perturb('last_level', x)


def layers(train: bool, dtype, pixels: int = 1) -> dict[str, Callable]:
  """Returns the constructors `conv` and `norm` for all blocks, so the blocks need not handle dtypes or train mode.

  With `pixels` above 1, they are for packed maps (tpu/packing.py).
  """
  conv = functools.partial(packing.Conv, pixels=pixels) if pixels > 1 else Conv
  norm = functools.partial(BatchNorm, pixels=pixels)
  return {
    'conv': functools.partial(conv, use_bias=False, kernel_init=kaiming, dtype=dtype),
    'norm': functools.partial(norm, use_running_average=not train, momentum=0.9, epsilon=1e-5, dtype=dtype),
  }


def adaptive_mean(x: jax.Array, size: int) -> jax.Array:
  """[B, H, W, C] -> [B, size, size, C]: the means over size x size bins, in at least float32.

  It follows PyTorch's AdaptiveAvgPool2d: on an axis of length n, bin i is [floor(i n / size), ceil((i + 1) n / size)).
  The bins overlap if n is not a multiple of size.
  """
  rows, columns = (_bins(n, size, wide_dtype(x)) for n in x.shape[1:3])
  return jnp.einsum('ih,jw,bhwc->bijc', rows, columns, wide(x), precision=HIGHEST)


def _bins(n, size, dtype):
  start = np.arange(size) * n // size
  stop = -(-np.arange(1, size + 1) * n // size)
  inside = (np.arange(n) >= start[:, None]) & (np.arange(n) < stop[:, None])
  return jnp.asarray(inside / inside.sum(axis=1, keepdims=True), dtype)


def resize_corners(x: jax.Array, height: int, width: int) -> jax.Array:
  """[B, H, W, C] -> [B, height, width, C]: bilinear resizing as in PyTorch with `align_corners=True`."""
  rows, columns = (_corner_weights(n, m, x.dtype) for n, m in zip(x.shape[1:3], (height, width), strict=True))
  return jnp.einsum('ih,jw,bhwc->bijc', rows, columns, x, precision=HIGHEST)


def _corner_weights(n, m, dtype):
  """The interpolation matrix [m, n] along one axis; each row has at most two nonzero weights."""
  at = np.arange(m) * ((n - 1) / (m - 1) if m > 1 else 0.0)
  return jnp.asarray(np.maximum(0, 1 - np.abs(at[:, None] - np.arange(n))), dtype)


def check_sides(images: jax.Array, model: str, multiple: int = 1, least: int = 1) -> None:
  """Checks height and width of images [B, H, W, C].

  Raises:
    UserError: a side is not a multiple of `multiple`, or is less than `least`; the message names the next valid size.
  """
  for side in images.shape[1:3]:
    fits = max(-(-side // multiple) * multiple, least)
    if side != fits:
      allowed = f'a multiple of {multiple}' if multiple > 1 else f'at least {least}'
      raise UserError(f'data.image_size: {side} must be {allowed} for {model}; give {fits}')
