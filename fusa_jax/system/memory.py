"""The memory of the process, as the C library handles it."""

import contextlib
import os
import sys


def restart_with_malloc_tunables() -> None:
  """Starts the process again, once, with glibc set to use huge pages and to keep freed memory. Call it before JAX.

  XLA takes the memory of each step from malloc and frees it, and malloc gives it back to the kernel: in pages of 4 kB
  that is 12 to 35% of a training step on a CPU, and more on a virtual machine (docs/benchmarks.md).
  glibc reads these settings from the environment, only when the process starts. A GLIBC_TUNABLES that the user has set
  stays as it is, also an empty one.
  """
  # A script on the standard input could not be read again; a program that imports this must not be restarted.
  ours = sys.argv[0] not in ('', '-') and (sys.argv[0] in sys.orig_argv[1:] or '-m' in sys.orig_argv)
  tried = os.environ.pop('FUSA_JAX_RESTARTED', None)
  if sys.platform == 'linux' and ours and not tried and 'GLIBC_TUNABLES' not in os.environ:
    settings = {'hugetlb': 1, 'mmap_max': 0, 'trim_threshold': 2**35, 'arena_max': 1}
    tunables = ':'.join(f'glibc.malloc.{key}={value}' for key, value in settings.items())
    with contextlib.suppress(OSError):  # then the process continues without these settings
      new = {'GLIBC_TUNABLES': tunables, 'FUSA_JAX_RESTARTED': '1'}
      os.execve(sys.executable, sys.orig_argv, os.environ | new)
