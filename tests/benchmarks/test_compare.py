"""The benchmark's two sides do the same work; that it runs and writes what it prints."""

import json

import jax
import numpy as np
import pytest
from absl import flags

torch = pytest.importorskip('torch')
from benchmarks import compare  # noqa: E402 (needs torch)
from fusa_jax import augment, tasks, torch_weights, train  # noqa: E402


@pytest.fixture(autouse=True)
def settings():
  if not flags.FLAGS.is_parsed():
    flags.FLAGS(['compare'])
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(flags.FLAGS['image_size'], 'value', 32)
    patch.setattr(flags.FLAGS['batch_size'], 'value', 2)
    patch.setattr(flags.FLAGS['rounds'], 'value', 1)
    patch.setattr(flags.FLAGS['steps'], 'value', 1)
    patch.setattr(flags.FLAGS['torch_compile'], 'value', False)
    yield


@pytest.mark.slow
def test_rows_and_json(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(flags.FLAGS['models'], 'value', ['resnet18'])
  monkeypatch.setattr(flags.FLAGS['json'], 'value', str(tmp_path / 'numbers.json'))
  monkeypatch.setattr(compare.launch, 'start_logging', lambda: None)
  monkeypatch.setattr(compare.launch, 'use_compilation_cache', lambda: None)
  compare.main([])
  written = json.loads((tmp_path / 'numbers.json').read_text())
  assert [row['framework'] for row in written['rows']] == ['JAX', 'PyTorch, eager']
  assert written['rows'][1]['train_ratio_to_eager'] == 1
  for row in written['rows']:
    assert row['train_slices_per_second'] > 0 and row['inference_slices_per_second'] > 0
    assert row['train_ratio_to_eager'] == pytest.approx(
      row['train_slices_per_second'] / written['rows'][1]['train_slices_per_second']
    )
  assert compare.table(written['rows']) in capsys.readouterr().out
  assert written['image_size'] == 32


@pytest.mark.parametrize('name', ['resnet18', 'linknet'])
def test_both_sides_compute_the_same_loss(name, monkeypatch):
  """From the same weights: the loss that PyTorch's side goes back from is the one of our loop's step."""
  losses = []
  backward = torch.Tensor.backward
  monkeypatch.setattr(torch.Tensor, 'backward', lambda self: (losses.append(self.item()), backward(self)))
  made = []
  create = compare.torch_reference.create

  def remember(*args):
    made.append(create(*args))
    weights.update({key: value.clone() for key, value in made[0].state_dict().items()})
    return made[0]

  weights = {}
  monkeypatch.setattr(compare.torch_reference, 'create', remember)
  # Enough values for each norm, of which the last see 16, to be well conditioned.
  monkeypatch.setattr(flags.FLAGS['image_size'], 'value', 64)
  monkeypatch.setattr(flags.FLAGS['batch_size'], 'value', 4)
  batch = compare.batch_of(64, 4)
  compare.theirs(name, batch, compiled=False).step()

  config = compare.config_of(name)
  task = tasks.create(config)
  optimizer, _ = train.make_optimizer(config)
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
