"""The norm of a 1x1 convolution, without storing the convolution's output.

A norm needs mean and variance of its input y = x W over all pixels before it can write its output. XLA therefore stores
y, reads it for the sums, and reads it again to normalise it. But y is linear in x. With the sums t of x and the matrix
G of x^T x over n pixels, the moments of y follow from x alone:

    mean(y) = t W / n
    var(y)_c = W_c^T (G / n - t^T t / n^2) W_c

The norm is then part of the convolution: its scale is a factor of the kernel, its shift the bias. cuDNN adds the
shortcut and applies the ReLU in the same pass. This form pays where x has fewer channels than y.

The backward pass needs no y either. Let g be the cotangent of the output, P the sum of x^T g over the pixels, and
a = scale / deviation. The norm's rule (Ioffe & Szegedy 2015, section 3) gives

    d_scale = (sum over k of W * P - mean * sum(g)) / deviation
    dy = a g - b y + c,    b = a d_scale / (n deviation),    c = b mean - a sum(g) / n

and the convolution's rules give

    dW = x^T dy = P a - G W b + t^T c
    dx = dy W^T = g (W a)^T - x (W b W^T) + c W^T
"""

import functools

import jax
import jax.numpy as jnp

from fusa_jax.models.gpu.sums import products, total
from fusa_jax.models.precision import HIGHEST, wide

# Products of small matrices, in float32.
_product = functools.partial(jnp.matmul, precision=HIGHEST)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def normalised(x, kernel, scale, bias, stride, epsilon, dtype):
  """Normalises the 1x1 convolution of x [B, H, W, k] with a kernel [1, 1, k, C], as `layers.batch_norm` does.

  x and kernel have the dtype of the output. In bfloat16, the kernel and the shift are rounded after they are multiplied
  by the norm's scale; the general form rounds the convolution's output instead.

  Returns (output [B, h, w, C] in dtype, mean [C], variance [C]). Only the output has a gradient, in reverse mode.
  """
  return _forward(x, kernel, scale, bias, stride, epsilon, dtype)[0]


def _forward(x, kernel, scale, bias, stride, epsilon, dtype):
  seen, matrix = x[:, ::stride, ::stride], _matrix(kernel)
  gram, sums, count = products(seen, seen), total(seen), seen.size // seen.shape[-1]
  mean = _product(sums / count, matrix)
  covariance = gram / count - jnp.outer(sums / count, sums / count)
  var = jnp.maximum((matrix * _product(covariance, matrix)).sum(axis=0), 0)
  inverse = jax.lax.rsqrt(var + epsilon)
  slope = scale * inverse
  out = _convolve(x, (matrix * slope).astype(dtype), stride) + (bias - mean * slope).astype(dtype)
  return (out, mean, var), (x, kernel, scale, mean, inverse, gram, sums)


def _backward(stride, epsilon, dtype, residuals, cotangents):
  x, kernel, scale, mean, inverse, gram, sums = residuals
  g, seen, matrix = cotangents[0], x[:, ::stride, ::stride], _matrix(kernel)
  count = seen.size // seen.shape[-1]
  of_pixels, d_bias = products(seen, g), total(g)
  d_scale = inverse * ((matrix * of_pixels).sum(axis=0) - mean * d_bias)
  of_g = scale * inverse
  of_y = of_g * inverse * d_scale / count
  constant = of_y * mean - of_g * d_bias / count
  d_matrix = of_pixels * of_g - _product(gram, matrix) * of_y + jnp.outer(sums, constant)
  d_seen = (
    _convolve(g, (matrix * of_g).T.astype(dtype))
    + _convolve(seen, _product(matrix * -of_y, matrix.T).astype(dtype))
    + _product(constant, matrix.T).astype(dtype)
  )
  unseen = [(0, m - stride * (n - 1) - 1, stride - 1) for m, n in zip(x.shape[1:3], seen.shape[1:3], strict=True)]
  d_x = jax.lax.pad(d_seen, jnp.zeros((), d_seen.dtype), ((0, 0, 0), *unseen, (0, 0, 0)))
  cotangent = lambda value, like: value.astype(like.dtype).reshape(like.shape)
  return cotangent(d_x, x), cotangent(d_matrix, kernel), cotangent(d_scale, scale), cotangent(d_bias, scale)


normalised.defvjp(_forward, _backward)


def _matrix(kernel):
  """The kernel [1, 1, k, C] as a matrix [k, C] in at least float32."""
  return wide(kernel).reshape(kernel.shape[-2:])


def _convolve(x, matrix, stride=1):
  if len(matrix) == 1:  # as a multiplication, XLA computes it inside of the operations that read it
    return x[:, ::stride, ::stride] * matrix
  return jax.lax.conv_general_dilated(
    x, matrix[None, None], (stride, stride), 'VALID', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
  )
