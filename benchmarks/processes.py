"""Worker processes of the benchmarks.

A worker is spawned, not forked, because JAX has threads and a worker must find its device like a new process. A
terminal sends Ctrl-C to all processes. A worker ignores it; the process that started the worker receives Ctrl-C and
ends the worker. If that process is killed, the worker ends by itself.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any


def start(work: Callable, *arguments: Any) -> tuple[BaseProcess, Connection]:
  """Starts work(connection, *arguments) in a process; returns the process and this end of the connection.

  Reading raises EOFError once the process has ended. Only the main thread may call this: it sets a signal handler.
  """
  here, there = multiprocessing.Pipe()
  process = multiprocessing.get_context('spawn').Process(target=_run, args=(work, there, *arguments))
  # The worker inherits the ignored signal. It therefore ignores Ctrl-C from the start, also while it imports modules.
  handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
  try:
    process.start()
  finally:
    signal.signal(signal.SIGINT, handler)
  there.close()  # the worker must hold the only copy, so that its end closes the pipe
  return process, here


def _run(work, connection, *arguments):
  threading.Thread(target=_leave_with_parent, daemon=True).start()
  work(connection, *arguments)


def _leave_with_parent():
  multiprocessing.parent_process().join()
  os._exit(1)
