"""Norm and ReLU in the form in which XLA on GPUs reads and writes the fewest maps.

XLA decides for each value whether to store it or to compute it again, and often stores too much here: the sum before a
ReLU beside the ReLU's output, or the cotangent after the ReLU's mask. The forms below leave it no choice. The barriers
are on maps that are stored in any case, so they cost nothing.
"""

import functools

import jax
import jax.numpy as jnp

from fusa_jax.models.gpu.sums import total
from fusa_jax.models.precision import wide


@jax.custom_vjp
def relu(x):
  """max(x, 0). The backward pass reads the output, so the sum x before the ReLU is not stored."""
  return jnp.maximum(x, 0)


def _relu_forward(x):
  out = relu(x)
  return out, out


def _relu_backward(out, g):
  out = jax.lax.optimization_barrier(out)  # without it, XLA would replace `out > 0` by `x > 0`
  return (jnp.where(out > 0, g, 0),)


relu.defvjp(_relu_forward, _relu_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def batch_norm_relu(x, scale, bias, epsilon, dtype):
  """relu of `layers.batch_norm`; returns (output in dtype, mean [C], variance [C]).

  The backward pass computes the ReLU's mask from x again, in each of its two sweeps over x [..., C]. Only the output
  has a gradient, in reverse mode.
  """
  return _forward(x, scale, bias, epsilon, dtype)[0]


def _forward(x, scale, bias, epsilon, dtype):
  count = x.size // x.shape[-1]
  mean = total(x) / count
  var = jnp.maximum(total(jnp.square(wide(x))) / count - jnp.square(mean), 0)
  inverse = jax.lax.rsqrt(var + epsilon)
  # Subtract the mean first: if it is much larger than the deviation, rounding x * slope would cost precision.
  out = jnp.maximum((wide(x) - mean) * (inverse * scale) + bias, 0).astype(dtype)
  return (out, mean, var), (x, mean, inverse, scale, bias)


def _backward(epsilon, dtype, residuals, cotangents):
  x, mean, inverse, scale, bias = residuals
  slope = inverse * scale

  def masked(x, slope, shift):
    # The mask is a number, because XLA would store a boolean mask rather than compute it again.
    return jnp.sign(jnp.maximum(wide(x) * slope + shift, 0)) * wide(cotangents[0])

  x, *line = jax.lax.optimization_barrier((x, slope, bias - mean * slope))
  g = masked(x, *line)
  d_bias, d_scale = total(g), total(g * (wide(x) - mean)) * inverse
  x, d_bias, d_scale = jax.lax.optimization_barrier((x, d_bias, d_scale))  # between the sweeps
  g = masked(x, *line)
  count = x.size // x.shape[-1]
  d_x = slope * (g - d_bias / count - (wide(x) - mean) * (inverse * d_scale / count))
  return d_x.astype(x.dtype), d_scale.astype(scale.dtype), d_bias.astype(bias.dtype)


batch_norm_relu.defvjp(_forward, _backward)
