"""XLA's count of operations compared with PyTorch's counter."""

import jax
import pytest
from conftest import SIZE, tiny

from benchmarks import model_table
from fusa_jax import models, tasks

torch = pytest.importorskip('torch')
from benchmarks import torch_reference  # noqa: E402 (needs torch)


@pytest.mark.parametrize('name', [name for name in models.NAMES if not name.startswith('fusa_')])
def test_gflops_equal_pytorchs(name):
  """They agree within 6%. XLA counts norms and activations, but not products with padding (many in DeepLabV3)."""
  from torch.utils.flop_counter import FlopCounterMode

  with torch.device('meta'):
    model = torch_reference.create(name).eval()
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
      model(torch.zeros(1, 1, 512, 512))
  ratio = model_table.forward_gflops(models.create(name), 512) / (counter.get_total_flops() / 1e9)
  assert (0.8 if name == 'deeplabv3' else 0.94) < ratio < 1.06


def test_parameter_counts_equal_pytorchs():
  for name in ('fusa_resnet50', 'fusa_resunet', 'linknet', 'vgg16'):
    with torch.device('meta'):
      model = torch_reference.create(name)
    assert model_table.count(models.create(name)) == sum(p.numel() for p in model.parameters())


def test_channels_of_neighbouring_slices_are_counted():
  """Two more channels: two more 3 x 3 kernels per output channel of each first convolution, counted by a real model."""
  task = tasks.create(tiny(**{'data.context': 1}))
  variables = jax.eval_shape(lambda: task.init(jax.random.key(0), SIZE))
  parameters = sum(leaf.size for leaf in jax.tree.leaves(variables['params']))
  assert model_table.count(task.model, channels=3) == parameters > model_table.count(task.model)
