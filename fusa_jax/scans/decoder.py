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

from fusa_jax.system.errors import UserError


class _Apart:
  """The process: `self(function, *arguments)` is what it gives there; None where the process ended over it."""

  def __init__(self):
    self.owner = os.getpid()
    self._process = subprocess.Popen(
      # With this process' path of modules, and nothing that lies in the current folder.
      [sys.executable, '-P', '-m', 'fusa_jax.scans.decoder'],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=subprocess.DEVNULL,  # decoders written in C print to it, beside what they give back
      env=os.environ | {'PYTHONPATH': os.pathsep.join(sys.path)},
      start_new_session=True,  # Ctrl-C is for this process; that one ends when nothing can be asked of it any more
    )

  def __call__(self, function, *arguments):
    try:
      pickle.dump((function, arguments), self._process.stdin)
      self._process.stdin.flush()
      return pickle.load(self._process.stdout)
    except (OSError, EOFError, pickle.UnpicklingError):
      return None

  def __del__(self):
    if hasattr(self, '_process') and self.owner == os.getpid():
      self._process.kill()
      self._process.communicate()


_of_thread = threading.local()


def apart(function: Callable, *arguments):
  """function(*arguments), of a module's own function and of what can be pickled; computed in the thread's process.

  Raises:
    UserError: as the function; or the process ended, without more to say; or the system gives none.
  """
  process = getattr(_of_thread, 'process', None)
  if process is None or process.owner != os.getpid():  # after a fork it answers another one
    try:
      process = _Apart()
    except OSError as error:
      raise UserError(f'no process to decode it in ({error.strerror}); close others, and start again') from None
  # Until it has answered it is nobody's: an answer that was not waited for would be taken for the next file's.
  _of_thread.process = None
  found = process(function, *arguments)
  if found is None:
    raise UserError('a slice cannot be decoded (its decoder broke down); copy it again from its source')
  _of_thread.process = process
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
