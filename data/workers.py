"""A pool of processes on all cores, as far as memory allows, for work that is done scan by scan."""

import contextlib
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor

from fusa_jax.system.memory import available_memory

# The peak of a process that reads and resizes one scan, measured: with float32 copies of the scan and its mask.
_BYTES_PER_VOXEL = 25
# An idle process with its libraries.
_BYTES = 300 * 10**6


def silent(items: Iterable, **_) -> Iterable:
  """Replaces a progress bar: it has the interface of tqdm.tqdm and shows nothing."""
  return items


def _begin():
  """Prepares a worker: it ignores SIGTERM, and ends when its parent ends, because a killed parent cannot end it."""
  signal.signal(signal.SIGTERM, signal.SIG_IGN)
  threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent():
  multiprocessing.parent_process().join()
  os._exit(1)


@contextlib.contextmanager
def pool(tasks: int, voxels: int = 0) -> Iterator[Callable]:
  """Makes a `map` over worker processes on all cores that this process may use. Results keep the order of items.

  Args:
    tasks: the number of items.
    voxels: the number of voxels of the largest scan. The number of processes is limited, so that scans of this size fit
      into 80% of the memory that is available now. The log says if that is fewer than the cores.
  """
  cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
  cores, available = max(1, min(tasks, cores)), available_memory()
  fitting = int(0.8 * available / (_BYTES + voxels * _BYTES_PER_VOXEL)) if available is not None else cores
  if fitting < cores:
    logging.info(
      'reading %d scans at a time instead of %d: %.1f GB of memory are available, and the largest scan has %d million '
      'voxels',
      max(1, fitting),
      cores,
      available / 1e9,
      voxels // 10**6,
    )
    cores = max(1, fitting)
  # Spawned, not forked: a fork of a process in which JAX or gRPC has started threads can deadlock.
  # Workers ignore SIGTERM, which Slurm sends to all processes. The parent process handles it and ends the workers, so
  # that none ends before it has removed its temporary files.
  executor = ProcessPoolExecutor(cores, multiprocessing.get_context('spawn'), _begin)
  try:
    yield executor.map
  finally:
    # After an error or Ctrl-C, tasks that have not started are dropped.
    executor.shutdown(wait=True, cancel_futures=True)
