"""The forms for GPUs, run on a CPU, compute what the general forms compute.

`on_gpu` makes `lax.platform_dependent` choose the form for GPUs.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from fusa_jax import models
from fusa_jax.models import layers
from fusa_jax.models.gpu import norms, projection
from fusa_jax.system import meshes

EPSILON = 1e-5


@pytest.fixture
def on_gpu(monkeypatch):
  monkeypatch.setattr(
    jax.lax, 'platform_dependent', lambda *args, default, cuda=None, **others: (cuda or default)(*args)
  )


def normal(*shapes, seed=0):
  rng = np.random.default_rng(seed)
  return [jnp.asarray(rng.normal(size=shape)) for shape in shapes]


def plain_norm(y, scale, bias):
  axes = tuple(range(y.ndim - 1))
  return (y - y.mean(axes)) / jnp.sqrt(y.var(axes) + EPSILON) * scale + bias


def compare_gradients(ours, oracle, arguments, weights):
  """Compares values and gradients of two functions of the arguments in float64, where rounding hides no error."""
  values, gradients = zip(
    *(
      jax.value_and_grad(lambda *a, f=f: (jnp.sin(f(*a)) * weights).sum(), range(len(arguments)))(*arguments)
      for f in (ours, oracle)
    ),
    strict=True,
  )
  np.testing.assert_allclose(*values, rtol=1e-9)
  for found, expected in zip(*gradients, strict=True):
    np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize('channels', [1, 3])
@pytest.mark.parametrize('stride', [1, 2])
def test_the_norm_of_a_projection(channels, stride):
  """Values far from zero, and an odd and an even side, are the hardest."""
  with jax.enable_x64(True):
    x, kernel, scale, bias, weights = normal(
      (2, 5, 6, channels), (1, 1, channels, 7), 7, 7, (2, -(-5 // stride), 6 // stride, 7)
    )
    arguments = (x + 3, kernel, scale, bias)
    product = lambda x, kernel: x[:, ::stride, ::stride] @ kernel[0, 0]
    ours = lambda *a: projection.normalised(*a, stride, EPSILON, x.dtype)[0]
    compare_gradients(ours, lambda x, kernel, *rest: plain_norm(product(x, kernel), *rest), arguments, weights)
    _, mean, var = projection.normalised(*arguments, stride, EPSILON, x.dtype)
    y = product(*arguments[:2])
    np.testing.assert_allclose(mean, y.mean((0, 1, 2)), rtol=1e-10)
    np.testing.assert_allclose(var, y.var((0, 1, 2)), rtol=1e-10)


def test_a_projection_in_bfloat16_is_as_exact_as_the_general_form():
  """Compares both with the norm of the same bfloat16 values in float64."""
  x, kernel, scale, bias, g = normal((2, 16, 16, 32), (1, 1, 32, 64), 64, 64, (2, 16, 16, 64))
  half = (jnp.maximum(x, 0).astype(jnp.bfloat16), (kernel / 6).astype(jnp.bfloat16))
  vectors = (scale.astype(jnp.float32), bias.astype(jnp.float32))

  def run(norm, arguments, g):
    out, pull = jax.vjp(norm, *arguments)
    return out, *pull(g.astype(out.dtype))

  general = lambda x, kernel, *a: layers.norm_of_projection(x, kernel, 1, *a, EPSILON, jnp.bfloat16)[0]
  ours = lambda *a: projection.normalised(*a, 1, EPSILON, jnp.bfloat16)[0]
  results = [run(norm, (*half, *vectors), g) for norm in (ours, general)]
  with jax.enable_x64(True):
    exact = tuple(jnp.asarray(np.asarray(a, np.float64)) for a in (*half, *vectors))
    truth = run(
      lambda x, kernel, *rest: plain_norm(x @ kernel[0, 0], *rest), exact, jnp.asarray(np.asarray(g, np.float64))
    )
  for found, usual, expected in zip(*results, truth, strict=True):
    expected = np.asarray(expected)
    error, allowed = (np.linalg.norm(np.asarray(a, np.float64) - expected) for a in (found, usual))
    assert error <= 1.5 * allowed
    assert error < 0.02 * np.linalg.norm(expected)


def test_a_norm_and_its_relu():
  with jax.enable_x64(True):
    x, scale, bias, weights = normal((3, 4, 5, 6), 6, 6, (3, 4, 5, 6))
    ours = lambda *a: norms.batch_norm_relu(*a, EPSILON, x.dtype)[0]
    compare_gradients(ours, lambda *a: jnp.maximum(plain_norm(*a), 0), (x + 10, scale, bias), weights)


def test_a_projection_on_several_devices_sees_the_whole_batch():
  x, kernel, scale, bias, g = (a.astype(jnp.float32) for a in normal((4, 8, 6, 3), (1, 1, 3, 5), 5, 5, (4, 4, 3, 5)))

  def run(x, kernel, scale, bias, g):
    out, pull, moments = jax.vjp(
      lambda *a: (lambda out, *rest: (out, rest))(*projection.normalised(*a, 2, EPSILON, x.dtype)),
      x,
      kernel,
      scale,
      bias,
      has_aux=True,
    )
    return out, moments, pull(g)

  alone = jax.jit(run)(x, kernel, scale, bias, g)
  mesh = meshes.create_mesh(2, 2, jax.devices()[:4])
  maps, vectors = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (('data', 'space'), ()))
  shared = jax.jit(run, in_shardings=(maps, vectors, vectors, vectors, maps))(x, kernel, scale, bias, g)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), shared, alone)


@pytest.mark.parametrize(('name', 'channels'), [('resunet', 1), ('fusa_resnet50', 3), ('resnet18', 1)])
def test_a_whole_model(name, channels, monkeypatch, request):
  """Loss, gradients and statistics of a small model, in float64, with all forms for GPUs and with none."""
  options = {'multiples': (1, 2)} if name == 'resunet' else {'stage_sizes': (2, 2)}
  # With 4 channels, all of them can be 0 after a ReLU at several pixels. FUSA's maximum then has ties, and rounding,
  # which differs between machines, decides which pixel gets the gradient.
  module = models.create(name, width=8 if name == 'fusa_resnet50' else 4, **options)
  with jax.enable_x64(True):
    images, targets = normal((2, 16, 16, channels), (2, 16, 16, 1) if name == 'resunet' else (2, 1))
    variables = jax.jit(lambda: module.init(jax.random.key(0), images))()
    variables = jax.tree.map(
      lambda v, n: v.astype(jnp.float64) + 0.1 * n,
      variables,
      *[jax.tree.unflatten(jax.tree.structure(variables), normal(*(v.shape for v in jax.tree.leaves(variables))))],
    )

    def loss(params):
      out, updates = module.apply(
        {'params': params, 'batch_stats': variables['batch_stats']}, images, train=True, mutable=['batch_stats']
      )
      return ((out - targets) ** 2).mean(), updates

    step = lambda: jax.jit(jax.value_and_grad(loss, has_aux=True))(variables['params'])
    general = step()
    request.getfixturevalue('on_gpu')
    (value, updates), gradients = step()
    np.testing.assert_allclose(value, general[0][0], rtol=1e-9)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-9)
    jax.tree.map(close, updates, general[0][1])
    jax.tree.map(close, gradients, general[1])


@pytest.mark.parametrize('classes', [1, 3])
def test_logits(classes, on_gpu):
  with jax.enable_x64(True):
    x, kernel, g = normal((2, 3, 4, 5), (1, 1, 5, classes), (2, 3, 4, classes))
    head = layers.PixelHead(classes, (1, 1))
    variables = {'params': {'kernel': kernel, 'bias': jnp.zeros(classes)}}
    out, pull = jax.vjp(lambda x: head.apply(variables, x), x)
    np.testing.assert_allclose(out, x @ kernel[0, 0], rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(pull(g)[0], g @ kernel[0, 0].T, rtol=1e-12, atol=1e-12)
