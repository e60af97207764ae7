"""Decoding in a process of its own: on some damaged files, GDCM ends the process that it is in.

Each thread has one such process, from its first file on. As a script, this is that process: it takes (function,
arguments) by pickle on the standard input, and gives back what the function gives, or its UserError.
"""

import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable

from fusa_jax.errors import UserError


class _Apart:
  """The process: `self(function, *arguments)` is what it gives there; None where the process ended over it."""

  def __init__(self):
    self._process = subprocess.Popen(
      [sys.executable, '-m', 'fusa_jax.decoder'],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      pipesize=2**20,  # a slice of 512 x 512 at once
      stderr=subprocess.DEVNULL,  # decoders written in C print to it, beside what they give back
      env=os.environ | {'PYTHONPATH': os.pathsep.join(sys.path)},
    )

  def __call__(self, function, *arguments):
    try:
      pickle.dump((function, arguments), self._process.stdin)
      self._process.stdin.flush()
      return pickle.load(self._process.stdout)
    except (OSError, EOFError, pickle.UnpicklingError):
      return None

  def __del__(self):
    self._process.kill()
    self._process.communicate()


_of_thread = threading.local()


def apart(function: Callable, *arguments):
  """function(*arguments), of a module's own function and of what can be pickled; computed in the thread's process.

  Raises:
    UserError: as the function; or the process ended, without more to say.
  """
  if not hasattr(_of_thread, 'process'):
    _of_thread.process = _Apart()
  found = _of_thread.process(function, *arguments)
  if found is None:
    del _of_thread.process
    raise UserError('a slice cannot be decoded (its decoder broke down); copy it again from its source')
  if isinstance(found, UserError):
    raise found
  return found


def main():
  # What libraries print goes elsewhere than what is given back.
  given = os.fdopen(os.dup(sys.stdout.fileno()), 'wb')
  os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
  while True:
    try:
      function, arguments = pickle.load(sys.stdin.buffer)
    except EOFError:
      return
    try:
      found = function(*arguments)
    except UserError as error:
      found = error
    pickle.dump(found, given)
    given.flush()


if __name__ == '__main__':
  main()
