"""Runs independent jobs on one machine: in order in this process, or several at a time, each on a share of the machine.

Each worker is a process with a pipe. ProcessPoolExecutor would need more code. Before Python 3.14 it cannot stop its
workers. It also does not protect them from Ctrl-C, or end them when their parent is killed.
"""

import collections
import contextlib
import dataclasses
import logging
import multiprocessing.connection
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import jax
import tqdm

from benchmarks import processes
from fusa_jax.system import program
from fusa_jax.system.errors import Terminated, UserError

# Seconds in which a worker must save its step after SIGTERM; after that it is killed.
_PATIENCE = 10


@dataclasses.dataclass(frozen=True)
class Share:
  """The cores and the device that a worker may use; None: all."""

  cores: tuple[int, ...] | None = None
  device: str | None = None

  def take(self) -> None:
    """Restricts this process to its share; call it before JAX looks for devices."""
    if self.cores:
      os.sched_setaffinity(0, self.cores)
    if self.device:
      os.environ['CUDA_VISIBLE_DEVICES'] = self.device


@dataclasses.dataclass(frozen=True)
class Machine:
  """The devices that run the jobs: JAX's names of their platform and kind, and their number."""

  platform: str
  kind: str
  devices: int

  def __str__(self) -> str:
    return f'{len(_cores())} CPU cores' if self.platform == 'cpu' else f'{self.devices} x {self.kind}'


def machine() -> Machine:
  """Describes this process's devices."""
  device = jax.devices()[0]
  return Machine(device.platform, device.device_kind, jax.device_count())


def prepare(count: int) -> tuple[Machine, list[Share]]:
  """Returns the machine and its shares for `count` jobs at a time.

  One job at a time needs no shares: jobs then run in this process.

  Raises:
    UserError: the machine cannot be divided into `count` shares.
  """
  if count == 1:
    return machine(), []
  # Look for devices in another process: this process would take GPU memory that its workers need.
  ((_, whole, _),) = run(collections.deque([machine]), [Share()])
  jax.config.update('jax_platforms', 'cpu')
  return whole, shares(count, whole)


def shares(count: int, whole: Machine) -> list[Share]:
  """Divides the machine into `count` shares: equal numbers of CPU cores, or one GPU per share.

  Raises:
    UserError: there are fewer than `count` cores or GPUs, or the device is a TPU, which only one process can use.
  """
  if whole.platform == 'tpu':
    raise UserError(f'--jobs: {count}, but only one process can use a TPU; leave --jobs out')
  cores = _cores()
  most, unit = (len(cores), 'CPU cores') if whole.platform == 'cpu' else (whole.devices, 'GPUs')
  if count > most:
    raise UserError(f'--jobs: {count}, but there are {most} {unit}; give --jobs={most} or fewer')
  if whole.platform != 'cpu':
    visible = os.environ.get('CUDA_VISIBLE_DEVICES', '')
    return [Share(device=name) for name in (visible.split(',') if visible else map(str, range(most)))][:count]
  if not hasattr(os, 'sched_setaffinity'):
    return [Share()] * count  # the system assigns the cores
  return [Share(tuple(cores[k * most // count : (k + 1) * most // count])) for k in range(count)]


def _cores():
  return sorted(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else list(range(os.cpu_count() or 1))


def run(todo: collections.deque[Callable[[], Any]], shares: list[Share]) -> Iterator[tuple[Callable, Any, float]]:
  """Yields (job, its value, seconds) as jobs end. While it iterates, the caller may add jobs to `todo`.

  After an error, or when the caller stops iterating, no further job starts, and running jobs are stopped.

  Args:
    todo: jobs, called without arguments. With shares, they must be picklable.
    shares: one worker process runs on each share. Without shares, jobs run in this process, in order.

  Raises:
    UserError: a job raised it. With shares, the text also names the job.
    RuntimeError: with shares, a job raised another error, or its process was killed.
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
      process, connection = processes.start(_work, share)
      workers.append(process)
      idle.append(connection)
    while todo or busy:
      while todo and idle:
        job, connection = todo.popleft(), idle.pop()
        with contextlib.suppress(ConnectionError):  # a dead worker: reading from it reports that
          connection.send(job)
        busy[connection] = job, time.monotonic()
      connection = multiprocessing.connection.wait(list(busy))[0]
      job, began = busy.pop(connection)
      try:
        error, value = connection.recv()
      except (EOFError, ConnectionError):
        raise RuntimeError(f'{job}: its process was killed, perhaps because it ran out of memory') from None
      if error is not None:
        raise error
      idle.append(connection)
      yield job, value, time.monotonic() - began
  finally:
    _stop(workers)


def _stop(workers):
  """Sends SIGTERM, after which training saves its step, and kills workers that take too long."""
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
  """Runs each job that the worker receives, and sends (None, value) or (error, None). It never returns."""
  share.take()
  program.start_logging()
  logging.getLogger().setLevel(logging.WARNING)
  logging.captureWarnings(True)
  # Progress bars of several runs would mix; each run's log has its own numbers. The default lock of tqdm is a
  # semaphore, which Python would report as leaked when a worker is stopped.
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
