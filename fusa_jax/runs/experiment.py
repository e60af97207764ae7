"""What a config means: which preset it is, the demo or data of the user's own, where the data are prepared."""

import importlib.util
import logging
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import ml_collections
import tqdm

from fusa_jax.system import home  # noqa: F401 (data/ is found by it)
from fusa_jax.system.errors import UserError

# Keys that may differ in another evaluation of a run.
_OF_EVALUATION = ('evaluate.', 'data.patients', 'data.lesion_labels')


def load_preset(path: str | pathlib.Path, preset: str) -> ml_collections.ConfigDict:
  """The config of a preset of a config file."""
  spec = importlib.util.spec_from_file_location('config', path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config(preset)


class Experiment(NamedTuple):
  """What is to be run.

  Attributes:
    config: of the run.
    name: of the config's file and preset; of the folder of a run that is repeated.
    is_demo: whether no data were named, so that the demo takes the place of what was named.
  """

  config: ml_collections.ConfigDict
  name: str
  is_demo: bool


def resolve(config: ml_collections.ConfigDict, path: str, preset: str, overrides: dict) -> Experiment:
  """The config of a preset or, where it names no data, the demo of that preset.

  Args:
    config: of the preset, with the overrides in it.
    path: of the config file.
    preset: of the file.
    overrides: {key with dots: value}.
  """
  is_demo = not names_data(config)
  if is_demo:
    preset = 'demo' if preset in ('paper', 'demo') else f'demo-{preset.removeprefix("demo-")}'
    config = load_preset(path, preset)
    config.update_from_flattened_dict(overrides)
  return Experiment(config, f'{pathlib.Path(path).stem}-{preset}', is_demo)


def names_data(config: ml_collections.ConfigDict) -> bool:
  """Whether a config says which data to use."""
  return bool(config.data.raw_dir or config.data.dir)


def prepared(config: ml_collections.ConfigDict) -> pathlib.Path:
  """The folder of the prepared dataset, after process 0 has prepared it where that was still to be done.

  Raises:
    UserError: the cohort's files cannot be used, or the dataset cannot be written.
  """
  from fusa_jax.system import hosts

  options = config.data
  if options.dir and not options.raw_dir:
    return pathlib.Path(options.dir)

  def prepare_data() -> str:
    from data import prepare

    if options.raw_dir:
      return str(prepare.prepare(options.raw_dir, options.dir, options.image_size, tqdm.tqdm, _cohort_options(options)))
    return str(prepare.prepare_phantom(options.dir, options.image_size, progress=tqdm.tqdm, **options.phantom))

  return pathlib.Path(hosts.on_main(prepare_data))


def scans_at_hand(config: ml_collections.ConfigDict) -> dict[str, Callable] | None:
  """By patient, what reads the scan and its mask as released; None where they are not at hand or not needed."""
  import jax

  from data import prepare
  from fusa_jax import tasks

  options = config.data
  if not tasks.type_of(config.task).has_masks or (options.dir and not options.raw_dir):
    return None
  if jax.process_count() > 1:
    # Only process 0 needs to have them, and prediction is work for all.
    logging.info('masks are not scored as volumes by several hosts; --mode=evaluate on one of them does')
    return None
  if options.raw_dir:
    return prepare.scans(options.raw_dir, _cohort_options(options))
  return prepare.scans(prepare.draw_phantoms(options.image_size, **options.phantom))


def to_evaluate(config: ml_collections.ConfigDict, named) -> ml_collections.ConfigDict:
  """A run's config, with the data and devices of today and what else may differ in another evaluation.

  Args:
    config: of the run.
    named: what --config names (`arguments.Named`), or None.

  Raises:
    UserError: a key was given that evaluation takes from the run.
  """
  config.mesh.update(data=-1, space=1)
  if named is None:
    return config
  check_changes(named.overrides, (*_OF_EVALUATION, 'data.raw_dir', 'data.dir', 'mesh.'))
  config.mesh.update(named.config.mesh)
  if names_data(named.config):
    config.data.update(raw_dir=named.config.data.raw_dir, dir=named.config.data.dir)
  changes = {key: value for key, value in named.overrides.items() if key.startswith(_OF_EVALUATION)}
  config.update_from_flattened_dict(changes)
  return config


def check_changes(overrides: dict, allowed: tuple[str, ...]) -> None:
  """Raises a UserError where --config.KEY was given of a key that a mode takes from the run instead."""
  for key in overrides:
    if not key.startswith(allowed):
      listed = ', '.join(name + ('*' if name.endswith('.') else '') for name in allowed)
      raise UserError(
        f'--config.{key}: comes from the run; of its config this mode changes {listed} only; leave it out'
      )


def _cohort_options(options):
  """What config.data says of how a cohort's files are to be read."""
  from data.cohorts import CohortOptions

  return CohortOptions(*(options[key] for key in CohortOptions._fields))
