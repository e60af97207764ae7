"""Interprets a config: finds its preset, the demo or the user's data, and the prepared dataset."""

import importlib.util
import logging
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import ml_collections

from fusa_jax.runs import run_config, split
from fusa_jax.system import home, progress  # noqa: F401 (importing home makes data/ importable)
from fusa_jax.system.errors import UserError

# Keys that --mode=evaluate may change.
_OF_EVALUATION = ('evaluate.',) + tuple(
  f'data.{key}' for key in ('patients', 'lesion_labels', 'classes', 'ignore_label', 'coloured')
)


def load_preset(path: str | pathlib.Path, preset: str) -> ml_collections.ConfigDict:
  """Returns the config of a preset in a config file."""
  spec = importlib.util.spec_from_file_location('config', path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  config = module.get_config(preset)
  config.data.classes = run_config.classes_as_pairs(config.data.classes)
  return config


class Experiment(NamedTuple):
  """A config to run, with its name.

  Attributes:
    config: the config.
    name: the config file and the preset, for example `seg-demo`; for --config=RUN/config.json, `RUN-again`.
    is_demo: whether this is the demo, because the command names no data.
  """

  config: ml_collections.ConfigDict
  name: str
  is_demo: bool


def resolve(config: ml_collections.ConfigDict, path: str, preset: str, overrides: dict) -> Experiment:
  """Returns the config of a preset; if it names no data, the demo version of the preset.

  Args:
    config: the config of the preset, with the overrides applied.
    path: the config file.
    preset: the name of the preset in that file.
    overrides: the values that the user gave, by dotted key.
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
  """Returns the folder of the prepared dataset. Process 0 prepares the dataset first if necessary.

  In the config, data.classes='auto' becomes the classes of the dataset.

  Raises:
    UserError: the cohort's files cannot be used, or the dataset cannot be written. Another process does not see the
      folder that process 0 would write it to. The folder holds no prepared dataset, but the classes are taken from it.
  """
  from fusa_jax.runs import prepared_dataset

  folder = _prepared(config)
  prepared_dataset.fill_classes(config, folder)
  return folder


def _prepared(config):
  from fusa_jax.system import hosts

  options = config.data
  if options.dir and not options.raw_dir:
    return pathlib.Path(options.dir).expanduser()
  from data import prepare

  if options.dir:
    folder, advice = pathlib.Path(options.dir).expanduser(), 'if each host has its own copy, leave data.raw_dir out'
  else:
    folder, advice = prepare.CACHE, '--mode=prepare with data.dir writes a dataset that you can copy'
  hosts.check_shared(folder, 'data.dir', f'give a data.dir that all hosts share; {advice}')

  def prepare_data() -> str:
    size, how = options.image_size, {'progress': progress.bar, 'options': _cohort_options(options)}
    if options.raw_dir:
      return str(prepare.prepare(options.raw_dir, options.dir, size, **how))
    return str(prepare.prepare_phantom(options.dir, size, **how, **options.phantom))

  return pathlib.Path(hosts.on_main(prepare_data))


def scans_at_hand(config: ml_collections.ConfigDict) -> dict[str, Callable] | None:
  """Returns a function per patient that reads the scan and its mask as released.

  Returns None if only a prepared dataset is named, if the task has no masks, or if several hosts run.
  """
  import jax

  from data import prepare
  from fusa_jax import tasks

  options = config.data
  if not tasks.type_of(config.task).has_masks or (options.dir and not options.raw_dir):
    return None
  if jax.process_count() > 1:
    # The scans may be on host 0 only, but all hosts take part in prediction.
    logging.info('several hosts do not test whole volumes; to test them, run --mode=evaluate on one host')
    return None
  if options.raw_dir:
    return prepare.scans(options.raw_dir, _cohort_options(options))
  return prepare.scans(prepare.draw_phantoms(options.image_size, **options.phantom), _cohort_options(options))


def demo_scan(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> pathlib.Path | None:
  """Returns the NIfTI file of a test patient of the demo; None if data.dir names a prepared dataset."""
  from data import prepare

  if config.data.dir:
    return None
  tested = split.load_split(workdir) if config.data.fold != 'all' else None
  patient = tested['test'][0] if tested else '*-0001'
  folder = prepare.draw_phantoms(config.data.image_size, **config.data.phantom)
  return next(folder.glob(f'{patient}_ct.nii.gz'), None)


def to_evaluate(config: ml_collections.ConfigDict, named) -> ml_collections.ConfigDict:
  """Returns the config of a run, with the user's changes for another evaluation: data, devices and options.

  Args:
    config: the config of the run, which is changed in place.
    named: the config that --config names (`arguments.Named`), or None.

  Raises:
    UserError: the user gave a key that evaluation takes from the run, or other classes than the run's own.
  """
  from fusa_jax import tasks

  config.mesh.update(data=-1, space=1)
  if named is None:
    return config
  own = tasks.classes_of(config)
  check_changes(named.overrides, (*_OF_EVALUATION, 'data.raw_dir', 'data.dir', 'mesh.'))
  config.mesh.update(named.config.mesh)
  if names_data(named.config):
    config.data.update(raw_dir=named.config.data.raw_dir, dir=named.config.data.dir)
  changes = {key: value for key, value in named.overrides.items() if key.startswith(_OF_EVALUATION)}
  config.update_from_flattened_dict(changes)
  given = tasks.classes_of(config)
  if (given.names, given.exclusive) != (own.names, own.exclusive):
    raise UserError(
      f'--config.data.classes: {", ".join(given.names)}, but the run has {", ".join(own.names)}; give other mask '
      'values of the same classes, in the same order, or leave it out'
    )
  return config


def check_changes(overrides: dict, allowed: tuple[str, ...]) -> None:
  """Checks the keys that the user gave to a mode that takes most of its config from the run.

  Args:
    overrides: the values that the user gave, by dotted key.
    allowed: the keys that may be given; a key that ends with a dot allows all keys below it.

  Raises:
    UserError: another key is given.
  """
  for key in overrides:
    if not key.startswith(allowed):
      listed = ', '.join(name + ('*' if name.endswith('.') else '') for name in allowed)
      raise UserError(
        f'--config.{key}: this mode takes it from the run and lets you change only {listed}; leave it out'
      )


def _cohort_options(options):
  """Returns the options in config.data for reading the files of a cohort."""
  from data.cohorts import CohortOptions

  return CohortOptions(*(options[key] for key in CohortOptions._fields))
