"""Products that promise float32 ask for it: by default a TPU multiplies in bfloat16 and a GPU in TF32."""

import re

import jax
import jax.numpy as jnp
import pytest

from fusa_jax import FUSA, models

# Fewer stages or levels, for a shorter test; the layers are the same.
_SHALLOW = {
  'resunet': {'multiples': (1, 2)},
  **{name: {'stage_sizes': (1,)} for name in ('resnet18', 'resnet34', 'resnet50')},
}
_QUICK = ('fusa_resnet18', 'fusa_resunet', 'vgg16')
_PRODUCT = re.compile(r'stablehlo\.(dot_general|convolution)\b.*')


def products(function, *shapes):
  """Returns (dtype of the operands, whether both have the highest precision) of each product in a TPU's program."""
  program = jax.jit(function).trace(*shapes).lower(lowering_platforms=('tpu',)).as_text()
  lines = [found[0] for found in _PRODUCT.finditer(program)]
  dtypes = [re.search(r': \(tensor<(?:\d+x)*(\w+)>', line)[1] for line in lines]
  return [(dtype, line.count('HIGHEST') == 2) for dtype, line in zip(dtypes, lines, strict=True)]


@pytest.mark.parametrize(
  'name', [name if name in _QUICK else pytest.param(name, marks=pytest.mark.slow) for name in models.NAMES]
)
def test_a_model_in_bfloat16_computes_its_other_products_in_float32(name):
  """The head and FUSA, in the forward and in the backward pass; all other products are of bfloat16."""
  model = models.create(name, dtype=jnp.bfloat16, width=4, **_SHALLOW.get(name.removeprefix('fusa_'), {}))
  images, key = jax.ShapeDtypeStruct((2, 64, 64, 1), jnp.float32), jax.random.key(0)
  variables = jax.eval_shape(lambda images: model.init(key, images), images)

  def loss(params, others, images):
    out, _ = model.apply({**others, 'params': params}, images, True, mutable=['batch_stats'], rngs={'dropout': key})
    return out.sum()

  found = products(jax.grad(loss), variables['params'], variables, images)
  exact = [highest for dtype, highest in found if dtype == 'f32']
  assert len(exact) >= 2 and all(exact)
  assert ('bf16', False) in found


@pytest.mark.parametrize('literal', [False, True])
def test_fusa_computes_in_float32(literal):
  module, x = FUSA(literal=literal), jax.ShapeDtypeStruct((2, 8, 8, 16), jnp.float32)
  variables = jax.eval_shape(lambda x: module.init(jax.random.key(0), x), x)
  found = products(jax.grad(lambda variables, x: module.apply(variables, x).sum()), variables, x)
  assert len(found) >= 4 and set(found) == {('f32', True)}
