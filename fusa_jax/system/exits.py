"""How a process ends: its exit code, the lines that say why, and what is cleared away first."""

import os
import sys
from collections.abc import Callable

_clearing = []


def before_leaving(clear: Callable[[], None]) -> Callable[[], None]:
  """A decorator of functions that clear away what must not stay behind, however the process ends (SIGKILL apart)."""
  _clearing.append(clear)
  return clear


def fail(error: Exception | str, code: int = 2) -> None:
  """Ends the process with the error's lines."""
  for line in str(error).splitlines():
    print(f'error: {line}', file=sys.stderr)
  leave(code)


def leave(code: int) -> None:
  """Ends the process, but not by sys.exit: threads of the input pipeline and of Orbax have nothing left to finish."""
  for clear in _clearing:
    clear()
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(code)
