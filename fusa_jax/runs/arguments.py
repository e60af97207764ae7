"""absl's flags with the house's errors, and --config: a config file and preset, or the config.json of a run."""

import pathlib
import re
import sys
from collections.abc import Callable
from typing import NamedTuple

import ml_collections
from absl import flags
from ml_collections import config_flags

from fusa_jax.runs import experiment, run_config
from fusa_jax.system import exits, home, memory, program
from fusa_jax.system.errors import UserError

FLAGS = flags.FLAGS
# Those of the operating point.
POINT = ('threshold', 'tta', 'lungs', 'smallest_ml')
# Reads a run's config.json as configs/ are read.
_OF_RUN = run_config.__file__


class Named(NamedTuple):
  """What --config names.

  Attributes:
    config: as the file gives it, with all --config.KEY=VALUE.
    path: of the config file.
    preset: of the file; of a run's config.json, its path.
    overrides: {key with dots: value} of the command line.
  """

  config: ml_collections.ConfigDict
  path: str
  preset: str
  overrides: dict

  @property
  def is_run(self) -> bool:
    """Whether it is the config.json of a run."""
    return self.path == _OF_RUN


def define_config() -> None:
  """Defines --config. Not on import: not each command has a config."""
  config_flags.DEFINE_config_file(
    'config', None, 'configs/seg.py or configs/cls.py, with :preset or without; or RUN/config.json: that run again'
  )


def define_flags(modes: list[str]) -> None:
  """Defines all flags of the command line. Not on import: a benchmark has flags of its own."""
  define_config()
  flags.DEFINE_enum('mode', 'train', modes, 'what to do')
  text, number, yes_or_no = flags.DEFINE_string, flags.DEFINE_integer, flags.DEFINE_bool
  text(
    'workdir', None, "folder of a run, or several as A,B,C, or a bundle; train: by default runs/ and the config's name"
  )
  text('input', None, 'a scan, a picture, or a folder or .zip of them or of DICOM; score: predicted masks')
  text('output', None, 'a folder to write to; view: the folder of predict; compare: a file')
  text('truth', None, 'the true masks, in a folder or a file')
  text('against', None, 'the workdir of another run, evaluated on the same patients')
  number('overlays', 0, 'draw so many slices with the masks of both runs side by side')
  text('license', None, "the bundle's licence, for its card")
  flags.DEFINE_float('threshold', None, 'probability from which on a pixel is lesion; by default as the run says')
  yes_or_no('tta', None, 'take the mean of slices as they are and mirrored; by default as the run says')
  yes_or_no('lungs', None, 'limit masks to the lungs, found by their HU; by default as the run says')
  flags.DEFINE_float('smallest_ml', None, 'leave out lesions below so many mL; by default as the run says')
  yes_or_no('probabilities', False, 'write probability volumes too')
  yes_or_no('dicom', False, 'write the masks of DICOM series as DICOM SEG too')
  text('topology', 'v5e:4x4', 'the TPU slice to compile for')
  number('slices', 1, 'how many TPU slices')
  yes_or_no('sweep', False, "compile for slices of 8 to 256 chips of the topology's kind, into docs/scaling.md")
  text('coordinator', None, 'several hosts: HOST:PORT of process 0, where the cluster does not tell it')
  number('num_processes', None, 'several hosts: how many processes')
  number('process_id', None, 'several hosts: the number of this process, from 0')
  number('connect_timeout', 300, 'several hosts: seconds to wait for all to come')
  number('heartbeat_timeout', 100, 'several hosts: seconds of silence after which a process counts as lost')


def named_config() -> Named:
  """What --config names.

  Raises:
    UserError: there is no --config.
  """
  if FLAGS.config is None:
    raise UserError('--config: missing; give --config=configs/seg.py or --config=configs/cls.py')
  path, _, preset = config_flags.get_config_filename(FLAGS['config']).partition(':')
  return Named(FLAGS.config, path, preset or 'paper', config_flags.get_override_values(FLAGS['config']))


def named_experiment() -> experiment.Experiment:
  """What --config asks for; of the demo, which takes the place of a config without data, the first lines say so.

  Raises:
    UserError: there is no --config.
  """
  named = named_config()
  if named.is_run:
    return experiment.Experiment(named.config, f'{pathlib.Path(named.preset).absolute().parent.name}-again', False)
  found = experiment.resolve(*named)
  from fusa_jax.system import hosts

  if found.is_demo and hosts.is_main():
    typed = 'python launch.py' if sys.argv[0].endswith('.py') else 'fusa-jax'
    shown = config_flags.get_config_filename(FLAGS['config']).removeprefix(f'{home.HOME}/')
    print(
      'No data named: this is the demo, a small model on synthetic chest phantoms.\n'
      f'For your own scans: {typed} --config={shown} --config.data.raw_dir=FOLDER_OF_SCANS',
      flush=True,
    )
  return found


def path_flag(name: str) -> pathlib.Path:
  """A flag's value as a path.

  Raises:
    UserError: it is missing.
  """
  if not FLAGS[name].value:
    raise UserError(f'--{name}: missing; this command needs it')
  return pathlib.Path(FLAGS[name].value)


def workdirs() -> list[pathlib.Path]:
  """--workdir, which may name several, separated by commas."""
  workdir = pathlib.Path(FLAGS.workdir)
  return [workdir] if workdir.exists() else [pathlib.Path(part) for part in FLAGS.workdir.split(',')]


def operating_point() -> dict:
  """What the flags say of the operating point; None: as the run says."""
  return dict(zip(('threshold', 'flips', 'lungs', 'smallest_ml'), (FLAGS[name].value for name in POINT), strict=True))


def parse_flags(argv: list[str]) -> list[str]:
  """absl's parsing: a wrong flag or config is one line and exit code 2."""
  try:
    rest = FLAGS(_with_config_paths(argv))
    if len(rest) > 1:
      raise ValueError(f'arguments: {rest[1]!r} is not a flag')
    # A config file that cannot be loaded is reported at the first look into it.
    if 'config' in FLAGS and FLAGS.config is not None:
      FLAGS.config.items()
    return rest
  except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError, ImportError, SyntaxError) as error:
    exits.fail(UserError(f'{_one_line(error)}; see --help'))


def start(main: Callable, help_text: Callable[[], str] | None = None) -> None:
  """Runs a main function with the flags that have been defined.

  Args:
    main: of the remaining arguments.
    help_text: what --help prints; None: absl's list of the flags.
  """
  if help_text is not None and {'--help', '-help', '-h'} & set(sys.argv[1:]):
    print(help_text())
    return
  memory.restart_with_malloc_tunables()
  program.start(main, parse_flags)


def _with_config_paths(argv):
  """The arguments with what --config names as a path that absl can load, behind `=` or as the next argument."""
  found = []
  for number, argument in enumerate(argv):
    flag, value = re.fullmatch(r'(?s)(--?config=)?(.*)', argument).groups()
    is_value = flag or (number and argv[number - 1] in ('--config', '-config'))
    found.append(f'{flag or ""}{_config_path(value)}' if is_value else argument)
  return found


def _config_path(value):
  """`configs/seg.py` is the project's own unless the current folder has such a file; JSON is read by run_config."""
  path, _, _ = value.partition(':')
  if re.fullmatch(r'configs/\w+\.py', path) and not pathlib.Path(path).exists() and (home.HOME / path).exists():
    return f'{home.HOME}/{value}'
  if pathlib.Path(value).is_dir():
    value = f'{value.rstrip("/")}/config.json'
  return f'{_OF_RUN}:{value}' if value.endswith('.json') else value


def _one_line(error):
  """What an error of absl or ml_collections says, without the traceback and the steps that some of them quote."""
  missing = error if isinstance(error, KeyError) else error.__context__
  if isinstance(missing, KeyError):
    what, *hint = str(missing.args[0]).splitlines()
    return f'--config: no key {what}' + ''.join(f' ({line})' for line in hint)
  if isinstance(error, SyntaxError):
    return f'--config: not Python ({error})'
  if unknown := re.search(r"Unknown command line flag '(config\.\S+)'", str(error)):
    return (
      f'--{unknown[1]}: changes a key of --config, which is missing; give --config=configs/seg.py or cls.py before it'
    )
  lines = [line.strip() for line in str(error).splitlines() if line.strip()]
  if 'Traceback' in str(error):  # the config file's own error, behind its type
    return f'--config: {lines[-1].partition(": ")[2]}'
  if lines and lines[0].startswith('Configuration is not available'):
    return f'--config: {lines[-1]}'
  return ' '.join(lines)
