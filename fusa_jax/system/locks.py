"""Locks, so that two jobs do not write to the same folder. The system releases a lock when its process ends."""

import contextlib
import inspect
import logging
import pathlib
from collections.abc import Iterator

import filelock

from fusa_jax.system import files
from fusa_jax.system.errors import UserError

# Newer versions of filelock replace a missing lock by the existence of a file, which a killed process would leave.
_HAS_FALLBACK = 'fallback_to_soft' in inspect.signature(filelock.BaseFileLock).parameters
_NO_FALLBACK = {'fallback_to_soft': False} if _HAS_FALLBACK else {}


def acquire(path: pathlib.Path, busy: str, wait: bool) -> filelock.BaseFileLock:
  """Takes the lock of a file, in a folder that exists; call release() on the result.

  On a file system without locks it logs a warning and takes no lock.

  Args:
    path: the file. It remains: another process may have it open, and would hold a lock on a removed file.
    busy: what to say if another process holds the lock.
    wait: wait for the other process, after logging `busy`. Otherwise `busy` is an error.

  Raises:
    UserError: another process holds the lock, and `wait` is not set.
    OSError: the file cannot be written.
  """
  lock = filelock.FileLock(path, **_NO_FALLBACK)
  try:
    try:
      lock.acquire(timeout=0)
    except filelock.Timeout:
      if not wait:
        raise UserError(busy) from None
      logging.info('%s', busy)
      lock.acquire()
  except NotImplementedError:
    logging.warning('%s: its file system has no locks; do not start two jobs there at once', path.parent)
  return lock


@contextlib.contextmanager
def alone(folder: pathlib.Path, name: str, busy: str) -> Iterator[None]:
  """Context in which no other process works in a folder. A folder that it creates and that stays empty is removed.

  Args:
    folder: the folder; it is created if it does not exist.
    name: the name of the lock.
    busy: the error if another process works in it.

  Raises:
    UserError: another process works in the folder, or it cannot be written.
  """
  path = folder / f'.{name}.lock'
  missing = [each for each in (folder, *folder.parents) if not each.exists()]
  with files.writing(path):
    folder.mkdir(parents=True, exist_ok=True)
    lock = acquire(path, busy, wait=False)
  try:
    yield
  finally:
    if missing and list(folder.iterdir()) == [path]:
      path.unlink()
      with contextlib.suppress(OSError):
        for each in missing:
          each.rmdir()
    lock.release()
