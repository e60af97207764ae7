"""The mean of several networks, compared with NumPy's mean of their probabilities."""

import jax
import numpy as np
import pytest
from conftest import SIZE, tiny
from scipy import special

import fusa_jax
from configs import seg
from fusa_jax import tasks
from fusa_jax.inference import trained
from fusa_jax.runs import run_config
from fusa_jax.system.errors import UserError


def test_the_mean_of_networks_and_flips():
  """Two networks of one architecture and one of another, each with its own temperature."""
  slices = np.random.default_rng(0).integers(-1000, 300, (2, SIZE, SIZE)).astype(np.int16)
  networks, expected = [], []
  for number, (name, temperature) in enumerate([('fusa_resunet', 1.0), ('resunet', 0.5), ('fusa_resunet', 2.0)]):
    config = tiny(seg, **{'model.name': name})
    task = tasks.create(config)
    variables = jax.jit(lambda key, task=task: task.init(key, SIZE))(jax.random.key(number))
    networks.append(trained.Network(config, number, variables, (temperature,)))
    logits = jax.jit(task.logits)
    plain, mirrored = (np.asarray(logits(variables, x)[..., 0], np.float64) for x in (slices, slices[:, :, ::-1]))
    mean = (special.expit(plain) + special.expit(mirrored)[:, :, ::-1]) / 2
    expected.append(special.expit(special.logit(mean) / temperature))
    assert np.abs(plain - mirrored[:, :, ::-1]).max() > 1e-3
  model = trained.create(networks, flips=True)
  probability = np.asarray(jax.jit(model.function)(model.variables, slices))
  assert probability.shape == (2, SIZE, SIZE) and probability.dtype == np.float32
  np.testing.assert_allclose(probability, np.mean(expected, axis=0), atol=2e-6)
  assert (model.name, model.step) == ('mean of 3: fusa_resunet, resunet', [0, 1, 2])
  assert len(model.variables) == 2


def test_the_mean_of_flips_is_exact_where_probabilities_are_1():
  logits = np.array([[-300.0, 0.0, 40.0, 300.0], [-290.0, 4.0, 42.0, -300.0]])
  # In float64, 1 - 1e-17 is 1; the complements are therefore computed separately.
  lesion, none = np.logaddexp.reduce(-np.logaddexp(0, -logits)), np.logaddexp.reduce(-np.logaddexp(0, logits))
  np.testing.assert_allclose(tasks.mean_logits(*logits.astype(np.float32)), lesion - none, rtol=1e-6)


@pytest.mark.parametrize(
  ('other', 'reason'),
  [
    ({'data.image_size': 2 * SIZE}, rf'workdir: .*b has data.image_size {2 * SIZE}, but .*a has {SIZE}; give'),
    ({'data.intensity': 'grey'}, r'workdir: .*b has data.intensity grey, but .*a has hu'),
    (
      {'data.classes': (('mass', (2,)), ('lesion', (1,)))},
      r'workdir: .*b has data.classes mass \(2,\), lesion \(1,\), but .*a has lesion \(\); give runs',
    ),
  ],
)
def test_incompatible_runs_are_refused(tmp_path, other, reason):
  for name, overrides in (('a', {}), ('b', other)):
    config = tiny(seg)
    for key, value in overrides.items():
      config.data[key.removeprefix('data.')] = value
    run_config.save_config(tmp_path / name, config)
  with pytest.raises(UserError, match=reason):
    trained.load_model([tmp_path / 'a', tmp_path / 'b'], None)


def test_an_address_is_refused_in_python():
  with pytest.raises(UserError, match='^workdir: s3://bucket/run is an address, not a path .*; mount the bucket'):
    fusa_jax.load(['runs/mine', 's3://bucket/run'])
