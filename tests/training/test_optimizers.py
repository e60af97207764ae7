"""Schedules compared with their formulas, and optimizers with PyTorch's."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import tiny

from fusa_jax.system.errors import UserError
from fusa_jax.training import optimizers

STEPS, WARMUP, RATE, DECAY = 40, 10, 0.25, 0.05


def config_with(**train):
  config = tiny()
  config.train.update(steps=STEPS, warmup_steps=WARMUP, learning_rate=RATE, weight_decay=DECAY, **train)
  return config


FORMULAS = {
  'warmup_cosine': lambda t: (
    RATE * t / WARMUP if t < WARMUP else RATE * (1 + math.cos(math.pi * (t - WARMUP) / (STEPS - WARMUP))) / 2
  ),
  'polynomial': lambda t: RATE * (1 - t / STEPS) ** 0.9,
  'constant': lambda t: RATE,
}


@pytest.mark.parametrize('name', optimizers.SCHEDULES)
def test_each_schedule_equals_its_formula(name):
  _, schedule = optimizers.make_optimizer(config_with(schedule=name))
  rates = [float(schedule(step)) for step in range(STEPS)]
  np.testing.assert_allclose(rates, [FORMULAS[name](step) for step in range(STEPS)], rtol=1e-5, atol=1e-8)


def test_warm_up_takes_at_most_half_of_the_steps():
  _, rate = optimizers.make_optimizer(tiny(**{'train.steps': 20, 'train.warmup_steps': 500}))
  rates = [float(rate(step)) for step in range(21)]
  assert np.argmax(rates) == 10
  assert rates[0] == 0 and rates[20] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize('clip_norm', [None, 3.0])
@pytest.mark.parametrize('name', optimizers.OPTIMIZERS)
def test_each_optimizer_equals_pytorchs(name, clip_norm):
  """Twelve steps with a falling learning rate on a kernel (with weight decay) and a bias (without).

  The gradients have norms from 2 to 6, so that clipping changes only some of them.
  """
  torch = pytest.importorskip('torch')
  rng = np.random.default_rng(0)
  start = {'kernel': rng.normal(size=(3, 4)), 'bias': rng.normal(size=4)}
  optimizer, schedule = optimizers.make_optimizer(
    config_with(optimizer=name, schedule='polynomial', clip_norm=clip_norm)
  )

  theirs = {key: torch.nn.Parameter(torch.from_numpy(value.copy())) for key, value in start.items()}
  groups = [
    {'params': [theirs['kernel']], 'weight_decay': DECAY},
    {'params': [theirs['bias']], 'weight_decay': 0.0},
  ]
  reference = {
    'adamw': lambda: torch.optim.AdamW(groups, lr=RATE),
    'sgd': lambda: torch.optim.SGD(groups, lr=RATE, momentum=0.99, nesterov=True),
  }[name]()

  ours = {key: jnp.asarray(value, jnp.float32) for key, value in start.items()}
  state, update, norms = optimizer.init(ours), jax.jit(optimizer.update), []
  for step in range(12):
    gradients = {key: rng.normal(size=value.shape) for key, value in start.items()}
    for group in reference.param_groups:
      group['lr'] = FORMULAS['polynomial'](step)
    for key, parameter in theirs.items():
      parameter.grad = torch.from_numpy(gradients[key])
    norms.append(float(torch.nn.utils.clip_grad_norm_(theirs.values(), clip_norm or float('inf'))))
    reference.step()
    updates, state = update({key: jnp.asarray(value, jnp.float32) for key, value in gradients.items()}, state, ours)
    ours = optax.apply_updates(ours, updates)
  for key, parameter in theirs.items():
    np.testing.assert_allclose(ours[key], parameter.detach().numpy(), rtol=1e-4, atol=1e-5, err_msg=key)
  assert min(norms) < 3 < max(norms)
  assert float(schedule(11)) == pytest.approx(reference.param_groups[0]['lr'], rel=1e-5)


@pytest.mark.parametrize(
  ('key', 'names'), [('optimizer', 'adamw, sgd'), ('schedule', 'warmup_cosine, polynomial, constant')]
)
def test_unknown_names_are_refused_with_the_list(key, names):
  with pytest.raises(UserError, match=rf"^train\.{key}: 'x' is unknown; give one of {names}$"):
    optimizers.make_optimizer(config_with(**{key: 'x'}))


def test_gpus_update_as_other_devices(monkeypatch):
  """GPUs store the gradients first, which changes no bit."""
  params = {'kernel': jnp.arange(24.0).reshape(2, 3, 4) / 7, 'bias': jnp.ones(4)}
  optimizer, _ = optimizers.make_optimizer(config_with(schedule='constant'))
  gradients = jax.tree.map(jnp.sin, params)
  update = lambda: jax.jit(lambda *a: optimizer.update(*a))(gradients, optimizer.init(params), params)
  general = update()
  chosen = []
  monkeypatch.setattr(jax.lax, 'platform_dependent', lambda *args, cuda, default: chosen.append(cuda) or cuda(*args))
  jax.tree.map(np.testing.assert_array_equal, update(), general)
  assert chosen
