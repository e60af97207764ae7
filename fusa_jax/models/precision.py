"""At least float32, for what bfloat16 is too coarse for: means, sums, and the last layers."""

import jax
import jax.numpy as jnp

# For products that promise float32. By default, a TPU multiplies float32 numbers in bfloat16 and a GPU in TF32.
HIGHEST = jax.lax.Precision.HIGHEST


def wide_dtype(x: jax.Array) -> jnp.dtype:
  """At least float32: the dtype of means and of the last layers, for any dtype of the activations."""
  return jnp.promote_types(x.dtype, jnp.float32)


def wide(x: jax.Array) -> jax.Array:
  return x.astype(wide_dtype(x))
