"""Both sides of the benchmark do the same work; the command runs and saves the numbers that it prints."""

import dataclasses
import json
import runpy
import sys
import types

import jax
import numpy as np
import pytest

import benchmarks

torch = pytest.importorskip('torch')
from benchmarks import compare, settings, workload  # noqa: E402 (needs torch)
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
  for module in (compare, settings):
    monkeypatch.setattr(module, 'flags', types.SimpleNamespace(FLAGS=flag_values))
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
    assert row['train_mfu'] is None  # of a CPU
  printed = capsys.readouterr().out
  head, _, *lines = printed[printed.index('| model') :].splitlines()
  assert lines == [compare.line(row) for row in written['rows']]
  assert all(line.count('|') == head.count('|') for line in lines)
  assert written['image_size'] == 32 and torch.__version__.startswith(written['versions']['torch'])
  assert f'torch {written["versions"]["torch"]}, ' in printed


def test_a_failing_torch_compile_loses_no_other_row(monkeypatch):
  """JAX and eager PyTorch are timed before; the third row has the reason."""

  def contestant(name, settings, compiled=False):
    if compiled:
      raise RuntimeError('no | compiler\nhere')
    nothing = lambda: None
    return compare.Contestant(nothing, lambda: np.zeros(2), nothing, nothing)

  monkeypatch.setattr(compare, 'ours', contestant)
  monkeypatch.setattr(compare, 'theirs', contestant)
  rows = []
  for row in compare.compare('resnet18', SETTINGS):
    rows.append(row)
    if len(rows) == 2:  # torch.compile has not been tried yet
      monkeypatch.setattr(compare.workload, 'in_turn', lambda *_: pytest.fail('timed again'))
  ours, eager, compiled = rows
  assert (ours['framework'], eager['framework']) == ('JAX', 'PyTorch, eager') and eager['train_ratio_to_eager'] == 1
  assert compiled == {
    'model': 'resnet18',
    'framework': 'PyTorch, torch.compile',
    'failed': 'RuntimeError: no | compiler here',
  }
  line = compare.line(compiled)
  assert line.count('|') == compare.line(ours).count('|') and 'failed: RuntimeError: no / compiler here' in line


@pytest.mark.parametrize('name', ['torch', 'torchvision'])
def test_a_missing_package_is_named(name, monkeypatch, capsys):
  monkeypatch.setitem(sys.modules, name, None)
  monkeypatch.delitem(sys.modules, 'benchmarks.compare')
  monkeypatch.delitem(sys.modules, 'benchmarks.torch_reference')
  monkeypatch.delattr(benchmarks, 'torch_reference')
  monkeypatch.setattr(compare.exits, 'leave', sys.exit)
  with pytest.raises(SystemExit) as exit_:
    runpy.run_module('benchmarks.compare', run_name='__main__')
  assert exit_.value.code == 2
  assert capsys.readouterr().err.startswith(f'error: {name}: not installed; pip install -r requirements-torch.txt')


def test_a_missing_smp_is_named(monkeypatch):
  monkeypatch.setitem(sys.modules, 'segmentation_models_pytorch', None)
  with pytest.raises(UserError, match='segmentation_models_pytorch: not installed, and .* of linknet needs it'):
    compare.original('linknet', SETTINGS)


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
