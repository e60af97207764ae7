"""absl's flags with one-line errors, and --config: a config file and preset, or the config.json of a run."""

import ast
import os
import pathlib
import re
import sys
from collections.abc import Callable
from typing import NamedTuple

import ml_collections
from absl import flags
from ml_collections import config_flags

from fusa_jax.runs import experiment, run_config
from fusa_jax.scans.classes import LESION, Classes, Keys, chosen
from fusa_jax.system import exits, home, memory, paths, program
from fusa_jax.system.errors import UserError

FLAGS = flags.FLAGS
# Flags of the operating point.
POINT = ('threshold', 'tta', 'lungs', 'smallest_ml')
# Flags that hold a path, or several with commas; the last three are of benchmarks.
_PATHS = ('workdir', 'input', 'output', 'truth', 'against', 'out', 'json', 'data_dir')
# Modes that take a --workdir in a bucket.
_IN_BUCKETS = ('train', 'evaluate', 'predict', 'export')
# Keys of a config that hold a path.
_PATH_KEYS = (('data', 'raw_dir'), ('data', 'dir'), ('model', 'init_from'))
# This file stands for a config file when --config names a run's config.json.
_OF_RUN = run_config.__file__


class Named(NamedTuple):
  """The value of --config, loaded.

  Attributes:
    config: the config of the file, with every --config.KEY=VALUE applied.
    path: the config file.
    preset: the preset of the file. For a run's config.json: the path of that file.
    overrides: {key with dots: value} from the command line.
  """

  config: ml_collections.ConfigDict
  path: str
  preset: str
  overrides: dict

  @property
  def is_run(self) -> bool:
    """Whether --config names the config.json of a run."""
    return self.path == _OF_RUN


def define_config() -> None:
  """Defines --config. A function, because not every program has a config."""
  config_flags.DEFINE_config_file(
    'config', None, 'configs/seg.py or configs/cls.py, optionally with :PRESET; or RUN/config.json to repeat a run'
  )


def define_flags(modes: list[str]) -> None:
  """Defines all flags of the command line. A function, because each benchmark has its own flags."""
  define_config()
  flags.DEFINE_enum('mode', 'train', modes, 'what to do')
  text, number, yes_or_no = flags.DEFINE_string, flags.DEFINE_integer, flags.DEFINE_bool
  text(
    'workdir',
    None,
    'folder of a run. train: runs/NAME_OF_CONFIG by default. predict and export: also several, as A,B,C, or a bundle. '
    'train, evaluate, predict and export: also gs://BUCKET/RUN',
  )
  text('input', None, 'a scan or picture, or a folder or .zip of scans, pictures or DICOM. score: the predicted masks')
  text('output', None, 'the folder to write to. view: the output folder of predict. compare: a file')
  text('truth', None, 'the reference masks: a folder or a file')
  text(
    'classes',
    None,
    "the mask values of each class, in masks with several: \"{'ground glass': (1,), 'consolidation': (2,)}\"; values "
    "of no class under 'background'. Default: one class, 1",
  )
  number('ignore_label', None, 'with --classes: the mask value of voxels that are left out of the scores')
  text('against', None, 'the folder of another run that was evaluated on the same patients')
  number('overlays', 0, 'number of slices to draw with the masks of both runs side by side')
  text('license', None, 'licence of the bundle, for its model card')
  text(
    'threshold',
    None,
    'pixels of at least this probability are lesion; of several classes, for example '
    '"ground glass:0.4,consolidation:0.5"; default: the threshold of the run',
  )
  yes_or_no('tta', None, 'average the predictions for each slice and its mirror image; default: as in the run')
  yes_or_no('lungs', None, 'limit masks to the lungs, which are segmented by HU; default: as in the run')
  text(
    'smallest_ml',
    None,
    'remove lesions smaller than this volume in mL; of several classes as in --threshold; default: as in the run',
  )
  yes_or_no('probabilities', False, 'also write the probabilities as volumes')
  flags.DEFINE_enum(
    'explain',
    None,
    ['overlays', 'volumes'],
    'classification: also write where the scores come from, as pictures with class-activation maps (overlays), or as '
    'these and volumes of the maps (volumes)',
  )
  yes_or_no('verbose', False, 'print details, such as the shape of every parameter')
  yes_or_no('dicom', False, 'also write the masks of DICOM series as DICOM SEG')
  yes_or_no('overwrite', False, 'replace result files that this program did not write, or that were changed since')
  yes_or_no('strict', False, 'predict nothing if one input is refused')
  text('topology', 'v5e:4x4', 'the chips to compile for: a TPU slice like v5e:4x4, or GPUs like h100:8')
  number('slices', 1, 'number of TPU slices')
  yes_or_no('sweep', False, 'compile for slices of 8 to 256 chips of this TPU generation and write docs/scaling.md')
  text('coordinator', None, 'several hosts: HOST:PORT of process 0, if the cluster does not announce it')
  number('num_processes', None, 'several hosts: number of processes')
  number('process_id', None, 'several hosts: the number of this process, from 0')
  number('connect_timeout', 300, 'several hosts: seconds to wait until all processes have connected')
  number('heartbeat_timeout', 100, 'several hosts: a process that is silent for this many seconds counts as lost')


def named_config() -> Named:
  """Returns the value of --config, loaded.

  Raises:
    UserError: --config is missing.
  """
  if FLAGS.config is None:
    raise UserError('--config: missing; give --config=configs/seg.py or --config=configs/cls.py')
  path, _, preset = config_flags.get_config_filename(FLAGS['config']).partition(':')
  return Named(FLAGS.config, path, preset or 'paper', config_flags.get_override_values(FLAGS['config']))


def named_experiment() -> experiment.Experiment:
  """Returns the experiment of --config. A config without data becomes the demo; this prints a notice that says so.

  Raises:
    UserError: --config is missing.
  """
  named = named_config()
  if named.is_run:
    return experiment.Experiment(named.config, f'{pathlib.Path(named.preset).absolute().parent.name}-again', False)
  found = experiment.resolve(*named)
  from fusa_jax.system import hosts

  if found.is_demo and hosts.is_main():
    shown = config_flags.get_config_filename(FLAGS['config']).removeprefix(f'{home.HOME}/')
    print(
      'No data given: this is the demo, a small model on synthetic chest phantoms.\n'
      f'For your own scans: {program.command()} --config={shown} --config.data.raw_dir=FOLDER_OF_SCANS',
      flush=True,
    )
  return found


def path_flag(name: str) -> pathlib.Path:
  """Returns a flag's value as a path.

  Raises:
    UserError: the flag is missing.
  """
  if not FLAGS[name].value:
    raise UserError(f'--{name}: missing; this command needs it')
  return pathlib.Path(FLAGS[name].value)


def workdirs() -> list[pathlib.Path]:
  """Returns the folders of --workdir, which are separated by commas."""
  if ',' in FLAGS.workdir and not pathlib.Path(FLAGS.workdir).exists():
    return [paths.to_path(part) for part in FLAGS.workdir.split(',')]
  return [paths.to_path(FLAGS.workdir)]


def classes() -> Classes:
  """Returns the classes of --classes and --ignore_label; without them, the only class of masks of 0 and 1.

  Raises:
    UserError: they are not valid (`scans.classes.chosen`), or --classes is missing.
  """
  keys = Keys('--classes', '--ignore_label')
  if FLAGS.classes is None:
    if FLAGS.ignore_label is not None:
      raise UserError(f'{keys.ignored}: needs {keys.classes}; {keys.example}')
    return LESION
  try:
    named = ast.literal_eval(FLAGS.classes)
  except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
    named = FLAGS.classes
  return chosen(named, FLAGS.ignore_label, keys)


def operating_point() -> dict:
  """Returns the flags of the operating point as arguments; None keeps the run's own value.

  Raises:
    UserError: a value is not a number, or not a number for each of some classes.
  """
  return {
    'threshold': _by_class('threshold'),
    'flips': FLAGS.tta,
    'lungs': FLAGS.lungs,
    'smallest_ml': _by_class('smallest_ml'),
  }


def _by_class(name):
  """Returns the number of a flag, or from `CLASS:NUMBER,CLASS:NUMBER` the number of each class."""
  text = FLAGS[name].value
  if text is None:
    return None

  def wrong(reason):
    return UserError(
      f'--{name}: {text!r}: {reason}; give a number or, of several classes, CLASS:NUMBER for each, separated by '
      f'commas, for example --{name}="ground glass:0.4,consolidation:0.5"'
    )

  if ':' not in text:
    number = _number(text)
    if number is None:
      raise wrong('is not a number')
    return number
  # A name may contain commas and colons; a number ends the part of its class.
  values, end = {}, 0
  for part in re.finditer(r'\s*(.+?)\s*:\s*([^\s,:]+)\s*(?:,|$)', text):
    number, end = _number(part[2]), part.end()
    if number is None:
      raise wrong(f'{part[2]!r}, for {part[1]!r}, is not a number')
    if part[1] in values:
      raise wrong(f'{part[1]!r} is given twice')
    values[part[1]] = number
  if end < len(text):
    raise wrong(f'{text[end:].strip()!r} is not CLASS:NUMBER')
  return values


def _number(text):
  """The number that a text states, or None."""
  try:
    return float(text)
  except ValueError:
    return None


def parse_flags(argv: list[str]) -> list[str]:
  """Parses the flags with absl. A wrong flag or config ends the program with one line and exit code 2."""
  try:
    rest = FLAGS(_with_config_paths(argv))
    if len(rest) > 1:
      raise ValueError(f'arguments: {rest[1]!r} is not a flag')
    for name in _PATHS:
      if name in FLAGS and FLAGS[name].present and FLAGS[name].value:
        may_be_in_bucket = name == 'workdir' and 'mode' in FLAGS and FLAGS.mode in _IN_BUCKETS
        for path in FLAGS[name].value.split(','):
          if not (may_be_in_bucket and paths.in_bucket(path)):
            paths.check_local(f'--{name}', path)
        # The shell expands ~ only at the start of a word.
        FLAGS[name].value = ','.join(os.path.expanduser(path) for path in FLAGS[name].value.split(','))
    # ml_collections reports a config file that cannot be loaded at the first access.
    if 'config' in FLAGS and FLAGS.config is not None:
      for section, key in _PATH_KEYS:
        paths.check_local(f'--config.{section}.{key}', FLAGS.config[section][key])
      FLAGS.config.data.classes = run_config.classes_as_pairs(FLAGS.config.data.classes)
      overrides = config_flags.get_override_values(FLAGS['config'])
      if 'data.classes' in overrides:
        overrides['data.classes'] = FLAGS.config.data.classes
    return rest
  except UserError as error:
    exits.fail(error)
  except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError, ImportError, SyntaxError) as error:
    exits.fail(UserError(f'{_one_line(error)}; see --help'))


def start(main: Callable, help_text: Callable[[], str] | None = None) -> None:
  """Runs a main function with the flags that have been defined.

  Args:
    main: takes the arguments that are not flags.
    help_text: returns the text of --help; None: absl's list of flags.
  """
  if help_text is not None and {'--help', '-help', '-h'} & set(sys.argv[1:]):
    print(help_text())
    return
  memory.restart_with_malloc_tunables()
  program.start(main, parse_flags)


def _with_config_paths(argv):
  """Replaces the value of --config, after `=` or in the next argument, by a path that absl can load."""
  found = []
  for number, argument in enumerate(argv):
    flag, value = re.fullmatch(r'(?s)(--?config=)?(.*)', argument).groups()
    is_value = flag or (number and argv[number - 1] in ('--config', '-config'))
    found.append(f'{flag or ""}{_config_path(value)}' if is_value else argument)
  return found


def _config_path(value):
  """Finds the project's own `configs/seg.py` if the current folder has no such file; reads JSON by run_config."""
  paths.check_local('--config', value)
  path, _, _ = value.partition(':')
  if re.fullmatch(r'configs/\w+\.py', path) and not pathlib.Path(path).exists() and (home.HOME / path).exists():
    return f'{home.HOME}/{value}'
  if pathlib.Path(value).is_dir():
    value = f'{value.rstrip("/")}/config.json'
  return f'{_OF_RUN}:{value}' if value.endswith('.json') else value


def _one_line(error):
  """Returns the message of an error of absl or ml_collections in one line, without a quoted traceback."""
  missing = error if isinstance(error, KeyError) else error.__context__
  if isinstance(missing, KeyError):
    what, *hint = str(missing.args[0]).splitlines()
    return f'--config: no key {what}' + ''.join(f' ({line})' for line in hint)
  if absent := re.search(r"No such file or directory: '([^']+)'", str(error)):
    return f'--config: {absent[1]} does not exist; give configs/seg.py, configs/cls.py or RUN/config.json'
  if isinstance(error, SyntaxError):
    return f'--config: is not valid Python ({error})'
  if unknown := re.search(r"Unknown command line flag '(config\.\S+)'", str(error)):
    return f'--{unknown[1]}: needs --config, which is missing; give --config=configs/seg.py or configs/cls.py before it'
  lines = [line.strip() for line in str(error).splitlines() if line.strip()]
  if 'Traceback' in str(error):  # the last line holds the type and message of the config file's own error
    return f'--config: {lines[-1].partition(": ")[2]}'
  if lines and lines[0].startswith('Configuration is not available'):
    return f'--config: {lines[-1]}'
  return ' '.join(lines)
