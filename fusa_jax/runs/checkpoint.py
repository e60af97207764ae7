"""Saves and restores checkpoints so that an interruption at any time either leaves them intact or is detected.

No other module uses Orbax. A checkpoint has two items: `variables` (parameters and batch statistics, enough for
evaluation and prediction; with train.ema, their moving average) and `optimizer` (the rest of the training state). The
run keeps its latest two checkpoints and the one with the best validation score.

A checkpoint is written under a temporary name and renamed once it is complete. It includes `sha256.json`, a digest of
each of its files, and `variables.sha256`. A checkpoint that does not match its digests is damaged: it is logged, not
used, and moved to `damaged/` when training continues. Only the files that will be read are compared with their digests,
because checkpoints are large.

A bucket has no rename. There Orbax writes a checkpoint under its final name, and `commit_success.txt` completes it.
"""

import hashlib
import json
import logging
import os
import pathlib
import re
from collections.abc import Sequence
from concurrent import futures
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from fusa_jax.system import hosts, paths
from fusa_jax.system.errors import UserError
from fusa_jax.system.files import sha256_of

_DIGESTS = 'sha256.json'  # of each file
_VARIABLES = 'variables.sha256'  # of the names and values of the arrays
_METRICS = pathlib.Path('metrics', 'metrics')  # where Orbax's manager saves the scores
# The folders of a checkpoint.
_ARRAYS = ('variables', 'optimizer')
_ITEMS = (*_ARRAYS, 'metrics')
# hashlib and reading release the lock.
_THREADS = min(os.cpu_count() or 1, 16)


class Checkpoints:
  """The intact checkpoints of a run. All processes of the run must open them together.

  This is a context manager. On exit it waits for a save in progress and raises its error.
  """

  def __init__(self, workdir: pathlib.Path):
    """Reads the scores of the existing checkpoints; no arrays."""
    self._folder = workdir / 'checkpoints' if paths.in_bucket(workdir) else (workdir / 'checkpoints').absolute()
    self._scores, self._damaged, self._intact, self._sha256, self._manager = {}, {}, set(), {}, None
    # Only process 0 checks, so that all processes continue from the same step.
    for step, (reason, score) in hosts.on_main(lambda: _survey(self._folder)):
      if reason:
        self._reject(step, reason)
      else:
        self._scores[step] = score

  def __enter__(self):
    return self

  def __exit__(self, *_):
    if self._manager is not None:
      self._with_disk_errors(self._manager.close)

  def latest(self) -> int | None:
    """Returns the latest step of which all files are intact; None without a checkpoint.

    All processes must call `latest` together, and so `best`.

    Raises:
      UserError: there are checkpoints, but all of them are damaged.
    """
    return self._first_intact(max, _ARRAYS)

  def best(self) -> int:
    """Returns the step with the highest validation score of which the variables are intact; without scores, the latest.

    Raises:
      UserError: the run has no checkpoint, or all of them are damaged.
    """
    step = self._first_intact(_best, ('variables',))
    if step is None:
      raise UserError(f'{self._folder}: no checkpoint in it; train first, or name the folder of a trained run')
    return step

  def digest(self, step: int) -> str | None:
    """Returns `sha256_of_variables` of a checkpoint without reading the arrays; None if an earlier version saved it."""
    path = self._folder / str(step) / _VARIABLES
    return path.read_text() if path.exists() else None

  def _first_intact(self, choose, items):
    """Returns the first step that `choose` takes from the scores and that is intact; None without a checkpoint."""
    while self._scores:
      step = choose(self._scores)
      new = [item for item in items if (step, item) not in self._intact]
      reason = hosts.on_main(lambda step=step, new=new: _damage(self._folder / str(step), new)) if new else None
      if not reason:
        self._intact |= {(step, item) for item in new}
        return step
      self._reject(step, reason)
    if self._damaged:
      raise UserError(
        f'{self._folder}: all checkpoints are damaged ({"; ".join(self._damaged.values())}); restore one from a '
        'copy, or delete them to start over'
      )
    return None

  def _reject(self, step, reason):
    self._scores.pop(step, None)
    self._damaged[step] = reason
    logging.warning('%s is damaged and not used: %s', self._folder / str(step), reason)

  def restore(self, step: int, **shapes: Any) -> dict[str, Any]:
    """Reads items of a checkpoint.

    Args:
      step: the step that was saved.
      **shapes: for each item by name, a tree with the shapes, dtypes and shardings to restore into.

    Returns:
      The items, by the same names.
    """
    with ocp.StandardCheckpointer() as checkpointer:
      return {name: checkpointer.restore(self._folder / str(step) / name, tree) for name, tree in shapes.items()}

  def save(self, step: int, variables: Any, optimizer: Any, score: float | None) -> None:
    """Starts to save a checkpoint in the background; returns once the arrays are copied.

    Args:
      step: the step of the training state.
      variables: {'params', 'batch_stats'}.
      optimizer: any tree of arrays.
      score: the validation score, higher is better; None if it is undefined or the run has no validation fold.

    Raises:
      UserError: the save cannot start, or the previous one failed: the disk is full, or the folder disappeared.
    """
    if self._manager is None:
      self._open()
    elif not self._folder.is_dir():
      raise UserError(f'{self._folder}: the folder disappeared during training; start again in a permanent --workdir')
    items = ocp.args.Composite(variables=ocp.args.PyTreeSave(variables), optimizer=ocp.args.PyTreeSave(optimizer))
    metrics = None if score is None else {'score': score}
    if hosts.is_main():
      self._sha256[step] = sha256_of_variables(variables)
    self._with_disk_errors(lambda: self._manager.save(step, args=items, metrics=metrics))
    self._scores[step] = score
    self._intact |= {(step, item) for item in _ARRAYS}

  def check(self) -> None:
    """Raises the UserError of a failed save; does not wait for a save in progress."""
    # The manager's thread has already taken the error, so check_for_errors does not raise it; waiting does.
    if self._manager is not None and not self._manager.is_saving_in_progress():
      self._with_disk_errors(self._manager.wait_until_finished)

  def _open(self):
    """Creates Orbax's manager, after moving away the damaged checkpoints, which it must not find."""
    if self._scores:
      self.best()  # a damaged one must not be kept in place of a good one
    hosts.on_main(self._set_aside)
    best = BestN(get_metric_fn=_score, n=1, keep_checkpoints_without_metrics=False)
    # Every host holds the whole state. Process 0 writes all of it, like every other file; hosts do not share the work.
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
        # Called once all files are written, before the rename that makes them a checkpoint.
        async_options=ocp.AsyncOptions(post_finalization_callback=lambda: _write_digests(self._folder, self._sha256)),
      ),
    )

  def _set_aside(self):
    # In a bucket, Orbax takes every other folder in checkpoints/ for an unfinished checkpoint and removes it.
    folder = self._folder.parent if paths.in_bucket(self._folder) else self._folder
    for step in self._damaged:
      aside = folder / 'damaged' / str(step)
      paths.remove_folder(aside)
      paths.move_folder(self._folder / str(step), aside)
      logging.warning('moved a damaged checkpoint to %s', aside)

  def _with_disk_errors(self, action):
    """Calls `action`; replaces Orbax's errors about the disk with a UserError of one line."""
    try:
      action()
    except Exception as error:
      # TensorStore writes the arrays. It reports the system's error as text in a ValueError.
      code = re.search(r"os_error_code='(\d+)'", str(error))
      if code:
        reason = os.strerror(int(code[1]))
      elif isinstance(error, OSError):
        reason = str(error)
      elif not self._folder.is_dir():
        reason = 'the folder disappeared'
      else:
        raise
      raise UserError(
        f'{self._folder}: a checkpoint could not be saved ({reason}); free space there or move the run, then rerun '
        'the same command'
      ) from error


def _survey(folder: pathlib.Path) -> list[tuple[int, tuple[str | None, float | None]]]:
  """Returns [(step, (damage, score))] of the checkpoints in a folder, in order. It reads only their small files."""
  found = []
  for step in _steps(folder):
    reason, metrics = _damage(folder / str(step), ('metrics',)), folder / str(step) / _METRICS
    scored = not reason and metrics.exists()
    found.append((step, (reason, _score(json.loads(metrics.read_text())) if scored else None)))
  return found


def _damage(checkpoint: pathlib.Path, items: Sequence[str] = _ITEMS) -> str | None:
  """Returns the first problem in the files of some items of a checkpoint; None if they are as they were saved."""
  try:
    recorded = _recorded(checkpoint)
  except FileNotFoundError:
    return f'{_DIGESTS} is missing'
  except (ValueError, AttributeError):
    return f'{_DIGESTS} is not readable'

  def problem(name):
    try:
      return None if sha256_of(checkpoint / name) == recorded[name] else f'{name} has changed since it was saved'
    except FileNotFoundError:
      return f'{name} is missing'
    except OSError as error:
      return f'{name} cannot be read ({error.strerror})'

  names = [name for name in recorded if name.partition('/')[0] in items]
  with futures.ThreadPoolExecutor(_THREADS) as pool:
    return next(filter(None, pool.map(problem, names)), None)


def _recorded(checkpoint: pathlib.Path) -> dict[str, str]:
  """Returns the digests of a checkpoint's files by their names.

  Raises:
    FileNotFoundError, ValueError, AttributeError: the file of digests is missing or damaged.
  """
  recorded = json.loads((checkpoint / _DIGESTS).read_text())
  recorded = {str(name): str(digest) for name, digest in recorded.items()}
  if not set(_ARRAYS) <= {name.partition('/')[0] for name in recorded} <= set(_ITEMS):
    raise ValueError('not the items of a checkpoint')
  return recorded


def _write_digests(folder: pathlib.Path, of_variables: dict[int, str]) -> None:
  """Adds the digests to the checkpoint that is being written in `folder` and still has a temporary name.

  Args:
    folder: the folder of the checkpoints.
    of_variables: `sha256_of_variables` by step.
  """
  if not hosts.is_main():
    return
  (partial,) = (path for path in folder.glob('*') if _is_partial(path))
  # Outside the items' folders are only Orbax's notes about the save. They still change, and are never read.
  names = [name for name in paths.files_under(partial) if '/' in name]
  with futures.ThreadPoolExecutor(_THREADS) as pool:
    digests = pool.map(lambda name: sha256_of(partial / name), names)
    of_files = json.dumps(dict(zip(names, digests, strict=True)), indent=1)
  step = int(re.match(r'\d+', partial.name)[0])
  for name, text in ((_VARIABLES, of_variables[step]), (_DIGESTS, of_files)):
    if paths.in_bucket(partial):
      (partial / name).write_text(text)
      continue
    with (partial / name).open('w') as file:
      file.write(text)
      file.flush()
      os.fsync(file.fileno())


def sha256_of_variables(variables: Any) -> str:
  """Returns a digest of the names and values of {'params', 'batch_stats'}."""
  digest = hashlib.sha256()
  for path, leaf in jax.tree_util.tree_leaves_with_path(variables):
    digest.update(jax.tree_util.keystr(path).encode() + np.asarray(leaf).tobytes())
  return digest.hexdigest()


def exists(workdir: pathlib.Path) -> bool:
  """Whether `workdir` holds a checkpoint to resume from. Creates no folder."""
  return bool(_steps(workdir / 'checkpoints'))


def _steps(folder):
  """The steps of the complete checkpoints in a folder, in order."""
  return sorted(int(path.name) for path in folder.glob('*') if path.name.isdigit() and not _is_partial(path))


def _is_partial(path):
  """Whether a checkpoint is being written, or was when its process was killed."""
  if paths.in_bucket(path):
    return path.name.isdigit() and not ocp.utils.is_checkpoint_finalized(path)
  return ocp.utils.TMP_DIR_SUFFIX in path.name


def _score(metrics):
  return metrics['score']


def _best(scores):
  """The step with the highest score; the later one of equal scores; without scores, the latest."""
  scored = {step: score for step, score in scores.items() if score is not None}
  return max(scored, key=lambda step: (scored[step], step)) if scored else max(scores)
