"""How a process ends: its exit code, the lines that say why, and the other processes of the run told."""

import os
import signal
import sys
import traceback
from collections.abc import Callable

from absl import app

from fusa_jax.errors import DoesNotFitError, Terminated, UserError


def start(main: Callable, parse_flags: Callable) -> None:
  """Runs a main function of the remaining arguments, with the house's errors and exit codes.

  2 is the user's to mend and 3 does not fit; anything else but 0 asks for the same command again: 130 (Ctrl-C), 143
  (SIGTERM), 1 (a bug, or another host lost) and 134 (JAX ended it, for another host's silence).
  """

  def run(argv):
    from fusa_jax import sharding

    signal.signal(signal.SIGTERM, _terminate)
    try:
      main(argv)
    except (UserError, DoesNotFitError) as error:
      code = 2 if isinstance(error, UserError) else 3
      sharding.fail_together(str(error), code)
      fail(error, code)
    except Terminated as stop:
      print(f'\nstopped {stop}; the same command goes on from the last checkpoint', file=sys.stderr)
      sharding.disconnect()
      _leave(143)
    except KeyboardInterrupt:
      print('\ninterrupted; the same command goes on from the last checkpoint', file=sys.stderr)
      sharding.fail_together('interrupted', 130)
      _leave(130)
    except Exception as error:
      traceback.print_exc()
      sharding.fail_together(f'{type(error).__name__}: {error}', 1)
      _leave(1)

  app.run(run, flags_parser=parse_flags)


def fail(error: Exception, code: int = 2) -> None:
  """Ends the process with the error's lines."""
  for line in str(error).splitlines():
    print(f'error: {line}', file=sys.stderr)
  _leave(code)


def _leave(code: int) -> None:
  """Not by sys.exit: threads of the input pipeline and of Orbax have nothing left to finish."""
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(code)


def _terminate(*_) -> None:
  raise Terminated('by SIGTERM')
