"""Stored values to network input: one function for HU and one for grey, wherever networks are used."""

import jax
import jax.numpy as jnp

# Of 8-bit images: what black and white stand for was lost when they were windowed.
GREY = (0.0, 255.0)


def black_and_white(intensity: str, window: tuple[float, float]) -> tuple[float, float]:
  """The values that a network and a picture clip to, of an intensity of volumes.VALUES."""
  return tuple(window) if intensity == 'hu' else GREY


def network_input(values: jax.Array, window: tuple[float, float]) -> jax.Array:
  """int16 or float [B, H, W] -> float32 [B, H, W, 1]: window[0] and below is -1, window[1] and above is 1."""
  low, high = window
  scaled = (values.astype(jnp.float32) - low) * (2 / (high - low)) - 1
  return jnp.clip(scaled, -1, 1)[..., None]


def grey_input(values: jax.Array) -> jax.Array:
  """Grey [B, H, W] -> float32 [B, H, W, 1]: black is -1, white is 1."""
  return network_input(values, GREY)
