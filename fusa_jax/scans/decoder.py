"""Runs functions in a separate process, because GDCM kills its own process on some damaged files.

Each thread starts one worker at its first file and keeps it. Run as a script, this module is the worker. It reads
(function, arguments) as pickles from the standard input, and writes the result or the UserError to the standard output.

ProcessPoolExecutor cannot replace it:
- Its spawned workers first import modules of the current folder and the main module. With launch.py this takes 0.6 s;
  the worker here takes 0.03 s. It fails for a script that Python reads from the standard input.
- The pool waits forever for a worker that dies while it sends an image.
- Its workers survive a killed parent.
"""

import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable

from fusa_jax.system.errors import UserError


class _Worker:
  """The worker process. `self(function, *arguments)` returns the result or the UserError; None if the process died."""

  def __init__(self):
    self.owner = os.getpid()
    self._process = subprocess.Popen(
      # -P: import nothing from the current folder. PYTHONPATH: find the same modules as this process.
      [sys.executable, '-P', '-m', 'fusa_jax.scans.decoder'],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=subprocess.DEVNULL,  # decoders written in C print warnings to it
      env=os.environ | {'PYTHONPATH': os.pathsep.join(sys.path)},
      start_new_session=True,  # keeps Ctrl-C away from the worker; it ends when its standard input closes
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


_thread_local = threading.local()


def apart(function: Callable, *arguments):
  """Computes function(*arguments) in this thread's worker.

  The function must be defined at the top level of a module. The arguments and the result must be picklable.

  Raises:
    UserError: the function raised it; the worker died; the system refuses to start a worker.
  """
  worker = getattr(_thread_local, 'worker', None)
  if worker is None or worker.owner != os.getpid():  # after a fork, the worker belongs to the parent process
    try:
      worker = _Worker()
    except OSError as error:
      raise UserError(f'cannot start a decoder process ({error.strerror}); close other programs, then retry') from None
  # Detach the worker until it replies, so that a late reply cannot be matched to the next file.
  _thread_local.worker = None
  result = worker(function, *arguments)
  if result is None:
    raise UserError('cannot be decoded (the decoder crashed); copy it again from its source')
  _thread_local.worker = worker
  if isinstance(result, UserError):
    raise result
  return result


def main():
  # Keep the standard output for results. What libraries print goes to the standard error.
  results = os.fdopen(os.dup(sys.stdout.fileno()), 'wb')
  os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
  while True:
    try:
      function, arguments = pickle.load(sys.stdin.buffer)
    except EOFError:
      return
    try:
      result = function(*arguments)
    except UserError as error:
      result = error
    pickle.dump(result, results)
    results.flush()


if __name__ == '__main__':
  main()
