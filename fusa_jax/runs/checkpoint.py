"""Checkpoints: the only file that knows Orbax. What is saved survives any interruption, or is known not to have.

Two items a step: `variables` (parameters and batch statistics, all that evaluation and prediction need) and `optimizer`
(the rest of the training state). Kept are the latest two and the best by the validation score.

A checkpoint appears by a rename, whole, and with it `sha256.json`: a digest of each of its files. What does not match
its digests is damaged: it is named, left out, and set aside when training goes on.
"""

import hashlib
import json
import logging
import os
import pathlib
import re
import shutil
import signal
import threading
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from fusa_jax.system import hosts
from fusa_jax.system.errors import UserError

_DIGESTS = 'sha256.json'
_METRICS = pathlib.Path('metrics', 'metrics')  # where Orbax's manager puts the scores


class Checkpoints:
  """The intact checkpoints of a run. All processes of the run open them together.

  A context manager: on leaving, saves under way are waited for and their errors raised.
  """

  def __init__(self, workdir: pathlib.Path):
    """Looks through what is there; damaged checkpoints are named in the log.

    Raises:
      UserError: checkpoints, but all of them damaged.
    """
    self._folder = (pathlib.Path(workdir) / 'checkpoints').absolute()
    # One process looks, so that all go on from the same step.
    found = hosts.on_main(lambda: _survey(self._folder))
    self._scores = {int(step): score for step, score in found['intact'].items()}
    self._damaged = {int(step): reason for step, reason in found['damaged'].items()}
    self._manager = None
    for step, reason in self._damaged.items():
      logging.warning('%s is damaged and not used: %s', self._folder / str(step), reason)
    if self._damaged and not self._scores:
      raise UserError(
        f'{self._folder}: all checkpoints are damaged ({"; ".join(self._damaged.values())}); restore one from a '
        'copy, or delete them to begin anew'
      )

  def __enter__(self):
    return self

  def __exit__(self, *_):
    if self._manager is not None:
      self._surfacing(self._manager.close)

  def latest(self) -> int | None:
    return max(self._scores, default=None)

  def best(self) -> int:
    """The step with the highest validation score; the latest where none was scored.

    Raises:
      UserError: there is no checkpoint.
    """
    if not self._scores:
      raise UserError(f'{self._folder}: no checkpoint in it; train first, or name the workdir of a run')
    scored = {step: score for step, score in self._scores.items() if score is not None}
    return max(scored, key=lambda step: (scored[step], step)) if scored else max(self._scores)

  def restore(self, step: int, **shapes: Any) -> dict[str, Any]:
    """Items by name, as saved at `step`, into the shapes, dtypes and shardings of the tree given for each."""
    with ocp.StandardCheckpointer() as checkpointer:
      return {name: checkpointer.restore(self._folder / str(step) / name, tree) for name, tree in shapes.items()}

  def save(self, step: int, variables: Any, optimizer: Any, score: float | None) -> None:
    """Begins to save; the arrays are copied before this returns.

    Args:
      step: of the state.
      variables: {'params', 'batch_stats'}.
      optimizer: any tree of arrays.
      score: validation score, higher is better; None where it is undefined or nothing is validated on.

    Raises:
      UserError: this save cannot begin, or the one before has failed: a full disk, a folder that is gone.
    """
    if self._manager is None:
      self._open()
    elif not self._folder.is_dir():
      raise UserError(f'{self._folder}: the folder is gone while training; start again with a --workdir that stays')
    items = ocp.args.Composite(variables=ocp.args.PyTreeSave(variables), optimizer=ocp.args.PyTreeSave(optimizer))
    self._surfacing(lambda: self._manager.save(step, args=items, metrics=None if score is None else {'score': score}))
    self._scores[step] = score

  def check(self) -> None:
    """Raises the UserError of a save that has failed meanwhile; does not wait for one under way."""
    # Not check_for_errors: the manager's own thread has taken the error by then, and only waiting for it gives it back.
    if self._manager is not None and not self._manager.is_saving_in_progress():
      self._surfacing(self._manager.wait_until_finished)

  def _open(self):
    """Orbax's manager, after what it must not see is out of its way."""
    hosts.on_main(self._set_aside)
    best = BestN(get_metric_fn=_score, n=1, keep_checkpoints_without_metrics=False)
    # All of the state is on every host: process 0 writes it, as it writes all else, instead of a part by each.
    writer = ocp.type_handlers.ArrayHandler(use_replica_parallel=False)
    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, writer))
    handler = lambda: ocp.PyTreeCheckpointHandler(type_handler_registry=registry)
    self._manager = ocp.CheckpointManager(
      self._folder,
      item_handlers={'variables': handler(), 'optimizer': handler()},
      options=ocp.CheckpointManagerOptions(
        best_fn=_score,
        best_mode='max',
        preservation_policy=AnyPreservationPolicy([LatestN(2), best]),
        cleanup_tmp_directories=True,
        # Called when all is written and before the rename that makes it a checkpoint.
        async_options=ocp.AsyncOptions(post_finalization_callback=lambda: _write_digests(self._folder)),
      ),
    )

  def _set_aside(self):
    for step in self._damaged:
      aside = self._folder / 'damaged' / str(step)
      shutil.rmtree(aside, ignore_errors=True)
      aside.parent.mkdir(exist_ok=True)
      (self._folder / str(step)).rename(aside)
      logging.warning('set aside: %s', aside)

  def _surfacing(self, act):
    """Does `act`; what Orbax reports of the disk becomes one line that says so."""
    try:
      act()
    except Exception as error:
      # TensorStore, which writes the arrays, gives the system's error as text within a ValueError.
      code = re.search(r"os_error_code='(\d+)'", str(error))
      if code:
        reason = os.strerror(int(code[1]))
      elif isinstance(error, OSError):
        reason = str(error)
      elif not self._folder.is_dir():
        reason = 'the folder is gone'
      else:
        raise
      raise UserError(
        f'{self._folder}: a checkpoint could not be saved ({reason}); free space there, or move the run, '
        'and start the same command again'
      ) from error


def _survey(folder: pathlib.Path) -> dict[str, dict[str, Any]]:
  """{'intact': {step: its score}, 'damaged': {step: the reason}} of the checkpoints in a folder."""
  found = {'intact': {}, 'damaged': {}}
  for step in sorted(int(path.name) for path in folder.glob('*') if path.name.isdigit()):
    reason = _damage(folder / str(step))
    if reason:
      found['damaged'][str(step)] = reason
    else:
      metrics = folder / str(step) / _METRICS
      found['intact'][str(step)] = _score(json.loads(metrics.read_text())) if metrics.exists() else None
  return found


def _damage(checkpoint: pathlib.Path) -> str | None:
  """What is wrong with the files of a checkpoint; None where they are as they were saved."""
  try:
    digests = json.loads((checkpoint / _DIGESTS).read_text())
    expected = {str(name): str(digest) for name, digest in digests.items()}
  except FileNotFoundError:
    return f'{_DIGESTS} is missing'
  except (ValueError, AttributeError):
    return f'{_DIGESTS} is not readable'
  for name, digest in expected.items():
    try:
      if _digest(checkpoint / name) != digest:
        return f'{name} is not as it was saved'
    except FileNotFoundError:
      return f'{name} is missing'
    except OSError as error:
      return f'{name} cannot be read ({error.strerror})'
  return None


def _write_digests(folder: pathlib.Path) -> None:
  """Into the checkpoint that is being written in `folder`, which has a temporary name still."""
  if not hosts.is_main():
    return
  (partial,) = folder.glob(f'*{ocp.utils.TMP_DIR_SUFFIX}*')
  # The files beside the items are Orbax's own notes of the save, and still change; nothing is read from them.
  files = sorted(path for item in partial.iterdir() if item.is_dir() for path in item.rglob('*') if path.is_file())
  text = json.dumps({path.relative_to(partial).as_posix(): _digest(path) for path in files}, indent=1)
  with (partial / _DIGESTS).open('w') as file:
    file.write(text)
    file.flush()
    os.fsync(file.fileno())


def _digest(path):
  with path.open('rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


class Preemption:
  """Whether this run is asked to stop (SIGTERM), at a step on which all of its processes agree. A context manager."""

  def __init__(self):
    self._asked = threading.Event()
    self._previous = None

  def __enter__(self):
    # With several processes JAX's own handler listens, and spreads the word.
    if not jax.distributed.is_initialized() and threading.current_thread() is threading.main_thread():
      self._previous = signal.signal(signal.SIGTERM, lambda *_: self._asked.set())
    return self

  def __exit__(self, *_):
    if self._previous is not None:
      signal.signal(signal.SIGTERM, self._previous)

  def reached(self, step: int) -> bool:
    """Whether to save and stop after `step`. To be asked at every step."""
    return self._asked.is_set() or multihost_utils.reached_preemption_sync_point(step)


def exists(workdir: pathlib.Path) -> bool:
  """Whether a run in `workdir` has a checkpoint to go on from; makes no folder."""
  folder = pathlib.Path(workdir) / 'checkpoints'
  return any(path.name.isdigit() for path in folder.glob('*'))


def _score(metrics):
  return metrics['score']
