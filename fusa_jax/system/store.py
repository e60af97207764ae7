"""The key-value store of JAX that the processes of a run share, and which processes are connected.

These names of JAX are not public, and no other module uses them. tests/system/test_private_names.py fails when JAX
moves one.
"""

import jax
from jax._src import distributed

_SURVIVAL = 'jax_enable_recoverability'


def client():
  """Returns the client of the store; None if this process runs alone."""
  return distributed.global_state.client


def number() -> int:
  """The number of this process; 0 if it runs alone."""
  return distributed.global_state.process_id


def count() -> int:
  """The number of connected processes."""
  return distributed.global_state.num_processes


def set_survival(survives: bool) -> None:
  """Sets whether processes go on when another one is lost. Call it before they connect."""
  jax.config.update(_SURVIVAL, survives)


def is_surviving() -> bool:
  """Whether processes go on when another one is lost."""
  return getattr(jax.config, _SURVIVAL)
