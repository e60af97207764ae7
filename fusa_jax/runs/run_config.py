"""The resolved config and the patients of a run, in its workdir: what resuming, evaluation and prediction go by."""

import json
import pathlib

import ml_collections

from fusa_jax.system import home, hosts  # noqa: F401 (configs/ is found by home)
from fusa_jax.system.errors import UserError
from fusa_jax.system.files import read_json, write_json

# Keys that may change between the stops of one run: they do not change its result.
_HARMLESS = ('data.raw_dir', 'data.dir', 'train.log_every', 'mesh.', 'evaluate.')


def save_config(workdir: pathlib.Path, config: ml_collections.ConfigDict) -> None:
  """Process 0 writes config.json, or checks a run's own against `config`; all see that they have the same workdir.

  Raises:
    UserError: the workdir holds a run whose result this config would change (the keys are named); it cannot be written;
      another process does not see it.
  """
  hosts.on_main(lambda: _save(workdir, config))
  if not hosts.is_main() and not (workdir / 'config.json').is_file():
    raise UserError(f'workdir: {workdir} is not what process 0 sees there; name a folder that all hosts share')


def _save(workdir, config):
  path = workdir / 'config.json'
  if path.exists():
    before, now = (_flat(plain(each).to_dict()) for each in (load_config(workdir), config))
    # Where data are named, no phantom is drawn.
    named = any(flat[key] for flat in (before, now) for key in ('data.raw_dir', 'data.dir'))
    harmless = (*_HARMLESS, 'data.phantom.') if named else _HARMLESS
    differ = sorted(
      key for key in before.keys() | now.keys() if before.get(key) != now.get(key) and not key.startswith(harmless)
    )
    if differ == ['train.steps']:
      raise UserError(
        f'{workdir} holds a run of {before["train.steps"]} steps, over which its learning rate is scheduled: it '
        'cannot be made longer or shorter; name another --workdir'
      )
    if differ:
      listed = ', '.join(f'{key} ({before.get(key)} -> {now.get(key)})' for key in differ)
      raise UserError(f'{workdir} holds a run of another config: {listed}; name another --workdir, or set these back')
  write_json(path, plain(config).to_dict())


def save_split(workdir: pathlib.Path, split: dict[str, list[str]]) -> None:
  """Process 0 writes split.json: the patients of each part, {'train', 'validation', 'test'}; or checks a run's own.

  Raises:
    UserError: the run was begun on other patients: files were added to the cohort, or taken out, and the folds dealt
      anew.
  """
  hosts.on_main(lambda: _save_split(workdir, split))


def _save_split(workdir, split):
  before = load_split(workdir)
  if before is None:
    write_json(workdir / 'split.json', split)
  elif before != split:
    raise UserError(
      f'{workdir}: the patients of its folds have changed since it was begun (files were added or taken out); '
      'bring the old ones back, or train anew in another --workdir'
    )


def load_split(workdir: pathlib.Path) -> dict[str, list[str]] | None:
  """The patients that a run was trained, validated and to be tested on; None where that was not written down.

  Raises:
    UserError: the file is damaged.
  """
  path = workdir / 'split.json'
  return read_json(path, 'restore it, or train again in another --workdir') if path.exists() else None


def load_config(workdir: pathlib.Path) -> ml_collections.ConfigDict:
  """The config of a run, each key of the type that configs/base.py gives it.

  Raises:
    UserError: there is no run of this version in the workdir.
  """
  path = workdir / 'config.json'
  if not path.exists():
    raise UserError(f'{workdir}: no run in it (config.json is missing); give --workdir of a trained run')
  return get_config(str(path))


def get_config(path: str) -> ml_collections.ConfigDict:
  """As `load_config`, of a config.json; by this name and argument, this module is the config file that --config reads.

  `--config=RUN/config.json` is that run again.
  """
  from configs import base

  saved = read_json(pathlib.Path(path), 'restore it, or train again in another --workdir')
  config = base.paper()
  if not isinstance(saved, dict) or not isinstance(saved.get('data'), dict):
    raise UserError(f'{path}: of something else than a run, as a bundle; name the folder of a run')
  unlike = _flat(saved).keys() ^ _flat(config.to_dict()).keys()
  if unlike:
    raise UserError(
      f'{path}: of a run of another version, by its keys {", ".join(sorted(unlike))}; train again with this version'
    )
  config.update(_with_tuples(saved))
  return config


def is_cross_validation(config: ml_collections.ConfigDict) -> bool:
  """Whether a config trains and tests each fold in turn, each as a run of its own."""
  return config.data.fold == 'all'


def plain(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
  """As JSON would give it back: tuples are lists."""
  return ml_collections.ConfigDict(json.loads(json.dumps(config.to_dict())))


def _with_tuples(values):
  """Lists as the tuples that they were before JSON."""
  if isinstance(values, dict):
    return {key: _with_tuples(value) for key, value in values.items()}
  return tuple(values) if isinstance(values, list) else values


def _flat(values: dict, prefix: str = '') -> dict:
  """Nested dictionaries as one, by keys with dots."""
  flat = {}
  for key, value in values.items():
    flat |= _flat(value, f'{prefix}{key}.') if isinstance(value, dict) else {f'{prefix}{key}': value}
  return flat
