"""Trained runs as one function of slices: a run's best checkpoint, or the mean probability of several runs'."""

import dataclasses
import json
import logging
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from fusa_jax import tasks
from fusa_jax.runs import checkpoint, operating_point, results, run_config
from fusa_jax.system import meshes
from fusa_jax.system.errors import UserError


@dataclasses.dataclass(frozen=True)
class Model:
  """What probabilities are computed by, whoever computes them.

  Attributes:
    function: (variables, slices [B, size, size]) -> probability of lesion, float32 [B] or [B, size, size].
    variables: of the function, on all devices of a mesh.
    task: name of its type in tasks.TASKS.
    values: of the slices, one of volumes.VALUES.
    image_size: of the slices.
    batch_size: slices that were trained on at once.
    name: of the network; of several, all of them.
    step: of the checkpoint; of several, of each.
  """

  function: Callable[[Any, jax.Array], jax.Array]
  variables: Any
  task: str
  values: str
  image_size: int
  batch_size: int
  name: str
  step: int | list[int]


class Network(NamedTuple):
  """A checkpoint: the run's config, the step, {'params', 'batch_stats'}, and what its logits are divided by."""

  config: ml_collections.ConfigDict
  step: int
  variables: dict
  temperature: float


def load_model(
  workdirs: Sequence[pathlib.Path], mesh, flips: bool | None = None, lungs: bool | None = None
) -> tuple[Model, operating_point.OperatingPoint]:
  """The model of one or several runs, and the point that they are used at.

  Args:
    workdirs: of trained runs; of a cross-validation, for all of its folds.
    mesh: for the variables.
    flips: whether probabilities are those of flips; None: as the runs' operating points were chosen.
    lungs: whether masks are limited to the lungs; None: likewise.

  Raises:
    UserError: as `load_networks`.
  """
  networks, point = load_networks(workdirs, mesh, flips, lungs)
  return create(networks, point.flips), point


def load_networks(
  workdirs: Sequence[pathlib.Path], mesh, flips: bool | None = None, lungs: bool | None = None
) -> tuple[list[Network], operating_point.OperatingPoint]:
  """The networks of one or several runs, and the point that the mean of their probabilities is used at.

  Args:
    workdirs, mesh, flips, lungs: as `load_model` has them.

  Raises:
    UserError: no run; a cross-validation that is not finished; no checkpoint; runs of other tasks, values or sizes.
  """
  folders = [run for workdir in workdirs for run in runs(workdir)]
  configs = [run_config.load_config(folder) for folder in folders]
  _check_alike(folders, configs)
  networks, points = [], []
  for folder, config in zip(folders, configs, strict=True):
    step, variables = load_variables(config, tasks.create(config), folder, mesh)
    point = operating_point.load_point(folder)
    if point.step != step:
      point = operating_point.OperatingPoint()
      logging.warning(
        '%s: no operating point for step %d, so the threshold is 0.5; --mode=evaluate chooses one', folder, step
      )
    if flips not in (None, point.flips):
      logging.warning('%s: its threshold was chosen %s flips', folder, 'with' if point.flips else 'without')
    point = point.with_options(flips=flips, lungs=lungs)
    networks.append(Network(config, step, variables, point.temperature))
    points.append(point)
  point = operating_point.mean(points)
  if point.flips and not all(network.config.augment.flip for network in networks):
    logging.warning('%s: trained without flips (augment.flip), of which it may know nothing', folders[0])
  return networks, point


def runs(workdir: pathlib.Path) -> list[pathlib.Path]:
  """The folder of a run; of a cross-validation, those of its folds."""
  if not run_config.is_cross_validation(run_config.load_config(workdir)):
    return [workdir]
  if not results.is_complete(workdir):
    raise UserError(
      f'workdir: {workdir} is a cross-validation that is not finished; go on with the command that began it, or name '
      f'the folder of one fold, {workdir / "fold0"}'
    )
  return [workdir / f'fold{one["fold"]}' for one in results.read_numbers(workdir)['folds']]


def _check_alike(folders, configs):
  for key, of in (
    ('task', lambda config: config.task),
    ('data.intensity', lambda config: config.data.intensity),
    ('data.image_size', lambda config: config.data.image_size),
  ):
    for folder, config in zip(folders, configs, strict=True):
      if of(config) != of(configs[0]):
        raise UserError(
          f'workdir: {folder} has {key} {of(config)}, {folders[0]} {of(configs[0])}; give runs that are alike in it'
        )


def load_variables(config, task: tasks.Task, workdir: pathlib.Path, mesh) -> tuple[int, dict]:
  """The best checkpoint's step and variables, on all devices of the mesh.

  Raises:
    UserError: the run has no checkpoint.
  """
  shapes = meshes.replicated_shapes(lambda: task.init(jax.random.key(0), config.data.image_size), mesh)
  with checkpoint.Checkpoints(workdir) as checkpoints:
    step = checkpoints.best()
    return step, checkpoints.restore(step, variables=shapes)['variables']


def create(networks: Sequence[Network], flips: bool) -> Model:
  """The mean of the networks' probabilities, each at its temperature; the task, values and size are the first's."""
  groups = {}
  for network in networks:
    groups.setdefault(_program(network.config), []).append(network)
  of_groups = [tasks.create(group[0].config) for group in groups.values()]

  def function(variables, slices):
    # Networks of one architecture are compiled once, whatever their number.
    found = [
      jax.lax.map(lambda one, task=task: task.probabilities(one['variables'], slices, one['temperature'], flips), each)
      for task, each in zip(of_groups, variables, strict=True)
    ]
    return jnp.concatenate(found).mean(axis=0)

  first = networks[0].config
  names = list(dict.fromkeys(network.config.model.name for network in networks))
  return Model(
    function=function,
    variables=tuple(_stacked(group) for group in groups.values()),
    task=first.task,
    values=first.data.intensity,
    image_size=first.data.image_size,
    batch_size=first.train.batch_size,
    name=names[0] if len(networks) == 1 else f'mean of {len(networks)}: {", ".join(names)}',
    step=networks[0].step if len(networks) == 1 else [network.step for network in networks],
  )


def _program(config):
  """What a network's program follows from, weights apart."""
  model = {key: value for key, value in config.model.items() if key != 'init_from'}
  return json.dumps([model, list(config.data.window)])


def _stacked(networks):
  """Their variables and temperatures, with an axis for the networks in front; where they were."""
  stack = lambda *x: x[0][None] if len(x) == 1 else jnp.stack(x)
  return {
    'variables': jax.tree.map(stack, *(network.variables for network in networks)),
    'temperature': np.array([network.temperature for network in networks], np.float32),
  }
