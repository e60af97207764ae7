"""The mesh and who holds what: batch over 'data', image height over 'space', parameters everywhere."""

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from fusa_jax.errors import UserError


def create_mesh(data: int = -1, space: int = 1, devices=None) -> Mesh:
  """A mesh ('data', 'space') over `devices` (default: all); data = -1 takes all devices that `space` leaves.

  Raises:
    UserError: sizes that do not make up the number of devices.
  """
  devices = np.asarray(devices if devices is not None else jax.devices())
  if data == -1 and space > 0 and devices.size % space == 0:
    data = devices.size // space
  if data < 1 or space < 1 or data * space != devices.size:
    fits = ', '.join(f'{devices.size // s}x{s}' for s in range(1, devices.size + 1) if devices.size % s == 0)
    raise UserError(f'mesh: data={data} x space={space} is not the {devices.size} devices there are; possible: {fits}')
  return jax.make_mesh(
    (data, space), ('data', 'space'), axis_types=(AxisType.Auto, AxisType.Auto), devices=devices.ravel()
  )


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
    wanted = np.arange(batch_size)[index[0]]
    first = np.searchsorted(rows, wanted[0])
    return local[(slice(first, first + len(wanted)), *index[1:])]

  return jax.make_array_from_callback(shape, batched(mesh, len(shape)), shard)
