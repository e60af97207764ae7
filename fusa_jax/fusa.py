"""Full scale attention (paper, section II-A and Fig. 1).

For x of shape [B, *space, C] with one to three spatial axes, the module computes

    c = W_channel [max over space, mean over space] + b_channel          [B, C]
    s = w_spatial [max over C, mean over C] + b_spatial                  [B, *space, 1]
    A = sigmoid(W_fuse [c expanded, s expanded] + b_fuse)                [B, *space, C]

and returns x * A. The paper's literal form builds the two expanded tensors. This module does not need them.
The fuse kernel splits into K_c (rows of c) and K_s (rows of s). The expanded c is constant over space, and the expanded
s is constant over channels. Therefore exactly:

    logits[b, p, :] = c[b] K_c + b_fuse  +  s[b, p] * sum_j K_s[j, :]

`gate` does the remaining work. It takes one map and one vector per image, and its cost is memory traffic.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

from fusa_jax import fusa_gpu

# By default, a TPU multiplies float32 numbers in bfloat16 and a GPU in TF32. These products are small, so the highest
# precision costs little (docs/models.md).
_product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


class Norm(NamedTuple):
  """A norm in front of FUSA, which GPUs compute together with it.

  Attributes:
    apply: x [B, *space, C] -> (normalised x in dtype, statistics), as all other devices compute it.
    affine: x -> ((mean, scale, shift), statistics), each [C]; the normalised x is (x - mean) * scale + shift.
    dtype: of the normalised x.
  """

  apply: Callable
  affine: Callable
  dtype: jnp.dtype


class FUSA(nn.Module):
  """Multiplies each value of a feature map by an attention map of the same shape.

  Attributes:
    dtype: the dtype of the output. In the literal form it is also the dtype of the computation. None: the dtype of the
      input. The factored form computes in at least float32 for every dtype, because it stores no full-size tensor.
    literal: follow the paper's text step by step, including the [B, *space, 2C] tensor. This form is slow. The tests
      compare the default, factored form with it. Both forms have the same parameters.
    pixels: above 1, the input and the output are packed maps [B, *space, pixels * C] (models/tpu/packing.py).

  The attention map A [B, *space, C] is sown as 'attention' into the collection 'intermediates'. It costs nothing if the
  caller does not make that collection mutable.
  """

  dtype: jnp.dtype | None = None
  literal: bool = False
  pixels: int = 1

  def __call__(self, x: jax.Array) -> jax.Array:
    """x [B, *space, C] -> x * A, same shape.

    Raises:
      ValueError: x has no spatial axis.
    """
    if x.ndim < 3:
      raise ValueError(f'FUSA: x has shape {x.shape}; give an array [batch, *space, channels]')
    x = x.astype(self.dtype or x.dtype)
    if self.pixels == 1 and fusa_gpu.suits(x):
      x = _cotangent_in_dtype(x)
    return self.after(Norm(lambda x: (x, ()), lambda x: (_unchanged(x), ()), x.dtype), x)[0]

  @nn.compact
  def after(self, norm: Norm, x: jax.Array) -> tuple[jax.Array, Any]:
    """x [B, *space, C] -> (y * A for the normalised x y, the norm's statistics)."""
    space, channels = x.ndim - 2, x.shape[-1] // self.pixels
    channel = _Affine((2 * channels, channels), name='channel')()
    spatial = _Affine((1,) * space + (2, 1), name='spatial')()
    fuse = _Affine((1,) * space + (2 * channels, channels), name='fuse')()
    parameters, dtype = (channel, spatial, fuse), self.dtype or norm.dtype

    def by_xla(x, parameters):
      y, statistics = norm.apply(x)
      # Otherwise a TPU's compiler recomputes y in each pool from the input of the preceding norm. The block then moves
      # 48% more bytes than without FUSA; with the barrier it moves 6% more (benchmarks/fusa.py).
      (y,) = stored(y.astype(dtype))
      gating = factors(y, *parameters, self.pixels)
      return gate(y, *gating, self.pixels), statistics, gating

    def by_kernels(x, parameters):
      if jnp.finfo(dtype).bits > 16:
        # Values that are computed twice may differ in the last digit of float32, and then equal no maximum.
        x, statistics = norm.apply(x)
        x, affine = jax.lax.optimization_barrier(x), _unchanged(x)
      else:
        affine, statistics = norm.affine(x)
      return gate_normalised(dtype, x, affine, *parameters), statistics

    if self.literal:
      y, statistics = norm.apply(x)
      y = y.astype(dtype)
      attention = literal_attention(y, *jax.tree.map(lambda p: p.astype(dtype), parameters))
      self.sow('intermediates', 'attention', attention)
      return y * attention, statistics
    if (
      self.pixels == 1 and dtype == norm.dtype and fusa_gpu.suits(x) and not self.is_mutable_collection('intermediates')
    ):
      default = lambda *arguments: by_xla(*arguments)[:2]
      return jax.lax.platform_dependent(x, parameters, cuda=by_kernels, default=default)
    out, statistics, gating = by_xla(x, parameters)
    # Sow outside of `gate`, so the backward pass of `gate` does not need the map. The compiler drops an unused map.
    self.sow('intermediates', 'attention', nn.sigmoid(_logits(*gating, self.pixels)).astype(dtype))
    return out, statistics


def stored(*arrays: jax.Array) -> tuple[jax.Array, ...]:
  """Makes all operations that follow read the same stored arrays: a barrier for the compiler.

  On GPUs it does nothing. XLA recomputes less there, and the barrier costs a pass over the arrays (docs/models.md).
  """
  return jax.lax.platform_dependent(*arrays, cuda=lambda *x: x, default=lambda *x: jax.lax.optimization_barrier(x))


def _unchanged(x):
  """The affine of a norm that changes nothing: (mean, scale, shift)."""
  zeros = jnp.zeros(x.shape[-1], jnp.float32)
  return zeros, zeros + 1, zeros


@jax.custom_vjp
def _cotangent_in_dtype(x):
  """Returns x. On GPUs, its cotangent is stored in x's dtype; XLA would store float32 for a norm to read."""
  return x


def _cotangent_in_dtype_backward(_, g):
  return (jax.lax.platform_dependent(g, cuda=jax.lax.optimization_barrier, default=lambda g: g),)


_cotangent_in_dtype.defvjp(lambda x: (x, None), _cotangent_in_dtype_backward)


class _Affine(nn.Module):
  """Creates a kernel and a bias as nn.Dense and nn.Conv do (names, layout, initialisers), but does not apply them."""

  shape: tuple[int, ...]

  @nn.compact
  def __call__(self):
    return (
      self.param('kernel', nn.initializers.lecun_normal(), self.shape),
      self.param('bias', nn.initializers.zeros, self.shape[-1:]),
    )


def literal_attention(x, channel, spatial, fuse):
  """The attention map A for x [B, *space, C], by the paper's own steps.

  `channel`, `spatial` and `fuse` are (kernel, bias) pairs.
  """
  space = tuple(range(1, x.ndim - 1))
  c = jnp.concatenate([x.max(space), x.mean(space)], axis=-1)
  c = _product(c, channel[0]) + channel[1]
  s = jnp.concatenate([x.max(-1, keepdims=True), x.mean(-1, keepdims=True)], axis=-1)
  s = _product(s, spatial[0].reshape(2, 1)) + spatial[1]
  c = jnp.broadcast_to(jnp.expand_dims(c, space), x.shape)
  s = jnp.broadcast_to(s, x.shape)
  kernel = fuse[0].reshape(fuse[0].shape[-2:])
  return nn.sigmoid(_product(jnp.concatenate([c, s], axis=-1), kernel) + fuse[1])


def factors(x, channel, spatial, fuse, pixels=1):
  """Returns (offset [B, C], score [B, *space], slope [C]) in at least float32; logits = offset + score * slope."""
  return _factors(*pools(x, pixels), channel, spatial, fuse)


def _factors(channel_max, channel_mean, spatial_max, spatial_mean, channel, spatial, fuse):
  channels = channel_max.shape[-1]
  pooled = everywhere(jnp.concatenate([channel_max, channel_mean], axis=-1), channels)
  c = _product(pooled, channel[0]) + channel[1]
  kernel = fuse[0].reshape(2 * channels, channels)
  offset = everywhere(_product(c, kernel[:channels]) + fuse[1], channels)
  w_max, w_mean = spatial[0].reshape(2)
  score = w_max * spatial_max + w_mean * spatial_mean + spatial[1]
  slope = kernel[channels:].sum(axis=0)
  return offset, score, slope


def everywhere(vectors, channels):
  """Returns vectors [B, any] unchanged, but replicates them and their cotangent on all devices of the current mesh.

  By default XLA splits the dense layers over the batch, as it does all other work. It then sums the gradients of their
  kernels over the devices. These are 3 C^2 numbers, three quarters of all data that FUSA-ResNet-50 sends. The vectors
  are only 3 C numbers per image. A device that holds all of them computes the gradients by itself.
  This does not pay for a small kernel, because waiting for the vectors takes longer than summing its gradient. It does
  not pay for a large batch either, because the vectors are then as large as the gradients (docs/models.md).

  The current mesh is the one of `jax.set_mesh`. If the caller shards an axis explicitly or manually, or sets no
  mesh, this function does nothing.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or any(kind != AxisType.Auto for kind in mesh.axis_types):
    return vectors  # before the test below: in an exported function the batch size is symbolic
  if channels < max(512, 2 * len(vectors)):
    return vectors
  return jax.lax.with_sharding_constraint(vectors, PartitionSpec())


def _wide(dtype):
  """The dtype of sums and small tensors: float32, or float64 if the input is float64."""
  return jnp.promote_types(dtype, jnp.float32)


# A packed map [B, *space, pixels * C] holds neighbouring pixels of a row in its last axis (models/tpu/packing.py). Its
# values per pixel have the shape [pixels, B, *space]. The next five functions hide most of this.


def _repeated(vectors, pixels):
  """Vectors [..., C] -> [..., pixels * C]."""
  return vectors if pixels == 1 else jnp.tile(vectors, pixels)


def _over_space(vectors, space, pixels):
  """Vectors [B, C] -> [B, 1, ..., 1, pixels * C]."""
  return jnp.expand_dims(_repeated(vectors, pixels), tuple(range(1, 1 + space)))


def _over_channels(values, channels, pixels):
  """Values per pixel -> [B, *space, 1], or [B, *space, pixels * C] of a packed map."""
  if pixels == 1:
    return values[..., None]
  pixel = jnp.arange(pixels * channels) // channels
  select = lambda out, i: jnp.where(pixel == i, values[i][..., None], out)
  return functools.reduce(select, range(1, pixels), values[0][..., None])


def _of_space(reduce, x, pixels):
  """Reduces space: [B, *space, pixels * C] -> [B, C]."""
  vectors = reduce(x, axis=tuple(range(1, x.ndim - 1)))
  return vectors if pixels == 1 else reduce(vectors.reshape(len(x), pixels, -1), axis=1)


def _of_channels(reduce, x, pixels):
  """Reduces the channels of each pixel: [B, *space, pixels * C] -> values per pixel."""
  if pixels == 1:
    return reduce(x, axis=-1)
  return jnp.stack([reduce(part, axis=-1) for part in jnp.split(x, pixels, axis=-1)])


def _logits(offset, score, slope, pixels=1):
  space = score.ndim - (1 if pixels == 1 else 2)
  score = _over_channels(score, slope.size, pixels)
  return _over_space(offset, space, pixels) + score * _repeated(slope, pixels)


# The two functions below do all full-size work. Autodiff would keep tensors of x's size for the backward pass of both:
# the sigmoid's value, and the comparison of x with its maxima. It would also write each of the five terms of x's
# cotangent separately. The backward passes below keep only x and the small tensors. They recompute the rest from x,
# elementwise, inside the two sweeps over x that the backward pass needs anyway. On a whole block, a TPU's compiler gets
# most of this from plain autodiff too, if the barrier above stores x once (figures: docs/models.md).


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def pools(x, pixels=1):
  """Pools x [B, *space, C]: returns max and mean over space [B, C], then max and mean over channels [B, *space]."""
  wide = x.astype(_wide(x.dtype))
  return tuple(
    reduce(operation, values, pixels).astype(wide.dtype)
    for reduce in (_of_space, _of_channels)
    for operation, values in ((jnp.max, x), (jnp.mean, wide))
  )


def _pools_forward(x, pixels):
  out = pools(x, pixels)
  return out, (x, out[0], out[2])


def _pools_backward(pixels, residuals, cotangents):
  x, channel_max, spatial_max = residuals
  d_channel_max, d_channel_mean, d_spatial_max, d_spatial_mean = cotangents
  channels = channel_max.shape[-1]
  wide = x.astype(_wide(x.dtype))
  over_space = lambda vectors: _over_space(vectors, x.ndim - 2, pixels)
  over_channels = lambda values: _over_channels(values, channels, pixels)
  is_channel_max = wide == over_space(channel_max)
  is_spatial_max = wide == over_channels(spatial_max)
  # Places that tie for a maximum share its gradient equally, as in JAX's own max and in torch.amax. Normally at least
  # one place equals the maximum. If the compiler recomputes x with another rounding, there may be none (XLA's CPU
  # backend did this at a low optimisation level). `maximum(..., 1)` then prevents 0 / 0 in the gradient.
  count = functools.partial(jnp.sum, dtype=wide.dtype)
  d_channel_max = d_channel_max / jnp.maximum(_of_space(count, is_channel_max, pixels), 1)
  d_spatial_max = d_spatial_max / jnp.maximum(_of_channels(count, is_spatial_max, pixels), 1)
  size = x.size // channel_max.size
  dx = over_space(d_channel_mean / size) + over_channels(d_spatial_mean / channels)
  dx += jnp.where(is_channel_max, over_space(d_channel_max), 0)
  dx += jnp.where(is_spatial_max, over_channels(d_spatial_max), 0)
  return (dx.astype(x.dtype),)


pools.defvjp(_pools_forward, _pools_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def gate(x, offset, score, slope, pixels=1):
  """Returns x * sigmoid(offset + score * slope): x [B, *space, C], offset [B, C], score [B, *space], slope [C]."""
  attention = nn.sigmoid(_logits(offset, score, slope, pixels))
  return (x * attention).astype(x.dtype)


def _gate_forward(x, offset, score, slope, pixels):
  return gate(x, offset, score, slope, pixels), (x, offset, score, slope)


def _gate_backward(pixels, residuals, g):
  x, offset, score, slope = residuals
  attention = nn.sigmoid(_logits(offset, score, slope, pixels))
  d_logits = g * x.astype(attention.dtype) * attention * (1 - attention)
  d_offset = _of_space(jnp.sum, d_logits, pixels)
  d_score = _of_channels(jnp.sum, d_logits * _repeated(slope, pixels), pixels)
  d_slope = (d_logits * _over_channels(score, slope.size, pixels)).sum(range(x.ndim - 1))
  d_slope = d_slope if pixels == 1 else d_slope.reshape(pixels, -1).sum(axis=0)
  return (g * attention).astype(x.dtype), d_offset, d_score, d_slope


gate.defvjp(_gate_forward, _gate_backward)


# On NVIDIA GPUs, one function does the work of a norm's affine map, `pools` and `gate`. Its backward pass needs all of
# them at once: then the sums for FUSA and for the norm come from one sweep over x and g, and the cotangent of x from a
# second one.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def gate_normalised(dtype, x, affine, channel, spatial, fuse):
  """FUSA of y = (x - mean) * scale + shift, rounded to dtype: x [B, *space, C], affine = (mean, scale, shift) [C].

  It never stores y. fusa_gpu.py has the kernels. `channel`, `spatial` and `fuse` are (kernel, bias) pairs.
  """
  return _gate_normalised_forward(dtype, x, affine, channel, spatial, fuse)[0]


def _normalised(dtype, x, affine):
  """y in float32. XLA may drop the rounding of a cast, but not this one: y must equal its maxima as in the kernels."""
  mean, scale, shift = affine
  kept = jnp.finfo(dtype)
  return jax.lax.reduce_precision((x - mean) * scale + shift, kept.nexp, kept.nmant)


def _gate_normalised_forward(dtype, x, affine, *parameters):
  channel_max, mean_n, spatial_max, spatial_mean = fusa_gpu.pools(x, affine, dtype)
  channel_mean = mean_n * affine[1] + affine[2]
  gating, pull = jax.vjp(_factors, channel_max, channel_mean, spatial_max, spatial_mean, *parameters)
  out = (_normalised(dtype, x, affine) * nn.sigmoid(_logits(*gating))).astype(dtype)
  weights = parameters[1][0].reshape(2)
  return out, (x, affine, gating, (channel_max, spatial_max), mean_n, weights, pull)


def _gate_normalised_backward(dtype, residuals, g):
  x, affine, gating, maxima, mean_n, weights, pull = residuals
  sums = fusa_gpu.sums(x, g, affine, gating, maxima, weights, dtype)
  d_channel_max, d_channel_mean, d_spatial_max, d_spatial_mean, *d_parameters = pull(
    (sums.d_offset, sums.d_score, sums.d_slope)
  )
  # Places that tie for a maximum share its gradient equally, as in `pools`.
  d_channel_max = d_channel_max / jnp.maximum(sums.channel_count, 1)
  d_spatial_max = d_spatial_max / jnp.maximum(sums.spatial_count, 1)

  space = tuple(range(1, x.ndim - 1))
  over_space = lambda value: jnp.expand_dims(value, space)
  y = _normalised(dtype, x, affine)
  d_y = g * nn.sigmoid(_logits(*gating))
  d_y += over_space(d_channel_mean / (x.size // (x.shape[0] * x.shape[-1]))) + (d_spatial_mean / x.shape[-1])[..., None]
  d_y += jnp.where(y == over_space(maxima[0]), over_space(d_channel_max), 0)
  d_y += jnp.where(y == maxima[1][..., None], d_spatial_max[..., None], 0)

  # The sums of d_y and of d_y * (x - mean): those of the kernel, and what the pools over space add.
  d_shift = sums.d_shift + (d_channel_mean + d_channel_max * sums.channel_count).sum(0)
  d_scale = sums.d_scale + (d_channel_mean * mean_n + d_channel_max * sums.channel_n).sum(0)
  scale = affine[1]
  return (d_y * scale).astype(x.dtype), (-d_shift * scale, d_scale, d_shift), *d_parameters


gate_normalised.defvjp(_gate_normalised_forward, _gate_normalised_backward)
