"""GPUs of a host: what is refused, the times of exchanges, and a compiled step where the compiler is installed."""

import importlib.util
import json
import os
import subprocess
import sys

import jax
import pytest
from conftest import tiny

from configs import cls, seg
from fusa_jax import tasks
from fusa_jax.chips import aot, gpu, hlo, topology
from fusa_jax.system.errors import UserError
from fusa_jax.training import optimizers


@pytest.mark.parametrize(
  ('text', 'slices', 'reason'),
  [
    ('h100', 1, "'h100' is not the GPUs of a host; give KIND:NUMBER like h100:8, KIND one of a100, h100, b200"),
    ('h100:0', 1, "'h100:0' is not the GPUs of a host"),
    ('h100:16', 1, "'h100:16' is not the GPUs of a host; .* NUMBER from 1 to 8"),
    ('h100:2x4', 1, "'h100:2x4' is not the GPUs of a host"),
    ('h100:8', 2, 'slices: 2, but only TPUs have slices; leave it out'),
    (
      'rtx:1',
      1,
      r"'rtx:1' is unknown; give a TPU slice like v5e:4x4 \(v4, .*\), or GPUs like h100:8 \(a100, h100, b200\)",
    ),
  ],
)
def test_invalid_topologies_are_refused(text, slices, reason):
  with pytest.raises(UserError, match=reason):
    topology.parse(text, slices)


def test_topologies():
  chips = topology.parse('h100:8')
  assert (chips.kind, chips.chips, chips.platform, str(chips)) == ('h100', 8, 'gpu', 'h100:8')
  assert topology.parse('v5e:2x4').platform == 'tpu'


def test_exchanges_over_nvlink():
  """An all-reduce of 1 GB over 8 GPUs sends 2 x 7/8 GB; NVLink of an H100 takes 450 GB/s in each direction."""
  eight = topology.parse('h100:8')
  seconds = lambda kind, size, group: eight.seconds(hlo.Collective(kind, size, group)) - gpu._EXCHANGE_SECONDS
  assert seconds('all-reduce', 10**9, 8) == pytest.approx(1.75 / 450)
  assert seconds('all-gather', 10**9, 8) == pytest.approx(0.875 / 450)
  assert seconds('reduce-scatter', 10**9 // 8, 8) == pytest.approx(0.875 / 450)
  assert seconds('collective-permute', 10**9, 8) == pytest.approx(1 / 450)


@pytest.mark.parametrize('platform', ['gpu', 'tpu'])
def test_flops_grow_with_the_batch_and_are_at_least_those_of_the_convolutions(platform):
  config = tiny(seg, **{'model.name': 'resunet', 'train.batch_size': 8})
  task = tasks.create(config)
  optimizer, _ = optimizers.make_optimizer(config)
  whole = aot._lowered_flops(config, optimizer, platform)
  config.train.batch_size = 16
  assert aot._lowered_flops(config, optimizer, platform) == pytest.approx(2 * whole, rel=0.01)
  # At least three times the forward pass: the gradients of inputs and of kernels cost as much.
  variables = jax.eval_shape(lambda: task.init(jax.random.key(0), 32))
  kernels = jax.tree_util.tree_leaves_with_path(variables['params'])
  at_full_size = [leaf for path, leaf in kernels if 'level0' in jax.tree_util.keystr(path) and leaf.ndim == 4]
  assert whole > 2 * 8 * 32 * 32 * sum(leaf.size for leaf in at_full_size)


def test_a_model_without_fusa_has_no_plain_form():
  assert aot.without_attention(seg.get_config('resunet')) is None
  assert aot.without_attention(seg.get_config()).model.name == 'resunet'


@pytest.mark.skipif(
  not importlib.util.find_spec('jax_plugins') or not importlib.util.find_spec('jax_plugins.xla_cuda12'),
  reason='the GPU compiler is not installed: requirements-aot-gpu.txt',
)
@pytest.mark.slow
@pytest.mark.parametrize('chips', ['h100:1', 'h100:8'])
def test_a_tiny_config_compiles_for_gpus(tmp_path, chips):
  """Runs the command as a user does and compares the report with the numbers of the model."""
  arguments = ['--config=configs/cls.py:demo', '--config.data.image_size=32', '--config.model.width=4']
  arguments += ['--config.model.stage_sizes=(1,)', '--config.train.batch_size=16', f'--topology={chips}']
  command = [sys.executable, 'launch.py', '--mode=aot', *arguments, f'--output={tmp_path}']
  result = subprocess.run(command, capture_output=True, text=True, timeout=600, env=os.environ | {'XLA_FLAGS': ''})
  assert result.returncode == 0, result.stderr
  report = json.loads((tmp_path / f'cls-demo-{chips.replace(":", "_")}.json').read_text())
  task = tasks.create(tiny(cls))
  params = jax.eval_shape(lambda: task.init(jax.random.key(0), 32))['params']
  size = sum(leaf.size for leaf in jax.tree.leaves(params))
  assert report['memory']['parameters'] == 4 * size
  count = int(chips[-1])
  assert report['chips'] == count and report['batch_per_device'] == 16 / count
  assert report['bytes_moved'] > 3 * 4 * size  # at least the state is read
  assert report['bytes_moved'] > report['bytes_moved_without_attention'] > 0
  assert (report['bytes_all_reduced'] >= 2 * size) == (count > 1)
  assert report['seconds']['memory'] == pytest.approx(report['bytes_moved'] / 3350e9)
  assert 'without FUSA' in result.stdout
