"""The lock of a run's folder: one job at a time trains or evaluates there.

A cross-validation locks its own folder and, one after the other, those of its folds. Different jobs may therefore train
different folds at the same time, as in benchmarks/study.py. Two jobs never work on one fold.
"""

import functools
import logging
import os
import pathlib
from collections.abc import Callable

from fusa_jax.system import hosts, locks, paths

# The folders that this process has locked: a cross-validation and the training in it ask for the same lock.
_held = set()


def alone_in_workdir(function: Callable) -> Callable:
  """Decorator for functions of (config, workdir, ...): process 0 holds the lock of the workdir while the function runs.

  The decorated function raises a UserError if another job works in the workdir.
  """

  @functools.wraps(function)
  def run(config, workdir, *arguments, **options):
    folder = workdir if paths.in_bucket(workdir) else pathlib.Path(os.path.realpath(workdir))
    if not hosts.is_main() or folder in _held:
      return function(config, workdir, *arguments, **options)
    if paths.in_bucket(workdir):
      logging.warning('%s: a bucket has no locks; do not start two jobs there at once', workdir)
      return function(config, workdir, *arguments, **options)
    busy = f'workdir: another job works in {workdir} now; wait until it ends, or name another folder'
    with locks.alone(workdir, 'run', busy):
      _held.add(folder)
      try:
        return function(config, workdir, *arguments, **options)
      finally:
        _held.remove(folder)

  return run
