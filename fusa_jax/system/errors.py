"""Errors that end a run early; system/program.py prints each as one line and exits with the error's own code."""

from collections.abc import Mapping
from typing import TypeVar

T = TypeVar('T')


class UserError(ValueError):
  """The user's input is wrong: a file, a flag or a config. The text says what is wrong, where, and what to do.

  Exit code 2. One error can report several problems (all bad files of a cohort), one per line.
  """


class DoesNotFitError(Exception):
  """The training step needs more memory than the chip that it is compiled for has. Exit code 3."""


class HostLost(Exception):
  """Another process was lost, and its work is left. Exit code 1: run it again."""


class PartlyRefused(Exception):
  """Some inputs were used and others were refused; the text counts them. Exit code 4: the results name the reasons."""


class Terminated(BaseException):
  """The process received SIGTERM. Schedulers send it before they take a machine away. Exit code 143: run it again."""


def look_up(registry: Mapping[str, T], name: str, key: str) -> T:
  """Returns registry[name] for a name that a user chose.

  Args:
    registry: the possible values, by name.
    name: the name to look up.
    key: the config key or flag that holds the name; the message begins with it.

  Raises:
    UserError: the name is not in the registry; the message lists the possible names.
  """
  if name not in registry:
    raise UserError(f'{key}: {name!r} is unknown; give one of {", ".join(registry)}')
  return registry[name]


def one_line(error: Exception, most: int = 120) -> str:
  """Returns an error's text on one line, cut to `most` characters; the name of its type if it has no text."""
  text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
  return ' '.join(text.split())[:most] or type(error).__name__
