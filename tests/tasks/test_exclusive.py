"""Exclusive classes: softmax probabilities as log-odds, their loss, and the tables of slices that follow."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny
from scipy import special

from configs import cls
from fusa_jax import models, tasks
from fusa_jax.system.errors import UserError
from fusa_jax.tasks import losses

NAMES = ('normal', 'COVID', 'other')


def task_of(**overrides):
  return tasks.create(tiny(cls, **{'data.classes': NAMES, **overrides}))


@pytest.mark.parametrize('scale', [1, 30, 300])
@pytest.mark.parametrize('count', [2, 3, 7])
def test_the_sigmoid_of_log_odds_is_the_softmax(count, scale):
  logits = np.random.default_rng(count).normal(scale=scale, size=(64, count)).astype(np.float32)
  exact = logits.astype(np.float64)
  others = [special.logsumexp(np.delete(exact, k, axis=1), axis=1) for k in range(count)]
  got = np.asarray(tasks.log_odds(jnp.asarray(logits)), np.float64)
  np.testing.assert_allclose(got, exact - np.stack(others, axis=1), rtol=3e-7, atol=1e-6 * scale)
  np.testing.assert_allclose(jax.nn.sigmoid(tasks.log_odds(jnp.asarray(logits))), special.softmax(exact, 1), atol=1e-6)
  np.testing.assert_array_equal(got.argmax(axis=1), logits.argmax(axis=1))


def test_the_task_gives_softmax_probabilities_and_averages_them_over_flips():
  task = task_of()
  assert task.exclusive and task.classes == NAMES
  slices = jnp.asarray(np.random.default_rng(0).integers(-1000, 300, (3, 32, 32)), jnp.int16)
  variables = jax.jit(lambda: task.init(jax.random.key(0), 32))()
  # The last layer starts near zero: make the classes differ.
  variables = jax.tree.map(lambda x: x + 0.3 * jax.random.normal(jax.random.key(x.size), x.shape), variables)
  raw = lambda slices: np.asarray(task.model.apply(variables, task.inputs(slices), train=False), np.float64)
  plain, mirrored = (special.softmax(raw(each), axis=1) for each in (slices, slices[:, :, ::-1]))
  assert plain.std(axis=0).max() > 0.01 and np.abs(plain - mirrored).max() > 0.001
  for flips, expected in ((False, plain), (True, (plain + mirrored) / 2)):
    got = task.logits(variables, slices, flips)
    assert got.shape == (3, 3)
    np.testing.assert_allclose(got, special.logit(expected), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(task.probabilities(variables, slices, flips=flips), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(task.probabilities(variables, slices, flips=flips).sum(axis=1), 1, atol=1e-6)


@pytest.mark.parametrize('count', [2, 3, 30])
def test_the_loss_equals_pytorchs(count):
  torch = pytest.importorskip('torch')
  rng = np.random.default_rng(0)
  logits, number = rng.normal(scale=5, size=(40, count)), rng.integers(count, size=40)
  bits = jnp.asarray(np.int32(1) << number.astype(np.int32))
  loss = losses.get_loss('cross_entropy', exclusive=True)
  theirs = torch.tensor(logits, requires_grad=True)
  expected = torch.nn.functional.cross_entropy(theirs, torch.tensor(number))
  expected.backward()
  got, gradient = jax.value_and_grad(loss)(jnp.asarray(logits, jnp.float32), bits)
  np.testing.assert_allclose(got, expected.item(), rtol=1e-6)
  np.testing.assert_allclose(gradient, theirs.grad.numpy(), atol=1e-7)


@pytest.mark.parametrize('name', sorted(losses.LOSSES.keys() - losses.EXCLUSIVE.keys()))
def test_other_losses_are_refused(name):
  with pytest.raises(UserError, match=rf'^train.loss: {name} is not for exclusive classes; give one of cross_entropy$'):
    task_of(**{'train.loss': name})


@pytest.mark.parametrize('name', models.CLASSIFIERS)
def test_every_classifier_has_a_logit_per_class(name):
  task = task_of(**{'model.name': name, 'model.width': None, 'model.stage_sizes': None})
  shapes = jax.eval_shape(lambda: task.init(jax.random.key(0), 64))
  out = jax.eval_shape(task.logits, shapes, jax.ShapeDtypeStruct((2, 64, 64), jnp.int16))
  assert out.shape == (2, 3) and out.dtype == jnp.float32


def test_auto_is_one_class_until_the_cohort_is_known():
  assert tasks.classes_of(cls.get_config()).names == ('lesion',) and not tasks.create(cls.get_config('demo')).exclusive
