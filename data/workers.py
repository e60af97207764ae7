"""A pool of processes on all cores, as far as memory allows, for work that is done scan by scan."""

import contextlib
import logging
import multiprocessing
import os
import pathlib
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor

# The peak of a process that reads and resizes one scan, measured: with float32 copies of the scan and its mask.
_BYTES_PER_VOXEL = 25
# An idle process with its libraries.
_BYTES = 300 * 10**6
# Files with the limit and the use of memory, of control groups 2 and 1.
_LIMITS = (
  ('/sys/fs/cgroup/memory.max', '/sys/fs/cgroup/memory.current'),
  ('/sys/fs/cgroup/memory/memory.limit_in_bytes', '/sys/fs/cgroup/memory/memory.usage_in_bytes'),
)


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


def available_memory() -> int | None:
  """Bytes that new processes can use: free memory of the machine, or of the container if it has a limit; None: unknown.

  It reads /proc/meminfo and the limits of control groups, of Linux only.
  """
  try:
    lines = pathlib.Path('/proc/meminfo').read_text().splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith('MemAvailable'))
  except (OSError, StopIteration, ValueError, IndexError):
    return None
  for limit, used in _LIMITS:
    with contextlib.suppress(OSError, ValueError):  # 'max' is no limit
      free = min(free, int(pathlib.Path(limit).read_text()) - int(pathlib.Path(used).read_text()))
  return max(free, 0)


@contextlib.contextmanager
def pool(tasks: int, voxels: int = 0) -> Iterator[Callable]:
  """Makes a `map` over worker processes on all cores that this process may use. Results keep the order of items.

  Args:
    tasks: the number of items.
    voxels: the number of voxels of the largest scan. There are only as many processes as scans of this size fit into
      80% of the memory that is available now. The log says so.
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
