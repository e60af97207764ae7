"""The devices of a run as a mesh, and the part of an array that each process and device holds.

The mesh has the axes ('data', 'space'). The batch is split over 'data' and image height over 'space'; each device holds
all parameters.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from fusa_jax.system.errors import UserError


def create_mesh(data: int = -1, space: int = 1, devices=None) -> Mesh:
  """Creates a mesh ('data', 'space') over `devices` (default: all); data = -1 means all devices / space.

  If TPU devices belong to several slices, 'data' extends over the slices and 'space' stays within one. The reason is
  traffic: 'space' exchanges parts of images at every convolution, 'data' only the sums of norms and gradients.

  Raises:
    UserError: data * space is not the number of devices, or images would be shared between slices.
  """
  devices = np.asarray(devices if devices is not None else jax.devices())
  if data == -1 and space > 0 and devices.size % space == 0:
    data = devices.size // space
  if data < 1 or space < 1 or data * space != devices.size:
    fits = ', '.join(f'{devices.size // s}x{s}' for s in range(1, devices.size + 1) if devices.size % s == 0)
    raise UserError(f'mesh: data={data} x space={space} does not match the {devices.size} devices; give one of {fits}')
  axes, types = ('data', 'space'), (AxisType.Auto, AxisType.Auto)
  slices = len({getattr(device, 'slice_index', None) for device in devices.flat})
  if devices.flat[0].platform == 'tpu' and slices > 1:
    if data % slices:
      raise UserError(f'mesh: space={space} would share an image between slices; make mesh.data a multiple of {slices}')
    # jax.make_mesh supports one slice only (seen with jax 0.10).
    grid = mesh_utils.create_hybrid_device_mesh((data // slices, space), (slices, 1), devices.ravel())
    return Mesh(grid, axes, axis_types=types)
  return jax.make_mesh((data, space), axes, axis_types=types, devices=devices.ravel())


def compiler_options(mesh: Mesh, deterministic: bool) -> dict | None:
  """The options to compile a program for the devices of a mesh with; None if there are none.

  On GPUs, XLA adds the updates of a scatter in any order (atomics), and times several kernels to choose one. With
  `deterministic` it sorts the updates first, and takes the first kernel that gives the same bits each time.
  """
  if deterministic and mesh.devices.flat[0].platform == 'gpu':
    return {'xla_gpu_deterministic_ops': True}
  return None


def check_divides(mesh: Mesh, batch_size: int, image_size: int) -> None:
  """Checks that the mesh can split the batch and the image height evenly.

  Raises:
    UserError: it cannot; the message names the nearest sizes that fit.
  """
  for axis, key, value in (('data', 'train.batch_size', batch_size), ('space', 'data.image_size', image_size)):
    parts = mesh.shape[axis]
    if value % parts:
      below, above = value // parts * parts, -(-value // parts) * parts
      sizes = f'{below} or {above}' if below else f'{above}'
      raise UserError(f'{key}: {value} must be a multiple of mesh.{axis}={parts}; give {sizes}')


def fitting_batch(mesh: Mesh, batch_size: int) -> int:
  """The smallest batch size >= `batch_size` that the mesh can split. Use it if results do not depend on batch size."""
  parts = mesh.shape['data']
  return -(-batch_size // parts) * parts


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec())


def replicated_shapes(make: Callable[[], Any], mesh: Mesh) -> Any:
  """Shapes and dtypes of the arrays that `make` returns, replicated on the mesh. Creates no arrays."""
  sharding = replicated(mesh)
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), jax.eval_shape(make))


def batched(mesh: Mesh, ndim: int) -> NamedSharding:
  """The sharding of an array of images [B, H, ...] or of values [B]."""
  return NamedSharding(mesh, PartitionSpec('data', 'space') if ndim > 1 else PartitionSpec('data'))


def split_images(*images: jax.Array) -> tuple[jax.Array, ...]:
  """Keeps images [B, H, ...] split over the current mesh, batch and height, as `batched` does for a program's input.

  XLA may gather the rows of images where an operation mixes them, as a random crop does. Everything that follows would
  then process whole images on each device. The current mesh is the one of `jax.set_mesh`; without one, nothing changes.
  """
  if jax.sharding.get_abstract_mesh().empty:
    return images
  return tuple(jax.lax.with_sharding_constraint(image, PartitionSpec('data', 'space')) for image in images)


def local_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
  """The rows of a global batch that this process must read: the ones that its devices hold, in order."""
  spans = batched(mesh, 1).addressable_devices_indices_map((batch_size,)).values()
  return np.unique(np.concatenate([np.arange(batch_size)[span] for span in spans]))


def to_devices(mesh: Mesh, batch_size: int, rows: np.ndarray, local: np.ndarray) -> jax.Array:
  """Makes the global array [batch_size, ...] from the part of this process: `local` holds its `rows`."""
  shape = (batch_size, *local.shape[1:])

  def shard(index):
    span = np.arange(batch_size)[index[0]]
    first = np.searchsorted(rows, span[0])
    return local[(slice(first, first + len(span)), *index[1:])]

  return jax.make_array_from_callback(shape, batched(mesh, len(shape)), shard)
