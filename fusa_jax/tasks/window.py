"""Converts stored values to network input: one function for HU, one for 8-bit values, in all parts of the program."""

import jax
import jax.numpy as jnp

# The range of 8-bit images. Windowing has removed their HU values.
GREY = (0.0, 255.0)


def black_and_white(intensity: str, window: tuple[float, float]) -> tuple[float, float]:
  """The (low, high) values that networks and pictures clip to, for an intensity of volumes.VALUES."""
  return tuple(window) if intensity == 'hu' else GREY


def network_input(values: jax.Array, window: tuple[float, float]) -> jax.Array:
  """Scales values linearly from window[0] = -1 to window[1] = 1, and clips them outside.

  int16 or float slices [B, H, W] -> float32 [B, H, W, 1]; slices with their neighbours [B, H, W, C] keep their shape.
  """
  low, high = window
  scaled = (values.astype(jnp.float32) - low) * (2 / (high - low)) - 1
  clipped = jnp.clip(scaled, -1, 1)
  return clipped if clipped.ndim == 4 else clipped[..., None]


def grey_input(values: jax.Array) -> jax.Array:
  """8-bit values, as `network_input`: black (0) is -1, white (255) is 1."""
  return network_input(values, GREY)
