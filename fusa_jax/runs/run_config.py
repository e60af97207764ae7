"""The resolved config and the patients of a run, in its workdir: what resuming, evaluation and prediction go by."""

import json
import pathlib

import ml_collections

from fusa_jax.system import hosts
from fusa_jax.system.errors import UserError
from fusa_jax.system.files import write_json

# What a run had, before there was such a key.
_BEFORE = {'lesion_labels': [], 'values': 'hu', 'patients': 'named'}
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
    raise UserError(f'--workdir: {workdir} is not what process 0 sees there; name a folder that all hosts share')


def _save(workdir, config):
  path = workdir / 'config.json'
  if path.exists():
    before, now = _flat(load_config(workdir)), _flat(plain(config))
    # Where data are named, no phantom is drawn.
    named = any(flat[key] for flat in (before, now) for key in ('data.raw_dir', 'data.dir'))
    harmless = (*_HARMLESS, 'data.phantom.') if named else _HARMLESS
    differ = sorted(
      key
      for key in before.keys() | now.keys()
      if before.get(key) != now.get(key)
      and not key.startswith(harmless)
      and (key in before or now[key])  # a key that is newer than the run, and is off
    )
    if differ == ['train.steps']:
      raise UserError(
        f'{workdir} holds a run of {before["train.steps"]} steps, over which its learning rate falls to zero: it '
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
  return _read(workdir / 'split.json')


def load_config(workdir: pathlib.Path) -> ml_collections.ConfigDict:
  """The config of a run.

  Raises:
    UserError: there is no run in the workdir.
  """
  config = _read(workdir / 'config.json')
  if config is None:
    raise UserError(f'{workdir}: no run in it (config.json is missing); give --workdir of a trained run')
  if 'data' not in config:
    raise UserError(f'{workdir}: no run in it (config.json is of something else, as a bundle); give --workdir of a run')
  config['data'] = _BEFORE | config['data']
  return ml_collections.ConfigDict(config)


def _read(path):
  """What a JSON file of a run holds; None where there is none."""
  try:
    return json.loads(path.read_text())
  except FileNotFoundError:
    return None
  except json.JSONDecodeError as error:
    raise UserError(f'{path}: damaged ({error}); restore it, or train anew in another --workdir') from None


def plain(config):
  """As JSON would give it back: tuples are lists."""
  return ml_collections.ConfigDict(json.loads(json.dumps(config.to_dict())))


def _flat(config):
  flat = {}
  for key, value in config.items():
    if isinstance(value, ml_collections.ConfigDict):
      flat |= {f'{key}.{inner}': v for inner, v in _flat(value).items()}
    else:
      flat[key] = value
  return flat
