"""SIGTERM, which schedulers send before they take a machine away. On any process, it stops all processes of a run.

Outside `deferred` it ends them at once: at any time each file is complete or absent, and the same command resumes.
Within `deferred` they first finish and save what they are doing.

JAX's own `reached_preemption_sync_point` is not used. JAX agrees on "highest number so far + 1" and tests equality, so
the number must grow by 1 per call. But Orbax also calls it, with the step of each save.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

from fusa_jax.system import store
from fusa_jax.system.errors import Terminated

# Keys in the store: the processes that received SIGTERM, and the number of calls of `reached` of each process then.
_RECEIVED, _CALLS = 'fusa_jax/sigterm/', 'fusa_jax/calls/'


class _State:
  """The state of this process.

  Attributes:
    received: set once this process itself has received SIGTERM.
    origin: the process that has received SIGTERM, once this process knows of it.
    lock: the watcher holds it while the processes agree, so that no process passes the point that they agree on.
    calls: the calls of `reached`; it only grows, also from one fold to the next.
    stop_at: the call of `reached` at which all processes stop, once they have agreed.
    deferral: 'together' or 'each' within `deferred`.
    wakeup: the descriptor of a pipe from which the watcher reads signals while the main thread computes.
    is_agreeing: whether this process has told the others its number of calls.
  """

  def __init__(self):
    self.received, self.origin, self.lock = threading.Event(), None, threading.Lock()
    self.calls, self.stop_at, self.deferral = 0, None, None
    self.wakeup, self.is_agreeing = None, False


_state = _State()


def listen() -> None:
  """Notes SIGTERM from now on. Connected processes call this after JAX has installed its own handler."""
  _state.wakeup, write = os.pipe()
  for end in (_state.wakeup, write):
    os.set_blocking(end, False)
  signal.set_wakeup_fd(write, warn_on_full_buffer=False)
  signal.signal(signal.SIGTERM, lambda *_: _state.received.set())


@contextlib.contextmanager
def deferred(together: bool) -> Iterator[None]:
  """Context that SIGTERM does not end at once: code in it asks where it can stop, and raises Terminated there.

  Args:
    together: all processes make the same calls of `reached`, and stop at the same one. Otherwise each asks `requested`.

  Raises:
    Terminated: at the end of the context, if SIGTERM came after the last question.
  """
  if store.client() is None:
    with _noted_alone():
      yield
    return
  with _state.lock:
    _state.deferral = 'together' if together else 'each'
  try:
    yield
    stops = reached(last=True) if together else requested()
  except Terminated:
    raise  # the deferral remains, so that the watcher lets this process end with the others
  except BaseException:
    _state.deferral = None
    raise
  if stops:
    raise Terminated('by SIGTERM')
  _state.deferral = None


@contextlib.contextmanager
def _noted_alone():
  """Context of a process that runs alone, in which SIGTERM is only noted. Outside, SIGTERM does what it did before."""
  _state.received.clear()
  previous = None
  if threading.current_thread() is threading.main_thread():
    previous = signal.signal(signal.SIGTERM, lambda *_: _state.received.set())
  try:
    yield
  finally:
    if previous is not None:
      signal.signal(signal.SIGTERM, previous)
  if _state.received.is_set():
    raise Terminated('by SIGTERM')


def reached(last: bool = False) -> bool:
  """Whether to stop here: all processes get True at the same call.

  Every process must make the same calls, within `deferred`.

  Args:
    last: whether this is the last call within a `deferred`, which ends with it.
  """
  if store.client() is None:
    return _state.received.is_set()
  with _state.lock:
    _state.calls += 1
    stops = _state.stop_at is not None and _state.calls >= _state.stop_at
    if last and not stops:
      _state.deferral = None
    return stops


def requested() -> bool:
  """Whether SIGTERM has reached any process of the run. Unlike with `reached`, processes learn of it one by one."""
  client = store.client()
  if client is None:
    return _state.received.is_set()
  if _state.origin is None:
    if _state.received.is_set():
      client.key_value_set(f'{_RECEIVED}{store.number()}', '', allow_overwrite=True)
    receivers = [int(name.rpartition('/')[2]) for name, _ in client.key_value_dir_get(_RECEIVED)]
    if receivers:
      _state.origin = store.number() if store.number() in receivers else min(receivers)
  return _state.origin is not None


def message() -> str:
  """Returns the text that a process prints if SIGTERM ends it outside `deferred`."""
  where = f' on process {_state.origin}' if requested() and _state.origin != store.number() else ''
  return f'stopped by SIGTERM{where}; rerun the same command to resume'


def must_leave() -> bool:
  """The watcher calls this every second: it agrees with the other processes on where to stop.

  Returns:
    Whether SIGTERM has come outside `deferred`, so that this process must end now.
  """
  with contextlib.suppress(BlockingIOError, TypeError):
    if signal.SIGTERM in os.read(_state.wakeup, 4096):
      _state.received.set()
  if not requested() or _state.stop_at is not None:
    return False
  if not _state.is_agreeing:
    _state.lock.acquire()
    if _state.deferral != 'together':
      _state.lock.release()
      return _state.deferral is None
    _state.is_agreeing = True
    store.client().key_value_set(f'{_CALLS}{store.number()}', str(_state.calls))
  calls = store.client().key_value_dir_get(_CALLS)
  if len(calls) == store.count():
    _state.stop_at = max(int(value) for _, value in calls) + 1
    _state.lock.release()
  return False


def is_agreeing() -> bool:
  """Whether the watcher should call `must_leave` again soon, because the processes wait for each other."""
  return _state.is_agreeing and _state.stop_at is None
