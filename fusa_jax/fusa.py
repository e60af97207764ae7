"""Full scale attention (paper, section II-A and Fig. 1).

For x of shape [B, *space, C], with one to three spatial axes:

    c = W_channel [max over space, mean over space] + b_channel          [B, C]
    s = w_spatial [max over C, mean over C] + b_spatial                  [B, *space, 1]
    A = sigmoid(W_fuse [c expanded, s expanded] + b_fuse)                [B, *space, C]

and the module returns x * A. The paper's literal form builds the two expanded tensors. It need not: the fuse kernel
splits into K_c (rows of c) and K_s (rows of s), a channel vector is the same at each place and a spatial map is the
same in each channel, so

    logits[b, p, :] = c[b] K_c + b_fuse  +  s[b, p] * sum_j K_s[j, :]

exactly. `gate` is what then remains of the work: a map per image, a vector per image, and memory traffic.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec


class FUSA(nn.Module):
  """Gates each value of a feature map by an attention map of the same shape.

  Attributes:
    dtype: the dtype of what is returned and, in the literal form, of the computation; None takes that of the input.
      The factored form computes in at least float32 whatever the dtype (it stores nothing of full size).
    literal: follow the paper's text step by step, the [B, *space, 2C] tensor included. Slow; it is the oracle that the
      default, factored form is tested against. The parameters are the same.

  The attention map A [B, *space, C] is sown as 'attention' into the collection 'intermediates', and costs nothing
  where that collection is not asked for.
  """

  dtype: jnp.dtype | None = None
  literal: bool = False

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """x [B, *space, C] -> x * A, same shape. Raises ValueError where x has no spatial axis."""
    if x.ndim < 3:
      raise ValueError(f'FUSA takes [batch, *space, channels], not an array of shape {x.shape}')
    space, channels = x.ndim - 2, x.shape[-1]
    channel = _Affine((2 * channels, channels), name='channel')()
    spatial = _Affine((1,) * space + (2, 1), name='spatial')()
    fuse = _Affine((1,) * space + (2 * channels, channels), name='fuse')()
    dtype = self.dtype or x.dtype
    x = x.astype(dtype)
    if self.literal:
      attention = literal_attention(x, *jax.tree.map(lambda p: p.astype(dtype), (channel, spatial, fuse)))
      self.sow('intermediates', 'attention', attention)
      return x * attention
    # One x for all that follows. Without the barrier a TPU's compiler computes it anew in each of the pools, from what
    # the norm before it reads (benchmarks/fusa.py: the block then moves 48% more bytes than without FUSA, so 6% more).
    x = jax.lax.optimization_barrier(x)
    offset, score, slope = factors(x, channel, spatial, fuse)
    # Sowing outside of `gate` keeps its backward pass free of the map; unused, the compiler drops it.
    self.sow('intermediates', 'attention', nn.sigmoid(_logits(offset, score, slope)).astype(dtype))
    return gate(x, offset, score, slope)


class _Affine(nn.Module):
  """Kernel and bias as nn.Dense and nn.Conv name, lay out and initialise them, without the application."""

  shape: tuple[int, ...]

  @nn.compact
  def __call__(self):
    return (
      self.param('kernel', nn.initializers.lecun_normal(), self.shape),
      self.param('bias', nn.initializers.zeros, self.shape[-1:]),
    )


def literal_attention(x, channel, spatial, fuse):
  """A of x [B, *space, C], by the paper's own steps; each of the three is a (kernel, bias) pair."""
  space = tuple(range(1, x.ndim - 1))
  c = jnp.concatenate([x.max(space), x.mean(space)], axis=-1)
  c = c @ channel[0] + channel[1]
  s = jnp.concatenate([x.max(-1, keepdims=True), x.mean(-1, keepdims=True)], axis=-1)
  s = s @ spatial[0].reshape(2, 1) + spatial[1]
  c = jnp.broadcast_to(jnp.expand_dims(c, space), x.shape)
  s = jnp.broadcast_to(s, x.shape)
  kernel = fuse[0].reshape(fuse[0].shape[-2:])
  return nn.sigmoid(jnp.concatenate([c, s], axis=-1) @ kernel + fuse[1])


def factors(x, channel, spatial, fuse):
  """(offset [B, C], score [B, *space], slope [C]) with logits = offset + score * slope, in at least float32."""
  channels = x.shape[-1]
  channel_max, channel_mean, spatial_max, spatial_mean = pools(x)
  c = everywhere(jnp.concatenate([channel_max, channel_mean], axis=-1), channels) @ channel[0] + channel[1]
  kernel = fuse[0].reshape(2 * channels, channels)
  offset = everywhere(c @ kernel[:channels] + fuse[1], channels)
  w_max, w_mean = spatial[0].reshape(2)
  score = w_max * spatial_max + w_mean * spatial_mean + spatial[1]
  slope = kernel[channels:].sum(axis=0)
  return offset, score, slope


def everywhere(vectors, channels):
  """The identity; puts vectors [B, any] and their cotangent whole on each device of the mesh in context, if one is.

  XLA would else split the dense layers over the batch, as it does all other work, and sum the gradients of their
  kernels over the devices: 3 C^2 numbers, three quarters of all that FUSA-ResNet-50 sends. The vectors are 3 C numbers
  an image: with all of them at hand each device computes those gradients by itself. Where a kernel is small, the wait
  for the vectors takes longer than its sum, and where the batch is large, the vectors are no less (docs/models.md).

  The mesh is that of `jax.set_mesh`. On axes that the caller shards explicitly or by hand nothing is done.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or any(kind != AxisType.Auto for kind in mesh.axis_types):
    return vectors  # here the batch may be any, of an exported function
  if channels < max(512, 2 * len(vectors)):
    return vectors
  return jax.lax.with_sharding_constraint(vectors, PartitionSpec())


def _wide(dtype):
  """The dtype that sums and small tensors are kept in: float32, or float64 where the input is."""
  return jnp.promote_types(dtype, jnp.float32)


def _logits(offset, score, slope):
  space = tuple(range(1, score.ndim))
  return jnp.expand_dims(offset, space) + score[..., None] * slope


# The two functions below hold all the work of full size. Left to autodiff, both of them keep tensors of x's size for
# the backward pass (the sigmoid's value, the comparison of x with its maxima) and write each of the five terms of x's
# cotangent by itself. Written by hand, what is kept is x and the small tensors; the rest is recomputed from x on the
# way, elementwise, inside the two sweeps that the backward pass needs anyway. On a whole block the TPU's compiler gets
# most of this from plain autodiff as well, once x is one (docs/models.md has the figures).


@jax.custom_vjp
def pools(x):
  """The four pools of x [B, *space, C]: max and mean over space [B, C], max and mean over channels [B, *space]."""
  space = tuple(range(1, x.ndim - 1))
  wide = x.astype(_wide(x.dtype))
  return x.max(space).astype(wide.dtype), wide.mean(space), x.max(-1).astype(wide.dtype), wide.mean(-1)


def _pools_forward(x):
  out = pools(x)
  return out, (x, out[0], out[2])


def _pools_backward(residuals, cotangents):
  x, channel_max, spatial_max = residuals
  d_channel_max, d_channel_mean, d_spatial_max, d_spatial_mean = cotangents
  space = tuple(range(1, x.ndim - 1))
  wide = x.astype(_wide(x.dtype))
  over_space = lambda value: jnp.expand_dims(value, space)
  is_channel_max = wide == over_space(channel_max)
  is_spatial_max = wide == spatial_max[..., None]
  # Places that tie for a maximum share its gradient equally, as JAX's own max (and torch.amax) has it. At least one
  # place does, unless the compiler has computed x anew on the way here and rounded it otherwise, as XLA's CPU backend
  # was seen to do at a low optimisation level: then nothing is found, and 0 / 0 must not become the gradient.
  count = lambda where, axes: jnp.maximum(jnp.sum(where, axis=axes, dtype=wide.dtype), 1)
  d_channel_max = d_channel_max / count(is_channel_max, space)
  d_spatial_max = d_spatial_max / count(is_spatial_max, -1)
  size = x.size // (x.shape[0] * x.shape[-1])
  dx = over_space(d_channel_mean / size) + (d_spatial_mean / x.shape[-1])[..., None]
  dx += jnp.where(is_channel_max, over_space(d_channel_max), 0)
  dx += jnp.where(is_spatial_max, d_spatial_max[..., None], 0)
  return (dx.astype(x.dtype),)


pools.defvjp(_pools_forward, _pools_backward)


@jax.custom_vjp
def gate(x, offset, score, slope):
  """x * sigmoid(offset + score * slope): x [B, *space, C], offset [B, C], score [B, *space], slope [C]."""
  attention = nn.sigmoid(_logits(offset, score, slope))
  return (x * attention).astype(x.dtype)


def _gate_forward(x, offset, score, slope):
  return gate(x, offset, score, slope), (x, offset, score, slope)


def _gate_backward(residuals, g):
  x, offset, score, slope = residuals
  space = tuple(range(1, x.ndim - 1))
  attention = nn.sigmoid(_logits(offset, score, slope))
  d_logits = g * x.astype(attention.dtype) * attention * (1 - attention)
  d_offset = d_logits.sum(space)
  d_score = (d_logits * slope).sum(-1)
  d_slope = (d_logits * score[..., None]).sum(range(x.ndim - 1))
  return (g * attention).astype(x.dtype), d_offset, d_score, d_slope


gate.defvjp(_gate_forward, _gate_backward)
