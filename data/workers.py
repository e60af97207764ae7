"""All cores of the machine, for work that is done a scan at a time."""

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor


def silent(items: Iterable, **_) -> Iterable:
  """What takes the place of a progress bar where none is wanted: it is called as tqdm.tqdm is."""
  return items


@contextlib.contextmanager
def pool(tasks: int) -> Iterator[Callable]:
  """A `map` over worker processes, in order of the items, on all cores that this process may use."""
  cores = min(tasks, len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1)
  # Spawned, not forked: a fork of a process in which JAX or gRPC has started threads can deadlock.
  # They end when they are told to, not in the middle of what has to be cleared away: SIGTERM, which Slurm sends to all
  # processes, is for the one that started them.
  ignored = signal.signal, (signal.SIGTERM, signal.SIG_IGN)
  executor = ProcessPoolExecutor(cores, multiprocessing.get_context('spawn'), *ignored)
  try:
    yield executor.map
  finally:
    # On an error or Ctrl-C what has not begun is dropped, instead of being waited for.
    executor.shutdown(wait=True, cancel_futures=True)
