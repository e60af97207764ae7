"""Sums over pixels in at least float32."""

import jax
import jax.numpy as jnp


def wide(x: jax.Array) -> jax.Array:
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def total(x: jax.Array) -> jax.Array:
  """x [..., C] -> the sums [C]."""
  return wide(x).sum(axis=tuple(range(x.ndim - 1)))


def products(x: jax.Array, y: jax.Array) -> jax.Array:
  """x [..., k], y [..., C] -> the sums of their products, [k, C]."""
  if x.shape[-1] == 1:
    return total(wide(x) * wide(y))[None]
  pixels = tuple(range(x.ndim - 1))
  dtype = jnp.promote_types(x.dtype, jnp.float32)
  dimensions = ((pixels, pixels), ((), ()))
  return jax.lax.dot_general(x, y, dimensions, jax.lax.Precision.HIGHEST, preferred_element_type=dtype)
