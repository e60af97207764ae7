"""Saves the resolved config of a run in its workdir, for resuming, evaluation and prediction."""

import json
import pathlib
from typing import Any

import ml_collections

from fusa_jax.scans import classes
from fusa_jax.system import home, hosts, paths  # noqa: F401 (importing home makes configs/ importable)
from fusa_jax.system.errors import UserError
from fusa_jax.system.files import read_json, write_json

# Files and folders that a run writes after config.json. Without config.json they are somebody else's.
_WRITTEN = ('checkpoints', 'log.jsonl', 'operating_point.json', 'split.json', 'starts.json', 'tensorboard', 'test')
# Keys that may change when a run is resumed: they do not change the trained model.
_RESUMABLE = ('data.raw_dir', 'data.dir', 'train.log_every', 'mesh.', 'evaluate.')

# Keys that configs of older runs may lack: the default does what these runs did.
_ADDED = {
  *('data.coloured', 'train.deterministic', 'train.clip_norm', 'train.ema', 'train.epochs', 'train.patience'),
  *('train.deep_supervision', 'train.remat', 'evaluate.patient_score', 'data.context', 'data.context_mm'),
  *('data.classes', 'data.ignore_label', 'data.phantom.kinds'),
  *(f'augment.{key}' for key in ('affine_probability', 'rotation', 'scaling', 'shear', 'noise_probability', 'noise')),
  *(f'augment.{key}' for key in ('blur_probability', 'blur', 'low_resolution_probability', 'low_resolution')),
  *(f'augment.{key}' for key in ('contrast_probability', 'contrast')),
  *(f'augment.{key}' for key in ('gamma_probability', 'gamma', 'gamma_inverted')),
}


def save_config(workdir: pathlib.Path, config: ml_collections.ConfigDict) -> None:
  """Writes config.json on process 0, or compares `config` with the config.json that a run already has.

  All processes first check that they share the workdir.

  Raises:
    UserError: the workdir holds a run with another config (the message names the keys), or cannot be written. Another
      process does not see the workdir.
  """
  hosts.check_shared(workdir, 'workdir', 'name a folder that all hosts share')
  hosts.on_main(lambda: _save(workdir, config))


def _save(workdir, config):
  path = workdir / 'config.json'
  if not path.exists():
    foreign = [workdir / name for name in _WRITTEN if (workdir / name).exists()]
    if foreign:
      raise UserError(
        f'workdir: {foreign[0]} exists, but {workdir} holds no run (config.json is missing); name another folder'
      )
  else:
    before, now = (_flat(plain(each).to_dict()) for each in (load_config(workdir), config))
    # With named data no phantoms are drawn, so their options do not matter.
    names_data = any(flat[key] for flat in (before, now) for key in ('data.raw_dir', 'data.dir'))
    resumable = (*_RESUMABLE, 'data.phantom.') if names_data else _RESUMABLE
    if not before['data.context'] and not now['data.context']:  # without neighbours, their distance does not matter
      resumable = (*resumable, 'data.context_mm')
    differ = sorted(
      key for key in before.keys() | now.keys() if before.get(key) != now.get(key) and not key.startswith(resumable)
    )
    if differ == ['train.steps']:
      raise UserError(
        f'{workdir} holds a run of {before["train.steps"]} steps: train.steps cannot change, because the learning rate '
        'schedule depends on it; name another --workdir'
      )
    if differ:
      listed = ', '.join(f'{key} ({before.get(key)} -> {now.get(key)})' for key in differ)
      raise UserError(
        f'{workdir} holds a run with another config: {listed}; undo these changes, or name another --workdir'
      )
  write_json(path, plain(config).to_dict())


def facts(config: ml_collections.ConfigDict) -> dict:
  """The values of a config by `--config.KEY`, without paths: copies of the data may lie elsewhere.

  Without neighbours, their distance has no effect and is left out.
  """
  left_out = {'data.raw_dir', 'data.dir', 'model.init_from', *(() if config.data.context else ('data.context_mm',))}
  return {f'config.{key}': value for key, value in _flat(plain(config).to_dict()).items() if key not in left_out}


def load_config(workdir: pathlib.Path) -> ml_collections.ConfigDict:
  """Returns the config of a run; each key has the type that configs/base.py gives it.

  Raises:
    UserError: the workdir holds no run, or the run is from another version.
  """
  path = workdir / 'config.json'
  if not path.exists():
    raise UserError(f'{workdir}: no run in it (config.json is missing); name the folder of a trained run in --workdir')
  return get_config(str(path))


def get_config(path: str) -> ml_collections.ConfigDict:
  """Reads a config.json as `load_config` does; `--config=RUN/config.json` repeats that run.

  For this, --config uses this module as the config file and calls this function, so its name and argument are fixed.
  """
  from configs import base

  paths.to_path(path).stat()  # --config reports a missing file as it does for configs/
  saved = read_json(paths.to_path(path), 'restore it, or train again in another --workdir')
  config = base.paper()
  if not isinstance(saved, dict) or not isinstance(saved.get('data'), dict):
    raise UserError(f'{path}: not the config of a run, but perhaps of a bundle; name the folder of a run')
  if 'classes' in saved['data']:
    saved['data']['classes'] = classes_as_pairs(saved['data']['classes'])
  known, stored = _flat(config.to_dict()).keys(), _flat(saved).keys()
  differ = (known - _ADDED - stored) | (stored - known)
  if differ:
    raise UserError(
      f'{path}: from another version (the keys {", ".join(sorted(differ))} differ); train again with this version'
    )
  config.update(_with_tuples(saved))
  return config


def is_cross_validation(config: ml_collections.ConfigDict) -> bool:
  """Whether a config is a cross-validation: a separate run trains and tests for each fold."""
  return config.data.fold == 'all'


def classes_as_pairs(named: Any) -> Any:
  """Returns data.classes as pairs of names and values, in one form for flags, config files, Python and JSON.

  As a dictionary, it would become a part of the config, with the names of the classes as keys. What is neither names
  with values nor empty is returned unchanged: `config_checks` refuses it.
  """
  try:
    return classes.as_pairs(named or ())
  except (TypeError, ValueError):
    return named


def plain(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
  """Returns the config as it would be read back from JSON: with lists in place of tuples."""
  values = config.to_dict()
  values['data']['classes'] = classes_as_pairs(values['data']['classes'])
  return ml_collections.ConfigDict(json.loads(json.dumps(values)))


def _with_tuples(values):
  """Converts lists back to tuples, which JSON stores as lists."""
  if isinstance(values, dict):
    return {key: _with_tuples(value) for key, value in values.items()}
  return tuple(values) if isinstance(values, list) else values


def _flat(values: dict, prefix: str = '') -> dict:
  """Flattens nested dictionaries to one with dotted keys."""
  flat = {}
  for key, value in values.items():
    flat |= _flat(value, f'{prefix}{key}.') if isinstance(value, dict) else {f'{prefix}{key}': value}
  return flat
