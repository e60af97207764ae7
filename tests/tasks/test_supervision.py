"""Deep supervision compared with its formula: levels, targets, weights, and gradients of the heads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny

from fusa_jax import tasks
from fusa_jax.tasks import losses, supervision

SIZE = 16


def test_the_loss_is_the_weighted_mean_over_the_levels():
  rng = np.random.default_rng(0)
  mask = (rng.random((2, 16, 8)) < 0.4).astype(np.uint8)
  outputs = [rng.normal(size=(2, 16 // side, 8 // side, 1)) for side in (1, 2, 4)]

  def cross_entropy(logits, truth):
    p = 1 / (1 + np.exp(-logits[..., 0]))
    return -(truth * np.log(p) + (1 - truth) * np.log(1 - p)).mean()

  expected = 0.0
  for weight, side, logits in zip((4 / 7, 2 / 7, 1 / 7), (1, 2, 4), outputs, strict=True):
    area = np.stack([mask[:, row::side, column::side] for row in range(side) for column in range(side)])
    expected += weight * cross_entropy(logits, area.mean(axis=0) >= 0.5)
  full, *deep = (jnp.asarray(logits, jnp.float32) for logits in outputs)
  deep = dict(zip(('level1', 'level2'), deep, strict=True))
  got = supervision.loss(losses.get_loss('cross_entropy'), full, deep, jnp.asarray(mask))
  np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_levels_of_several_classes_and_unknown_pixels():
  """Each class has its own majority. A block with an unknown pixel is unknown."""
  mask = np.array([[1, 1, 3, 0], [1, 2, 0, 0], [2, 2, 128, 3], [2, 2, 3, 3]], np.uint8)[None]
  seen = []
  outputs = [jnp.zeros((1, side, side, 2)) for side in (4, 2)]
  supervision.loss(lambda _, truth: seen.append(truth) or 0.0, outputs[0], {'level1': outputs[1]}, mask, True)
  np.testing.assert_array_equal(seen[1][0], [[1, 0], [2, 3 + 128]])


@pytest.fixture(scope='module')
def model():
  """A model of four levels with two heads, its variables, and a batch."""
  task = tasks.create(tiny(**{'train.deep_supervision': True, 'model.multiples': (1, 1, 1, 1)}))
  variables = jax.jit(lambda: task.init(jax.random.key(0), SIZE))()
  heads = jax.jit(lambda: task.init_heads(jax.random.key(1), variables, SIZE))()
  rng = np.random.default_rng(0)
  slices = jnp.asarray(rng.integers(-1000, 300, (2, SIZE, SIZE)), jnp.int16)
  return task, variables, heads, slices, jnp.asarray(rng.random((2, SIZE, SIZE)) < 0.4, jnp.uint8)


def test_each_lower_level_has_a_head(model):
  task, variables, heads, slices, _ = model
  logits, updated = task.model.apply(variables, task.inputs(slices), train=True, mutable=['batch_stats', 'levels'])
  deep = task.heads.apply(heads, supervision.features(updated['levels']))
  assert {name: x.shape for name, x in deep.items()} == {'level1': (2, 8, 8, 1), 'level2': (2, 4, 4, 1)}
  assert list(deep) == ['level1', 'level2'] and logits.shape == (2, SIZE, SIZE, 1)
  # The first level's head by hand.
  features, head = updated['levels']['level1'][0], heads['params']['level1']
  np.testing.assert_allclose(deep['level1'], features @ head['kernel'][0, 0] + head['bias'], rtol=1e-4, atol=1e-5)


def test_every_head_and_the_model_learn_from_the_loss(model):
  task, variables, heads, slices, mask = model

  def loss(params, heads):
    return task.train_loss({**variables, 'params': params}, heads, slices, mask, jax.random.key(0))[0]

  of_model, of_heads = jax.jit(jax.grad(loss, argnums=(0, 1)))(variables['params'], heads)
  for gradient in jax.tree.leaves((of_model['head'], of_heads, of_model['up2_conv'])):
    assert np.abs(gradient).max() > 0


def test_the_model_of_inference_knows_nothing_of_the_heads(model):
  task, variables, *_ = model
  assert set(variables) == {'params', 'batch_stats'}
  plain = tasks.create(tiny(**{'model.multiples': (1, 1, 1, 1)}))
  program = lambda task: jax.jit(task.probabilities).lower(variables, model[3]).as_text()
  assert program(task) == program(plain)
