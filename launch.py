"""The one entry point: flags -> a mode -> one function of fusa_jax.

python launch.py --config=configs/seg.py --config.data.raw_dir=FOLDER_OF_SCANS
python launch.py --mode=predict --workdir=RUN --input=SCAN_OR_FOLDER --output=FOLDER
python launch.py --mode=export --workdir=RUN --output=BUNDLE
python launch.py --mode=view --input=SCAN_OR_FOLDER --output=FOLDER_OF_PREDICT
python launch.py --mode=score --input=PREDICTED_MASKS --truth=TRUE_MASKS --output=FOLDER
python launch.py --mode=compare --workdir=RUN --against=OTHER_RUN
python launch.py --mode=aot --config=configs/seg.py --topology=v5e:4x4
python launch.py --mode=doctor

On several hosts, the same command on each is one run: docs/pods.md.
"""

import logging
import pathlib
import re
import sys

import absl.logging
import tqdm
from absl import flags
from ml_collections import config_flags

from fusa_jax.system import exits, hosts, memory, meshes, program
from fusa_jax.system.errors import UserError

# Where configs/ and data/ lie, too: the repository, or a folder of its own in site-packages.
HOME = pathlib.Path(__file__).resolve().parent
COMPILED = pathlib.Path('~/.cache/fusa_jax/compiled').expanduser()
MODES = ('train', 'evaluate', 'predict', 'export', 'prepare', 'view', 'score', 'compare', 'aot', 'doctor')

_CONFIG = config_flags.DEFINE_config_file('config', None, 'configs/seg.py or configs/cls.py, with :preset or without')
_MODE = flags.DEFINE_enum('mode', 'train', MODES, 'train also prepares before and evaluates after')
_WORKDIR = flags.DEFINE_string(
  'workdir',
  None,
  'folder of the run, by default runs/ and the name of the config; predict, export: of several, A,B,C; predict: of a '
  'bundle',
)
_INPUT = flags.DEFINE_string(
  'input', None, 'predict: a scan, a picture, or a folder or .zip of them or of DICOM; view: the same; score: masks'
)
_OUTPUT = flags.DEFINE_string(
  'output',
  None,
  'predict, export, score, aot: a folder for what is written; view: the folder of predict; compare: a file',
)
_THRESHOLD = flags.DEFINE_float(
  'threshold', None, "predict, export: probability of a lesion; default, here and below: the run's operating point"
)
_TTA = flags.DEFINE_bool('tta', None, 'predict, export: the mean of slices as they are and mirrored left and right')
_LUNGS = flags.DEFINE_bool('lungs', None, 'predict, export: masks are limited to the lungs, found by their HU')
_SMALLEST_ML = flags.DEFINE_float(
  'smallest_ml', None, 'predict, export: leave out lesions of a scan below so many mL; 0: none'
)
_LICENSE = flags.DEFINE_string('license', None, "export: the bundle's licence, for its card")
_TRUTH = flags.DEFINE_string('truth', None, 'score: the true masks, in a folder or a file')
_AGAINST = flags.DEFINE_string('against', None, 'compare: the workdir of another run, evaluated on the same patients')
_TOPOLOGY = flags.DEFINE_string('topology', 'v5e:4x4', 'aot: the TPU slice to compile for')
_SLICES = flags.DEFINE_integer('slices', 1, 'aot: how many such slices')
_SWEEP = flags.DEFINE_bool('sweep', False, "aot: slices of 8 to 256 chips of the topology's kind, into docs/scaling.md")
_COORDINATOR = flags.DEFINE_string('coordinator', None, 'several hosts: HOST:PORT of process 0, where nothing tells it')
_NUM_PROCESSES = flags.DEFINE_integer('num_processes', None, 'several hosts: how many processes')
_PROCESS_ID = flags.DEFINE_integer('process_id', None, 'several hosts: the number of this one, from 0')
_CONNECT_TIMEOUT = flags.DEFINE_integer('connect_timeout', 300, 'several hosts: seconds to wait for all to come')
_HEARTBEAT_TIMEOUT = flags.DEFINE_integer(
  'heartbeat_timeout', 100, 'several hosts: seconds of silence after which a process counts as dead and all others end'
)
_PROBABILITIES = flags.DEFINE_bool('probabilities', False, 'predict: write probability volumes too')
_DICOM = flags.DEFINE_bool('dicom', False, 'predict: write the masks of DICOM series as DICOM SEG too')


def main(_):
  """Dispatches on --mode. Modules are imported where they are needed: worker processes import this file too."""
  start_logging()
  check_flags()
  if _MODE.value in ALONE:
    ALONE[_MODE.value]()
    return

  hosts.connect(
    _COORDINATOR.value,
    _NUM_PROCESSES.value,
    _PROCESS_ID.value,
    connect_timeout=_CONNECT_TIMEOUT.value,
    heartbeat_timeout=_HEARTBEAT_TIMEOUT.value,
  )
  if not hosts.is_main():
    logging.getLogger().setLevel(logging.WARNING)
  TOGETHER[_MODE.value]()
  hosts.disconnect()


def check_flags() -> None:
  """Raises a UserError where a flag was given that the mode leaves aside, and another name of it is meant."""
  for flag, (modes, instead) in OF_MODES.items():
    if flags.FLAGS[flag].present and _MODE.value not in modes:
      raise UserError(f'--{flag}: is of --mode={" and ".join(modes)}, not of {_MODE.value}; {instead}')


def train() -> None:
  """--mode=train: prepares what is missing, trains or resumes, evaluates, reports."""
  from fusa_jax.training import cross_validation, evaluate, train

  config, name = resolve_config()
  data_dir = prepared(config)
  use_compilation_cache()
  workdir, known = pathlib.Path(_WORKDIR.value or f'runs/{name}'), scans(config)
  evaluate.check_scans(config, known)
  if config.data.fold == 'all':
    cross_validation.cross_validate(config, workdir, data_dir, known)
  else:
    train.train(config, workdir, data_dir)
    evaluate.evaluate(config, workdir, data_dir, known)
  write_report(config, workdir, data_dir)


def evaluate() -> None:
  """--mode=evaluate: a run again, from its folder; where the data lie and what devices there are may have changed."""
  from fusa_jax.runs import run_config
  from fusa_jax.training import cross_validation, evaluate

  use_compilation_cache()
  workdir = path_flag(_WORKDIR)
  config = run_config.load_config(workdir)
  config.mesh.update(data=-1, space=1)
  if _CONFIG.value is not None:
    config.mesh.update(_CONFIG.value.mesh)
    if names_data(_CONFIG.value):
      config.data.update(raw_dir=_CONFIG.value.data.raw_dir, dir=_CONFIG.value.data.dir)
    asked = config_flags.get_override_values(flags.FLAGS['config'])
    may_change = ('evaluate.', 'data.patients', 'data.lesion_labels')
    config.update_from_flattened_dict({key: value for key, value in asked.items() if key.startswith(may_change)})
  data_dir = prepared(config)
  again = cross_validation.evaluate_again if config.data.fold == 'all' else evaluate.evaluate
  again(config, workdir, data_dir, scans(config))
  write_report(config, workdir, data_dir)


def write_report(config, workdir: pathlib.Path, data_dir: pathlib.Path) -> None:
  """The page of a run that has just been evaluated."""
  from configs import command
  from fusa_jax.runs import report
  from fusa_jax.training import cross_validation, datasets

  if not hosts.is_main():
    return
  for run, one in cross_validation.runs(config, workdir, data_dir).items() if config.data.fold == 'all' else ():
    report.write_report(run, datasets.card(data_dir, one.data.fold), command.command(one))
  report.write_report(workdir, datasets.card(data_dir, config.data.fold), command.command(config))
  logging.info('results: %s', workdir / 'test')


def predict() -> None:
  """--mode=predict: masks and numbers of new scans."""
  from fusa_jax.inference import predict, predictor

  use_compilation_cache()
  folders, source, output = workdirs(), path_flag(_INPUT), path_flag(_OUTPUT)
  run = predictor.load_predictor(
    folders,
    meshes.create_mesh(**_CONFIG.value.mesh) if _CONFIG.value is not None else None,
    **asked_point(),
  )
  predict.predict(run, source, output, _PROBABILITIES.value, _DICOM.value)


def export() -> None:
  """--mode=export: a run, or the mean of several, as a bundle to pass on."""
  from fusa_jax.inference import export

  folders, output = workdirs(), path_flag(_OUTPUT)
  licence = _LICENSE.value or export.NO_LICENCE
  export.write_bundle(folders, output, **asked_point(), licence=licence)
  logging.info('exported: %s', output)


def workdirs() -> list[pathlib.Path]:
  """--workdir, which may name several; raises UserError where it is missing."""
  workdir = path_flag(_WORKDIR)
  return [workdir] if workdir.exists() else [pathlib.Path(part) for part in str(workdir).split(',')]


def asked_point() -> dict:
  """What the flags want of the operating point; None: as the run says."""
  return {
    'threshold': _THRESHOLD.value,
    'flips': _TTA.value,
    'lungs': _LUNGS.value,
    'smallest_ml': _SMALLEST_ML.value,
  }


def prepare() -> None:
  """--mode=prepare: the dataset alone."""
  config, _ = resolve_config()
  if config.data.dir and not config.data.raw_dir:
    raise UserError('data.raw_dir: missing; --mode=prepare needs the folder of the scans')
  logging.info('prepared: %s', prepared(config))


def score() -> None:
  """--mode=score: masks against masks, whoever made them."""
  from fusa_jax.measures import score

  score.score(*(path_flag(flag) for flag in (_INPUT, _TRUTH, _OUTPUT)))


def compare() -> None:
  """--mode=compare: two runs on the same test patients."""
  from fusa_jax.runs import compare

  compare.compare(path_flag(_WORKDIR), path_flag(_AGAINST), pathlib.Path(_OUTPUT.value) if _OUTPUT.value else None)


def compile_ahead() -> None:
  """--mode=aot: the training step compiled for TPUs that are not here."""
  import jax

  from fusa_jax.chips import aot, tpu

  jax.config.update('jax_platforms', 'cpu')  # whatever is here, it is not what the step is compiled for
  config, name = named_config()
  topology = tpu.Topology.parse(_TOPOLOGY.value, _SLICES.value)
  if _SWEEP.value:
    aot.sweep(config, name, topology.kind, pathlib.Path('docs/scaling.md'))
  else:
    aot.aot(config, name, topology, pathlib.Path(_OUTPUT.value or 'runs/aot'))


def view() -> None:
  """--mode=view: pages for a browser, of scans and of what predict wrote for them."""
  from fusa_jax.inference import viewer

  viewer.view(path_flag(_INPUT), path_flag(_OUTPUT))


def doctor() -> None:
  """--mode=doctor: what is here, and whether it works."""
  from data import prepare
  from fusa_jax.chips import doctor

  caches = {'prepared datasets': prepare.CACHE, 'compiled programs, of these': COMPILED}
  doctor.doctor(load_config(str(HOME / 'configs/seg.py'), 'demo'), caches)


def named_config():
  """(config, name of its file and preset), as asked for.

  Raises:
    UserError: there is no --config.
  """
  if _CONFIG.value is None:
    raise UserError('--config: missing; give --config=configs/seg.py or --config=configs/cls.py')
  path, preset = file_and_preset()
  return _CONFIG.value, f'{pathlib.Path(path).stem}-{preset}'


def file_and_preset() -> tuple[str, str]:
  """Of --config, which is one or both."""
  path, _, preset = config_flags.get_config_filename(flags.FLAGS['config']).partition(':')
  return path, preset or 'paper'


def resolve_config():
  """As named_config; without any data named, the demo, and says so."""

  config, name = named_config()
  if not names_data(config):
    path, preset = file_and_preset()
    preset = 'demo' if preset in ('paper', 'demo') else f'demo-{preset.removeprefix("demo-")}'
    overrides = config_flags.get_override_values(flags.FLAGS['config'])
    config = load_config(path, preset)
    config.update_from_flattened_dict(overrides)
    name = f'{pathlib.Path(path).stem}-{preset}'
    if hosts.is_main():
      typed = 'python launch.py' if sys.argv[0].endswith('.py') else 'fusa-jax'
      shown = config_flags.get_config_filename(flags.FLAGS['config']).removeprefix(f'{HOME}/')
      print(
        'No data named: this is the demo, a small model on synthetic chest phantoms.\n'
        f'For your own scans: {typed} --config={shown} '
        '--config.data.raw_dir=FOLDER_OF_SCANS',
        flush=True,
      )
  return config, name


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
  """The folder of the prepared dataset, after process 0 has prepared it where that was still to be done."""

  data = config.data
  if data.dir and not data.raw_dir:
    return pathlib.Path(data.dir)

  def prepare_data() -> str:
    from data import prepare

    if data.raw_dir:
      return str(prepare.prepare(data.raw_dir, data.dir, data.image_size, tqdm.tqdm, wanted(data)))
    return str(prepare.prepare_phantom(data.dir, data.image_size, progress=tqdm.tqdm, **data.phantom))

  return pathlib.Path(hosts.on_main(prepare_data))


def wanted(data):
  """What a config says of how a cohort's files are to be taken."""
  from data.cohorts import Wanted

  return Wanted(*(data[key] for key in Wanted._fields))


def scans(config) -> dict | None:
  """By patient, what reads the scan and its mask as released, where they are at hand."""
  import jax

  from data import prepare

  data = config.data
  if config.task != 'segmentation' or (data.dir and not data.raw_dir):
    return None
  if jax.process_count() > 1:
    # Only process 0 needs to have them, and prediction is work for all.
    logging.info('masks are not scored as volumes by several hosts; --mode=evaluate on one of them does')
    return None
  if data.raw_dir:
    return prepare.scans(data.raw_dir, wanted(data))
  return prepare.scans(prepare.draw_phantoms(data.image_size, **data.phantom))


def path_flag(flag) -> pathlib.Path:
  """A flag's value as a path; raises UserError where it is missing."""
  if not flag.value:
    raise UserError(f'--{flag.name}: missing; --mode={_MODE.value} needs it')
  return pathlib.Path(flag.value)


def use_compilation_cache() -> None:
  """A second run of the same shapes starts in seconds."""
  import jax

  jax.config.update('jax_compilation_cache_dir', str(COMPILED))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.1)


def start_logging() -> None:
  """Messages as plain lines on stderr, beside the progress bars; libraries only where they warn."""
  logging.basicConfig(format='%(message)s', level=logging.WARNING, force=True)
  logging.getLogger().setLevel(logging.INFO)
  for name in ('jax', 'orbax', 'matplotlib', 'tensorboardX', 'grain'):
    logging.getLogger(name).setLevel(logging.WARNING)
  # Through absl, TFDS warns of folders that it has yet to write, and Orbax prints errors that it raises as well.
  absl.logging.set_verbosity(absl.logging.FATAL)


def parse_flags(argv):
  """absl's parsing with the house's errors: a wrong flag or config is one line and exit code 2."""
  try:
    rest = flags.FLAGS([own_config(argument) for argument in argv])
    if len(rest) > 1:
      raise ValueError(f'arguments: {rest[1]!r} is no flag')
    # A config file that cannot be loaded is reported at the first look into it.
    if _CONFIG.value is not None:
      _CONFIG.value.items()
    return rest
  except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError, ImportError, SyntaxError) as error:
    exits.fail(UserError(f'{one_line(error)}; see --help'))


def own_config(argument: str) -> str:
  """An argument in which `configs/seg.py`, where the current folder has no such file, is the one beside this file."""
  flag, path, preset = re.fullmatch(r'(?s)((?:--?config=)?)([^:]*)(.*)', argument).groups()
  is_own = re.fullmatch(r'configs/\w+\.py', path) and not pathlib.Path(path).exists() and (HOME / path).exists()
  return f'{flag}{HOME / path}{preset}' if is_own else argument


def one_line(error: Exception) -> str:
  """What an error of absl or ml_collections says, without the traceback and the steps that some of them quote."""
  missing = error if isinstance(error, KeyError) else error.__context__
  if isinstance(missing, KeyError):
    what, *hint = str(missing.args[0]).splitlines()
    return f'--config: no key {what}' + ''.join(f' ({line})' for line in hint)
  if isinstance(error, SyntaxError):
    return f'--config: no Python ({error})'
  lines = [line.strip() for line in str(error).splitlines() if line.strip()]
  if 'Traceback' in str(error):  # the config file's own error, behind its type
    return f'--config: {lines[-1].partition(": ")[2]}'
  if lines and lines[0].startswith('Configuration is not available'):
    return f'--config: {lines[-1]}'
  return ' '.join(lines)


def start(main) -> None:
  """Runs a main function with the flags above."""
  memory.restart_with_malloc_tunables()
  program.start(main, parse_flags)


def console() -> None:
  """The command fusa-jax: as `python launch.py`, it finds what lies beside this file before anything of that name."""
  sys.path.insert(0, str(HOME))
  start(main)


# Flags of some modes alone, which others might be thought to have: of which, and what to do there.
_AS_KEY = 'there it is --config.evaluate.'
OF_MODES = {
  'threshold': (('predict', 'export'), f'{_AS_KEY}target_sensitivity that chooses it'),
  'tta': (('predict', 'export'), f'{_AS_KEY}flips'),
  'lungs': (('predict', 'export'), f'{_AS_KEY}lungs'),
  'smallest_ml': (('predict', 'export'), f'{_AS_KEY}fit_smallest that chooses it'),
  'probabilities': (('predict',), 'leave it out'),
  'dicom': (('predict',), 'leave it out'),
}
# By mode: those in which all processes of a run take part, and those that need no more than this one.
TOGETHER = {'train': train, 'evaluate': evaluate, 'predict': predict, 'prepare': prepare}
ALONE = {
  'export': export,
  'view': view,
  'score': score,
  'compare': compare,
  'aot': compile_ahead,
  'doctor': doctor,
}

if __name__ == '__main__':
  start(main)
