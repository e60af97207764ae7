"""Pooling, resizing and norms compared with NumPy, scipy and PyTorch."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage

from fusa_jax.models import layers
from fusa_jax.models.cpu import pooling


def images(height, width):
  return np.random.default_rng(0).normal(size=(2, height, width, 3)).astype(np.float32)


@pytest.mark.parametrize(('height', 'width'), [(7, 7), (16, 16), (12, 5), (1, 3)])
@pytest.mark.parametrize('size', [1, 3, 7])
def test_adaptive_means_average_overlapping_bins(height, width, size):
  x = images(height, width)
  expected = np.empty((2, size, size, 3))
  for i in range(size):
    for j in range(size):
      rows = slice(int(np.floor(i * height / size)), int(np.ceil((i + 1) * height / size)))
      columns = slice(int(np.floor(j * width / size)), int(np.ceil((j + 1) * width / size)))
      expected[:, i, j] = x[:, rows, columns].mean((1, 2))
  np.testing.assert_allclose(layers.adaptive_mean(jnp.asarray(x), size), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(('height', 'width'), [(2, 2), (6, 4), (1, 5)])
def test_resizing_keeps_the_corners(height, width):
  """scipy's zoom also aligns the centres of the corner pixels by default."""
  x = images(height, width)
  expected = scipy.ndimage.zoom(x.astype(np.float64), (1, 16 / height, 20 / width, 1), order=1, mode='nearest')
  out = layers.resize_corners(jnp.asarray(x), 16, 20)
  np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(out[:, 0, 0], x[:, 0, 0], rtol=1e-6)
  np.testing.assert_allclose(out[:, -1, -1], x[:, -1, -1], rtol=1e-5)


def test_running_variance_is_unbiased():
  x = images(2, 3) * 3 + 1
  norm = layers.layers(train=True, dtype=None)['norm']()
  variables = norm.init(jax.random.key(0), jnp.asarray(x))
  np.testing.assert_array_equal(variables['batch_stats']['var'], 1)
  out, updates = norm.apply(variables, jnp.asarray(x), mutable=['batch_stats'])
  np.testing.assert_allclose(out, (x - x.mean((0, 1, 2))) / np.sqrt(x.var((0, 1, 2)) + 1e-5), rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(updates['batch_stats']['mean'], 0.1 * x.mean((0, 1, 2)), rtol=1e-5)
  np.testing.assert_allclose(updates['batch_stats']['var'], 0.9 + 0.1 * x.var((0, 1, 2), ddof=1), rtol=1e-5)


def test_gradients_of_a_norm_equal_autodiff():
  """Compares with JAX's derivative of the formula in float64. Values far from zero are the hardest for the variance."""
  with jax.enable_x64(True):
    rng = np.random.default_rng(0)
    x, weight = (jnp.asarray(rng.normal(size=(3, 4, 5, 6))) for _ in range(2))
    arguments = (x + 10, jnp.asarray(rng.normal(size=6)), jnp.asarray(rng.normal(size=6)))

    def plain(x, scale, bias):
      axes = (0, 1, 2)
      return (x - x.mean(axes)) / jnp.sqrt(x.var(axes) + 1e-5) * scale + bias

    ours = lambda *a: layers.batch_norm(*a, 1e-5, x.dtype)[0]
    np.testing.assert_allclose(ours(*arguments), plain(*arguments), rtol=1e-10, atol=1e-11)
    gradients = [jax.grad(lambda *a, f=f: (f(*a) * weight).sum(), (0, 1, 2))(*arguments) for f in (ours, plain)]
    for found, expected in zip(*gradients, strict=True):
      np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-10)


def test_a_norm_keeps_only_its_input_for_the_backward_pass():
  x = jnp.asarray(images(8, 8), jnp.bfloat16)
  _, pull = jax.vjp(lambda x: layers.batch_norm(x, jnp.ones(3), jnp.zeros(3), 1e-5, x.dtype)[0], x)
  assert [leaf.dtype for leaf in jax.tree.leaves(pull) if leaf.size >= x.size] == [jnp.bfloat16]


def test_a_single_value_has_no_variance():
  norm = layers.layers(train=True, dtype=None)['norm']()
  x = jnp.ones((1, 1, 1, 2))
  _, updates = norm.apply(norm.init(jax.random.key(0), x), x, mutable=['batch_stats'])
  np.testing.assert_allclose(updates['batch_stats']['var'], 0.9)


def test_doubling_equals_a_transposed_convolution():
  """Compares values and gradients with Flax's, from the same parameters."""
  x = jnp.asarray(images(3, 4))
  theirs, ours = nn.ConvTranspose(5, (2, 2), (2, 2)), layers.Doubling(5)
  variables = theirs.init(jax.random.key(0), x)
  jax.tree.map(np.testing.assert_array_equal, ours.init(jax.random.key(0), x), variables)
  weights = np.random.default_rng(1).normal(size=(2, 6, 8, 5))

  def loss(module, variables, x):
    return (module.apply(variables, x) * weights).sum(), module.apply(variables, x)

  (_, expected), gradients = jax.value_and_grad(loss, (1, 2), has_aux=True)(theirs, variables, x)
  (_, out), ours_gradients = jax.value_and_grad(loss, (1, 2), has_aux=True)(ours, variables, x)
  np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), ours_gradients, gradients)


@pytest.mark.parametrize(
  ('shape', 'size', 'stride', 'padding'),
  [((2, 8, 6, 3), 2, 2, 0), ((2, 9, 7, 3), 2, 2, 0), ((2, 9, 8, 3), 3, 2, 1), ((1, 5, 5, 2), 3, 1, 1)],
)
def test_pooling_equals_pytorchs_with_ties(shape, size, stride, padding):
  torch = pytest.importorskip('torch')
  x = np.maximum(np.random.default_rng(0).integers(-3, 4, shape), 0).astype(np.float32)  # mostly ties
  theirs = torch.tensor(x, requires_grad=True)
  out = torch.nn.functional.max_pool2d(theirs.permute(0, 3, 1, 2), size, stride, padding).permute(0, 2, 3, 1)
  g = np.random.default_rng(1).normal(size=tuple(out.shape)).astype(np.float32)
  out.backward(torch.tensor(g))
  value, pull = jax.vjp(lambda x: layers.max_pool(x, size, stride, padding), x)
  np.testing.assert_array_equal(value, out.detach())
  np.testing.assert_allclose(pull(jnp.asarray(g))[0], theirs.grad, rtol=1e-6, atol=1e-6)
  on_gpu = pooling.by_number((size, stride, padding), x, value, jnp.asarray(g))
  np.testing.assert_allclose(on_gpu, theirs.grad, rtol=1e-6, atol=1e-6)
