"""Device meshes: their shapes, sizes that divide over them, and the rows of each host."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fusa_jax.system import meshes
from fusa_jax.system.errors import UserError


@pytest.mark.parametrize(('data', 'space', 'shape'), [(-1, 1, (8, 1)), (-1, 2, (4, 2)), (2, 4, (2, 4)), (1, 8, (1, 8))])
def test_mesh_shapes(data, space, shape):
  mesh = meshes.create_mesh(data, space)
  assert mesh.axis_names == ('data', 'space')
  assert mesh.devices.shape == shape


def test_only_gpus_need_an_option_to_be_deterministic():
  """XLA knows the option: it refuses to compile with an unknown one, on any device."""
  of_platform = lambda name: SimpleNamespace(devices=np.array([[SimpleNamespace(platform=name)]]))
  assert meshes.compiler_options(of_platform('gpu'), False) is None
  options = meshes.compiler_options(of_platform('gpu'), True)
  assert options and not any(meshes.compiler_options(of_platform(name), True) for name in ('cpu', 'tpu'))
  lowered = jax.jit(jnp.sin).lower(1.0)
  lowered.compile(options)
  with pytest.raises(jax.errors.JaxRuntimeError, match='No such compile option'):
    lowered.compile({f'{name}_of_another_version': value for name, value in options.items()})


@pytest.mark.parametrize(('data', 'space'), [(3, 1), (-1, 3), (8, 2), (0, 1), (-1, 0)])
def test_impossible_meshes_name_the_possible_ones(data, space):
  with pytest.raises(UserError, match=r'does not match the 8 devices; give one of 8x1, 4x2, 2x4, 1x8'):
    meshes.create_mesh(data, space)


def test_errors_name_sizes_that_divide():
  mesh = meshes.create_mesh(4, 2)
  meshes.check_divides(mesh, 8, 32)
  with pytest.raises(UserError, match=r'train.batch_size: 6 must be a multiple of mesh.data=4; give 4 or 8'):
    meshes.check_divides(mesh, 6, 32)
  with pytest.raises(UserError, match=r'data.image_size: 33 .* mesh.space=2; give 32 or 34'):
    meshes.check_divides(mesh, 8, 33)
  with pytest.raises(UserError, match=r'train.batch_size: 3 must be a multiple of mesh.data=4; give 4'):
    meshes.check_divides(mesh, 3, 32)


def test_fitting_batches():
  mesh = meshes.create_mesh(4, 2)
  assert [meshes.fitting_batch(mesh, n) for n in (1, 4, 5, 8)] == [4, 4, 8, 8]


@pytest.mark.parametrize('space', [1, 2, 8])
def test_local_batches_form_the_global_batch(space):
  mesh = meshes.create_mesh(-1, space)
  rows = meshes.local_rows(mesh, 16)
  np.testing.assert_array_equal(rows, np.arange(16))  # one process holds all rows
  batch = np.random.default_rng(0).integers(0, 9, (16, 8, 4))
  array = meshes.to_devices(mesh, 16, rows, batch)
  np.testing.assert_array_equal(array, batch)
  assert array.sharding.shard_shape(array.shape) == (16 * space // 8, 8 // space, 4)
  assert len(array.addressable_shards) == 8
  labels = meshes.to_devices(mesh, 16, rows, np.arange(16))
  np.testing.assert_array_equal(labels, np.arange(16))


def test_a_host_reads_only_the_rows_of_its_devices(monkeypatch):
  """Pretends that devices 2, 3, 6 and 7 belong to another host."""
  mesh = meshes.create_mesh(4, 2)
  mine = {mesh.devices[i, j] for i in (0, 2) for j in (0, 1)}
  full = meshes.batched(mesh, 1).devices_indices_map((16,))

  class Here:
    def addressable_devices_indices_map(self, shape):
      return {device: full[device] for device in mine}

  monkeypatch.setattr(meshes, 'batched', lambda *_: Here())
  np.testing.assert_array_equal(meshes.local_rows(mesh, 16), [0, 1, 2, 3, 8, 9, 10, 11])
