"""TPU slices, and the traffic of compiled programs, compared with programs of known traffic."""

import dataclasses
import importlib.util
import math

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from fusa_jax.chips import hlo, tpu
from fusa_jax.system import meshes
from fusa_jax.system.errors import UserError


@pytest.mark.parametrize(
  ('text', 'slices', 'reason'),
  [
    ('v5e', 1, "'v5e' is not a TPU slice; give KIND:SHAPE like v5e:4x4, KIND one of v4, v5e, v5p, v6e"),
    ('v9:2x2', 1, "'v9:2x2' is not a TPU slice"),
    ('v5e:4', 1, "'v5e:4' is not a TPU slice"),
    ('v5e:4x0', 1, "'v5e:4x0' is not a TPU slice"),
    ('v5e:16x32', 1, 'v5e:16x32 has too many chips; give a slice of v5e with at most 256'),
    ('v5e:4x4', 0, 'slices: 0 is too few; give 1 or more'),
  ],
)
def test_invalid_topologies_are_refused(text, slices, reason):
  with pytest.raises(UserError, match=reason):
    tpu.Topology.parse(text, slices)


def test_topologies():
  topology = tpu.Topology.parse('v5e:4x8', 2)
  assert (topology.kind, topology.shape, topology.chips, str(topology)) == ('v5e', (4, 8), 64, 'v5e:4x8 x 2 slices')
  for kind, chip in tpu.CHIPS.items():
    sizes = [tpu.Topology.parse(f'{kind}:{shape}').chips for shape in chip.sweep]
    assert sizes[0] == 8 and sizes == sorted(sizes) and sizes[-1] in (128, 256)


def collectives(function, mesh, *arguments):
  """Returns the collectives in the program that XLA compiles for CPU devices; other devices use the same operations."""
  text = jax.jit(function).lower(*arguments).compile().as_text()
  return hlo.collectives(text, mesh.devices.size)


def test_collectives_are_counted_with_their_bytes_and_groups():
  """Uses programs of known traffic."""
  mesh = meshes.create_mesh(4, 2)
  place = lambda *axes: NamedSharding(mesh, PartitionSpec(*axes))
  array = lambda shape, dtype, *axes: jax.ShapeDtypeStruct(shape, dtype, sharding=place(*axes))
  # A matrix product over sharded rows, as in the gradient of a dense layer: summed over 'data'.
  product = lambda x, y: jax.lax.with_sharding_constraint(x.T @ y, place())
  found = collectives(product, mesh, array((64, 24), jnp.float32, 'data'), array((64, 40), jnp.float32, 'data'))
  assert [(c.kind, c.nbytes, c.group) for c in found] == [('all-reduce', 24 * 40 * 4, 4)]
  gather = lambda x: jax.lax.with_sharding_constraint(x, place())
  found = collectives(gather, mesh, array((32, 16), jnp.bfloat16, 'space'))
  assert [(c.kind, c.group) for c in found] == [('all-gather', 2)]
  assert found[0].nbytes in (32 * 16 * 2, 32 * 16 * 4)  # the CPU compiler may gather bfloat16 as float32
  # A sum over all elements involves all eight devices.
  found = collectives(lambda x: x.sum(), mesh, array((8, 8), jnp.float32, 'data', 'space'))
  assert math.prod(c.group for c in found if c.kind == 'all-reduce') == 8
  # Each device receives one row from its neighbour.
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
def test_lines_of_the_tpu_compiler(line, expected):
  (found,) = hlo.collectives(line, 8)
  assert (found.kind, found.nbytes, found.group) == expected


def test_a_collective_with_several_computations_counts_once():
  line = '%g.{} = f32[8,2,64]{{2,1,0}} all-gather(%p), channel_id={}, replica_groups=[1,8]<=[8], dimensions={{0}}'
  program = '\n'.join(line.format(*numbers) for numbers in ((1, 7), (2, 7), (3, 9), (4, 7)))
  assert [found.nbytes for found in hlo.collectives(program, 8)] == [4096, 4096]


def test_lines_that_only_look_like_collectives_are_ignored():
  for line in (
    '%d = f32[8] all-reduce-done(%s)',
    '%s = (f32[8], token[]) send(%x)',
    '%f = f32[8] fusion(%all-reduce.1)',
  ):
    assert not hlo.collectives(line, 8)


def test_times_follow_the_published_rates():
  """All-reduce on a whole v5e pod runs at the published 51.2 TB/s; a small one takes the latency of its path."""
  pod = tpu.Topology.parse('v5e:16x16')
  large = hlo.Collective('all-reduce', 10**10, 256)
  assert 256 * 2 * large.nbytes / pod.seconds(large) == pytest.approx(51.2e12, rel=0.01)
  assert pod.seconds(hlo.Collective('all-reduce', 4, 256)) == pytest.approx(2 * 16e-6, rel=0.01)
  # A slice with lines instead of rings has half the rate.
  ratio = tpu.Topology.parse('v5e:4x4').seconds(hlo.Collective('all-reduce', 10**10, 16)) / pod.seconds(large)
  assert ratio == pytest.approx(2 * (15 / 16) / (255 / 256), rel=0.01)
  # All-gather sends the data once, all-reduce twice. Reduce-scatter counts the whole input, not one part.
  seconds = {kind: pod.seconds(hlo.Collective(kind, 10**10, 256)) for kind in ('all-reduce', 'all-gather')}
  assert seconds['all-reduce'] == pytest.approx(2 * seconds['all-gather'], rel=0.01)
  scatter = pod.seconds(hlo.Collective('reduce-scatter', 10**10 // 256, 256))
  assert scatter == pytest.approx(seconds['all-gather'], rel=0.01)


def test_missing_compiler_is_reported(monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(UserError, match='the TPU compiler is not installed; pip install -r requirements-aot.txt'):
    tpu.Topology.parse('v5e:4x4').devices()


def test_operations_and_their_sources():
  """Data in the memory of the core, S(1), cost nothing. A copy with a start and a done line counts once."""
  program = """HloModule step

ENTRY %main (x: f32[1024]) -> f32[1024] {
  %x = f32[1024]{0:T(1024)} parameter(0)
  %a = f32[1024]{0:T(1024)S(1)} fusion(%x), kind=kLoop, calls=%f, metadata={op_name="jit(step)/jvp(Net)/norm1/sub"}
  %b = bf16[1024]{0:T(1024)} fusion(%a, %x), kind=kLoop, calls=%g, metadata={op_name="jit(step)/jvp(Net)/relu/max"}, \
backend_config={"window_config":{},"estimated_cycles":"123","used_scoped_memory_configs":[]}
  %c = (bf16[1024]{0:T(1024)S(1)}, bf16[1024]{0:T(1024)}, u32[]{:S(2)}) copy-start(%b)
  %d = bf16[1024]{0:T(1024)S(1)} copy-done(%c)
  %i = f32[1024]{0:T(1024)S(1)} fusion(%d), kind=kLoop, calls=%k, backend_config={"estimated_cycles":"7"}
  %j = f32[]{:T(128)S(1)} fusion(%d), kind=kLoop, backend_config={"estimated_cycles":"9223372036854775807"}
  ROOT %e = f32[1024]{0:T(1024)} fusion(%d), kind=kLoop, calls=%h
}
"""
  assert [dataclasses.astuple(operation) for operation in hlo.operations(program)] == [
    ('a', 4096, 0, 'jit(step)/jvp(Net)/norm1/sub'),
    ('b', 2048 + 4096, 123, 'jit(step)/jvp(Net)/relu/max'),
    ('d', 2048, 0, 'jit(step)/jvp(Net)/relu/max'),  # made by the compiler: takes the source of its operand
    ('i', 0, 7, 'jit(step)/jvp(Net)/relu/max'),  # moves nothing, but takes time
    ('e', 4096, 0, 'jit(step)/jvp(Net)/relu/max'),
  ]


@pytest.mark.skipif(not importlib.util.find_spec('libtpu'), reason='no TPU compiler: requirements-aot.txt')
@pytest.mark.slow
def test_memory_traffic_equals_the_necessary_reads_and_writes():
  """Programs of one or two operations, compiled for a v5e. Intermediate results stay in the core."""
  device = jax.sharding.SingleDeviceSharding(tpu.Topology.parse('v5e:2x2').devices()[0])
  array = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype, sharding=device)
  x, y = array(jnp.bfloat16, 2048, 2048), array(jnp.bfloat16, 2048, 1024)
  for function, arguments, expected in (
    (lambda x: x + 1, [array(jnp.float32, 1000, 1024)], 2 * 4096000),
    (lambda x: x.sum(), [array(jnp.float32, 1000, 1024)], 4096000),
    (lambda x, y: x @ y, [x, y], 2 * (2048 * 2048 + 2 * 2048 * 1024)),
    (lambda x, y: jnp.tanh(x @ y) @ y.T, [x, y], 2 * (2 * 2048 * 2048 + 2 * 2048 * 1024)),  # y is read twice
  ):
    text = jax.jit(function).lower(*arguments).compile().as_text()
    operations = hlo.operations(text)
    assert sum(operation.nbytes for operation in operations) == pytest.approx(expected, rel=0.01)
    assert any(operation.source.startswith('jit(<lambda>)/') for operation in operations)


@pytest.mark.skipif(not importlib.util.find_spec('libtpu'), reason='no TPU compiler: requirements-aot.txt')
@pytest.mark.slow
@pytest.mark.parametrize('slice_', ['v4:2x2x1', 'v5e:2x2', 'v5p:2x2x1', 'v6e:2x2'])
def test_the_clock_brings_a_large_product_close_to_the_peak(slice_):
  """A product of large matrices is bound by arithmetic, so its estimate is little above the time at the peak.

  With a wrong number of matrix units it would be off by a factor of two.
  """
  topology = tpu.Topology.parse(slice_)
  device = jax.sharding.SingleDeviceSharding(topology.devices()[0])
  matrix = jax.ShapeDtypeStruct((8192, 8192), jnp.bfloat16, sharding=device)
  text = jax.jit(jnp.matmul).lower(matrix, matrix).compile().as_text()
  seconds = sum(operation.cycles for operation in hlo.operations(text)) / topology.chip.clock
  assert 1 <= seconds / (2 * 8192**3 / topology.chip.flops) < 1.5
