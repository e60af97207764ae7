"""Loads trained runs as one model: the best checkpoint of a run, or the mean probability of several runs."""

import dataclasses
import hashlib
import json
import logging
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from fusa_jax import tasks
from fusa_jax.inference import explanation
from fusa_jax.runs import checkpoint, operating_point, result_files, run_config
from fusa_jax.runs.split import TEST
from fusa_jax.scans.classes import LESION, Classes
from fusa_jax.scans.neighbours import SLICE_ALONE, Context
from fusa_jax.system import meshes
from fusa_jax.system.errors import UserError
from fusa_jax.tasks import window


@dataclasses.dataclass(frozen=True)
class Model:
  """A function that computes probabilities, from runs or from a bundle, and the facts about it.

  Attributes:
    function: (variables, slices [B, size, size]) -> probability of lesion, float32 [B] or [B, size, size]; of several
      classes [B, classes] or [B, size, size, classes]. With neighbours, slices are [B, size, size, context.channels].
    variables: variables of the function, on all devices of a mesh.
    task: name of the type of task, a key of tasks.TASKS.
    values: values of the slices, one of volumes.VALUES.
    image_size: size of the slices.
    batch_size: batch size of the training.
    name: name of the network; for several networks, one text with all names.
    step: step of the checkpoint; for several networks, a list of steps.
    sha256: digest of the program and the weights; '' in a model that is exported.
    explainer: computes class-activation maps; None for segmentation, and for a bundle: its program has one output.
    context: the neighbours that it sees beside a slice.
    classes: the classes that it knows, in the order of its probabilities.
  """

  function: Callable[[Any, jax.Array], jax.Array]
  variables: Any
  task: str
  values: str
  image_size: int
  batch_size: int
  name: str
  step: int | list[int]
  sha256: str
  explainer: explanation.Explainer | None = None
  context: Context = SLICE_ALONE
  classes: Classes = LESION


class Network(NamedTuple):
  """A checkpoint: the run's config, the step, {'params', 'batch_stats'}, and the divisor of each class's logits."""

  config: ml_collections.ConfigDict
  step: int
  variables: dict
  temperatures: tuple[float, ...]


def load_model(
  workdirs: Sequence[pathlib.Path], mesh, flips: bool | None = None, lungs: bool | None = None
) -> tuple[Model, operating_point.Points]:
  """Loads the model and the operating points of one or several runs.

  Args:
    workdirs: folders of trained runs; the folder of a cross-validation stands for all of its folds.
    mesh: mesh that holds the variables.
    flips: whether to use flips (test-time augmentation). None: as in the runs' operating points.
    lungs: whether to limit masks to the lungs. None: as in the runs' operating points.

  Raises:
    UserError: as `load_networks`.
  """
  networks, points = load_networks(workdirs, mesh, flips, lungs)
  flips = operating_point.shared(points).flips
  return create(networks, flips, _digest(networks, flips)), points


def load_networks(
  workdirs: Sequence[pathlib.Path], mesh, flips: bool | None = None, lungs: bool | None = None
) -> tuple[list[Network], operating_point.Points]:
  """Loads the networks of one or several runs, and the operating points for the mean of their probabilities.

  Args:
    workdirs, mesh, flips, lungs: as in `load_model`.

  Raises:
    UserError: a folder holds no run or no checkpoint; a cross-validation is not complete; or the runs differ in task,
      values, image size, neighbours or classes.
  """
  folders = [run for workdir in workdirs for run in runs(workdir)]
  configs = [run_config.load_config(folder) for folder in folders]
  _check_alike(folders, configs)
  networks, points = [], []
  for folder, config in zip(folders, configs, strict=True):
    task = tasks.create(config)
    step, variables = load_best(config, task, folder, mesh)
    of_run = operating_point.load_points(folder, task.classes)
    if any(point.step != step for point in of_run.values()):
      of_run = dict.fromkeys(task.classes, operating_point.OperatingPoint())
      logging.warning(
        '%s: no operating point for step %d, so the threshold is 0.5; run --mode=evaluate to choose one', folder, step
      )
    has_flips = operating_point.shared(of_run).flips
    if flips not in (None, has_flips):
      logging.warning('%s: the threshold was chosen %s flips', folder, 'with' if has_flips else 'without')
    of_run = operating_point.with_options(of_run, flips=flips, lungs=lungs)
    networks.append(Network(config, step, variables, tuple(point.temperature for point in of_run.values())))
    points.append(of_run)
  points = operating_point.mean(points)
  if operating_point.shared(points).flips and not all(network.config.augment.flip for network in networks):
    logging.warning('%s: trained without flips (augment.flip), so results with flips may be worse', folders[0])
  return networks, points


def runs(workdir: pathlib.Path) -> list[pathlib.Path]:
  """Returns [workdir] for a run, and the folders of the folds for a cross-validation."""
  if not run_config.is_cross_validation(run_config.load_config(workdir)):
    return [workdir]
  if not result_files.is_complete(workdir / TEST):
    raise UserError(
      f'workdir: {workdir} is a cross-validation that is not complete; rerun its command to resume, or give the '
      f'folder of one fold, {workdir / "fold0"}'
    )
  return [workdir / f'fold{one["fold"]}' for one in result_files.read_numbers(workdir)['folds']]


def _check_alike(folders, configs):
  for key, value_of in (
    ('task', lambda config: config.task),
    ('data.intensity', lambda config: config.data.intensity),
    ('data.image_size', lambda config: config.data.image_size),
    ('data.context', lambda config: config.data.context),
    ('data.context_mm', lambda config: tasks.context_of(config).mm),
    ('data.classes', lambda config: _in_words(tasks.classes_of(config))),
  ):
    for folder, config in zip(folders, configs, strict=True):
      if value_of(config) != value_of(configs[0]):
        raise UserError(
          f'workdir: {folder} has {key} {value_of(config)}, but {folders[0]} has {value_of(configs[0])}; '
          f'give runs with the same {key}'
        )


def _in_words(classes):
  """The classes with the values that masks are written with. What a run left out of its loss may differ."""
  return ', '.join(f'{name} {values}' for name, values in zip(classes.names, classes.values, strict=True))


def load_best(config, task: tasks.Task, workdir: pathlib.Path, mesh) -> tuple[int, dict]:
  """Loads the best checkpoint of a run; returns its step and its variables, on all devices of the mesh.

  Raises:
    UserError: the run has no checkpoint.
  """
  shapes = meshes.replicated_shapes(lambda: task.init(jax.random.key(0), config.data.image_size), mesh)
  with checkpoint.Checkpoints(workdir) as checkpoints:
    step = checkpoints.best()
    return step, checkpoints.restore(step, variables=shapes)['variables']


def create(networks: Sequence[Network], flips: bool, sha256: str = '') -> Model:
  """Creates the model of the networks' mean probability, each network with its temperatures.

  The task, values, sizes and classes are those of the first network.
  """
  groups = {}
  for network in networks:
    groups.setdefault(_program(network.config), []).append(network)
  of_groups = [tasks.create(group[0].config) for group in groups.values()]

  def of_networks(compute, variables, slices):
    # `lax.map` compiles networks of the same architecture once.
    return [
      jax.lax.map(lambda one, task=task: compute(task, one['variables'], slices, one['temperatures'], flips), each)
      for task, each in zip(of_groups, variables, strict=True)
    ]

  def function(variables, slices):
    return jnp.concatenate(of_networks(_probabilities, variables, slices)).mean(axis=0)

  def maps(variables, slices):
    return explanation.mean_of_networks(of_networks(explanation.activation_maps, variables, slices))

  first = networks[0].config
  shown = window.black_and_white(first.data.intensity, first.data.window)
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
    sha256=sha256,
    explainer=None if of_groups[0].type.has_masks else explanation.Explainer(maps, shown),
    context=tasks.context_of(first),
    classes=tasks.classes_of(first),
  )


def _probabilities(task, variables, slices, temperatures, flips):
  """As `Task.probabilities`, with a temperature per class, and without an axis of classes if there is only one."""
  logits = task.logits(variables, slices, flips)
  return nn.sigmoid((logits if len(task.classes) > 1 else logits[..., 0]) / temperatures)


def _digest(networks, flips):
  digest = hashlib.sha256(json.dumps(flips).encode())
  for network in networks:
    # Networks of one class keep their digest.
    temperatures = [float(temperature) for temperature in network.temperatures]
    digest.update(json.dumps([_program(network.config), *_one_or_all(temperatures)]).encode())
    digest.update(checkpoint.sha256_of_variables(network.variables).encode())
  return digest.hexdigest()


def _program(config):
  """Text that is equal for two networks if their programs differ in weights only."""
  model = {key: value for key, value in config.model.items() if key != 'init_from'}
  context = tasks.context_of(config)
  # Runs of the slice alone keep their digest.
  return json.dumps([model, list(config.data.window), *([list(context)] if context.slices else [])])


def _one_or_all(temperatures):
  return temperatures if len(temperatures) == 1 else [temperatures]


def _stacked(networks):
  """Stacks the networks' variables and temperatures along a new first axis, on the devices that hold them."""
  stack = lambda *x: x[0][None] if len(x) == 1 else jnp.stack(x)
  temperatures = np.array([network.temperatures for network in networks], np.float32)
  return {
    'variables': jax.tree.map(stack, *(network.variables for network in networks)),
    'temperatures': temperatures if temperatures.shape[1] > 1 else temperatures[:, 0],
  }
