"""The names of JAX and Orbax that are not public: each test fails with the name that a new version has moved."""

import inspect

import jax
import pytest

from fusa_jax.system import store

# What the program calls, with the arguments that it passes.
CLIENT = {
  'blocking_key_value_get': ('key', 'timeout_in_ms'),
  'key_value_dir_get': ('key',),
  'key_value_increment': ('key', 'increment'),
  'key_value_set': ('key', 'value', 'allow_overwrite'),
  'wait_at_barrier': ('barrier_id', 'timeout_in_ms'),
}


def test_the_store_of_jax():
  """The client is a class in C++, so only its documentation shows the arguments."""
  from jax._src.lib import _jax

  assert store.client() is None and store.number() == 0, 'jax._src.distributed.global_state has changed'
  assert isinstance(store.count(), int), 'jax._src.distributed.global_state.num_processes has changed'
  for name, arguments in CLIENT.items():
    signature = getattr(_jax.DistributedRuntimeClient, name).__doc__.splitlines()[0]
    for argument in arguments:
      assert f'{argument}: ' in signature, f'system/store.py: {name} of the client of JAX is now {signature}'


def test_options_of_jax():
  assert store.is_surviving() in (True, False), 'jax_enable_recoverability has moved'
  known = inspect.signature(jax.distributed.initialize).parameters
  for name in ('cluster_detection_method', 'initialization_timeout', 'heartbeat_timeout_seconds'):
    assert name in known, f'system/hosts.py: jax.distributed.initialize does not take {name}'


def test_names_of_orbax():
  """runs/checkpoint.py uses them; Orbax documents them, but has moved them before."""
  ocp = pytest.importorskip('orbax.checkpoint')
  from orbax.checkpoint import checkpoint_managers

  assert isinstance(ocp.utils.TMP_DIR_SUFFIX, str)
  takes = lambda function: inspect.signature(function).parameters
  for function, arguments in {
    checkpoint_managers.AnyPreservationPolicy: ('policies',),
    checkpoint_managers.LatestN: ('n',),
    checkpoint_managers.BestN: ('get_metric_fn', 'n', 'keep_checkpoints_without_metrics'),
    ocp.type_handlers.ArrayHandler: ('use_replica_parallel',),
    ocp.AsyncOptions: ('post_finalization_callback',),
    ocp.CheckpointManagerOptions: ('best_fn', 'best_mode', 'preservation_policy', 'cleanup_tmp_directories'),
    ocp.PyTreeCheckpointHandler: ('type_handler_registry',),
  }.items():
    for argument in arguments:
      assert argument in takes(function), f'runs/checkpoint.py: {function} of Orbax does not take {argument}'
  assert callable(ocp.type_handlers.create_type_handler_registry)
