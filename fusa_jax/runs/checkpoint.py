"""Saves and restores checkpoints so that an interruption at any time either leaves them intact or is detected.

No other module uses Orbax. A checkpoint has two items: `variables` (parameters and batch statistics, enough for
evaluation and prediction) and `optimizer` (the rest of the training state). The run keeps its latest two checkpoints
and the one with the best validation score.

A checkpoint is written under a temporary name and renamed once it is complete. It includes `sha256.json`, a digest of
each of its files. A checkpoint that does not match its digests is damaged: it is logged, not used, and moved to
`damaged/` when training continues.
"""

import json
import logging
import os
import pathlib
import re
import shutil
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from fusa_jax.system import hosts
from fusa_jax.system.errors import UserError
from fusa_jax.system.files import sha256_of

_DIGESTS = 'sha256.json'
_METRICS = pathlib.Path('metrics', 'metrics')  # where Orbax's manager saves the scores


class Checkpoints:
  """The intact checkpoints of a run. All processes of the run must open them together.

  This is a context manager. On exit it waits for a save in progress and raises its error.
  """

  def __init__(self, workdir: pathlib.Path):
    """Checks the existing checkpoints and logs a warning for each damaged one.

    Raises:
      UserError: there are checkpoints, but all of them are damaged.
    """
    self._folder = (pathlib.Path(workdir) / 'checkpoints').absolute()
    # Only process 0 checks, so that all processes continue from the same step.
    survey = hosts.on_main(lambda: _survey(self._folder))
    self._scores = {int(step): score for step, score in survey['intact'].items()}
    self._damaged = {int(step): reason for step, reason in survey['damaged'].items()}
    self._manager = None
    for step, reason in self._damaged.items():
      logging.warning('%s is damaged and not used: %s', self._folder / str(step), reason)
    if self._damaged and not self._scores:
      raise UserError(
        f'{self._folder}: all checkpoints are damaged ({"; ".join(self._damaged.values())}); restore one from a '
        'copy, or delete them to start over'
      )

  def __enter__(self):
    return self

  def __exit__(self, *_):
    if self._manager is not None:
      self._with_disk_errors(self._manager.close)

  def latest(self) -> int | None:
    """Returns the latest step, or None without a checkpoint."""
    return max(self._scores, default=None)

  def best(self) -> int:
    """Returns the step with the highest validation score, or the latest step if none has a score.

    Raises:
      UserError: the run has no checkpoint.
    """
    if not self._scores:
      raise UserError(f'{self._folder}: no checkpoint in it; train first, or name the folder of a trained run')
    scored = {step: score for step, score in self._scores.items() if score is not None}
    return max(scored, key=lambda step: (scored[step], step)) if scored else max(self._scores)

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
    self._with_disk_errors(lambda: self._manager.save(step, args=items, metrics=metrics))
    self._scores[step] = score

  def check(self) -> None:
    """Raises the UserError of a failed save; does not wait for a save in progress."""
    # The manager's thread has already taken the error, so check_for_errors does not raise it; waiting does.
    if self._manager is not None and not self._manager.is_saving_in_progress():
      self._with_disk_errors(self._manager.wait_until_finished)

  def _open(self):
    """Creates Orbax's manager, after moving away the damaged checkpoints, which it must not find."""
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
        async_options=ocp.AsyncOptions(post_finalization_callback=lambda: _write_digests(self._folder)),
      ),
    )

  def _set_aside(self):
    for step in self._damaged:
      aside = self._folder / 'damaged' / str(step)
      shutil.rmtree(aside, ignore_errors=True)
      aside.parent.mkdir(exist_ok=True)
      (self._folder / str(step)).rename(aside)
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


def _survey(folder: pathlib.Path) -> dict[str, dict[str, Any]]:
  """Checks the checkpoints in a folder. Returns {'intact': {step: score}, 'damaged': {step: reason}}."""
  survey = {'intact': {}, 'damaged': {}}
  for step in sorted(int(path.name) for path in folder.glob('*') if path.name.isdigit()):
    reason = _damage(folder / str(step))
    if reason:
      survey['damaged'][str(step)] = reason
    else:
      metrics = folder / str(step) / _METRICS
      survey['intact'][str(step)] = _score(json.loads(metrics.read_text())) if metrics.exists() else None
  return survey


def _damage(checkpoint: pathlib.Path) -> str | None:
  """Returns the first problem in the files of a checkpoint; None if they are unchanged since they were saved."""
  try:
    digests = json.loads((checkpoint / _DIGESTS).read_text())
    expected = {str(name): str(digest) for name, digest in digests.items()}
  except FileNotFoundError:
    return f'{_DIGESTS} is missing'
  except (ValueError, AttributeError):
    return f'{_DIGESTS} is not readable'
  for name, digest in expected.items():
    try:
      if sha256_of(checkpoint / name) != digest:
        return f'{name} has changed since it was saved'
    except FileNotFoundError:
      return f'{name} is missing'
    except OSError as error:
      return f'{name} cannot be read ({error.strerror})'
  return None


def _write_digests(folder: pathlib.Path) -> None:
  """Adds the digests to the checkpoint that is being written in `folder` and still has a temporary name."""
  if not hosts.is_main():
    return
  (partial,) = folder.glob(f'*{ocp.utils.TMP_DIR_SUFFIX}*')
  # Outside the items' folders are only Orbax's notes about the save. They still change, and are never read.
  files = sorted(path for item in partial.iterdir() if item.is_dir() for path in item.rglob('*') if path.is_file())
  text = json.dumps({path.relative_to(partial).as_posix(): sha256_of(path) for path in files}, indent=1)
  with (partial / _DIGESTS).open('w') as file:
    file.write(text)
    file.flush()
    os.fsync(file.fileno())


def exists(workdir: pathlib.Path) -> bool:
  """Whether `workdir` holds a checkpoint to resume from. Creates no folder."""
  folder = pathlib.Path(workdir) / 'checkpoints'
  return any(path.name.isdigit() for path in folder.glob('*'))


def _score(metrics):
  return metrics['score']
