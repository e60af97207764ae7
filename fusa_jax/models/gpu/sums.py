"""Sums over pixels in at least float32."""

import jax

from fusa_jax.models.precision import HIGHEST, wide, wide_dtype


def total(x: jax.Array) -> jax.Array:
  """x [..., C] -> the sums [C]."""
  return wide(x).sum(axis=tuple(range(x.ndim - 1)))


def products(x: jax.Array, y: jax.Array) -> jax.Array:
  """x [..., k], y [..., C] -> the sums of their products, [k, C]."""
  if x.shape[-1] == 1:
    return total(wide(x) * wide(y))[None]
  pixels = tuple(range(x.ndim - 1))
  dimensions = ((pixels, pixels), ((), ()))
  return jax.lax.dot_general(x, y, dimensions, HIGHEST, preferred_element_type=wide_dtype(x))
