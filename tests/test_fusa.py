"""Compares the factored form with the literal form, and the literal form with NumPy loops of the paper's text."""

import itertools

import flax
import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from fusa_jax import FUSA
from fusa_jax.chips import hlo
from fusa_jax.system import meshes

SHAPES = {'2d': (2, 5, 7, 6), '3d': (2, 3, 4, 5, 6), '1d': (2, 9, 6)}


@pytest.fixture(autouse=True)
def _float64():
  with jax.enable_x64(True):
    yield


def inputs(kind, ties):
  """Returns x and variables in float64, with nonzero biases. `ties` gives x few distinct values, as after a ReLU."""
  rng = np.random.default_rng(0)
  x = rng.normal(size=SHAPES[kind])
  if ties:
    x = np.round(np.maximum(x, 0) * 2) / 2
    assert (np.sort(x, axis=-1)[..., -1] == np.sort(x, axis=-1)[..., -2]).any()
  shapes = jax.eval_shape(FUSA().init, jax.random.key(0), jax.ShapeDtypeStruct(x.shape, x.dtype))
  return jnp.asarray(x), jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape)), shapes)


def oracle(x, params):
  """Section II-A of the paper, one position and one channel at a time."""
  channels = x.shape[-1]
  channel, spatial, fuse = (params[name] for name in ('channel', 'spatial', 'fuse'))
  out = np.empty_like(x)
  for b in range(len(x)):
    flat = x[b].reshape(-1, channels)
    c = np.concatenate([flat.max(0), flat.mean(0)]) @ channel['kernel'] + channel['bias']
    for place in np.ndindex(x.shape[1:-1]):
      value = x[b][place]
      s = np.array([value.max(), value.mean()]) @ spatial['kernel'].reshape(2, 1) + spatial['bias']
      stitched = np.concatenate([c, np.full(channels, s[0])])
      logits = stitched @ fuse['kernel'].reshape(2 * channels, channels) + fuse['bias']
      out[b][place] = value / (1 + np.exp(-logits))
  return out


def difference(a, b):
  # Not Python's max, which may ignore NaN.
  return np.max(
    [float(jnp.linalg.norm(p - q) / jnp.linalg.norm(q)) for p, q in zip(*map(jax.tree.leaves, (a, b)), strict=True)]
  )


@pytest.mark.parametrize('literal', [True, False])
@pytest.mark.parametrize('kind', SHAPES)
def test_equals_the_papers_text(kind, literal):
  x, variables = inputs(kind, ties=False)
  expected = oracle(np.asarray(x), jax.tree.map(np.asarray, variables['params']))
  np.testing.assert_allclose(FUSA(literal=literal).apply(variables, x), expected, rtol=1e-12)


@pytest.mark.parametrize(('kind', 'ties'), list(itertools.product(SHAPES, [False, True])))
def test_factored_equals_literal_in_float64(kind, ties):
  x, variables = inputs(kind, ties)
  weight = jnp.asarray(np.random.default_rng(1).normal(size=x.shape))
  values, gradients = [], []
  for literal in (False, True):
    module = FUSA(literal=literal)
    values.append(jax.jit(module.apply)(variables, x))
    loss = lambda v, x, m=module: (m.apply(v, x) * weight).sum()
    gradients.append(jax.jit(jax.grad(loss, (0, 1)))(variables, x))
  assert difference(*values) < 1e-10
  assert difference(*gradients) < 1e-10


def test_gradients_against_finite_differences():
  x, variables = inputs('2d', ties=False)
  check_grads(jax.jit(FUSA().apply), (variables, x), order=1, modes=['rev'], rtol=1e-6)


@pytest.mark.parametrize('ties', [False, True])
def test_bfloat16_is_within_its_rounding(ties):
  """Values may differ by half a unit in the last of 8 significant bits; gradients are sums of these values."""
  x, variables = inputs('2d', ties)
  x = x.astype(jnp.bfloat16)
  variables = jax.tree.map(lambda p: p.astype(jnp.float32), variables)
  loss = lambda v, x, m: (m.apply(v, x).astype(jnp.float32) ** 2).sum()
  out = FUSA().apply(variables, x)
  exact = FUSA(literal=True).apply(variables, x.astype(jnp.float32))
  assert out.dtype == jnp.bfloat16
  np.testing.assert_allclose(out.astype(np.float32), exact, rtol=2**-8)
  gradient = jax.jit(jax.grad(loss, (0, 1)), static_argnums=2)
  gradients = gradient(variables, x, FUSA())
  expected = gradient(variables, x.astype(jnp.float32), FUSA(literal=True))
  assert gradients[1].dtype == jnp.bfloat16
  assert difference(jax.tree.map(lambda g: g.astype(jnp.float32), gradients), expected) < 2**-7


def test_parameters_have_the_agreed_layout():
  _, variables = inputs('2d', ties=False)
  shapes = {'/'.join(k): v.shape for k, v in flax.traverse_util.flatten_dict(variables['params']).items()}
  assert shapes == {
    'channel/kernel': (12, 6),
    'channel/bias': (6,),
    'spatial/kernel': (1, 1, 2, 1),
    'spatial/bias': (1,),
    'fuse/kernel': (1, 1, 12, 6),
    'fuse/bias': (6,),
  }
  _, variables = inputs('3d', ties=False)
  assert variables['params']['fuse']['kernel'].shape == (1, 1, 1, 12, 6)


@pytest.mark.parametrize('literal', [True, False])
def test_attention_map_scales_the_input(literal):
  x, variables = inputs('2d', ties=False)
  out, state = FUSA(literal=literal).apply(variables, x, mutable=['intermediates'])
  (attention,) = state['intermediates']['attention']
  assert attention.shape == x.shape
  assert 0 < attention.min() < attention.max() < 1
  np.testing.assert_allclose(x * attention, out, rtol=1e-12)
  assert set(FUSA().init(jax.random.key(0), x)) == {'params'}


def widest(literal):
  """Returns the size of the largest array in a forward and backward pass, in multiples of the size of x."""
  x, variables = inputs('2d', ties=False)
  loss = lambda v, x: FUSA(literal=literal).apply(v, x).sum()
  jaxpr = jax.make_jaxpr(jax.grad(loss, (0, 1)))(variables, x).jaxpr
  sizes = []

  def walk(jaxpr):
    for equation in jaxpr.eqns:
      sizes.extend(var.aval.size for var in equation.outvars)
      for inner in jax.extend.core.jaxprs_in_params(equation.params):
        walk(getattr(inner, 'jaxpr', inner))

  walk(jaxpr)
  return max(sizes) / x.size


def test_factored_form_never_builds_the_2c_tensor():
  assert widest(literal=True) == 2
  assert widest(literal=False) == 1


def test_refuses_input_without_spatial_axes():
  with pytest.raises(ValueError, match=r'\(2, 6\).*\[batch, \*space, channels\]'):
    FUSA().init(jax.random.key(0), jnp.ones((2, 6)))


MESHES = [(8, 1), (4, 2), (2, 4)]


def on_mesh(data, space, literal, shape):
  """Returns (value, gradients, collectives) of a weighted sum of the output. With data=0 it runs on one device."""
  rng = np.random.default_rng(0)
  x, weight = jnp.asarray(rng.normal(size=shape)), jnp.asarray(rng.normal(size=shape))
  module = FUSA(literal=literal)
  shapes = jax.eval_shape(module.init, jax.random.key(0), x)
  # Small values, to keep every sigmoid from saturation.
  variables = jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape) / s.shape[-1]), shapes)
  run = jax.value_and_grad(lambda v, x: (module.apply(v, x) * weight).sum(), (0, 1))
  if not data:
    return *jax.jit(run)(variables, x), []
  mesh = meshes.create_mesh(data, space)
  variables = jax.device_put(variables, meshes.replicated(mesh))
  x, weight = (jax.device_put(a, meshes.batched(mesh, a.ndim)) for a in (x, weight))
  with jax.set_mesh(mesh):
    placed = (meshes.replicated(mesh), (meshes.replicated(mesh), meshes.batched(mesh, x.ndim)))
    compiled = jax.jit(run, out_shardings=placed).lower(variables, x).compile()
    return *compiled(variables, x), hlo.collectives(compiled.as_text(), mesh.size)


@pytest.mark.parametrize('literal', [True, False])
@pytest.mark.parametrize(('data', 'space'), MESHES)
def test_result_does_not_depend_on_the_mesh(data, space, literal):
  """In float64 with 512 channels: from this number on, the pooled vectors are replicated on all devices."""
  shape = (8, 8, 2, 512)
  value, gradients, _ = on_mesh(0, 0, literal, shape)
  sharded, sharded_gradients, _ = on_mesh(data, space, literal, shape)
  np.testing.assert_allclose(sharded, value, rtol=1e-12)
  assert difference(sharded_gradients, gradients) < 1e-12


@pytest.mark.parametrize(('data', 'space'), MESHES)
def test_the_gradients_of_the_dense_kernels_are_not_sent(data, space):
  """Vectors are sent, 3 C to 4 C numbers per image. If a kernel is not larger, its gradients are sent instead."""
  channels = 512
  sent = lambda batch, channels: sum(c.nbytes for c in on_mesh(data, space, False, (batch, 8, 2, channels))[2]) // 8
  assert 0 < sent(8, channels) < 8 * 6 * channels < channels**2 / 8
  assert sent(8, 64) >= 3 * 64**2
  assert sent(264, channels) >= 3 * channels**2
