"""The one entry point: flags -> a mode -> one function of fusa_jax.

python launch.py --config=configs/seg.py --config.data.raw_dir=FOLDER_OF_SCANS
python launch.py --mode=predict --workdir=RUN --input=SCAN_OR_FOLDER --output=FOLDER
"""

import logging
import os
import pathlib
import sys

import absl.logging
import tqdm
from absl import app, flags
from ml_collections import config_flags

from fusa_jax.errors import UserError

MODES = ('train', 'evaluate', 'predict', 'prepare')

_CONFIG = config_flags.DEFINE_config_file('config', None, 'configs/seg.py or configs/cls.py, with :preset or without')
_MODE = flags.DEFINE_enum('mode', 'train', MODES, 'train also prepares before and evaluates after')
_WORKDIR = flags.DEFINE_string('workdir', None, 'folder of the run; default: runs/ and the name of the config')
_INPUT = flags.DEFINE_string('input', None, 'predict: a scan (.nii, .nii.gz), or a folder of scans')
_OUTPUT = flags.DEFINE_string('output', None, 'predict: a folder for masks and numbers')
_PROBABILITIES = flags.DEFINE_bool('probabilities', False, 'predict: write probability volumes too')


def main(_):
  """Dispatches on --mode. Modules are imported where they are needed: worker processes import this file too."""
  start_logging()
  if _MODE.value == 'predict':
    from fusa_jax import predict

    use_compilation_cache()
    predict.predict(path_flag(_WORKDIR), path_flag(_INPUT), path_flag(_OUTPUT), probabilities=_PROBABILITIES.value)
    return
  if _MODE.value == 'evaluate':
    from fusa_jax import evaluate, run_config

    use_compilation_cache()
    workdir = path_flag(_WORKDIR)
    config = run_config.load(workdir)
    # Where the data lie and what devices there are may differ from when it was trained: --config says so, or defaults.
    config.mesh.update(data=-1, space=1)
    if _CONFIG.value is not None:
      config.mesh.update(_CONFIG.value.mesh)
      if names_data(_CONFIG.value):
        config.data.update(raw_dir=_CONFIG.value.data.raw_dir, dir=_CONFIG.value.data.dir)
    evaluate.evaluate(config, workdir, prepared(config))
    return

  config, name = resolve_config()
  if _MODE.value == 'prepare' and config.data.dir and not config.data.raw_dir:
    raise UserError('data.raw_dir: missing; --mode=prepare needs the folder of the scans')
  data_dir = prepared(config)
  if _MODE.value == 'prepare':
    logging.info('prepared: %s', data_dir)
    return
  from fusa_jax import evaluate, train

  use_compilation_cache()
  workdir = pathlib.Path(_WORKDIR.value or f'runs/{name}')
  train.train(config, workdir, data_dir)
  evaluate.evaluate(config, workdir, data_dir)
  logging.info('results: %s', workdir / 'test')


def resolve_config():
  """(config, name of its file and preset): the one asked for; without any data named, the demo, and says so.

  Raises:
    UserError: there is no --config.
  """
  config = _CONFIG.value
  if config is None:
    raise UserError('--config: missing; give --config=configs/seg.py or --config=configs/cls.py')
  path = config_flags.get_config_filename(flags.FLAGS['config'])
  _, _, preset = path.partition(':')
  if not names_data(config):
    preset = 'demo' if preset in ('', 'paper', 'demo') else f'demo-{preset.removeprefix("demo-")}'
    overrides = config_flags.get_override_values(flags.FLAGS['config'])
    config = load_config(path.partition(':')[0], preset)
    config.update_from_flattened_dict(overrides)
    print(
      'No data named: this is the demo, a small model on synthetic chest phantoms.\n'
      f'For your own scans: python launch.py --config={path} --config.data.raw_dir=FOLDER_OF_SCANS',
      flush=True,
    )
  return config, f'{pathlib.Path(path.partition(":")[0]).stem}-{preset or "paper"}'


def names_data(config) -> bool:
  return bool(config.data.raw_dir or config.data.dir)


def load_config(path: str, preset: str):
  """A preset of a config file."""
  import importlib.util

  spec = importlib.util.spec_from_file_location('config', path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config(preset)


def prepared(config) -> pathlib.Path:
  """The folder of the prepared dataset, after preparing it where that is still to be done."""
  data = config.data
  if data.dir and not data.raw_dir:
    return pathlib.Path(data.dir)
  from data import prepare

  if data.raw_dir:
    return prepare.prepare(data.raw_dir, data.dir, data.image_size, tqdm.tqdm)
  return prepare.prepare_phantom(data.dir, data.image_size, progress=tqdm.tqdm, **data.phantom)


def path_flag(flag) -> pathlib.Path:
  """A flag's value as a path; raises UserError where it is missing."""
  if not flag.value:
    raise UserError(f'--{flag.name}: missing; --mode={_MODE.value} needs it')
  return pathlib.Path(flag.value)


def use_compilation_cache() -> None:
  """A second run of the same shapes starts in seconds."""
  import jax

  jax.config.update('jax_compilation_cache_dir', str(pathlib.Path('~/.cache/fusa_jax/compiled').expanduser()))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 1.0)


def start_logging() -> None:
  """Messages as plain lines on stderr, beside the progress bars; libraries only where they warn."""
  logging.basicConfig(format='%(message)s', level=logging.WARNING, force=True)
  logging.getLogger().setLevel(logging.INFO)
  for name in ('jax', 'orbax', 'matplotlib', 'tensorboardX', 'grain'):
    logging.getLogger(name).setLevel(logging.WARNING)
  # TFDS warns through absl of folders that it has yet to write.
  absl.logging.set_verbosity(absl.logging.ERROR)


def parse_flags(argv):
  """absl's parsing with the house's errors: a wrong flag or config is one line and exit code 2."""
  try:
    rest = flags.FLAGS(argv)
    if len(rest) > 1:
      raise ValueError(f'arguments: {rest[1]!r} is no flag')
    # A config file that cannot be loaded is reported at the first look into it.
    if _CONFIG.value is not None:
      _CONFIG.value.items()
    return rest
  except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError, ImportError) as error:
    fail(UserError(f'{" ".join(str(error).split())}; see python launch.py --help'))


def fail(error: UserError) -> None:
  for line in str(error).splitlines():
    print(f'error: {line}', file=sys.stderr)
  sys.stderr.flush()
  # Not sys.exit: threads of the input pipeline and of Orbax have nothing left to finish.
  os._exit(2)


def start(main) -> None:
  """Runs a main function of the remaining arguments, with the house's errors and exit codes."""

  def run(argv):
    try:
      main(argv)
    except UserError as error:
      fail(error)
    except KeyboardInterrupt:
      print('\ninterrupted; the same command goes on from the last checkpoint', file=sys.stderr)
      os._exit(130)

  app.run(run, flags_parser=parse_flags)


if __name__ == '__main__':
  start(main)
