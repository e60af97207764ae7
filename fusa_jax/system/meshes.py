"""The devices of a run as a mesh, and the parts of arrays that each process and device holds.

On the mesh ('data', 'space') the batch is split over 'data', image height over 'space'; parameters are everywhere.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from fusa_jax.system.errors import UserError


def create_mesh(data: int = -1, space: int = 1, devices=None) -> Mesh:
  """A mesh ('data', 'space') over `devices` (default: all); data = -1 takes all devices that `space` leaves.

  Where TPU devices belong to several slices, 'data' goes over the slices too and 'space' stays within one: parts of an
  image are exchanged at every convolution, over the batch only the sums of norms and gradients.

  Raises:
    UserError: sizes that do not make up the number of devices, or images shared between slices.
  """
  devices = np.asarray(devices if devices is not None else jax.devices())
  if data == -1 and space > 0 and devices.size % space == 0:
    data = devices.size // space
  if data < 1 or space < 1 or data * space != devices.size:
    fits = ', '.join(f'{devices.size // s}x{s}' for s in range(1, devices.size + 1) if devices.size % s == 0)
    raise UserError(f'mesh: data={data} x space={space} is not the {devices.size} devices there are; possible: {fits}')
  axes, types = ('data', 'space'), (AxisType.Auto, AxisType.Auto)
  slices = len({getattr(device, 'slice_index', None) for device in devices.flat})
  if devices.flat[0].platform == 'tpu' and slices > 1:
    if data % slices:
      raise UserError(
        f'mesh: space={space} would share an image between slices; mesh.data must be a multiple of {slices}'
      )
    # jax.make_mesh knows one slice only (seen with jax 0.10).
    grid = mesh_utils.create_hybrid_device_mesh((data // slices, space), (slices, 1), devices.ravel())
    return Mesh(grid, axes, axis_types=types)
  return jax.make_mesh((data, space), axes, axis_types=types, devices=devices.ravel())


def check_divides(mesh: Mesh, batch_size: int, image_size: int) -> None:
  """Raises UserError where the batch or the image height cannot be split evenly, naming the next that can."""
  for axis, key, value in (('data', 'train.batch_size', batch_size), ('space', 'data.image_size', image_size)):
    parts = mesh.shape[axis]
    if value % parts:
      below, above = value // parts * parts, -(-value // parts) * parts
      sizes = f'{below} or {above}' if below else f'{above}'
      raise UserError(f'{key}: {value} does not divide over mesh.{axis}={parts}; {sizes} does')


def fitting_batch(mesh: Mesh, batch_size: int) -> int:
  """The smallest batch from `batch_size` up that the mesh can split: for work whose result does not depend on it."""
  parts = mesh.shape['data']
  return -(-batch_size // parts) * parts


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec())


def replicated_shapes(make: Callable[[], Any], mesh: Mesh) -> Any:
  """Shapes and dtypes of the arrays that `make` returns, each on all devices of the mesh. No array is made."""
  sharding = replicated(mesh)
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), jax.eval_shape(make))


def batched(mesh: Mesh, ndim: int) -> NamedSharding:
  """For an array [B, H, ...] of images, or one of values [B]."""
  return NamedSharding(mesh, PartitionSpec('data', 'space') if ndim > 1 else PartitionSpec('data'))


def local_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
  """The rows of a global batch that this process's devices hold, in order: those and no others it must read."""
  spans = batched(mesh, 1).addressable_devices_indices_map((batch_size,)).values()
  return np.unique(np.concatenate([np.arange(batch_size)[span] for span in spans]))


def to_devices(mesh: Mesh, batch_size: int, rows: np.ndarray, local: np.ndarray) -> jax.Array:
  """The global array [batch_size, ...] of which this process holds `local` = its `rows`."""
  shape = (batch_size, *local.shape[1:])

  def shard(index):
    span = np.arange(batch_size)[index[0]]
    first = np.searchsorted(rows, span[0])
    return local[(slice(first, first + len(span)), *index[1:])]

  return jax.make_array_from_callback(shape, batched(mesh, len(shape)), shard)
