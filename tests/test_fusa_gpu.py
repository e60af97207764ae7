"""The kernels for NVIDIA GPUs, interpreted on a CPU, against NumPy in float64 and against the literal form of FUSA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fusa_jax import FUSA, fusa_gpu
from fusa_jax.chips import hlo
from fusa_jax.system import meshes

# One to three spatial axes; sizes that fill no tile, and sizes that fill several.
SHAPES = [(2, 9, 6), (2, 5, 7, 6), (2, 3, 4, 5, 6), (1, 1, 1, 3), (2, 33, 35, 64), (1, 16, 16, 512), (1, 9, 8, 2048)]


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
  """Runs kernels on the CPU, and everything that depends on the platform as on a GPU."""
  call = functools.partial(fusa_gpu.pl.pallas_call, interpret=True)
  monkeypatch.setattr(fusa_gpu.pl, 'pallas_call', call)
  monkeypatch.setattr(fusa_gpu, '_device_kind', lambda _: 'H100')
  monkeypatch.setattr(jax.lax, 'platform_dependent', lambda *x, default, cuda=None, **_: (cuda or default)(*x))


def inputs(shape, dtype, seed=0):
  """x with few distinct values, so that many are equal to a maximum, and a cotangent."""
  rng = np.random.default_rng(seed)
  x = np.round(rng.normal(size=shape) * 4) / 4
  return jnp.asarray(x, dtype), jnp.asarray(rng.normal(size=shape), dtype)


def exact(array):
  return np.asarray(array).astype(np.float64)


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize('shape', SHAPES)
def test_pools_and_counts(shape, dtype):
  x, _ = inputs(shape, dtype)
  maxima, means, counts = jax.jit(fusa_gpu.pools)(x)
  x = exact(x)
  for axes, maximum, mean, count in zip((tuple(range(1, x.ndim - 1)), -1), maxima, means, counts, strict=True):
    np.testing.assert_array_equal(maximum, x.max(axes))
    np.testing.assert_array_equal(count, (x == x.max(axes, keepdims=True)).sum(axes))
    np.testing.assert_allclose(mean, x.mean(axes), atol=1e-6)


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize('shape', SHAPES)
def test_sums_of_the_backward_pass(shape, dtype):
  (x, g), rng = inputs(shape, dtype), np.random.default_rng(1)
  small = [rng.normal(size=s) for s in ((shape[0], shape[-1]), shape[:-1], shape[-1:])]
  found = jax.jit(fusa_gpu.gate_sums)(x, g, *(jnp.asarray(a, jnp.float32) for a in small))
  offset, score, slope = small
  attention = 1 / (1 + np.exp(-np.expand_dims(offset, tuple(range(1, x.ndim - 1))) - score[..., None] * slope))
  d_logits = exact(g) * exact(x) * attention * (1 - attention)
  space = tuple(range(1, x.ndim - 1))
  expected = [d_logits.sum(space), d_logits @ slope, (d_logits * score[..., None]).sum((0, *space))]
  for ours, theirs in zip(found, expected, strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5 * np.abs(theirs).max())


def value_and_gradients(module, variables, x, weight):
  """A weighted sum of the module's output, and its gradients by the variables and by x."""
  loss = lambda v, x: (module.apply(v, x).astype(weight.dtype) * weight).sum()
  return jax.jit(jax.value_and_grad(loss, (0, 1)))(variables, x)


def variables_of(channels, spatial_axes, seed=2):
  rng = np.random.default_rng(seed)
  x = jax.ShapeDtypeStruct((1,) * (spatial_axes + 1) + (channels,), jnp.float32)
  shapes = jax.eval_shape(FUSA().init, jax.random.key(0), x)
  # Small values, to keep every sigmoid from saturation.
  return jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape) / s.shape[-1], jnp.float32), shapes)


def difference(a, b):
  pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  return max(np.linalg.norm(exact(p) - exact(q)) / np.linalg.norm(exact(q)) for p, q in pairs)


@pytest.mark.parametrize(('dtype', 'tolerance'), [(jnp.bfloat16, 2**-7), (jnp.float32, 2e-6)])
@pytest.mark.parametrize('shape', [(2, 9, 6), (2, 5, 7, 6), (2, 3, 4, 5, 6)])
def test_module_equals_the_literal_form(shape, dtype, tolerance):
  """In float64, with ties for most of the maxima."""
  x, weight = inputs(shape, dtype)
  variables = variables_of(shape[-1], len(shape) - 2)
  found = value_and_gradients(FUSA(), variables, x, weight.astype(jnp.float32))
  assert 'pallas_call' in str(jax.make_jaxpr(FUSA().apply)(variables, x))
  with jax.enable_x64(True):
    wide = jax.tree.map(lambda a: jnp.asarray(exact(a)), (variables, x, weight))
    expected = value_and_gradients(FUSA(literal=True), *wide)
  assert difference(found, expected) < tolerance


@pytest.mark.parametrize(('data', 'space'), [(8, 1), (4, 2), (2, 4)])
def test_devices_of_a_mesh_share_the_work(data, space):
  shape = (8, 16, 16, 24)
  x, weight = inputs(shape, jnp.float32)
  variables = variables_of(24, 2)
  expected = value_and_gradients(FUSA(), variables, x, weight)
  mesh = meshes.create_mesh(data, space)
  x, weight = (jax.device_put(a, meshes.batched(mesh, 4)) for a in (x, weight))
  loss = lambda v, x: (FUSA().apply(v, x) * weight).sum()
  placed = (meshes.replicated(mesh), (meshes.replicated(mesh), meshes.batched(mesh, 4)))
  with jax.set_mesh(mesh):
    assert fusa_gpu.suits(x)
    step = jax.jit(jax.value_and_grad(loss, (0, 1)), out_shardings=placed)
    compiled = step.lower(variables, x).compile()
  assert difference(compiled(variables, x), expected) < 1e-5  # float32 sums in another order
  exchanged = hlo.collectives(compiled.as_text(), mesh.size)
  assert 0 < max(c.nbytes for c in exchanged) < x.nbytes / mesh.size  # vectors, but no map


def test_nan_reaches_the_whole_image_as_in_the_literal_form():
  x, _ = inputs((2, 5, 7, 6), jnp.float32)
  x = x.at[0, 1, 2, 3].set(jnp.nan)
  variables = variables_of(6, 2)
  missing = np.isnan(jax.jit(FUSA().apply)(variables, x))
  np.testing.assert_array_equal(missing, np.isnan(jax.jit(FUSA(literal=True).apply)(variables, x)))
  assert missing[0].all() and not missing[1].any()


def test_maps_that_have_no_kernels(monkeypatch):
  fits = lambda dtype=jnp.float32, shape=(8, 8, 4, 6): fusa_gpu.suits(jax.ShapeDtypeStruct(shape, dtype))
  assert fits() and fits(jnp.bfloat16) and fits(jnp.float16) and fits(shape=(1, 3, 4096))
  assert not fits(jnp.float64) and not fits(shape=(1, 3, 4097)) and not fits(shape=(0, 8, 4, 6))
  assert not fits(shape=(*jax.export.symbolic_shape('b'), 8, 4, 6))
  with jax.set_mesh(meshes.create_mesh(4, 2)):
    assert fits() and not fits(shape=(6, 8, 4, 6)) and not fits(shape=(8, 7, 4, 6))
  with jax.set_mesh(jax.make_mesh((8,), ('batch',))):
    assert not fits()
  monkeypatch.undo()
  with jax.set_mesh(meshes.create_mesh(4, 2)):
    assert not fits()  # these are CPUs
  monkeypatch.setattr(fusa_gpu, 'pl', None)
  assert not fits()


def test_images_can_be_mapped():
  x, _ = inputs((3, 2, 5, 4, 6), jnp.float32)
  variables = variables_of(6, 2)
  apply = jax.jit(FUSA().apply)
  mapped = jax.jit(jax.vmap(FUSA().apply, (None, 0)))(variables, x)
  one = jnp.stack([apply(variables, image) for image in x])
  np.testing.assert_allclose(mapped, one, rtol=1e-6)
