"""The memory of this machine, and settings of the C library for the memory of the process."""

import contextlib
import os
import pathlib
import sys

# Files with the limit and the use of a container's memory in bytes, of control groups 2 and 1.
_LIMITS = (
  ('/sys/fs/cgroup/memory.max', '/sys/fs/cgroup/memory.current'),
  ('/sys/fs/cgroup/memory/memory.limit_in_bytes', '/sys/fs/cgroup/memory/memory.usage_in_bytes'),
)


def available_memory() -> int | None:
  """Returns the bytes that new processes can use; None if they are unknown.

  This is the free memory of the machine, or of the container if that has less. Only Linux states both.
  """
  try:
    lines = pathlib.Path('/proc/meminfo').read_text().splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith('MemAvailable'))
  except (OSError, StopIteration, ValueError, IndexError):
    return None
  for limit, used in _LIMITS:
    with contextlib.suppress(OSError, ValueError):  # the text 'max' stands for no limit
      free = min(free, int(pathlib.Path(limit).read_text()) - int(pathlib.Path(used).read_text()))
  return max(free, 0)


def container_limit() -> int | None:
  """Returns the bytes of memory that the container may use; None without a limit. The system kills larger processes."""
  for file, _ in _LIMITS:
    with contextlib.suppress(OSError, ValueError):
      limit = int(pathlib.Path(file).read_text())
      if limit < 2**60:  # version 1 states a larger number for no limit
        return limit
  return None


def restart_with_malloc_tunables() -> None:
  """Restarts the process once, with glibc set to use huge pages and to keep freed memory. Call it before JAX.

  XLA allocates the memory of each step with malloc and frees it, and malloc returns it to the kernel. With pages of
  4 kB this takes 12 to 35% of a training step on a CPU, and more on a virtual machine (docs/benchmarks.md).

  glibc reads these settings from the environment only when the process starts. If the user has set GLIBC_TUNABLES, even
  to nothing, this function changes nothing.
  """
  # A script on standard input cannot be read twice. A program that imports this module must not be restarted.
  is_program = sys.argv[0] not in ('', '-') and (sys.argv[0] in sys.orig_argv[1:] or '-m' in sys.orig_argv)
  restarted = os.environ.pop('FUSA_JAX_RESTARTED', None)
  if sys.platform == 'linux' and is_program and not restarted and 'GLIBC_TUNABLES' not in os.environ:
    settings = {'hugetlb': 1, 'mmap_max': 0, 'trim_threshold': 2**35, 'arena_max': 1}
    tunables = ':'.join(f'glibc.malloc.{key}={value}' for key, value in settings.items())
    with contextlib.suppress(OSError):  # if it fails, the process continues without these settings
      added = {'GLIBC_TUNABLES': tunables, 'FUSA_JAX_RESTARTED': '1'}
      os.execve(sys.executable, sys.orig_argv, os.environ | added)
