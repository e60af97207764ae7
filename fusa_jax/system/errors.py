"""What ends a run early; system/program.py turns each into one line and an exit code of its own."""

from collections.abc import Mapping
from typing import TypeVar

T = TypeVar('T')


class UserError(ValueError):
  """Bad input from outside: a file, a flag, a config. The text says what is wrong, where, and what to do. Exit code 2.

  Several findings of one kind (all bad files of a cohort) are given together, a line each.
  """


class DoesNotFitError(Exception):
  """The training step needs more memory than the chip that it is compiled for has. Exit code 3."""


class Terminated(BaseException):
  """Asked to end by SIGTERM, as schedulers ask before they take a machine away. Exit code 143: to be started again."""


def look_up(registry: Mapping[str, T], name: str, key: str) -> T:
  """registry[name], where a user chose the name.

  Args:
    registry: what there is, by name.
    name: of one of them.
    key: the config key or the flag that gave the name; the message begins with it.

  Raises:
    UserError: the registry has no such name; the message lists those that it has.
  """
  if name not in registry:
    raise UserError(f'{key}: there is no {name!r}; one of {", ".join(registry)}')
  return registry[name]


def one_line(error: Exception, most: int = 120) -> str:
  """An error's text in one line, shortened; its type where it has none."""
  text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
  return ' '.join(text.split())[:most] or type(error).__name__
