"""The processes of a run, one per host: they connect, wait for each other, and end together.

They share a key-value store of JAX (see `store`).
"""

import itertools
import json
import logging
import pathlib
import secrets
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax

from fusa_jax.system import exits, files, preemption, store
from fusa_jax.system.errors import UserError

T = TypeVar('T')
# Keys in JAX's key-value store, which all processes share. Orbax uses the store in the same way.
_DONE, _FAILED, _ENDED = 'fusa_jax/done/', 'fusa_jax/failed/', 'fusa_jax/ended/'
_DEALT, _ALIVE, _FACTS = 'fusa_jax/dealt/', 'fusa_jax/alive/', 'fusa_jax/facts/'
_turns = itertools.count()
# Set once this process disconnects, or ends because of an error or SIGTERM.
_leaving, _ending = threading.Event(), threading.Event()
# Seconds that processes need to disconnect.
_GRACE = 3
# Seconds to wait until all processes know that they must end.
_TO_END = 10
# Seconds to wait until a new file is visible on the other hosts.
_TO_SEE = 5
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
  store.set_survival(survives)
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
  preemption.listen()
  _watcher.start()


def disconnect() -> None:
  """Waits until every process has called this function, then disconnects; ends the process if another one fails."""
  if store.client() is not None:
    on_main(lambda: None)  # wait for process 0, which writes the results, and still react to its failure
    # Process 0 holds the store, and JAX aborts processes that lose it. If they survive each other, JAX itself does not
    # wait for them.
    wait_for_others()
    if is_main() and store.is_surviving():
      time.sleep(_GRACE)
    _leaving.set()
    _watcher.join()
    jax.distributed.shutdown()


def is_main() -> bool:
  """Whether this is process 0. Only process 0 writes files, prepares data and shows progress."""
  return store.number() == 0


def on_main(function: Callable[[], Any]) -> Any:
  """Runs function() on process 0 and returns its value on all processes. If process 0 fails, all fail.

  The value must be serialisable as JSON. All processes must call `on_main` in the same order.
  """
  client, key = store.client(), f'{_DONE}{next(_turns)}'
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
  client, key = store.client(), f'{_FACTS}{next(_turns)}/'
  if client is None:
    return
  client.key_value_set(f'{key}{number()}', json.dumps(dict(facts), sort_keys=True))

  def compare():
    own, lines = json.loads(json.dumps(dict(facts))), []
    for process in range(1, store.count()):
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


def check_shared(folder: pathlib.Path, name: str, advice: str) -> None:
  """Checks that all processes see the same folder: they read a file with random content that process 0 writes there.

  Args:
    folder: the folder, as this process names it. Process 0 creates a missing folder, and removes it after an error.
    name: the parameter that sets the folder; the message begins with it.
    advice: end of the message: what to do.

  Raises:
    UserError: process 0 cannot write to the folder, or another process does not see the file. It ends all processes.
  """
  client, key = store.client(), f'{_FACTS}{next(_turns)}/'
  if client is None:
    return
  content = secrets.token_hex(16)
  probe, is_new = folder / f'.probe.{content[:8]}', not folder.exists()

  def write():
    with files.writing(folder):
      folder.mkdir(parents=True, exist_ok=True)
      probe.write_text(content)
    return content

  def compare():
    try:
      blind = [k for k in range(1, store.count()) if not json.loads(_wait_for(client, f'{key}{k}'))]
    finally:
      probe.unlink(missing_ok=True)
    if blind:
      if is_new:
        folder.rmdir()
      which = f'process {blind[0]} does' if len(blind) == 1 else f'processes {", ".join(map(str, blind))} do'
      raise UserError(f'{name}: {which} not see the files of process 0 in {folder}; {advice}')

  content = on_main(write)
  if not is_main():
    client.key_value_set(f'{key}{number()}', json.dumps(_holds(folder / f'.probe.{content[:8]}', content)))
  on_main(compare)


def _holds(path, content):
  """Whether a file has this content. Waits a few seconds, because a shared file system may show a new file late."""
  until = time.monotonic() + _TO_SEE
  while True:
    try:
      return path.read_text() == content
    except OSError:
      if time.monotonic() > until:
        return False
    time.sleep(0.2)


def number() -> int:
  """The number of this process; 0 if it runs alone."""
  return store.number()


def dealt(items: Sequence[T]) -> Iterator[T]:
  """Yields the next item that no process has taken yet, until all are taken. All processes must pass equal items."""
  client, key = store.client(), f'{_DEALT}{next(_turns)}'
  if client is None:
    yield from items
    return
  while (taken := client.key_value_increment(key, 1)) <= len(items):
    yield items[taken - 1]


def wait_for_others() -> list[int]:
  """Process 0 waits until each other process has called this function or is lost; it returns the lost ones.

  A process is lost if it sends no sign of life for `heartbeat_timeout` seconds. Other processes return [] at once.
  """
  client, key = store.client(), f'{_DONE}{next(_turns)}/'
  if client is None:
    return []
  if not is_main():
    client.key_value_set(f'{key}{number()}', '')
    return []
  waiting = set(range(1, store.count()))
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
  if store.client() is not None:
    store.client().wait_at_barrier(f'{_DONE}{next(_turns)}', timeout_in_ms=24 * 3600 * 1000)
  return compiled


def fail_together(message: str, code: int) -> None:
  """Sends the other processes this process's error and exit code; they end with the same ones.

  If this process ends already because of another one, its own error is a consequence: this does not return.
  """
  client = store.client()
  if client is not None and _ending.is_set():
    time.sleep(2 * _TO_END)  # the watcher ends the process
  if client is None or _leaving.is_set():
    return
  _end(client, _FAILED, json.dumps([code, f'process {number()} of {store.count()}: {message}']))


def _wait_for(client, key) -> str:
  """The value of a key, as soon as another process sets it."""
  while True:
    try:
      return client.blocking_key_value_get(key, 60_000)
    except jax.errors.JaxRuntimeError as error:
      if 'DEADLINE_EXCEEDED' not in str(error):
        raise


def _num_ended(client) -> int:
  """Number of processes that have failed, or ended because another one failed."""
  return sum(len(client.key_value_dir_get(folder)) for folder in (_FAILED, _ENDED))


def _end(client, folder, message=''):
  """Tells the other processes that this one ends, and waits until all have said so, but not for a lost one.

  A process that ended earlier would break the connections of the others, and they would report that. Process 0 ends
  last, because it holds the store.
  """
  _ending.set()
  _leaving.set()
  try:
    client.key_value_set(f'{folder}{number()}', message)
    until = time.monotonic() + _TO_END
    while time.monotonic() < until and _num_ended(client) < store.count():
      time.sleep(0.1)
  except jax.errors.JaxRuntimeError:
    return  # the others cannot be reached
  if is_main() and store.count() > 1:
    time.sleep(0.5)


def _watch():
  """Ends this process when another one has failed or on SIGTERM, and shows the others that this one lives."""
  client = store.client()
  while not _leaving.wait(0.1 if preemption.is_agreeing() else 1.0):
    try:
      client.key_value_increment(f'{_ALIVE}{number()}', 1)
      failures = client.key_value_dir_get(_FAILED)
      if failures and not _leaving.is_set():
        code, message = json.loads(failures[0][1])
        lines = ['', preemption.message()] if code == 143 else [f'error: {line}' for line in message.splitlines()]
        print('\n'.join(lines), file=sys.stderr)
        _end(client, _ENDED)
        exits.leave(code)
      if preemption.must_leave() and not _leaving.is_set():
        print(f'\n{preemption.message()}', file=sys.stderr)
        _end(client, _FAILED, json.dumps([143, '']))
        exits.leave(143)
    except jax.errors.JaxRuntimeError:
      return  # process 0 is gone; JAX ends this one
