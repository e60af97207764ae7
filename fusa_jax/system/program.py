"""Runs a main function as a program: prints errors, handles signals, sets exit codes, informs the other processes."""

import logging
import os
import pathlib
import signal
import sys
import traceback
from collections.abc import Callable

import absl.logging
from absl import app, flags

from fusa_jax.system import exits, home
from fusa_jax.system.errors import DoesNotFitError, HostLost, PartlyRefused, Terminated, UserError

# Flags with another name than the parameter that they set: {parameter: flag}.
_FLAGS = {'flips': 'tta'}
COMPILED = home.CACHE / 'compiled'


def start(main: Callable, parse_flags: Callable) -> None:
  """Parses the flags, runs the main function and exits.

  Exit codes:
    0: success.
    1: a bug, or the connection to another host is lost. Rerun the command.
    2: an error in the user's input. Fix it first.
    3: the training step does not fit into the memory of the chip.
    4: some inputs were refused or failed; all others are done.
    130: Ctrl-C. Rerun the command.
    134: JAX stopped the process because another host did not respond. Rerun the command.
    143: SIGTERM. Rerun the command.

  Args:
    main: takes the arguments that are not flags.
    parse_flags: takes all arguments and returns those that are not flags.
  """

  def run(argv):
    from fusa_jax.system import hosts

    signal.signal(signal.SIGTERM, _terminate)
    try:
      main(argv)
    except (UserError, DoesNotFitError) as error:
      code, text = 2 if isinstance(error, UserError) else 3, with_dashes(str(error))
      hosts.fail_together(text, code)
      exits.fail(text, code)
    except HostLost as lost:
      print(f'error: {lost}', file=sys.stderr)
      hosts.fail_together(str(lost), 1)
      exits.leave(1)
    except PartlyRefused as partly:
      hosts.disconnect()
      if hosts.is_main():
        print(partly, file=sys.stderr)
      exits.leave(4)
    except Terminated as stop:
      print(f'\nstopped {stop}; rerun the same command to resume', file=sys.stderr)
      hosts.disconnect()
      exits.leave(143)
    except KeyboardInterrupt:
      print('\ninterrupted; rerun the same command to resume', file=sys.stderr)
      hosts.fail_together('interrupted', 130)
      exits.leave(130)
    except Exception as error:
      hosts.fail_together(f'{type(error).__name__}: {error}', 1)
      traceback.print_exc()
      exits.leave(1)

  app.run(run, flags_parser=parse_flags)


def with_dashes(text: str) -> str:
  """Turns the name of a parameter at the start of a line into its flag: `input: ...` becomes `--input: ...`."""
  return '\n'.join(_line_with_dashes(line) for line in text.splitlines())


def _line_with_dashes(line):
  names, colon, rest = line.partition(': ')
  typed = [_FLAGS.get(name, name) for name in names.split(', ')]
  if not colon or not all(name in flags.FLAGS for name in typed):
    return line
  return f'{", ".join(f"--{name}" for name in typed)}: {rest}'


def _terminate(*_) -> None:
  raise Terminated('by SIGTERM')


def start_logging(verbose: bool = False) -> None:
  """Logs messages as plain lines to standard error, like the progress bars. From libraries it logs only warnings.

  Args:
    verbose: also log this package's messages of level DEBUG.
  """
  logging.basicConfig(format='%(message)s', level=logging.WARNING, force=True)
  logging.getLogger().setLevel(logging.INFO)
  logging.getLogger('fusa_jax').setLevel(logging.DEBUG if verbose else logging.INFO)
  for name in ('jax', 'orbax', 'matplotlib', 'tensorboardX', 'grain'):
    logging.getLogger(name).setLevel(logging.WARNING)
  # gcsfs logs at every access that the type of a bucket is unknown, which does not matter. It also logs errors that it
  # raises.
  logging.getLogger('gcsfs').setLevel(logging.CRITICAL)
  logging.getLogger('fsspec').setLevel(logging.WARNING)
  # Silence absl: TFDS warns about folders that it has not written yet, and Orbax logs errors that it also raises.
  absl.logging.set_verbosity(absl.logging.FATAL)


def command() -> str:
  """Returns the program's name as the user typed it, for the commands that messages suggest."""
  return 'fusa-jax' if pathlib.Path(sys.argv[0]).stem == 'fusa-jax' else 'python launch.py'


def use_compilation_cache() -> None:
  """Keeps compiled programs on disk, so that a second run with the same shapes starts in seconds."""
  import jax

  try:
    COMPILED.mkdir(parents=True, exist_ok=True)
    is_writable = os.access(COMPILED, os.W_OK)
  except OSError:
    is_writable = False
  if not is_writable:
    logging.info(
      '%s: cannot be written, so compiled programs are not kept; set XDG_CACHE_HOME to a folder that can', COMPILED
    )
    return
  jax.config.update('jax_compilation_cache_dir', str(COMPILED))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.1)
