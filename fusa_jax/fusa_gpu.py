"""The maxima and sums of FUSA on NVIDIA GPUs, as Pallas kernels: each one reads a feature map once.

XLA on GPUs does not join reductions over different axes. Each of FUSA's four pools, and each of the sums of its
backward pass, would read the whole map from memory (docs/models.md). Here a program of the GPU reads a part of the map,
all channels of some pixels, in tiles that fit its registers. It finishes the reductions over channels. It leaves the
reductions over space as one partial result per program, a few per cent of the map, which XLA joins.

The map y is that of a norm, (x - mean) * scale + shift. The kernels compute it from the norm's input x, so that nobody
stores it. They compute in float32 and take any number of pixels. `suits` says which maps they take.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

try:
  from jax.experimental import pallas as pl
  from jax.experimental.pallas import triton
except ImportError:  # Pallas is experimental: without it, XLA does all work
  pl = None

# 8 warps hold a tile of 4096 values in 16 registers of each thread. The kernel of the backward pass keeps six running
# sums of the size of its tile, so its tile is smaller. For 128 channels the kernels then take 101 and 95 registers of
# a thread (170 with tiles of 2048), so that a core of an H100 holds two programs of each.
_POOLS_TILE, _SUMS_TILE, _WARPS = 4096, 1024, 8
# About eight programs for each of the 132 cores of an H100, but at least 64 pixels each: a partial result of 4 bytes
# per channel is then small beside the 2 bytes per pixel and channel that are read.
_PROGRAMS, _LEAST_PIXELS, _MOST_PIXELS = 1024, 64, 1024
_MOST_CHANNELS = 4096

_EVERYWHERE, _BATCHED, _MAP = PartitionSpec(), PartitionSpec('data'), PartitionSpec('data', 'space')


def suits(x: jax.Array) -> bool:
  """Whether the kernels take the map x [B, *space, C] on the current mesh of devices; without a mesh, on one device.

  They do not take float64, batch sizes that are not numbers yet (jax.export), and more than 4096 channels. Without a
  mesh, the process must have a GPU. XLA cannot split a kernel over devices. So this module does it for the mesh of
  system/meshes.py, ('data', 'space'), if the map splits evenly; another mesh of several devices has no kernels.
  """
  if pl is None or x.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32) or x.shape[-1] > _MOST_CHANNELS:
    return False
  if not all(isinstance(size, int) for size in x.shape) or not x.size:
    return False
  mesh = jax.sharding.get_abstract_mesh()
  if not _on_gpus(mesh):
    return False
  if mesh.empty:  # XLA would gather the map on each of several devices
    return jax.device_count() == 1
  if mesh.size == 1:
    return True
  if mesh.axis_names != ('data', 'space') or any(kind != AxisType.Auto for kind in mesh.axis_types):
    return False
  return x.shape[0] % mesh.shape['data'] == 0 and x.shape[1] % mesh.shape['space'] == 0


def _on_gpus(mesh):
  """Whether the program may run on GPUs. Otherwise nobody needs to wait until the kernels are traced."""
  if mesh.abstract_device is None:
    return jax.default_backend() == 'gpu'
  return not mesh.abstract_device.device_kind.startswith(('cpu', 'TPU'))


def pools(x, affine, dtype):
  """Pools y = (x - mean) * scale + shift, rounded to dtype: x [B, *space, C], affine = (mean, scale, shift), each [C].

  Returns the maximum of y and the mean of x - mean over space [B, C], then maximum and mean of y over channels
  [B, *space], all float32.
  """
  local = _on_each_device(functools.partial(_local_pools, dtype), (_MAP, (_EVERYWHERE,) * 3), (_MAP,) * 4)
  part_max, part_sum, spatial_max, spatial_sum = local(x, affine)
  return part_max.max(1), part_sum.sum(1) / math.prod(x.shape[1:-1]), spatial_max, spatial_sum / x.shape[-1]


class Sums(NamedTuple):
  """Sums of the backward pass of FUSA of y, for n = x - mean and the cotangent g of y * A.

  Attributes:
    d_offset [B, C], d_slope [C], d_score [B, *space]: cotangents of the variables of A = sigmoid(offset + score *
      slope).
    channel_count [B, C], spatial_count [B, *space]: number of values that equal the maximum, over space and channels.
    channel_n [B, C]: sum over space of n where y equals its maximum.
    d_shift, d_scale [C]: sums over images and space of d and d * n, for d the cotangent of y without its pools over
      space.
  """

  d_offset: jax.Array
  d_slope: jax.Array
  d_score: jax.Array
  channel_count: jax.Array
  spatial_count: jax.Array
  channel_n: jax.Array
  d_shift: jax.Array
  d_scale: jax.Array


def sums(x, g, affine, gating, maxima, weights, dtype) -> Sums:
  """The sums of the backward pass of FUSA of y.

  Args:
    x, affine, dtype: as in `pools`. g: the cotangent of y * A.
    gating: offset [B, C], score [B, *space] and slope [C].
    maxima: of y over space [B, C] and over channels [B, *space].
    weights: two numbers, of which score = weights[0] * maximum of y + weights[1] * mean of y + constant.
  """
  in_specs = (_MAP, _MAP, (_EVERYWHERE,) * 3, (_BATCHED, _MAP, _EVERYWHERE), (_BATCHED, _MAP), _EVERYWHERE)
  local = _on_each_device(functools.partial(_local_sums, dtype), in_specs, (_MAP,) * 8)
  d_offset, count, channel_n, d_slope, d_shift, d_scale, d_score, spatial_count = local(
    x, g, affine, gating, maxima, weights
  )
  d_offset, count, channel_n = (partial.sum(1) for partial in (d_offset, count, channel_n))
  d_slope, d_shift, d_scale = (partial.sum((0, 1)) for partial in (d_slope, d_shift, d_scale))
  return Sums(d_offset, d_slope, d_score, count, spatial_count, channel_n, d_shift, d_scale)


def _on_each_device(function, in_specs, out_specs):
  """The function of local arrays as a function of global ones, on the current mesh."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.size <= 1:
    return function
  return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


class _Tiling:
  """How the programs of a kernel share the map x: program (b, k) has a run of pixels of image b.

  Attributes:
    pixels, channels: those of an image.
    rows, width: pixels and channels of a tile, powers of two, as Triton demands; the tile may reach beyond the map.
    steps: number of tiles that a program reads, one after the other.
    dtype: to which y is rounded.
  """

  def __init__(self, x, dtype, tile):
    batch, self.channels, self.pixels = x.shape[0], x.shape[-1], math.prod(x.shape[1:-1])
    self.dtype = dtype
    self.width = pl.next_power_of_2(self.channels)
    most = pl.next_power_of_2(self.pixels)
    self.rows = min(max(tile // self.width, 1), most)
    share = pl.next_power_of_2(max(batch * self.pixels // _PROGRAMS, 1))
    run = max(min(max(share, _LEAST_PIXELS), _MOST_PIXELS, most), self.rows)
    self.steps = run // self.rows
    self.grid = (batch, pl.cdiv(self.pixels, run))
    # Blocks of arrays [B, pixels, C], [B, pixels], [B, C], [C], and [B, programs per image, C] for partial results.
    self.map = pl.BlockSpec((None, run, self.width), lambda b, k: (b, k, 0))
    self.per_pixel = pl.BlockSpec((None, run), lambda b, k: (b, k))
    self.per_image = pl.BlockSpec((None, self.width), lambda b, k: (b, 0))
    self.per_channel = pl.BlockSpec((self.width,), lambda b, k: (0,))
    self.partial = pl.BlockSpec((None, None, self.width), lambda b, k: (b, k, 0))
    self.pixel_shape = jax.ShapeDtypeStruct((batch, self.pixels), jnp.float32)
    self.partial_shape = jax.ShapeDtypeStruct((*self.grid, self.channels), jnp.float32)

  def call(self, kernel, arrays, in_specs, partials, per_pixel):
    """Calls a kernel with that many partial results and results per pixel."""
    return pl.pallas_call(
      functools.partial(kernel, self),
      grid=self.grid,
      in_specs=in_specs,
      out_specs=[self.partial] * partials + [self.per_pixel] * per_pixel,
      out_shape=[self.partial_shape] * partials + [self.pixel_shape] * per_pixel,
      compiler_params=triton.CompilerParams(num_warps=_WARPS, num_stages=2),
    )(*arrays)

  def at(self, step):
    """The pixels of a tile, in the block of its program."""
    return pl.ds(step * self.rows, self.rows)

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

  def normalised(self, x, affine):
    """x - mean, and y."""
    mean, scale, shift = affine
    n = x - mean
    return n, (n * scale + shift).astype(self.dtype).astype(jnp.float32)

  def zeros(self):
    return jnp.zeros((self.rows, self.width), jnp.float32)


def _load(ref, mask):
  values = triton.load(ref, mask=mask, other=None if mask is None else 0)
  return values.astype(jnp.float32)


def _where(mask, values, other):
  return values if mask is None else jnp.where(mask, values, other)


def _flat(x, array):
  """An array over the space of x, [B, *space, ...], as [B, pixels, ...]."""
  return array.reshape(x.shape[0], -1, *array.shape[x.ndim - 1 :])


def _local_pools(dtype, x, affine):
  tiling = _Tiling(x, dtype, _POOLS_TILE)
  specs = [tiling.map, *[tiling.per_channel] * 3]
  *partials, spatial_max, spatial_sum = tiling.call(_pools_kernel, (_flat(x, x), *affine), specs, 2, 2)
  return *partials, spatial_max.reshape(x.shape[:-1]), spatial_sum.reshape(x.shape[:-1])


def _pools_kernel(tiling, x_ref, mean_ref, scale_ref, shift_ref, part_max, part_sum, spatial_max, spatial_sum):
  program = pl.program_id(1)
  *_, columns = tiling.inside(program, 0)
  affine = [_load(ref.at[:], columns)[None] for ref in (mean_ref, scale_ref, shift_ref)]

  def read(step, running):
    highest, total = running
    both, rows, _ = tiling.inside(program, step)
    at = tiling.at(step)
    n, y = tiling.normalised(_load(x_ref.at[at, :], both), affine)
    triton.store(spatial_sum.at[at], _where(both, y, 0.0).sum(1), mask=rows)
    y = _where(both, y, -jnp.inf)
    triton.store(spatial_max.at[at], y.max(1), mask=rows)
    return jnp.maximum(highest, y), total + _where(both, n, 0.0)

  running = (tiling.zeros() - jnp.inf, tiling.zeros())
  highest, total = jax.lax.fori_loop(0, tiling.steps, read, running)
  triton.store(part_max.at[:], highest.max(0), mask=columns)
  triton.store(part_sum.at[:], total.sum(0), mask=columns)


def _local_sums(dtype, x, g, affine, gating, maxima, weights):
  tiling = _Tiling(x, dtype, _SUMS_TILE)
  (offset, score, slope), (channel_max, spatial_max) = gating, maxima
  arrays = (
    _flat(x, x),
    _flat(x, g),
    *affine,
    slope,
    offset,
    channel_max,
    _flat(x, score),
    _flat(x, spatial_max),
    weights,
  )
  specs = [tiling.map] * 2 + [tiling.per_channel] * 4 + [tiling.per_image] * 2 + [tiling.per_pixel] * 2
  specs.append(pl.BlockSpec((2,), lambda *_: (0,)))
  *partials, d_score, spatial_count = tiling.call(_sums_kernel, arrays, specs, 6, 2)
  return *partials, d_score.reshape(score.shape), spatial_count.reshape(score.shape)


def _sums_kernel(tiling, x_ref, g_ref, *refs):
  vectors, (score_ref, spatial_max_ref, weights_ref), partials = refs[:6], refs[6:9], refs[9:15]
  d_score_ref, spatial_count_ref = refs[15:]
  program = pl.program_id(1)
  *_, columns = tiling.inside(program, 0)
  *affine, slope, offset, channel_max = (_load(ref.at[:], columns)[None] for ref in vectors)
  of_max, of_mean = weights_ref[0], weights_ref[1] / tiling.channels

  def read(step, running):
    both, rows, _ = tiling.inside(program, step)
    at = tiling.at(step)
    x, g = (_load(ref.at[at, :], both) for ref in (x_ref, g_ref))  # g is zero beyond the map
    score, spatial_max = (_load(ref.at[at], rows)[:, None] for ref in (score_ref, spatial_max_ref))
    n, y = tiling.normalised(x, affine)
    equals = lambda maximum: _where(both, (y == maximum).astype(jnp.float32), 0.0)
    is_channel_max, is_spatial_max = equals(channel_max), equals(spatial_max)
    attention = jax.nn.sigmoid(offset + score * slope)
    through = g * attention
    d_logits = through * y * (1 - attention)
    d_score = (d_logits * slope).sum(1)
    count = is_spatial_max.sum(1)
    triton.store(d_score_ref.at[at], d_score, mask=rows)
    triton.store(spatial_count_ref.at[at], count, mask=rows)
    share = is_spatial_max * (of_max / jnp.maximum(count, 1))[:, None] + of_mean
    d_y = through + _where(both, share * d_score[:, None], 0.0)
    terms = (d_logits, is_channel_max, is_channel_max * n, d_logits * score, d_y, d_y * n)
    return tuple(total + term for total, term in zip(running, terms, strict=True))

  totals = jax.lax.fori_loop(0, tiling.steps, read, (tiling.zeros(),) * 6)
  for ref, total in zip(partials, totals, strict=True):
    triton.store(ref.at[:], total.sum(0), mask=columns)
