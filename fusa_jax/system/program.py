"""A main function as a program: the house's errors, signals and exit codes, and the other processes of the run told."""

import logging
import pathlib
import signal
import sys
import traceback
from collections.abc import Callable

import absl.logging
from absl import app, flags

from fusa_jax.system import exits
from fusa_jax.system.errors import DoesNotFitError, Terminated, UserError

# Parameters with flags of other names.
_FLAGS = {'flips': 'tta'}
COMPILED = pathlib.Path('~/.cache/fusa_jax/compiled').expanduser()


def start(main: Callable, parse_flags: Callable) -> None:
  """Runs a main function of the remaining arguments.

  Exit codes: 2 is the user's to mend and 3 does not fit; anything else but 0 asks for the same command again: 130
  (Ctrl-C), 143 (SIGTERM), 1 (a bug, or another host lost) and 134 (JAX ended it, for another host's silence).
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
    except Terminated as stop:
      print(f'\nstopped {stop}; the same command goes on from the last checkpoint', file=sys.stderr)
      hosts.disconnect()
      exits.leave(143)
    except KeyboardInterrupt:
      print('\ninterrupted; the same command goes on from the last checkpoint', file=sys.stderr)
      hosts.fail_together('interrupted', 130)
      exits.leave(130)
    except Exception as error:
      traceback.print_exc()
      hosts.fail_together(f'{type(error).__name__}: {error}', 1)
      exits.leave(1)

  app.run(run, flags_parser=parse_flags)


def with_dashes(text: str) -> str:
  """Lines that begin with the name of a parameter, with that of its flag: `input: ...` as `--input: ...`."""
  return '\n'.join(_line_with_dashes(line) for line in text.splitlines())


def _line_with_dashes(line):
  names, colon, rest = line.partition(': ')
  typed = [_FLAGS.get(name, name) for name in names.split(', ')]
  if not colon or not all(name in flags.FLAGS for name in typed):
    return line
  return f'{", ".join(f"--{name}" for name in typed)}: {rest}'


def _terminate(*_) -> None:
  raise Terminated('by SIGTERM')


def start_logging() -> None:
  """Messages as plain lines on stderr, beside the progress bars; libraries only where they warn."""
  logging.basicConfig(format='%(message)s', level=logging.WARNING, force=True)
  logging.getLogger().setLevel(logging.INFO)
  for name in ('jax', 'orbax', 'matplotlib', 'tensorboardX', 'grain'):
    logging.getLogger(name).setLevel(logging.WARNING)
  # Through absl, TFDS warns of folders that it has yet to write, and Orbax prints errors that it raises as well.
  absl.logging.set_verbosity(absl.logging.FATAL)


def use_compilation_cache() -> None:
  """Keeps compiled programs on disk: a second run of the same shapes starts in seconds."""
  import jax

  jax.config.update('jax_compilation_cache_dir', str(COMPILED))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.1)
