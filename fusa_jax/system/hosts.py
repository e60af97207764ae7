"""The processes of a run, one per host: they connect, wait for each other, and end together.

They share a key-value store of JAX. This store has no public name, and no other module uses it.
"""

import itertools
import json
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
from jax._src import distributed

from fusa_jax.system import exits
from fusa_jax.system.errors import UserError

T = TypeVar('T')
# Keys in JAX's key-value store, which all processes share. Orbax uses the store in the same way.
_DONE, _FAILED, _ENDED = 'fusa_jax/done/', 'fusa_jax/failed/', 'fusa_jax/ended/'
_DEALT, _ALIVE, _FACTS = 'fusa_jax/dealt/', 'fusa_jax/alive/', 'fusa_jax/facts/'
_turns = itertools.count()
_leaving = threading.Event()
# Seconds that processes need to disconnect.
_GRACE = 3
# Seconds after which a silent process counts as lost; set by `connect`.
_patience = [100]
_watcher = threading.Thread(target=lambda: _watch(), name='watch', daemon=True)


def connect(
  coordinator: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
  *,
  connect_timeout: int = 300,
  heartbeat_timeout: int = 100,
  survives: bool = False,
) -> None:
  """Connects to the other processes of the run, if there are any. Call it before any code asks JAX for devices.

  The first three arguments describe the processes. Without them, JAX detects the processes on Cloud TPU, GKE, Slurm,
  Open MPI and Kubernetes. If JAX detects none, this process runs alone.
  Connected processes end together. If one fails, the others print its error and end too. If one dies without a message,
  JAX ends the others after `heartbeat_timeout`.

  Args:
    coordinator: HOST:PORT of process 0.
    num_processes: number of processes of the run.
    process_id: number of this process, 0 to num_processes - 1.
    connect_timeout: seconds to wait until all processes are connected.
    heartbeat_timeout: a process counts as dead after this many seconds without a heartbeat.
    survives: the others go on if a process other than 0 dies (see `wait_for_others`).

  Raises:
    UserError: only some of the first three arguments are given, or one has an invalid value.
  """
  address = (coordinator, num_processes, process_id)
  if any(value is not None for value in address):
    if None in address:
      raise UserError('coordinator, num_processes, process_id: give all three, or none if the cluster sets them')
    host, _, port = coordinator.rpartition(':')
    if not host or not port.isdigit():
      raise UserError(f'coordinator: {coordinator!r} must be HOST:PORT; give the host of process 0 and a free port')
    if not 0 <= process_id < num_processes:
      raise UserError(f'process_id: {process_id} does not fit {num_processes} processes; give 0 to {num_processes - 1}')
    logging.info('process %d of %d, waiting for the others at %s', process_id, num_processes, coordinator)

  def give_up():
    where = f' at {coordinator}' if coordinator else ''
    print(
      f'error: hosts: not all processes connected{where} within {connect_timeout} s; start the command on every host '
      'with its own process id, and check that they can reach that port',
      file=sys.stderr,
    )
    exits.leave(2)

  # JAX itself would abort without saying what it waited for.
  patience = threading.Timer(connect_timeout, give_up)
  patience.daemon = True
  patience.start()
  jax.config.update('jax_enable_recoverability', survives)
  _patience[0] = heartbeat_timeout
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
    return  # JAX detected no other processes
  finally:
    patience.cancel()
  _watcher.start()


def disconnect() -> None:
  """Waits until every process has called this function, then disconnects; ends the process if another one fails."""
  if _client() is not None:
    on_main(lambda: None)  # wait for process 0, which writes the results, and still react to its failure
    # Process 0 holds the store, and JAX aborts processes that lose it. If they survive each other, JAX itself does not
    # wait for them.
    wait_for_others()
    if is_main() and jax.config.jax_enable_recoverability:
      time.sleep(_GRACE)
    _leaving.set()
    _watcher.join()
    jax.distributed.shutdown()


def is_main() -> bool:
  """Whether this is process 0. Only process 0 writes files, prepares data and shows progress."""
  return distributed.global_state.process_id == 0


def on_main(function: Callable[[], Any]) -> Any:
  """Runs function() on process 0 and returns its value on all processes. If process 0 fails, all fail.

  The value must be serialisable as JSON. All processes must call `on_main` in the same order.
  """
  client, key = _client(), f'{_DONE}{next(_turns)}'
  if client is None:
    return function()
  if is_main():
    value = function()
    client.key_value_set(key, json.dumps(value))
    return value
  # Not a collective of the devices: those have a timeout, and preparing a cohort may take longer.
  return json.loads(_wait_for(client, key))


def check_equal(facts: Mapping[str, Any]) -> None:
  """Checks that all processes have the same facts, for example the same config.

  Args:
    facts: values that JSON can store, by the names that the error shows.

  Raises:
    UserError: a process differs from process 0. It is raised on process 0 and ends all.
  """
  client, key = _client(), f'{_FACTS}{next(_turns)}/'
  if client is None:
    return
  client.key_value_set(f'{key}{number()}', json.dumps(dict(facts), sort_keys=True))

  def compare():
    own, lines = json.loads(json.dumps(dict(facts))), []
    for process in range(1, distributed.global_state.num_processes):
      others = json.loads(_wait_for(client, f'{key}{process}'))
      lines += [
        f'hosts: process {process} differs from process 0 in {name} ({others.get(name)}, not {own.get(name)}); start '
        'the same command with the same code and data on all hosts'
        for name in sorted(own.keys() | others.keys())
        if own.get(name) != others.get(name)
      ]
    if lines:
      raise UserError('\n'.join(lines))

  on_main(compare)


def number() -> int:
  """The number of this process; 0 if it runs alone."""
  return distributed.global_state.process_id


def dealt(items: Sequence[T]) -> Iterator[T]:
  """Yields the next item that no process has taken yet, until all are taken. All processes must pass equal items."""
  client, key = _client(), f'{_DEALT}{next(_turns)}'
  if client is None:
    yield from items
    return
  while (taken := client.key_value_increment(key, 1)) <= len(items):
    yield items[taken - 1]


def wait_for_others() -> list[int]:
  """Process 0 waits until each other process has called this function or is lost; it returns the lost ones.

  A process is lost if it sends no sign of life for `heartbeat_timeout` seconds. Other processes return [] at once.
  """
  client, key = _client(), f'{_DONE}{next(_turns)}/'
  if client is None:
    return []
  if not is_main():
    client.key_value_set(f'{key}{number()}', '')
    return []
  waiting = set(range(1, distributed.global_state.num_processes))
  lives, changed_at, lost = {}, dict.fromkeys(waiting, time.monotonic()), []
  while waiting:
    waiting -= {int(name.rpartition('/')[2]) for name, _ in client.key_value_dir_get(key)}
    for name, count in client.key_value_dir_get(_ALIVE):
      process = int(name.rpartition('/')[2])
      if lives.get(process) != count:
        lives[process], changed_at[process] = count, time.monotonic()
    lost += [process for process in waiting if time.monotonic() - changed_at[process] > _patience[0]]
    waiting -= set(lost)
    time.sleep(0.2)
  return lost


def compiled_together(jitted: Callable) -> Callable:
  """Wraps a jitted function so that its first call compiles it with `compile_together`. All calls need equal shapes."""
  compiled = None

  def run(*arguments):
    nonlocal compiled
    if compiled is None:
      compiled = compile_together(jitted.lower(*arguments))
    return compiled(*arguments)

  return run


def compile_together(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
  """Compiles and waits until all processes have compiled; Gloo's first exchange would wait only 30 s for the others."""
  compiled = lowered.compile()
  if _client() is not None:
    _client().wait_at_barrier(f'{_DONE}{next(_turns)}', timeout_in_ms=24 * 3600 * 1000)
  return compiled


def fail_together(message: str, code: int) -> None:
  """Sends the other processes this process's error and exit code; they end with the same ones."""
  client = _client()
  if client is None or _leaving.is_set():
    return
  _leaving.set()
  number, count = distributed.global_state.process_id, distributed.global_state.num_processes
  try:
    client.key_value_set(f'{_FAILED}{number}', json.dumps([code, f'process {number} of {count}: {message}']))
    # Process 0 holds the store. It waits, for at most 10 s, until the others have read the message.
    until = time.monotonic() + (10 if number == 0 else 0)
    while time.monotonic() < until and _num_ended(client) < count:
      time.sleep(0.1)
  except jax.errors.JaxRuntimeError:
    pass  # the others cannot be reached


def _wait_for(client, key) -> str:
  """The value of a key, as soon as another process sets it."""
  while True:
    try:
      return client.blocking_key_value_get(key, 60_000)
    except jax.errors.JaxRuntimeError as error:
      if 'DEADLINE_EXCEEDED' not in str(error):
        raise


def _client():
  return distributed.global_state.client


def _num_ended(client) -> int:
  """Number of processes that have failed, or ended because another one failed."""
  return sum(len(client.key_value_dir_get(folder)) for folder in (_FAILED, _ENDED))


def _watch():
  """Ends this process when another one has failed, and shows the others that this one lives."""
  client, number = _client(), distributed.global_state.process_id
  while not _leaving.wait(1.0):
    try:
      client.key_value_increment(f'{_ALIVE}{number}', 1)
      failures = client.key_value_dir_get(_FAILED)
      if failures and not _leaving.is_set():
        code, message = json.loads(failures[0][1])
        for line in message.splitlines():
          print(f'error: {line}', file=sys.stderr)
        client.key_value_set(f'{_ENDED}{number}', '')
        exits.leave(code)
    except jax.errors.JaxRuntimeError:
      return  # process 0 is gone; JAX ends this one
