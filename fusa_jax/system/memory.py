"""The memory of the process, as the C library handles it."""

import contextlib
import os
import sys


def restart_with_malloc_tunables() -> None:
  """Begins the process anew, once, with glibc told to use huge pages and to keep what is freed; before JAX is imported.

  XLA takes the memory of each step from malloc and frees it, and malloc gives it back to the kernel: in pages of 4 kB
  that is 12 to 35% of a training step on a CPU, and more where a virtual machine's host takes it on
  (docs/benchmarks.md). glibc reads this from the environment, at its start alone; whatever is there already, an empty
  GLIBC_TUNABLES too, stays as it is.
  """
  # Not a script on the standard input, of which nothing would be left, nor what another program runs in itself.
  ours = sys.argv[0] not in ('', '-') and (sys.argv[0] in sys.orig_argv[1:] or '-m' in sys.orig_argv)
  tried = os.environ.pop('FUSA_JAX_STARTED_ANEW', None)
  if sys.platform == 'linux' and ours and not tried and 'GLIBC_TUNABLES' not in os.environ:
    told = {'hugetlb': 1, 'mmap_max': 0, 'trim_threshold': 2**35, 'arena_max': 1}
    tunables = ':'.join(f'glibc.malloc.{key}={value}' for key, value in told.items())
    with contextlib.suppress(OSError):  # then it goes on as it is
      new = {'GLIBC_TUNABLES': tunables, 'FUSA_JAX_STARTED_ANEW': '1'}
      os.execve(sys.executable, sys.orig_argv, os.environ | new)
