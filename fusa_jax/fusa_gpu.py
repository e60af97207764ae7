"""The sums and maxima of FUSA on NVIDIA GPUs, as Pallas kernels: each one reads a feature map once.

XLA on GPUs does not join reductions over different axes. Each of FUSA's four pools, and each of the three sums of its
backward pass, would read the whole map from memory (docs/models.md). Here a program of the GPU reads a part of the map,
all channels of some pixels, in tiles that fit its registers. It finishes the reductions over channels. The reductions
over space it leaves as one partial result per program, a few per cent of the map, which XLA joins.

The kernels compute in float32. They take any number of pixels, and any number of channels up to 4096. `suits` says
which maps they take; fusa.py computes everything else with XLA.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

try:
  from jax.experimental import pallas as pl
  from jax.experimental.pallas import triton
except ImportError:  # Pallas is experimental: without it, XLA does all work
  pl = None

# A tile of 4096 values on 8 warps is 16 values per thread. With the running results of a kernel, that many fit into its
# registers twice, so that an H100 keeps enough reads in flight.
_TILE, _WARPS = 4096, 8
# About eight programs for each of the 132 cores of an H100, but at least 64 pixels each: a partial result of 4 bytes
# per channel is then small beside the 2 bytes per pixel and channel that are read.
_PROGRAMS, _LEAST_PIXELS, _MOST_PIXELS = 1024, 64, 1024

_BATCHED, _MAP = PartitionSpec('data'), PartitionSpec('data', 'space')


def suits(x: jax.Array) -> bool:
  """Whether the kernels take the map x [B, *space, C] on the current mesh of devices; without a mesh, on one device.

  They do not take float64, batch sizes that are not numbers yet (jax.export), and more than 4096 channels. XLA cannot
  split a kernel over devices. So this module does it for the mesh of system/meshes.py, ('data', 'space'), if the map
  splits evenly; another mesh of several devices has no kernels.
  """
  if pl is None or x.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32) or x.shape[-1] > _TILE:
    return False
  if not all(isinstance(size, int) for size in x.shape) or not x.size:
    return False
  mesh = jax.sharding.get_abstract_mesh()
  if _device_kind(mesh) == 'cpu':
    return False  # spares CPUs the time to trace the kernels; without a mesh the platform is not known yet
  if mesh.size <= 1:
    return True
  if mesh.axis_names != ('data', 'space') or any(kind != AxisType.Auto for kind in mesh.axis_types):
    return False
  return x.shape[0] % mesh.shape['data'] == 0 and x.shape[1] % mesh.shape['space'] == 0


def _device_kind(mesh):
  return mesh.abstract_device.device_kind if mesh.abstract_device else None


def _on_each_device(function, in_specs, out_specs):
  """The function of local arrays as a function of global ones, on the current mesh."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.size <= 1:
    return function
  return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def pools(x):
  """Pools x [B, *space, C]: returns (maxima, means, counts), each ([B, C] over space, [B, *space] over channels).

  A count is the number of values that are equal to the maximum; the gradient needs it. All are float32.
  """
  local = _on_each_device(_local_pools, (_MAP,), ((_MAP,) * 3, (_MAP,) * 3))
  (part_max, part_count, part_sum), (spatial_max, spatial_count, spatial_sum) = local(x)
  channel_max = part_max.max(1)
  channel_count = jnp.where(part_max == channel_max[:, None], part_count, 0).sum(1)
  pixels = math.prod(x.shape[1:-1])
  return (
    (channel_max, spatial_max),
    (part_sum.sum(1) / pixels, spatial_sum / x.shape[-1]),
    (channel_count, spatial_count),
  )


def gate_sums(x, g, offset, score, slope):
  """The sums of the backward pass of fusa.gate, with its arguments and g, the cotangent of its result.

  Returns the cotangents of offset [B, C], score [B, *space] and slope [C].
  """
  in_specs = (_MAP, _MAP, _BATCHED, _MAP, PartitionSpec())
  local = _on_each_device(_local_gate_sums, in_specs, (_MAP, _MAP, _MAP))
  part_offset, part_slope, d_score = local(x, g, offset, score, slope)
  return part_offset.sum(1), d_score, part_slope.sum((0, 1))


class _Tiling:
  """How the programs of a kernel share a map [B, *space, C]: program (b, k) has a run of pixels of image b.

  Attributes:
    pixels, channels: those of an image.
    rows, width: pixels and channels of a tile, powers of two, as Triton demands; the tile may reach beyond the map.
    steps: number of tiles that a program reads, one after the other.
  """

  def __init__(self, x):
    batch, self.channels, self.pixels = x.shape[0], x.shape[-1], math.prod(x.shape[1:-1])
    self.width = pl.next_power_of_2(self.channels)
    most = pl.next_power_of_2(self.pixels)
    self.rows = min(_TILE // self.width, most)
    share = pl.next_power_of_2(max(batch * self.pixels // _PROGRAMS, 1))
    run = max(min(max(share, _LEAST_PIXELS), _MOST_PIXELS, most), self.rows)
    self.steps = run // self.rows
    self.grid = (batch, pl.cdiv(self.pixels, run))
    # Blocks of the arrays [B, pixels, C], [B, pixels], [B, C], [C], and [B, programs per image, C] for partial results.
    self.map = pl.BlockSpec((None, run, self.width), lambda b, k: (b, k, 0))
    self.per_pixel = pl.BlockSpec((None, run), lambda b, k: (b, k))
    self.per_image = pl.BlockSpec((None, self.width), lambda b, k: (b, 0))
    self.per_channel = pl.BlockSpec((self.width,), lambda b, k: (0,))
    self.partial = pl.BlockSpec((None, None, self.width), lambda b, k: (b, k, 0))
    self.pixel_shape = jax.ShapeDtypeStruct((batch, self.pixels), jnp.float32)
    self.partial_shape = jax.ShapeDtypeStruct((*self.grid, self.channels), jnp.float32)

  def call(self, kernel, arrays, in_specs, per_channel, per_pixel):
    """Calls a kernel of that many outputs per program and channel, then per pixel."""
    return pl.pallas_call(
      functools.partial(kernel, self),
      grid=self.grid,
      in_specs=in_specs,
      out_specs=[self.partial] * per_channel + [self.per_pixel] * per_pixel,
      out_shape=[self.partial_shape] * per_channel + [self.pixel_shape] * per_pixel,
      compiler_params=triton.CompilerParams(num_warps=_WARPS, num_stages=2),
    )(*arrays)

  def inside(self, program, step):
    """Which values of a program's tile are in the map: masks [rows, width], [rows] and [width]; None if all are."""
    row = (program * self.steps + step) * self.rows + jnp.arange(self.rows)
    rows = None if self.pixels % (self.rows * self.steps) == 0 else row < self.pixels
    columns = None if self.channels == self.width else jnp.arange(self.width) < self.channels
    if rows is None and columns is None:
      return None, None, None
    both = jnp.ones((self.rows, self.width), bool)
    both = both if rows is None else both & rows[:, None]
    both = both if columns is None else both & columns[None]
    return both, rows, columns

  def at(self, step):
    """The pixels of a tile, in the block of its program."""
    return pl.ds(step * self.rows, self.rows)


def _load(ref, mask):
  values = triton.load(ref, mask=mask, other=None if mask is None else 0)
  return values.astype(jnp.float32)


def _local_pools(x):
  tiling = _Tiling(x)
  flat = x.reshape(x.shape[0], tiling.pixels, tiling.channels)
  out = tiling.call(_pools_kernel, (flat,), [tiling.map], 3, 3)
  return tuple(out[:3]), tuple(array.reshape(x.shape[:-1]) for array in out[3:])


def _pools_kernel(tiling, x_ref, part_max, part_count, part_sum, spatial_max, spatial_count, spatial_sum):
  program = pl.program_id(1)

  def read(step, running):
    highest, count, total = running
    both, rows, _ = tiling.inside(program, step)
    at = tiling.at(step)
    x = _load(x_ref.at[at, :], both)
    total += x
    triton.store(spatial_sum.at[at], x.sum(1), mask=rows)
    if both is not None:
      x = jnp.where(both, x, -jnp.inf)
    is_highest = lambda of: ((x == of) if both is None else (x == of) & both).astype(jnp.float32)
    row_max = x.max(1)
    triton.store(spatial_max.at[at], row_max, mask=rows)
    triton.store(spatial_count.at[at], is_highest(row_max[:, None]).sum(1), mask=rows)
    count = jnp.where(x > highest, 1.0, count + is_highest(highest))
    return jnp.maximum(highest, x), count, total

  zeros = jnp.zeros((tiling.rows, tiling.width), jnp.float32)
  highest, count, total = jax.lax.fori_loop(0, tiling.steps, read, (zeros - jnp.inf, zeros, zeros))
  *_, columns = tiling.inside(program, 0)
  column_max = highest.max(0)
  triton.store(part_max.at[:], column_max, mask=columns)
  triton.store(part_count.at[:], jnp.where(highest == column_max[None], count, 0.0).sum(0), mask=columns)
  triton.store(part_sum.at[:], total.sum(0), mask=columns)


def _local_gate_sums(x, g, offset, score, slope):
  tiling = _Tiling(x)
  flat = lambda array: array.reshape(x.shape[0], tiling.pixels, *array.shape[x.ndim - 1 :])
  specs = [tiling.map, tiling.map, tiling.per_image, tiling.per_pixel, tiling.per_channel]
  arrays = (flat(x), flat(g), offset, flat(score), slope)
  part_offset, part_slope, d_score = tiling.call(_gate_sums_kernel, arrays, specs, 2, 1)
  return part_offset, part_slope, d_score.reshape(score.shape)


def _gate_sums_kernel(tiling, x_ref, g_ref, offset_ref, score_ref, slope_ref, part_offset, part_slope, d_score):
  program = pl.program_id(1)
  *_, columns = tiling.inside(program, 0)
  offset, slope = (_load(ref.at[:], columns)[None] for ref in (offset_ref, slope_ref))

  def read(step, running):
    d_offset, d_slope = running
    both, rows, _ = tiling.inside(program, step)
    at = tiling.at(step)
    x, g = (_load(ref.at[at, :], both) for ref in (x_ref, g_ref))
    score = _load(score_ref.at[at], rows)[:, None]
    attention = jax.nn.sigmoid(offset + score * slope)
    d_logits = g * x * attention * (1 - attention)  # zero beyond the map, as g and x are
    triton.store(d_score.at[at], (d_logits * slope).sum(1), mask=rows)
    return d_offset + d_logits, d_slope + d_logits * score

  zeros = jnp.zeros((tiling.rows, tiling.width), jnp.float32)
  d_offset, d_slope = jax.lax.fori_loop(0, tiling.steps, read, (zeros, zeros))
  triton.store(part_offset.at[:], d_offset.sum(0), mask=columns)
  triton.store(part_slope.at[:], d_slope.sum(0), mask=columns)
