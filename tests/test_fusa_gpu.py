"""The kernels for NVIDIA GPUs, interpreted on a CPU, against NumPy in float64 and against the literal form of FUSA."""

import functools
import importlib.util
import json
import math
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fusa_jax import FUSA, fusa, fusa_gpu
from fusa_jax.chips import hlo
from fusa_jax.models.layers import layers, statistics
from fusa_jax.models.resnet import BasicBlock
from fusa_jax.system import meshes

# One to three spatial axes; sizes that fill no tile, and sizes that fill several.
MAPS = [
  ((2, 9, 6), jnp.bfloat16),
  ((2, 5, 7, 6), jnp.float32),
  ((2, 3, 4, 5, 6), jnp.float16),
  ((1, 1, 1, 3), jnp.float32),
  ((2, 33, 35, 64), jnp.bfloat16),
  ((1, 16, 16, 512), jnp.float32),
  ((1, 9, 8, 2048), jnp.bfloat16),
]


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
  """Runs kernels on the CPU, and everything that depends on the platform as on a GPU."""
  call = functools.partial(fusa_gpu.pl.pallas_call, interpret=True)
  monkeypatch.setattr(fusa_gpu.pl, 'pallas_call', call)
  monkeypatch.setattr(fusa_gpu, '_on_gpus', lambda _: True)
  monkeypatch.setattr(jax, 'device_count', lambda: 1)
  monkeypatch.setattr(jax.lax, 'platform_dependent', lambda *x, default, cuda=None, **_: (cuda or default)(*x))


def exact(array):
  return np.asarray(array).astype(np.float64)


def inputs(shape, dtype):
  """A map x, a norm's affine, and a cotangent. Many y are equal to a maximum, and all y are numbers of bfloat16."""
  rng = np.random.default_rng(0)
  x, g = np.round(rng.normal(size=shape) * 4) / 4, rng.normal(size=shape)
  affine = [rng.choice(values, shape[-1]) for values in ([-1.0, 0.5], [-1.0, 0.0, 0.5, 2.0], [-0.5, 0.25])]
  return jnp.asarray(x, dtype), tuple(jnp.asarray(a, jnp.float32) for a in affine), jnp.asarray(g, dtype)


def axes_of(x):
  """The axes of the pools: space, and channels."""
  return tuple(range(1, x.ndim - 1)), -1


@pytest.mark.parametrize(('shape', 'dtype'), MAPS)
def test_pools(shape, dtype):
  x, affine, _ = inputs(shape, dtype)
  channel_max, mean_n, spatial_max, spatial_mean = jax.jit(fusa_gpu.pools, static_argnums=2)(x, affine, dtype)
  x, (mean, scale, shift) = exact(x), map(exact, affine)
  y, (space, channels) = (x - mean) * scale + shift, axes_of(x)
  np.testing.assert_array_equal(channel_max, y.max(space))
  np.testing.assert_array_equal(spatial_max, y.max(channels))
  np.testing.assert_allclose(mean_n, (x - mean).mean(space), atol=1e-6)
  np.testing.assert_allclose(spatial_mean, y.mean(channels), atol=1e-6)


@pytest.mark.parametrize(('shape', 'dtype'), MAPS)
def test_sums_of_the_backward_pass(shape, dtype):
  (x, affine, g), rng = inputs(shape, dtype), np.random.default_rng(1)
  offset, score, slope = (rng.normal(size=size) for size in ((shape[0], shape[-1]), shape[:-1], shape[-1:]))
  weights = np.array([0.7, -1.3])
  single = lambda *arrays: tuple(jnp.asarray(a, jnp.float32) for a in arrays)
  mean, scale, shift = map(exact, affine)
  n = exact(x) - mean
  y, (space, channels) = n * scale + shift, axes_of(x)
  maxima = single(y.max(space), y.max(channels))
  found = jax.jit(fusa_gpu.sums, static_argnums=6)(
    x, g, affine, single(offset, score, slope), maxima, *single(weights), dtype
  )
  attention = 1 / (1 + np.exp(-np.expand_dims(offset, space) - score[..., None] * slope))
  d_logits = exact(g) * y * attention * (1 - attention)
  is_channel_max, is_spatial_max = (y == y.max(axes, keepdims=True) for axes in (space, channels))
  count = is_spatial_max.sum(channels, keepdims=True)
  of_pools = weights[0] * is_spatial_max / count + weights[1] / shape[-1]
  d_y = exact(g) * attention + (d_logits @ slope)[..., None] * of_pools
  expected = fusa_gpu.Sums(
    d_offset=d_logits.sum(space),
    d_slope=(d_logits * score[..., None]).sum((0, *space)),
    d_score=d_logits @ slope,
    channel_count=is_channel_max.sum(space),
    spatial_count=count[..., 0],
    channel_n=(n * is_channel_max).sum(space),
    d_shift=d_y.sum((0, *space)),
    d_scale=(d_y * n).sum((0, *space)),
  )
  for name in fusa_gpu.Sums._fields:
    theirs = getattr(expected, name)
    np.testing.assert_allclose(getattr(found, name), theirs, 1e-5, 1e-5 * np.abs(theirs).max(), err_msg=name)


class Normalised(fusa.nn.Module):
  """FUSA after a norm with the given affine."""

  literal: bool = False

  @fusa.nn.compact
  def __call__(self, x, affine):
    mean, scale, shift = affine
    apply = lambda x: ((x - mean) * scale + shift, ())
    return FUSA(literal=self.literal, name='fusa').after(fusa.Norm(apply, lambda x: (affine, ()), x.dtype), x)[0]


def variables_of(shape):
  rng = np.random.default_rng(2)
  x = jax.ShapeDtypeStruct((1,) * (len(shape) - 1) + shape[-1:], jnp.float32)
  shapes = jax.eval_shape(FUSA().init, jax.random.key(0), x)
  # Small values, to keep every sigmoid from saturation.
  return jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape) / s.shape[-1], jnp.float32), shapes)


def output_and_gradients(module, weight, arguments):
  """The module's output for (variables, *inputs), and the gradients of its weighted sum."""
  out, pull = jax.vjp(module.apply, *arguments)
  return out, pull(weight.astype(out.dtype))


def difference(a, b):
  pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  # Not Python's max, which may ignore NaN.
  return np.max([np.linalg.norm(exact(p) - exact(q)) / np.linalg.norm(exact(q)) for p, q in pairs])


@pytest.mark.parametrize(
  ('norm', 'shape', 'dtype', 'tolerance'),
  [
    (False, (2, 5, 7, 6), jnp.float32, 5e-6),
    (False, (2, 5, 7, 6), jnp.bfloat16, 2**-7),
    (True, (2, 9, 6), jnp.float32, 5e-6),
    (True, (2, 5, 7, 6), jnp.bfloat16, 2**-7),
    (True, (2, 3, 4, 5, 6), jnp.float32, 5e-6),
  ],
)
def test_module_equals_the_literal_form(norm, shape, dtype, tolerance):
  """Values and gradients in float64, with ties for most of the maxima, and channels that a norm makes constant."""
  x, affine, weight = inputs(shape, dtype)
  variables = variables_of(shape)
  arguments = ({'params': {'fusa': variables['params']}}, x, affine) if norm else (variables, x)
  module = Normalised if norm else FUSA
  run = jax.jit(output_and_gradients, static_argnums=0)
  found = run(module(), weight, arguments)
  assert 'pallas_call' in str(jax.make_jaxpr(module().apply)(*arguments))
  with jax.enable_x64(True):
    wide = jax.tree.map(lambda a: jnp.asarray(exact(a)), (weight, arguments))
    # Not jitted: XLA would compute the input of the maxima twice, with different roundings.
    expected = output_and_gradients(module(literal=True), *wide)
  assert difference(found, expected) < tolerance


@pytest.mark.parametrize('train', [True, False])
def test_residual_block_equals_the_literal_form(train):
  """Its last norm and FUSA are one function here. Output, running statistics and gradients in float64."""
  rng, shape = np.random.default_rng(3), (2, 6, 5, 8)
  make = lambda literal: BasicBlock(8, attention=functools.partial(FUSA, literal=literal), **layers(train, None))
  variables = jax.eval_shape(make(True).init, jax.random.key(0), jnp.ones(shape))
  draw = lambda s: jnp.asarray(rng.normal(size=s.shape) / np.sqrt(s.size), jnp.float32)
  params, stats = (jax.tree.map(draw, variables[name]) for name in ('params', 'batch_stats'))
  stats = jax.tree.map(jnp.square, stats)
  x, weight = (jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(2))

  def run(block, params, x, weight, stats):
    apply = lambda *arguments: block.apply(
      {'params': arguments[0], 'batch_stats': stats}, arguments[1], mutable=['batch_stats']
    )
    out, pull, stats = jax.vjp(apply, params, x, has_aux=True)
    return out, stats, pull(weight)

  arguments = (params, x, weight, stats)
  assert 'pallas_call' in str(jax.make_jaxpr(functools.partial(run, make(False)))(*arguments))
  found = jax.jit(run, static_argnums=0)(make(False), *arguments)
  with jax.enable_x64(True):
    wide = jax.tree.map(lambda a: jnp.asarray(exact(a)), arguments)
    # Not jitted: XLA would compute the input of the maxima twice, with different roundings.
    expected = run(make(True), *wide)
  assert difference(found, expected) < 1e-5


def test_gradient_of_the_statistics_of_a_norm():
  x, _, g = inputs((2, 5, 7, 6), jnp.float32)
  of = lambda moments: lambda x: sum((m * w).sum() for m, w in zip(moments(x), g[0, 0], strict=False))
  found = jax.grad(of(statistics))(x)
  with jax.enable_x64(True):
    expected = jax.grad(of(lambda x: (x.mean((0, 1, 2)), x.var((0, 1, 2)))))(jnp.asarray(exact(x)))
  assert difference(found, expected) < 1e-6


@pytest.mark.parametrize(('data', 'space'), [(8, 1), (4, 2), (2, 4)])
def test_devices_of_a_mesh_share_the_work(data, space):
  shape = (8, 16, 16, 24)
  x, affine, weight = inputs(shape, jnp.float32)
  arguments = ({'params': {'fusa': variables_of(shape)['params']}}, x, affine)
  run = functools.partial(output_and_gradients, Normalised())
  expected = jax.jit(run)(weight, arguments)
  mesh = meshes.create_mesh(data, space)
  everywhere, split = meshes.replicated(mesh), meshes.batched(mesh, 4)
  x, weight = (jax.device_put(a, split) for a in (x, weight))
  arguments = (arguments[0], x, affine)
  with jax.set_mesh(mesh):
    assert fusa_gpu.suits(x)
    compiled = jax.jit(run, out_shardings=(split, (everywhere, split, everywhere))).lower(weight, arguments).compile()
  assert difference(compiled(weight, arguments), expected) < 1e-5  # float32 sums in another order
  sent = hlo.collectives(compiled.as_text(), mesh.size)
  assert 0 < max(exchange.nbytes for exchange in sent) < x.nbytes / mesh.size  # vectors, but no map


def test_nan_reaches_the_whole_image_as_in_the_literal_form():
  x, _, _ = inputs((2, 5, 7, 6), jnp.float32)
  x = x.at[0, 1, 2, 3].set(jnp.nan)
  variables = variables_of(x.shape)
  missing, expected = (np.isnan(jax.jit(FUSA(literal=form).apply)(variables, x)) for form in (False, True))
  np.testing.assert_array_equal(missing, expected)
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
  with monkeypatch.context() as patch:
    patch.setattr(jax, 'device_count', lambda: 2)  # without a mesh, XLA would gather the map on both
    assert not fits()
  monkeypatch.setattr(fusa_gpu, 'pl', None)
  assert not fits()
  monkeypatch.undo()
  assert not fits()  # the devices are CPUs, without a mesh
  with jax.set_mesh(meshes.create_mesh(4, 2)):
    assert not fits()  # and with one


def test_the_attention_map_can_be_read():
  """To return the map, XLA computes it; the result is the same."""
  x, _, _ = inputs((2, 5, 7, 6), jnp.float32)
  variables = variables_of(x.shape)
  out, state = jax.jit(functools.partial(FUSA().apply, mutable=['intermediates']))(variables, x)
  (attention,) = state['intermediates']['attention']
  np.testing.assert_allclose(out, x * attention, rtol=1e-6)
  np.testing.assert_allclose(out, jax.jit(FUSA().apply)(variables, x), rtol=1e-5)


def test_images_can_be_mapped():
  x, _, _ = inputs((3, 2, 5, 4, 6), jnp.float32)
  variables, apply = variables_of(x.shape[1:]), jax.jit(FUSA().apply)
  mapped = jax.jit(jax.vmap(FUSA().apply, (None, 0)))(variables, x)
  np.testing.assert_allclose(mapped, jnp.stack([apply(variables, image) for image in x]), rtol=1e-5)


@pytest.mark.skipif(
  not importlib.util.find_spec('jax_plugins') or not importlib.util.find_spec('jax_plugins.xla_cuda12'),
  reason='the GPU compiler is not installed: requirements-aot-gpu.txt',
)
@pytest.mark.slow
def test_a_compiled_block_moves_few_more_maps_with_fusa():
  """Compiled for an H100. One sweep for the pools is needed; XLA also keeps the input of the ReLU, in some blocks."""
  shape = (4, 64, 64, 64)
  code = f"""
import json
from benchmarks import fusa
from fusa_jax.chips import topology
print(json.dumps([fusa.cost(form, {shape}, topology.parse('h100:1'))[0] for form in fusa.FORMS.values()]))
"""
  command = [sys.executable, '-c', code]
  result = subprocess.run(command, capture_output=True, text=True, timeout=600, env=os.environ | {'XLA_FLAGS': ''})
  assert result.returncode == 0, result.stderr
  none, literal, plain, factored = json.loads(result.stdout.splitlines()[-1])
  one_map = 2 * math.prod(shape)
  assert 1 < (factored - none) / one_map < 4.5
  assert (plain - none) / one_map > 12 and literal > plain
