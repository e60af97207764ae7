"""The step compiled for TPUs that are not here: what it is said to need, against counts made in other ways."""

import json
import math
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny
from jax.sharding import NamedSharding, PartitionSpec

from configs import cls, seg
from fusa_jax import aot, sharding
from fusa_jax.errors import DoesNotFitError, UserError


@pytest.mark.parametrize(
  ('text', 'slices', 'reason'),
  [
    ('v5e', 1, "'v5e' is no slice; give KIND:SHAPE like v5e:4x4, KIND one of v4, v5e, v5p, v6e"),
    ('v9:2x2', 1, "'v9:2x2' is no slice"),
    ('v5e:4', 1, "'v5e:4' is no slice"),
    ('v5e:4x0', 1, "'v5e:4x0' is no slice"),
    ('v5e:16x32', 1, 'a slice of v5e has at most 256 chips'),
    ('v5e:4x4', 0, '--slices: 0; give 1 or more'),
  ],
)
def test_topologies_that_are_none(text, slices, reason):
  with pytest.raises(UserError, match=reason):
    aot.Topology.parse(text, slices)


def test_topologies():
  topology = aot.Topology.parse('v5e:4x8', 2)
  assert (topology.kind, topology.shape, topology.chips, str(topology)) == ('v5e', (4, 8), 64, 'v5e:4x8 x 2 slices')
  for kind, chip in aot.CHIPS.items():
    sizes = [aot.Topology.parse(f'{kind}:{shape}').chips for shape in chip.sweep]
    assert sizes[0] == 8 and sizes == sorted(sizes) and sizes[-1] in (128, 256)


def collectives(function, mesh, *arguments):
  """Those in the program that XLA makes for CPU devices: the same operations as for others."""
  text = jax.jit(function).lower(*arguments).compile().as_text()
  lines = [line for line in text.splitlines() if aot._SENDS.search(line)]
  return [aot.Collective.parse(line, mesh.devices.size) for line in lines]


def test_collectives_are_counted_with_their_bytes_and_groups():
  """Programs of which it is known what they must send."""
  mesh = sharding.create_mesh(4, 2)
  place = lambda *axes: NamedSharding(mesh, PartitionSpec(*axes))
  array = lambda shape, dtype, *axes: jax.ShapeDtypeStruct(shape, dtype, sharding=place(*axes))
  # A matrix product over split rows: the gradient of a dense layer, summed over 'data'.
  product = lambda x, y: jax.lax.with_sharding_constraint(x.T @ y, place())
  found = collectives(product, mesh, array((64, 24), jnp.float32, 'data'), array((64, 40), jnp.float32, 'data'))
  assert [(c.kind, c.nbytes, c.group) for c in found] == [('all-reduce', 24 * 40 * 4, 4)]
  gather = lambda x: jax.lax.with_sharding_constraint(x, place())
  found = collectives(gather, mesh, array((32, 16), jnp.bfloat16, 'space'))
  assert [(c.kind, c.group) for c in found] == [('all-gather', 2)]
  assert found[0].nbytes in (32 * 16 * 2, 32 * 16 * 4)  # the CPU's compiler may gather bfloat16 as float32
  # A sum over everything takes part on all eight.
  found = collectives(lambda x: x.sum(), mesh, array((8, 8), jnp.float32, 'data', 'space'))
  assert math.prod(c.group for c in found if c.kind == 'all-reduce') == 8
  # A row from the neighbour.
  shift = lambda x: jax.lax.with_sharding_constraint(jnp.roll(x, 1, axis=0), place('space'))
  found = collectives(shift, mesh, array((32, 16), jnp.float32, 'space'))
  assert {(c.kind, c.nbytes) for c in found} == {('collective-permute', 16 * 4)}


@pytest.mark.parametrize(
  ('line', 'expected'),
  [
    (
      '%r = (f32[64]{0:T(128)S(1)}, bf16[8,64]{1,0}) all-reduce(%a, %b), '
      "replica_groups=mesh['axis_0'=16,'axis_1'=4] {'axis_0'}, to_apply=%sum",
      ('all-reduce', 64 * 4 + 8 * 64 * 2, 16),
    ),
    (
      "%r = f32[64]{0} all-reduce(%a), replica_groups=mesh['axis_0'=4,'axis_1'=8], device_ids=([8,4]T(1,0)) "
      "{'axis_0','axis_1':(2)4}, to_apply=%sum",
      ('all-reduce', 256, 16),
    ),
    (
      '%p = (bf16[2,8]{1,0}, bf16[2,8]{1,0}, u32[], u32[]) collective-permute-start(%x), source_target_pairs={{0,1}}',
      ('collective-permute', 32, 8),
    ),
    ('%g = (f32[4]{0}, f32[32]{0}) all-gather-start(%x), replica_groups=[2,8]<=[16]', ('all-gather', 128, 8)),
    ('%s = f32[4]{0} reduce-scatter(%x), replica_groups={{0,1,2,3},{4,5,6,7}}', ('reduce-scatter', 16, 4)),
    (
      '%send = (f32[128]{0}, u32[], token[]) send(%x, %t), is_host_transfer=true, '
      'frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime"}',
      ('send', 512, 8),
    ),
  ],
)
def test_lines_as_the_tpu_compiler_writes_them(line, expected):
  found = aot.Collective.parse(line, 8)
  assert (found.kind, found.nbytes, found.group) == expected


def test_what_only_looks_like_a_collective_is_left_out():
  for line in (
    '%d = f32[8] all-reduce-done(%s)',
    '%s = (f32[8], token[]) send(%x)',
    '%f = f32[8] fusion(%all-reduce.1)',
  ):
    assert not aot._SENDS.search(line)


def test_times_follow_the_published_rates():
  """All-reduce on a whole v5e pod runs at the 51.2 TB/s that its page publishes, small ones at what the way takes."""
  pod = aot.Topology.parse('v5e:16x16')
  large = aot.Collective('all-reduce', 10**10, 256)
  assert 256 * 2 * large.nbytes / large.seconds(pod) == pytest.approx(51.2e12, rel=0.01)
  assert aot.Collective('all-reduce', 4, 256).seconds(pod) == pytest.approx(2 * 16e-6, rel=0.01)
  # Lines instead of rings: half the rate.
  ratio = aot.Collective('all-reduce', 10**10, 16).seconds(aot.Topology.parse('v5e:4x4')) / large.seconds(pod)
  assert ratio == pytest.approx(2 * (15 / 16) / (255 / 256), rel=0.01)
  # What is gathered is sent once, what is reduced twice; scattered, it counts by its whole.
  seconds = {kind: aot.Collective(kind, 10**10, 256).seconds(pod) for kind in ('all-reduce', 'all-gather')}
  assert seconds['all-reduce'] == pytest.approx(2 * seconds['all-gather'], rel=0.01)
  scatter = aot.Collective('reduce-scatter', 10**10 // 256, 256).seconds(pod)
  assert scatter == pytest.approx(seconds['all-gather'], rel=0.01)


@pytest.mark.parametrize('limit', [0, 1, 5, 11, 15])
def test_the_largest_batch_is_found(monkeypatch, limit):
  def fake(config, topology):
    if config.train.batch_size // 16 > limit:
      raise DoesNotFitError('too much')

  monkeypatch.setattr(aot, 'report', fake)
  config = seg.get_config()
  config.train.batch_size = 16 * 16
  assert aot.largest_batch(config, aot.Topology.parse('v5e:4x4')) == limit
  assert config.train.batch_size == 256  # left as it was


needs_libtpu = pytest.mark.skipif(
  not aot.importlib.util.find_spec('libtpu'), reason='the TPU compiler is not installed: requirements-aot.txt'
)


def launch(*arguments):
  command = [sys.executable, 'launch.py', '--mode=aot', *arguments]
  return subprocess.run(command, capture_output=True, text=True, timeout=600)


@needs_libtpu
@pytest.mark.slow
def test_a_tiny_config_compiles_for_v5e(tmp_path):
  """As a user types it; the report against the model's own numbers."""
  arguments = ['--config=configs/cls.py:demo', '--config.data.image_size=32', '--config.model.width=4']
  result = launch(*arguments, '--topology=v5e:2x4', f'--output={tmp_path}')
  assert result.returncode == 0, result.stderr
  report = json.loads((tmp_path / 'cls-demo-v5e_2x4.json').read_text())
  task = aot.tasks.create(tiny(cls))
  params = jax.eval_shape(lambda: task.init(jax.random.key(0), 32))['params']
  size = sum(leaf.size for leaf in jax.tree.leaves(params))
  assert report['memory']['parameters'] == 4 * size
  assert report['memory']['optimizer_and_statistics'] > 2 * 4 * size  # Adam's two moments
  assert report['chips'] == 8 and report['mesh'] == {'data': 8, 'space': 1}
  assert report['batch_per_device'] == 2
  assert report['memory']['peak'] < report['memory']['chip'] == 16 * 2**30
  # Every gradient is summed over the chips, in bfloat16 at the least, and the norms' sums besides.
  assert 2 * size <= report['bytes_all_reduced'] <= 6 * size
  assert report['bytes_otherwise_sent'] == report['bytes_between_slices'] == 0
  assert report['seconds']['compute'] == pytest.approx(report['flops'] / 197e12)
  assert report['seconds']['memory'] == pytest.approx(report['bytes_moved'] / 819e9)
  assert 0 < report['efficiency'] < 1
  for line in ('topology', 'peak memory', 'scaling efficiency', '8 chips, mesh data 8 x space 1'):
    assert line in result.stdout


@needs_libtpu
@pytest.mark.slow
def test_several_slices_and_shared_images_compile():
  """'data' goes over the slices, 'space' stays within one; each shows in what is sent."""
  config = tiny(cls, **{'mesh.data': -1, 'mesh.space': 2, 'train.batch_size': 16})
  report = aot.report(config, aot.Topology.parse('v5e:2x4', 2))
  assert report['chips'] == 16 and report['mesh'] == {'data': 8, 'space': 2}
  assert report['bytes_between_slices'] > 0
  assert report['bytes_otherwise_sent'] > 0  # rows at the edges of the parts of an image
  with pytest.raises(UserError, match='would share an image between slices; mesh.data must be a multiple of 2'):
    aot.report(tiny(cls, **{'mesh.data': 1, 'mesh.space': 16}), aot.Topology.parse('v5e:2x4', 2))


@needs_libtpu
@pytest.mark.slow
def test_what_does_not_fit_ends_with_3(tmp_path):
  """Images of 4096 x 4096 on chips of 16 GB. Nothing is written."""
  arguments = ['--config=configs/seg.py', '--config.data.image_size=4096', '--config.model.width=16']
  result = launch(*arguments, '--topology=v5e:4x4', f'--output={tmp_path}')
  assert result.returncode == 3, result.stderr
  last = result.stderr.splitlines()[-1]
  assert last.startswith('error: train.batch_size=16 on v5e:4x4: needs ')
  assert 'GiB are missing; not one slice per device fits, and mesh.space shares images' in last
  assert not list(tmp_path.iterdir())


def test_the_compiler_is_asked_for_where_it_is_missing(monkeypatch):
  monkeypatch.setattr(aot.importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(UserError, match='the TPU compiler is not installed; pip install -r requirements-aot.txt'):
    aot.Topology.parse('v5e:4x4').devices()


def test_the_page_is_what_its_reports_say():
  docs = pathlib.Path(__file__).parent.parent / 'docs'
  assert (docs / 'scaling.md').read_text() == aot.scaling_page(docs / 'scaling')
  reports = [json.loads(path.read_text()) for path in sorted((docs / 'scaling').glob('*.json'))]
  assert {rows[0]['task'] for rows in reports} == {'segmentation', 'classification'}
  for rows in reports:
    assert [row['chips'] for row in rows] == [8, 16, 32, 64, 128, 256]
    assert np.ptp([row['batch_per_device'] for row in rows]) == 0
