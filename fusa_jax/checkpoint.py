"""Checkpoints: the only file that knows Orbax.

Two items a step: `variables` (parameters and batch statistics, all that evaluation and prediction need) and `optimizer`
(the rest of the training state). Kept are the latest two and the best by the validation score.
"""

import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from fusa_jax.errors import UserError


class Checkpoints:
  """The checkpoints of a run. A context manager: on leaving, saves under way are waited for and their errors raised."""

  def __init__(self, workdir: pathlib.Path):
    best = BestN(get_metric_fn=_score, n=1, keep_checkpoints_without_metrics=False)
    policy = AnyPreservationPolicy([LatestN(2), best])
    options = ocp.CheckpointManagerOptions(best_fn=_score, best_mode='max', preservation_policy=policy)
    self._folder = (pathlib.Path(workdir) / 'checkpoints').absolute()
    self._manager = ocp.CheckpointManager(self._folder, options=options, item_names=('variables', 'optimizer'))

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self._manager.close()

  def latest(self) -> int | None:
    return self._manager.latest_step()

  def best(self) -> int:
    """The step with the highest validation score; the latest where none was scored.

    Raises:
      UserError: there is no checkpoint.
    """
    step = self._manager.best_step()
    if step is None:
      step = self._manager.latest_step()
    if step is None:
      raise UserError(f'{self._folder}: no checkpoint in it; train first, or name the workdir of a run')
    return step

  def save(self, step: int, variables: Any, optimizer: Any, score: float | None) -> None:
    """Begins to save; the arrays are copied before this returns. Raises what an earlier save failed with.

    Args:
      step: of the state.
      variables: {'params', 'batch_stats'}.
      optimizer: any tree of arrays.
      score: validation score, higher is better; None where it is undefined or nothing is validated on.
    """
    self._manager.check_for_errors()
    items = ocp.args.Composite(variables=ocp.args.StandardSave(variables), optimizer=ocp.args.StandardSave(optimizer))
    self._manager.save(step, args=items, metrics=None if score is None else {'score': score})

  def restore(self, step: int, **like: Any) -> dict[str, Any]:
    """Items by name as saved at `step`, each into the shapes, dtypes and shardings of the tree given for it."""
    items = ocp.args.Composite(**{name: ocp.args.StandardRestore(tree) for name, tree in like.items()})
    return dict(self._manager.restore(step, args=items).items())


def exists(workdir: pathlib.Path) -> bool:
  """Whether a run in `workdir` has a checkpoint to go on from; makes no folder."""
  folder = pathlib.Path(workdir) / 'checkpoints'
  return folder.is_dir() and bool(ocp.utils.checkpoint_steps(folder.absolute()))


def _score(metrics):
  return metrics['score']


def shapes(tree: Any, sharding: jax.sharding.Sharding) -> Any:
  """The tree's shapes and dtypes, all with one sharding: what `restore` takes."""
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)
