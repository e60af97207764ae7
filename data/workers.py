"""A pool of processes on all cores, for work that is done scan by scan."""

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor


def silent(items: Iterable, **_) -> Iterable:
  """Replaces a progress bar: it has the interface of tqdm.tqdm and shows nothing."""
  return items


@contextlib.contextmanager
def pool(tasks: int) -> Iterator[Callable]:
  """Makes a `map` over worker processes on all cores that this process may use. Results keep the order of items."""
  cores = min(tasks, len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1)
  # Spawned, not forked: a fork of a process in which JAX or gRPC has started threads can deadlock.
  # Workers ignore SIGTERM, which Slurm sends to all processes. The parent process handles it and ends the workers, so
  # that none ends before it has removed its temporary files.
  ignored = signal.signal, (signal.SIGTERM, signal.SIG_IGN)
  executor = ProcessPoolExecutor(cores, multiprocessing.get_context('spawn'), *ignored)
  try:
    yield executor.map
  finally:
    # After an error or Ctrl-C, tasks that have not started are dropped.
    executor.shutdown(wait=True, cancel_futures=True)
