"""Hounsfield units to network input: one function, for training, evaluation, prediction and export alike."""

import jax
import jax.numpy as jnp


def network_input(hu: jax.Array, window: tuple[float, float]) -> jax.Array:
  """int16 or float HU [B, H, W] -> float32 [B, H, W, 1]: window[0] and below is -1, window[1] and above is 1."""
  low, high = window
  scaled = (hu.astype(jnp.float32) - low) * (2 / (high - low)) - 1
  return jnp.clip(scaled, -1, 1)[..., None]
