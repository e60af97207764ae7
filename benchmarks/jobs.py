"""Independent jobs on one machine: one after the other in this process, or several at a time, each with its share."""

import collections
import dataclasses
import logging
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import jax
import tqdm

from fusa_jax.system import program
from fusa_jax.system.errors import Terminated, UserError

# Seconds that a worker has, once told to stop, for saving the step that it is at.
_PATIENCE = 10


@dataclasses.dataclass(frozen=True)
class Share:
  """What of the machine a worker may use: these cores, this device; None is all."""

  cores: tuple[int, ...] | None = None
  device: str | None = None

  def take(self) -> None:
    """Keeps this process to its share; before JAX looks for devices."""
    if self.cores:
      os.sched_setaffinity(0, self.cores)
    if self.device:
      os.environ['CUDA_VISIBLE_DEVICES'] = self.device


@dataclasses.dataclass(frozen=True)
class Machine:
  """What jobs run on: `platform` and `kind` as JAX names them, and how many devices of it there are."""

  platform: str
  kind: str
  devices: int

  def __str__(self) -> str:
    return f'{len(_cores())} CPU cores' if self.platform == 'cpu' else f'{self.devices} x {self.kind}'


def machine() -> Machine:
  """This process's devices."""
  device = jax.devices()[0]
  return Machine(device.platform, device.device_kind, jax.device_count())


def prepare(count: int) -> tuple[Machine, list[Share]]:
  """The machine, and its shares for so many jobs at a time; for one, none: it is this process's own.

  Raises:
    UserError: it cannot be shared by so many.
  """
  if count == 1:
    return machine(), []
  # Another process looks: this one would hold the memory of the GPUs that its workers need.
  ((_, found, _),) = run(collections.deque([machine]), [Share()])
  jax.config.update('jax_platforms', 'cpu')
  return found, shares(count, found)


def shares(count: int, found: Machine) -> list[Share]:
  """As many equal parts of the machine: its cores, or a GPU each.

  Raises:
    UserError: there are fewer; or the machine is a TPU, all of whose chips belong to one process.
  """
  if found.platform == 'tpu':
    raise UserError(f'--jobs: {count}, but a TPU belongs to one process; leave --jobs out')
  cores = _cores()
  there, what = (len(cores), 'CPU cores') if found.platform == 'cpu' else (found.devices, 'GPUs')
  if count > there:
    raise UserError(f'--jobs: {count}, but there are {there} {what}; give --jobs={there} or fewer')
  if found.platform != 'cpu':
    named = os.environ.get('CUDA_VISIBLE_DEVICES', '')
    return [Share(device=name) for name in (named.split(',') if named else map(str, range(there)))][:count]
  if not hasattr(os, 'sched_setaffinity'):
    return [Share()] * count  # the system deals the cores
  return [Share(tuple(cores[k * there // count : (k + 1) * there // count])) for k in range(count)]


def _cores():
  return sorted(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else list(range(os.cpu_count() or 1))


def run(todo: collections.deque[Callable[[], Any]], shares: list[Share]) -> Iterator[tuple[Callable, Any, float]]:
  """Yields (job, its value, seconds) as jobs end. Whoever iterates may add to `todo` meanwhile.

  Args:
    todo: jobs without arguments; with shares, such as can be pickled.
    shares: a worker process for each; none of them: jobs run in this process, in order.

  Raises:
    UserError: of a job, which it names where there are shares. No other is begun, and those that run are stopped; so
      they are when the caller leaves.
    RuntimeError: a job failed otherwise, or its process was killed.
  """
  if not shares:
    while todo:
      job, began = todo.popleft(), time.monotonic()
      logging.info('%s', job)
      yield job, job(), time.monotonic() - began
    return
  workers, idle, busy = [], [], {}
  try:
    for share in shares[: len(todo)]:
      process, connection = _start(share)
      workers.append(process)
      idle.append(connection)
    while todo or busy:
      while todo and idle:
        job, connection = todo.popleft(), idle.pop()
        connection.send(job)
        busy[connection] = job, time.monotonic()
      connection = multiprocessing.connection.wait(list(busy))[0]
      job, began = busy.pop(connection)
      try:
        error, value = connection.recv()
      except (EOFError, ConnectionError):
        raise RuntimeError(f'{job}: its process was killed, perhaps for want of memory') from None
      if error is not None:
        raise error
      idle.append(connection)
      yield job, value, time.monotonic() - began
  finally:
    _stop(workers)


def _start(share):
  """A worker process that waits for jobs, and the connection to it."""
  here, there = multiprocessing.Pipe()
  # Spawned, not forked: JAX has threads.
  process = multiprocessing.get_context('spawn').Process(target=_work, args=(there, share))
  # Ctrl-C reaches all processes of a terminal. This one hears it and stops the others, which would print tracebacks.
  heard = signal.signal(signal.SIGINT, signal.SIG_IGN)
  try:
    process.start()
  finally:
    signal.signal(signal.SIGINT, heard)
  there.close()  # so that the worker's end is the only one, and its death is seen
  return process, here


def _stop(workers):
  """By SIGTERM, at which training saves its step; those that take too long are killed."""
  for process in workers:
    process.terminate()
  until = time.monotonic() + _PATIENCE
  try:
    for process in workers:
      process.join(max(0, until - time.monotonic()))
  finally:
    for process in workers:
      process.kill()
      process.join()


def _work(connection, share):
  """A worker's life: does what it is sent; gives (None, value), or (error, None)."""
  share.take()
  threading.Thread(target=leave_with_parent, daemon=True).start()
  program.start_logging()
  logging.getLogger().setLevel(logging.WARNING)
  logging.captureWarnings(True)
  # Progress bars of several runs would mix; each run's log has its own numbers. Their lock, by default one that other
  # processes could share, would be reported as leaked when a worker is stopped.
  sys.stdout = sys.stderr = open(os.devnull, 'w')  # noqa: SIM115
  tqdm.tqdm.set_lock(threading.RLock())
  program.use_compilation_cache()
  while True:
    job = connection.recv()
    try:
      answer = None, job()
    except UserError as error:
      answer = UserError(f'{job}: {error}'), None
    except Terminated:
      os._exit(143)
    except Exception:
      answer = RuntimeError(f'{job}\n{traceback.format_exc()}'), None
    connection.send(answer)


def leave_with_parent():
  """What was killed without a word is not worked for."""
  multiprocessing.parent_process().join()
  os._exit(1)
