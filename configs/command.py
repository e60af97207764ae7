"""The command line that repeats a run, from its config: the nearest preset and what differs from it."""

import shlex

import ml_collections

from configs import cls, seg

_FILES = {'segmentation': ('configs/seg.py', seg), 'classification': ('configs/cls.py', cls)}


def command(config: ml_collections.ConfigDict) -> str:
  """`python launch.py --config=...` of a config, whether built or read from a run's config.json."""
  file, module = _FILES[config.task]
  wanted = _flat(config)
  name = config.model.name
  differences = {}
  for preset in ('paper', 'demo', name, f'demo-{name}'):
    flat = _flat(module.get_config(preset))
    if not flat.keys() - wanted.keys():  # no flag takes back what a preset sets
      differences[preset] = {key: value for key, value in wanted.items() if flat.get(key) != value}
  preset = min(differences, key=lambda preset: len(differences[preset]))
  at = '' if preset == 'paper' else f':{preset}'
  drawn = not (config.data.raw_dir or config.data.dir)
  given = [
    f'--config.{key}={_text(value)}'
    for key, value in differences[preset].items()
    if drawn or not key.startswith('data.phantom.')
  ]
  return shlex.join(['python', 'launch.py', f'--config={file}{at}', *given])


def _text(value):
  return '({})'.format(''.join(f'{item},' for item in value)) if isinstance(value, tuple) else str(value)


def _flat(config):
  """Keys with dots; lists as the tuples that they were before JSON; what is None or the task itself left out."""
  flat = {}
  for key, value in config.items():
    if isinstance(value, ml_collections.ConfigDict):
      flat |= {f'{key}.{inner}': v for inner, v in _flat(value).items()}
    elif value is not None and key != 'task':
      flat[key] = tuple(value) if isinstance(value, list | tuple) else value
  return flat
