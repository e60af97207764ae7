"""HU and grey values as network input."""

import jax.numpy as jnp
import numpy as np

from fusa_jax.tasks.window import grey_input, network_input


def test_window_maps_to_minus_one_and_one():
  hu = jnp.asarray([[[-2000, -1000, -350, 300, 3071]]], jnp.int16)
  out = network_input(hu, (-1000.0, 300.0))
  assert out.shape == (1, 1, 5, 1) and out.dtype == jnp.float32
  np.testing.assert_allclose(out[0, 0, :, 0], [-1, -1, 0, 1, 1], atol=1e-6)


def test_grey_maps_to_minus_one_and_one():
  grey = jnp.asarray([[[0, 51, 255, 300, -4]]], jnp.int16)
  np.testing.assert_allclose(grey_input(grey)[0, 0, :, 0], [-1, -0.6, 1, 1, -1], atol=1e-6)
