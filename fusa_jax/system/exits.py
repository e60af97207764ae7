"""Ends a process: runs the clean-up functions, prints the reason, and sets the exit code."""

import os
import sys
from collections.abc import Callable

_clearing = []


def before_leaving(clear: Callable[[], None]) -> Callable[[], None]:
  """Decorator for clean-up functions that must run before the process ends in any way except SIGKILL."""
  _clearing.append(clear)
  return clear


def fail(error: Exception | str, code: int = 2) -> None:
  """Prints each line of the error and ends the process."""
  for line in str(error).splitlines():
    print(f'error: {line}', file=sys.stderr)
  leave(code)


def leave(code: int) -> None:
  """Ends the process with os._exit. sys.exit would wait for input and Orbax threads, which have nothing to finish."""
  for clear in _clearing:
    clear()
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(code)
