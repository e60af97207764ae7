"""Both sides of the benchmark do the same work; the command runs and saves the numbers that it prints."""

import dataclasses
import json
import types

import jax
import numpy as np
import pytest

torch = pytest.importorskip('torch')
from benchmarks import compare, compare_table, workload  # noqa: E402 (needs torch)
from benchmarks.settings import Settings  # noqa: E402
from fusa_jax import tasks, torch_weights  # noqa: E402
from fusa_jax.system.errors import UserError  # noqa: E402
from fusa_jax.training import augment, optimizers, train  # noqa: E402

SETTINGS = Settings(image_size=32, batch_size=2, rounds=1, steps=1)


@pytest.mark.slow
def test_rows_and_json(tmp_path, monkeypatch, capsys):
  flag_values = types.SimpleNamespace(
    models=['resnet18'], torch_compile=False, json=str(tmp_path / 'numbers.json'), **dataclasses.asdict(SETTINGS)
  )
  monkeypatch.setattr(compare, 'flags', types.SimpleNamespace(FLAGS=flag_values))
  monkeypatch.setattr(compare.program, 'start_logging', lambda: None)
  monkeypatch.setattr(compare.program, 'use_compilation_cache', lambda: None)
  compare.main([])
  written = json.loads((tmp_path / 'numbers.json').read_text())
  assert [row['framework'] for row in written['rows']] == ['JAX', 'PyTorch, eager']
  assert written['rows'][1]['train_ratio_to_eager'] == 1
  for row in written['rows']:
    assert row['train_slices_per_second'] > 0 and row['inference_slices_per_second'] > 0
    assert row['train_ratio_to_eager'] == pytest.approx(
      row['train_slices_per_second'] / written['rows'][1]['train_slices_per_second']
    )
  assert compare_table.table(written['rows']) in capsys.readouterr().out
  assert written['image_size'] == 32


def test_incomparable_models_are_refused():
  with pytest.raises(UserError, match=r"--models: 'resnet19' is unknown; choose from densenet121, "):
    compare.ours('resnet19', SETTINGS)
  with pytest.raises(UserError, match="--width: 8, but PyTorch's resnet50 exists at full width only"):
    compare.theirs('resnet50', dataclasses.replace(SETTINGS, width=8), compiled=False)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['resnet18', 'linknet'])
def test_both_sides_compute_the_same_loss(name, monkeypatch):
  """From the same weights, PyTorch's loss at its backward call equals the loss of our training step."""
  losses = []
  backward = torch.Tensor.backward
  monkeypatch.setattr(torch.Tensor, 'backward', lambda self: (losses.append(self.item()), backward(self)))
  made = []
  create = compare.torch_reference.create

  def create_and_keep_weights(*args):
    made.append(create(*args))
    weights.update({key: value.clone() for key, value in made[0].state_dict().items()})
    return made[0]

  weights = {}
  monkeypatch.setattr(compare.torch_reference, 'create', create_and_keep_weights)
  # Each norm needs enough values to be well conditioned; at this size the last norms have 16.
  settings = Settings(image_size=64, batch_size=4)
  batch = workload.batch_of(64, 4)
  compare.theirs(name, settings, compiled=False).step()

  config = workload.config_of(name, settings)
  task = tasks.create(config)
  optimizer, _ = optimizers.make_optimizer(config)
  variables = torch_weights.from_torch(name, weights)
  state = train.TrainState(np.int32(0), variables, optimizer.init(variables['params']))
  _, scalars = jax.jit(
    lambda state, batch: train.train_step(
      state,
      batch,
      task=task,
      optimizer=optimizer,
      augmentation=augment.create(config),
      seed=0,
    )
  )(state, batch)
  assert losses == [pytest.approx(float(scalars['loss']), rel=1e-4)]
