"""Compiles the training step for absent TPUs and compares its reported needs with independent counts."""

import importlib.util
import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from conftest import tiny

from configs import cls, seg
from fusa_jax import tasks
from fusa_jax.chips import aot, tpu
from fusa_jax.system.errors import DoesNotFitError, UserError


@pytest.mark.parametrize('limit', [0, 1, 5, 11, 15])
def test_the_largest_batch_is_found(monkeypatch, limit):
  def fake(config, topology):
    if config.train.batch_size // 16 > limit:
      raise DoesNotFitError('too much')

  monkeypatch.setattr(aot, 'report', fake)
  config = seg.get_config()
  config.train.batch_size = 16 * 16
  assert aot.largest_batch(config, tpu.Topology.parse('v5e:4x4')) == limit
  assert config.train.batch_size == 256  # unchanged


needs_libtpu = pytest.mark.skipif(
  not importlib.util.find_spec('libtpu'), reason='the TPU compiler is not installed: requirements-aot.txt'
)


def launch(*arguments):
  command = [sys.executable, 'launch.py', '--mode=aot', *arguments]
  return subprocess.run(command, capture_output=True, text=True, timeout=600)


@needs_libtpu
@pytest.mark.slow
def test_a_tiny_config_compiles_for_v5e(tmp_path):
  """Runs the command as a user does and compares the report with the numbers of the model."""
  arguments = ['--config=configs/cls.py:demo', '--config.data.image_size=32', '--config.model.width=4']
  arguments += ['--config.model.stage_sizes=(1,)', '--config.data.context=1', '--config.data.classes=("a","b","c")']
  result = launch(*arguments, '--topology=v5e:2x4', f'--output={tmp_path}')
  assert result.returncode == 0, result.stderr
  report = json.loads((tmp_path / 'cls-demo-v5e_2x4.json').read_text())
  task = tasks.create(tiny(cls, **{'data.context': 1, 'data.classes': ('a', 'b', 'c')}))
  params = jax.eval_shape(lambda: task.init(jax.random.key(0), 32))['params']
  assert params['encoder']['conv1']['kernel'].shape[2] == params['head']['bias'].shape[0] == 3
  assert report['channels'] == 3 and report['classes'] == ['a', 'b', 'c']
  size = sum(leaf.size for leaf in jax.tree.leaves(params))
  assert report['memory']['parameters'] == 4 * size
  assert report['memory']['optimizer_and_statistics'] > 2 * 4 * size  # Adam's two moments
  assert report['chips'] == 8 and report['mesh'] == {'data': 8, 'space': 1}
  assert report['batch_per_device'] == 2
  assert report['memory']['peak'] < report['memory']['chip'] == 16 * 2**30
  # Every gradient is summed over the chips, in bfloat16 or wider. The statistics of the norms are summed as well.
  assert 2 * size <= report['bytes_all_reduced'] <= 6 * size
  assert report['bytes_otherwise_sent'] == report['bytes_between_slices'] == 0
  assert report['seconds']['compute'] == pytest.approx(report['flops'] / 197e12)
  assert report['seconds']['memory'] == pytest.approx(report['bytes_moved'] / 819e9)
  assert 3 * 4 * size < report['bytes_moved'] < report['bytes_accessed']  # at least the state is read
  slowest = [operation['cycles'] for operation in report['operations']]
  assert slowest == sorted(slowest, reverse=True) and len(slowest) == 50
  assert report['cycles'] / 10 < sum(slowest) <= report['cycles']
  for key, total in (('nbytes', 'bytes_moved'), ('cycles', 'cycles')):
    assert sum(sums[key] for sums in report['layers'].values()) == report[total]
  assert {'encoder/stage1_0', 'outside the layers'} <= set(report['layers'])
  assert report['core_seconds'] == pytest.approx(report['cycles'] / 1.5e9, rel=0.01)
  assert report['step_seconds'] == report['core_seconds'] + report['seconds']['interconnect'] > report['least_seconds']
  assert report['cycles_without_attention'] < report['cycles']
  assert 0 < report['peak_share'] < report['efficiency'] < 1
  for line in ('topology', 'peak memory', 'scaling efficiency', '8 chips, mesh data 8 x space 1', 'slowest layers'):
    assert line in result.stdout


@needs_libtpu
@pytest.mark.slow
def test_several_slices_and_shared_images_compile():
  """'data' spans the slices and 'space' stays within one. The report counts the traffic of both."""
  config = tiny(cls, **{'mesh.data': -1, 'mesh.space': 2, 'train.batch_size': 16})
  report = aot.report(config, tpu.Topology.parse('v5e:2x4', 2))
  assert report['chips'] == 16 and report['mesh'] == {'data': 8, 'space': 2}
  assert report['bytes_between_slices'] > 0
  assert report['bytes_otherwise_sent'] > 0  # rows at the borders between the parts of an image
  with pytest.raises(UserError, match='would share an image between slices; make mesh.data a multiple of 2'):
    aot.report(tiny(cls, **{'mesh.data': 1, 'mesh.space': 16}), tpu.Topology.parse('v5e:2x4', 2))


@needs_libtpu
@pytest.mark.slow
def test_exit_code_3_if_it_does_not_fit(tmp_path):
  """Images of 4096 x 4096 do not fit chips with 16 GB; nothing is written."""
  arguments = ['--config=configs/seg.py', '--config.data.image_size=4096', '--config.model.width=16']
  result = launch(*arguments, '--topology=v5e:4x4', f'--output={tmp_path}')
  assert result.returncode == 3, result.stderr
  last = result.stderr.splitlines()[-1]
  assert last.startswith('error: train.batch_size=16 on v5e:4x4: needs ')
  assert 'GiB are missing; one slice per device does not fit; a larger mesh.space splits images' in last
  assert not list(tmp_path.iterdir())


def test_scaling_page_matches_its_reports():
  docs = pathlib.Path(__file__).parents[2] / 'docs'
  assert (docs / 'scaling.md').read_text() == aot.scaling_page(docs / 'scaling')
  reports = [json.loads(path.read_text()) for path in sorted((docs / 'scaling').glob('*.json'))]
  assert {rows[0]['task'] for rows in reports} == {'segmentation', 'classification'}
  for rows in reports:
    assert [row['chips'] for row in rows] == [8, 32, 256]
    assert np.ptp([row['batch_per_device'] for row in rows]) == 0
