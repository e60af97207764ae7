"""The models' shapes, sizes and starts. That they compute what PyTorch's do is for the tests of torch_weights."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fusa_jax import FUSA, models
from fusa_jax.errors import UserError
from fusa_jax.models.resnet import BasicBlock, Bottleneck, layers


def variables_of(name, shape=(1, 64, 64, 1), **options):
  module = models.create(name, **options)
  return jax.eval_shape(functools.partial(module.init, train=False), jax.random.key(0), jnp.zeros(shape))


def count(variables):
  return sum(leaf.size for leaf in jax.tree.leaves(variables['params']))


# As torchvision documents its weights: https://pytorch.org/vision/stable/models.html (num_params).
@pytest.mark.parametrize(
  ('name', 'parameters'), [('resnet18', 11689512), ('resnet34', 21797672), ('resnet50', 25557032)]
)
def test_resnets_have_torchvisions_number_of_parameters(name, parameters):
  assert count(variables_of(name, (1, 64, 64, 3), num_classes=1000)) == parameters


@pytest.mark.parametrize('name', models.NAMES)
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_logits_have_the_agreed_shape_and_are_float32(name, dtype):
  module = models.create(name, num_classes=2, dtype=dtype, width=4)
  images = jnp.zeros((2, 32, 48, 3))
  variables = jax.eval_shape(functools.partial(module.init, train=False), jax.random.key(0), images)
  assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype('float32')}
  apply = functools.partial(module.apply, train=True, mutable=['batch_stats'])
  logits, changed = jax.eval_shape(apply, variables, images)
  assert logits.dtype == jnp.float32
  assert logits.shape == ((2, 2) if name in models.CLASSIFIERS else (2, 32, 48, 2))
  assert jax.tree.structure(changed['batch_stats']) == jax.tree.structure(variables['batch_stats'])


@pytest.mark.parametrize('plain', [name for name in models.NAMES if not name.startswith('fusa_')])
def test_fusa_variants_add_attention_and_nothing_else(plain):
  flat = lambda name: {jax.tree_util.keystr(k): v.shape for k, v in jax.tree.leaves_with_path(variables_of(name))}
  before, after = flat(plain), flat(f'fusa_{plain}')
  assert before.items() < after.items()
  added = {key for key in after if key not in before}
  assert all("['attention']" in key for key in added)
  # Section II-B: each residual block contains one module; II-C: four in the encoder, four in the decoder.
  modules = {key.split("['attention']")[0] for key in added}
  assert len(modules) == {'resnet18': 8, 'resnet34': 16, 'resnet50': 16, 'resunet': 8}[plain]


def test_fusa_resunet_has_the_papers_channels():
  """Section II-C: a residual module to 64 channels, then 128, 256, 512, 1024; the decoder mirrors them."""
  params = variables_of('fusa_resunet')['params']
  width = {name: block['conv2']['kernel'].shape[-1] for name, block in params.items() if 'conv2' in block}
  assert width == {
    'stem': 64,
    'down1': 128,
    'down2': 256,
    'down3': 512,
    'down4': 1024,
    'up3': 512,
    'up2': 256,
    'up1': 128,
    'up0': 64,
  }
  assert 'attention' not in params['stem']


@pytest.mark.parametrize('attention', [None, FUSA])
@pytest.mark.parametrize('block', [BasicBlock, Bottleneck])
def test_residual_blocks_start_as_the_identity(block, attention):
  x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, 6, 8)), jnp.float32)
  module = block(8 // block.expansion, attention=attention, **layers(train=False, dtype=None))
  out, _ = module.init_with_output(jax.random.key(0), x)
  np.testing.assert_array_equal(out, np.maximum(x, 0))


def test_attention_sits_between_branch_and_shortcut():
  """Section II-B: the map scales F(x), then the shortcut is added: an attention of zero leaves the shortcut."""
  x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, 6, 8)), jnp.float32)

  class Zero(FUSA):
    def __call__(self, x):
      return jnp.zeros_like(x)

  module = BasicBlock(8, attention=Zero, **layers(train=True, dtype=None))
  variables = jax.tree.map(jnp.ones_like, module.init(jax.random.key(0), x))
  out, _ = module.apply(variables, x, mutable=['batch_stats'])
  np.testing.assert_array_equal(out, np.maximum(x, 0))


def test_resunet_names_the_next_size_that_it_takes():
  with pytest.raises(ValueError, match=r'multiples of 16: 40 is not, 48 is'):
    variables_of('resunet', (1, 32, 40, 1))


def test_registry_refuses_by_name():
  with pytest.raises(UserError, match='there is no .*resnet19.*one of .*resnet18'):
    models.create('resnet19')
  with pytest.raises(UserError, match='resnet18 cannot take .*depth'):
    models.create('resnet18', depth=3)
