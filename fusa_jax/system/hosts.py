"""The processes of a run, one a host: they come together, wait for each other, and end together.

The one module that uses what JAX has no public name for: its store of keys that all processes share.
"""

import itertools
import json
import logging
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
from jax._src import distributed

from fusa_jax.system import exits
from fusa_jax.system.errors import UserError

# Keys of JAX's store that all processes share (its client has no public name; Orbax reaches for it in the same way).
_DONE, _FAILED, _ENDED = 'fusa_jax/done/', 'fusa_jax/failed/', 'fusa_jax/ended/'
_turns = itertools.count()
_leaving = threading.Event()
_watcher = threading.Thread(target=lambda: _watch(), name='watch', daemon=True)


def connect(
  coordinator: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
  *,
  connect_timeout: int = 300,
  heartbeat_timeout: int = 100,
) -> None:
  """Joins the other processes of the run, if there are any; before anything asks JAX for devices.

  Told by the first three arguments; else as JAX detects it on Cloud TPU, GKE, Slurm, Open MPI and Kubernetes; else this
  process is alone. From then on all end together: where one fails, the others print its error and end too; where one
  dies without a word, JAX ends the others after `heartbeat_timeout`.

  Args:
    coordinator: HOST:PORT at which process 0 can be reached.
    num_processes: of the run.
    process_id: of this one, 0 to num_processes - 1.
    connect_timeout: seconds to wait for all of them to come.
    heartbeat_timeout: seconds without a sign of life after which a process counts as dead.

  Raises:
    UserError: some of the first three, but not all; or values that cannot be.
  """
  address = (coordinator, num_processes, process_id)
  if any(value is not None for value in address):
    if None in address:
      raise UserError('coordinator, num_processes, process_id: give all or, where the cluster does, none')
    host, _, port = coordinator.rpartition(':')
    if not host or not port.isdigit():
      raise UserError(f'coordinator: {coordinator!r} is no HOST:PORT; name the host of process 0 and a free port')
    if not 0 <= process_id < num_processes:
      raise UserError(f'process_id: {process_id}, but with {num_processes} processes it is 0 to {num_processes - 1}')
    logging.info('process %d of %d, waiting for the others at %s', process_id, num_processes, coordinator)

  def give_up():
    where = f' at {coordinator}' if coordinator else ''
    print(
      f'error: hosts: the processes did not all come together{where} within {connect_timeout} s; start the command '
      'on every host, each with its own process id, and see that they reach that port',
      file=sys.stderr,
    )
    exits.leave(2)

  # JAX itself would abort without saying who was waited for.
  patience = threading.Timer(connect_timeout, give_up)
  patience.daemon = True
  patience.start()
  try:
    jax.distributed.initialize(
      *address,
      cluster_detection_method='deactivate' if coordinator else None,
      initialization_timeout=connect_timeout + 30,
      heartbeat_timeout_seconds=heartbeat_timeout,
    )
  except ValueError as error:
    if coordinator or 'coordinator_address should be defined' not in str(error):
      raise
    return  # nothing tells of other processes
  finally:
    patience.cancel()
  _watcher.start()


def disconnect() -> None:
  """Leaves together: waits until every process has come here, or ends as soon as one of them fails."""
  if _client() is not None:
    on_main(lambda: None)  # process 0 writes the results: until then, the others still listen
    _leaving.set()
    _watcher.join()
    jax.distributed.shutdown()


def is_main() -> bool:
  """Whether this is process 0, the one that writes files, prepares data and shows progress."""
  return distributed.global_state.process_id == 0


def on_main(function: Callable[[], Any]) -> Any:
  """function() of process 0, for all: the others wait for its value (anything that JSON can hold), or fail with it.

  To be called by all processes in the same order.
  """
  client, key = _client(), f'{_DONE}{next(_turns)}'
  if client is None:
    return function()
  if is_main():
    value = function()
    client.key_value_set(key, json.dumps(value))
    return value
  # Not a collective of the devices: those give up after a time, and preparing a cohort takes as long as it takes.
  while True:
    try:
      return json.loads(client.blocking_key_value_get(key, 60_000))
    except jax.errors.JaxRuntimeError as error:
      if 'DEADLINE_EXCEEDED' not in str(error):
        raise


def compiled_together(jitted: Callable) -> Callable:
  """A jitted function of one set of shapes, compiled at its first call, by `compile_together`."""
  compiled = None

  def run(*arguments):
    nonlocal compiled
    if compiled is None:
      compiled = compile_together(jitted.lower(*arguments))
    return compiled(*arguments)

  return run


def compile_together(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
  """Compiles, and waits until all processes have: Gloo gives up after 30 s of waiting for one in the first exchange."""
  compiled = lowered.compile()
  if _client() is not None:
    _client().wait_at_barrier(f'{_DONE}{next(_turns)}', timeout_in_ms=24 * 3600 * 1000)
  return compiled


def fail_together(message: str, code: int) -> None:
  """Tells the other processes that this one ends, why, and with which exit code; they end in the same way."""
  client = _client()
  if client is None or _leaving.is_set():
    return
  _leaving.set()
  number, count = distributed.global_state.process_id, distributed.global_state.num_processes
  try:
    client.key_value_set(f'{_FAILED}{number}', json.dumps([code, f'process {number} of {count}: {message}']))
    # They meet at process 0: it stays until they have heard.
    until = time.monotonic() + (10 if number == 0 else 0)
    while time.monotonic() < until and _told(client) < count:
      time.sleep(0.1)
  except jax.errors.JaxRuntimeError:
    pass  # nobody to tell


def _client():
  return distributed.global_state.client


def _told(client) -> int:
  """How many processes have failed, or ended for another's failure."""
  return sum(len(client.key_value_dir_get(folder)) for folder in (_FAILED, _ENDED))


def _watch():
  """Ends this process when another one has failed."""
  client, number = _client(), distributed.global_state.process_id
  while not _leaving.wait(1.0):
    try:
      failures = client.key_value_dir_get(_FAILED)
      if failures and not _leaving.is_set():
        code, message = json.loads(failures[0][1])
        for line in message.splitlines():
          print(f'error: {line}', file=sys.stderr)
        client.key_value_set(f'{_ENDED}{number}', '')
        exits.leave(code)
    except jax.errors.JaxRuntimeError:
      return  # process 0 is gone; JAX ends this one
