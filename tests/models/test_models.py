"""Shapes, sizes and initial values of the models. test_against_torch.py compares their outputs with PyTorch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fusa_jax import FUSA, models
from fusa_jax.models.layers import layers
from fusa_jax.models.resnet import BasicBlock, Bottleneck
from fusa_jax.system.errors import UserError

# The deepest encoders reduce images 32 times; this size is not square.
SHAPE = (2, 64, 96, 3)
WITH_DROPOUT = ('vgg16', 'mobilenet_v2', 'pspnet', 'deeplabv3')


def variables_of(name, shape=(1, 64, 64, 1), **options):
  module = models.create(name, **options)
  return jax.eval_shape(functools.partial(module.init, train=False), jax.random.key(0), jnp.zeros(shape))


# Section II-B: each residual block contains one module; II-C: four in the encoder, four in the decoder.
FUSA_MODULES = {
  'resnet18': 8,
  'resnet34': 16,
  'resnet50': 16,
  'resunet': 8,
  'linknet': 8,
  'pspnet': 7,
  'deeplabv3': 16,
}


def count(variables):
  return sum(leaf.size for leaf in jax.tree.leaves(variables['params']))


# From torchvision's documentation: https://pytorch.org/vision/stable/models.html (num_params).
@pytest.mark.parametrize(
  ('name', 'parameters'),
  [
    ('resnet18', 11689512),
    ('resnet34', 21797672),
    ('resnet50', 25557032),
    ('vgg16', 138365992),
    ('densenet121', 7978856),
    ('mobilenet_v2', 3504872),
  ],
)
def test_classifiers_have_torchvisions_number_of_parameters(name, parameters):
  assert count(variables_of(name, (1, 64, 64, 3), num_classes=1000)) == parameters


@pytest.mark.parametrize('name', models.NAMES)
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_logits_and_the_last_level_have_the_agreed_shape(name, dtype):
  module = models.create(name, num_classes=2, dtype=dtype, width=4)
  images = jnp.zeros(SHAPE)
  variables = jax.eval_shape(functools.partial(module.init, train=False), jax.random.key(0), images)
  assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype('float32')}
  assert variables.keys() == {'params', 'batch_stats'}
  read = ['batch_stats', 'intermediates', 'perturbations']
  apply = functools.partial(module.apply, train=True, mutable=read, rngs={'dropout': jax.random.key(0)})
  logits, updates = jax.eval_shape(apply, variables, images)
  assert logits.dtype == jnp.float32
  assert logits.shape == ((2, 2) if name in models.CLASSIFIERS else (*SHAPE[:3], 2))
  assert jax.tree.structure(updates['batch_stats']) == jax.tree.structure(variables['batch_stats'])
  if name in models.CLASSIFIERS:  # each marks its last level, once
    (features,) = updates['intermediates']['last_level']
    stride = 16 if name == 'vgg16' else 32
    assert features.shape[:3] == (SHAPE[0], SHAPE[1] // stride, SHAPE[2] // stride)
    assert features.dtype == dtype and updates['perturbations'] == {'last_level': features}


@pytest.mark.parametrize('plain', list(FUSA_MODULES))
def test_fusa_variants_add_attention_and_nothing_else(plain):
  flat = lambda name: {jax.tree_util.keystr(k): v.shape for k, v in jax.tree.leaves_with_path(variables_of(name))}
  before, after = flat(plain), flat(f'fusa_{plain}')
  assert before.items() < after.items()
  added = {key for key in after if key not in before}
  assert all("['attention']" in key for key in added)
  modules = {key.split("['attention']")[0] for key in added}
  assert len(modules) == FUSA_MODULES[plain]


def test_every_name_is_a_plain_model_or_its_fusa_variant():
  assert set(models.NAMES) == {
    *FUSA_MODULES,
    *(f'fusa_{n}' for n in FUSA_MODULES),
    'vgg16',
    'densenet121',
    'mobilenet_v2',
  }


@pytest.mark.parametrize(
  'name', [name if name == 'vgg16' else pytest.param(name, marks=pytest.mark.slow) for name in WITH_DROPOUT]
)
def test_dropout_depends_on_its_key_and_is_off_in_evaluation(name):
  module = models.create(name, width=8)
  images = jnp.asarray(np.random.default_rng(0).normal(size=SHAPE), jnp.float32)
  variables = module.init(jax.random.key(0), images, train=False)
  train = jax.jit(lambda key: module.apply(variables, images, train=True, mutable='batch_stats', rngs={'dropout': key}))
  first, again, other = (np.asarray(train(jax.random.key(seed))[0]) for seed in (1, 1, 2))
  np.testing.assert_array_equal(first, again)
  assert np.abs(first - other).max() > 1e-3 * np.abs(first).max()
  jax.eval_shape(functools.partial(module.apply, train=False), variables, images)  # needs no key


@pytest.mark.parametrize('encoder', ['resnet18', 'resnet34', 'resnet50'])
@pytest.mark.parametrize(('name', 'depth'), [('linknet', 5), ('pspnet', 3), ('deeplabv3', 5)])
def test_segmenters_take_each_encoder(name, depth, encoder):
  params = variables_of(name, encoder=encoder)['params']['encoder']
  whole = variables_of(encoder)['params']['encoder']
  assert params.keys() == {key for key in whole if not key.startswith('stage') or int(key[5]) < depth}


def test_fusa_resunet_has_the_papers_channels():
  """Section II-C: residual modules with 64, 128, 256, 512 and 1024 channels; the decoder mirrors them."""
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
  """Section II-B: the map scales F(x), then the shortcut is added. Zero attention leaves only the shortcut."""
  x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, 6, 8)), jnp.float32)

  class Zero(FUSA):
    def after(self, norm, x):
      y, statistics = norm.apply(x)
      return jnp.zeros_like(y), statistics

  module = BasicBlock(8, attention=Zero, **layers(train=True, dtype=None))
  variables = jax.tree.map(jnp.ones_like, module.init(jax.random.key(0), x))
  out, _ = module.apply(variables, x, mutable=['batch_stats'])
  np.testing.assert_array_equal(out, np.maximum(x, 0))


# At this size, the stem of a ResNet, which has no blocks, keeps as much as its stages.
@pytest.mark.parametrize(('name', 'share'), [('fusa_resunet', 0.5), ('resnet18', 0.7)])
def test_rematerialisation_keeps_less_and_changes_no_gradient(name, share):
  """Gradients are compared in float64."""
  options = {'width': 4, **({'multiples': (1, 2)} if name == 'fusa_resunet' else {'stage_sizes': (2, 2)})}
  with jax.enable_x64(True):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 16, 16, 1)))
    plain, remat = (models.create(name, **options, remat=remat) for remat in (False, True))
    variables = jax.jit(lambda: plain.init(jax.random.key(0), x))()
    variables = jax.tree.map(lambda v: v.astype(jnp.float64) + 0.1, variables)  # no norm has scale 0

    def loss_of(module):
      def loss(params):
        out, updates = module.apply({**variables, 'params': params}, x, train=True, mutable=['batch_stats'])
        return (out**2).mean(), updates

      return loss

    def kept(loss):
      """The number of values in maps [2, side, side, C] that the backward pass keeps."""
      pull = jax.eval_shape(lambda params: jax.vjp(loss, params, has_aux=True)[1], variables['params'])
      maps = [leaf for leaf in jax.tree.leaves(pull) if leaf.ndim == 4 and leaf.shape[0] == 2]
      return sum(leaf.size for leaf in maps if leaf.shape[1] == leaf.shape[2])

    losses = [loss_of(module) for module in (plain, remat)]
    assert kept(losses[1]) < share * kept(losses[0])
    results = [jax.jit(jax.value_and_grad(loss, has_aux=True))(variables['params']) for loss in losses]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), *results)


@pytest.mark.parametrize(
  ('name', 'reason'),
  [
    ('resunet', '36 must be a multiple of 16 for ResUNet; give 48'),
    ('linknet', '36 must be a multiple of 32 for LinkNet; give 64'),
    ('pspnet', '36 must be a multiple of 8 for PSPNet; give 40'),
    ('deeplabv3', '36 must be a multiple of 8 for DeepLabV3; give 40'),
  ],
)
@pytest.mark.parametrize('shape', [(1, 64, 36, 1), (1, 36, 64, 1)])
def test_errors_name_the_next_valid_size(name, reason, shape):
  with pytest.raises(UserError, match=reason):
    variables_of(name, shape)


@pytest.mark.parametrize('name', ['vgg16', 'densenet121'])
def test_images_below_32_pixels_are_refused(name):
  with pytest.raises(UserError, match='31 must be at least 32 for .*; give 32'):
    variables_of(name, (1, 64, 31, 1))


def test_unknown_names_and_options_are_refused():
  with pytest.raises(UserError, match='resnet19.* is unknown; give one of .*resnet18'):
    models.create('resnet19')
  with pytest.raises(UserError, match='resnet18 does not accept .*depth'):
    models.create('resnet18', depth=3)
  with pytest.raises(UserError, match="model.encoder: 'vgg16' is unknown; give one of resnet18, resnet34, resnet50"):
    variables_of('linknet', encoder='vgg16')
