"""Packed maps, the form of full resolution for TPUs: the same results and parameters as unpacked maps, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import cls, seg
from fusa_jax import FUSA, models, tasks
from fusa_jax.models.layers import BatchNorm, Doubling, max_pool
from fusa_jax.models.tpu import packing


@pytest.fixture(autouse=True)
def double():
  with jax.enable_x64(True):
    yield


def draw(*shape, seed=0):
  """Numbers with few digits: some are equal, so maxima tie."""
  return np.random.default_rng(seed).normal(size=shape).round(1)


@pytest.mark.parametrize(('side', 'pixels'), [(1, 2), (3, 2), (3, 3), (5, 2), (7, 2)])
def test_a_packed_kernel_does_the_same_convolution(side, pixels):
  x, kernel = draw(2, 6, 12, 3), draw(side, side, 3, 4)
  convolve = lambda x, k: jax.lax.conv_general_dilated(x, k, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC'))
  packed = convolve(packing.pack(x, pixels), packing.pack_kernel(jnp.asarray(kernel), pixels))
  np.testing.assert_allclose(packing.unpack(packed, pixels), convolve(x, kernel), rtol=1e-12, atol=1e-12)


def both(plain, packed, *arguments):
  """Values and gradients of two functions with the same arguments, under one random cotangent."""
  results = []
  for function in (plain, packed):
    out, back = jax.vjp(jax.jit(function), *arguments)
    cotangent = jax.tree.map(lambda leaf: draw(*leaf.shape, seed=1).astype(leaf.dtype), out)
    results.append((out, back(cotangent)))
  return results


def assert_same(results):
  plain, packed = results
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-9), packed, plain)


def test_pooling_gives_ties_to_the_first():
  x = draw(2, 8, 8, 3).round()
  x[0, 0, 0] = np.nan
  assert_same(both(lambda x: max_pool(x, 2, 2), lambda x: packing.halve(packing.pack(x, 2)), x))


@pytest.mark.parametrize('average', [False, True])
def test_norm(average):
  plain, packed = (BatchNorm(average, 0.9, 1e-5, pixels=pixels) for pixels in (1, 2))
  x = draw(2, 4, 8, 3) + 5
  variables = plain.init(jax.random.key(0), x)
  variables = jax.tree.map(lambda leaf: draw(*leaf.shape, seed=2) ** 2 + 0.5, variables)

  def apply(norm, pixels):
    def run(params, x):
      out, updated = norm.apply({**variables, 'params': params}, packing.pack(x, pixels), mutable=['batch_stats'])
      return packing.unpack(out, pixels), jax.lax.stop_gradient(updated)

    return run

  assert_same(both(apply(plain, 1), apply(packed, 2), variables['params'], x))


def test_doubling():
  x = draw(2, 3, 4, 5)
  plain, packed = (Doubling(4, jnp.float64, pixels) for pixels in (1, 2))
  params = plain.init(jax.random.key(0), x)
  assert_same(both(plain.apply, lambda p, x: packing.unpack(packed.apply(p, x), 2), params, x))


def test_fusa():
  """Also its attention map, and gradients where the maximum ties within a pixel, a pair and the image."""
  x = draw(2, 4, 6, 3).round()
  plain, packed = FUSA(), FUSA(pixels=2)
  params = plain.init(jax.random.key(0), x)
  params = jax.tree.map(lambda leaf: draw(*leaf.shape, seed=3), params)
  assert jax.tree.map(jnp.shape, packed.init(jax.random.key(0), packing.pack(x, 2))) == jax.tree.map(jnp.shape, params)

  def apply(module, pixels):
    def run(params, x):
      out, updated = module.apply(params, packing.pack(x, pixels), mutable=['intermediates'])
      return packing.unpack(out, pixels), packing.unpack(updated['intermediates']['attention'][0], pixels)

    return run

  assert_same(both(apply(plain, 1), apply(packed, 2), params, x))
  literal = FUSA(literal=True).apply(params, x)
  np.testing.assert_allclose(apply(packed, 2)(params, x)[0], literal, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(('name', 'channels'), [*((name, 1) for name in models.PACKED), ('fusa_resunet', 3)])
def test_networks(name, channels):
  """A convolution over a join takes the channels of both maps. Running statistics are the same, too."""
  options = {'width': 4, 'multiples': (1, 2), 'dtype': jnp.float64}
  plain, packed = models.create(name, **options), models.create(name, packed=True, **options)
  images = draw(2, 16, 16, channels)
  variables = plain.init(jax.random.key(0), images)
  assert jax.tree.map(jnp.shape, packed.init(jax.random.key(0), images)) == jax.tree.map(jnp.shape, variables)
  variables = jax.tree.map(lambda leaf: abs(draw(*leaf.shape, seed=4)) / 2 + 0.1, variables)

  def apply(model):
    def run(params, images):
      of = {**variables, 'params': params}
      logits, updated = model.apply(of, images, train=True, mutable=['batch_stats'])
      return logits, jax.lax.stop_gradient(updated)

    return run

  assert_same(both(apply(plain), apply(packed), variables['params'], images))


def test_tpus_alone_pack(monkeypatch):
  config = seg.get_config('demo')
  packed = {platform: tasks.create(config, platform).model.packed for platform in ('cpu', 'gpu', 'tpu', None)}
  assert packed == {'cpu': False, 'gpu': False, 'tpu': True, None: False}
  assert not hasattr(tasks.create(ConfigDict(cls.get_config('demo')), 'tpu').model, 'packed')
