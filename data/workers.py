"""A pool of processes on all cores, for work that is done scan by scan."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor


def silent(items: Iterable, **_) -> Iterable:
  """Replaces a progress bar: it has the interface of tqdm.tqdm and shows nothing."""
  return items


def _begin():
  """Prepares a worker. It ends with its parent: a parent that is killed does not end its workers."""
  signal.signal(signal.SIGTERM, signal.SIG_IGN)
  threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent():
  multiprocessing.parent_process().join()
  os._exit(1)


@contextlib.contextmanager
def pool(tasks: int) -> Iterator[Callable]:
  """Makes a `map` over worker processes on all cores that this process may use. Results keep the order of items."""
  cores = min(tasks, len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1)
  # Spawned, not forked: a fork of a process in which JAX or gRPC has started threads can deadlock.
  # Workers ignore SIGTERM, which Slurm sends to all processes. The parent process handles it and ends the workers, so
  # that none ends before it has removed its temporary files.
  executor = ProcessPoolExecutor(cores, multiprocessing.get_context('spawn'), _begin)
  try:
    yield executor.map
  finally:
    # After an error or Ctrl-C, tasks that have not started are dropped.
    executor.shutdown(wait=True, cancel_futures=True)
