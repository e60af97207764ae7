"""The command line: a table of modes. Each mode has a function and its flags."""

import logging
import pathlib
from collections.abc import Callable
from typing import NamedTuple

from absl import flags

from fusa_jax.runs import arguments, config_checks, experiment, next_steps
from fusa_jax.scans.classes import AUTO
from fusa_jax.system import home, paths, program
from fusa_jax.system.errors import PartlyRefused, UserError

FLAGS = flags.FLAGS
_HOSTS = ('coordinator', 'num_processes', 'process_id', 'connect_timeout', 'heartbeat_timeout')


class Mode(NamedTuple):
  """One value of --mode.

  Attributes:
    function: does the work.
    does: one line for --help.
    needs: required flags.
    takes: optional flags.
    together: whether all processes of a run take part. Otherwise each process works alone.
    survives: whether the others go on when a process is lost.
  """

  function: Callable[[], None]
  does: str
  needs: tuple[str, ...] = ()
  takes: tuple[str, ...] = ()
  together: bool = False
  survives: bool = False

  @property
  def flags(self) -> tuple[str, ...]:
    """All flags of this mode."""
    return (*self.needs, *self.takes, *(_HOSTS if self.together else ()))


def train() -> None:
  from fusa_jax.training import cross_validation

  config, name, is_demo = arguments.named_experiment()
  cross_validation.check_config(config)
  data_dir = experiment.prepared(config)
  workdir, scans = paths.to_path(FLAGS.workdir or f'runs/{name}'), experiment.scans_at_hand(config)
  cross_validation.train_and_test(config, workdir, data_dir, scans, FLAGS.overwrite)
  test = cross_validation.write_reports(config, workdir, data_dir)
  next_steps.after_test(workdir, test, experiment.demo_scan(config, workdir) if is_demo else None)


def evaluate() -> None:
  from fusa_jax.runs import run_config
  from fusa_jax.training import cross_validation

  workdir = paths.to_path(FLAGS.workdir)
  config = experiment.to_evaluate(run_config.load_config(workdir), arguments.named_config() if FLAGS.config else None)
  data_dir = experiment.prepared(config)
  cross_validation.evaluate_again(config, workdir, data_dir, experiment.scans_at_hand(config), FLAGS.overwrite)
  next_steps.after_test(workdir, cross_validation.write_reports(config, workdir, data_dir))


def predict() -> None:
  import jax

  from fusa_jax.inference import predict, predictor
  from fusa_jax.system import meshes

  mesh = None
  if FLAGS.config is not None:
    experiment.check_changes(arguments.named_config().overrides, ('mesh.',))
    mesh = meshes.create_mesh(**FLAGS.config.mesh, devices=jax.local_devices())
  run = predictor.load_predictor(arguments.workdirs(), mesh, **arguments.operating_point())
  counts = predict.predict(
    run,
    pathlib.Path(FLAGS.input),
    pathlib.Path(FLAGS.output),
    FLAGS.probabilities,
    FLAGS.dicom,
    FLAGS.overwrite,
    FLAGS.strict,
    FLAGS.explain,
  )
  next_steps.after_prediction(FLAGS.input, FLAGS.output)
  if counts.refused or counts.failed:
    raise PartlyRefused(counts)
  logging.info('%s', counts)


def export() -> None:
  from fusa_jax.inference import export

  output = pathlib.Path(FLAGS.output)
  export.write_bundle(
    arguments.workdirs(), output, **arguments.operating_point(), licence=FLAGS.license or export.NO_LICENCE
  )
  next_steps.after_export(output)


def prepare() -> None:
  config = arguments.named_experiment().config
  if config.data.dir and not config.data.raw_dir:
    raise UserError('--config.data.raw_dir: missing; --mode=prepare needs the folder of the scans')
  config_checks.check(config)
  next_steps.after_preparation(experiment.prepared(config))


def view() -> None:
  from fusa_jax.inference import viewer

  viewer.view(pathlib.Path(FLAGS.input), pathlib.Path(FLAGS.output), FLAGS.overwrite)


def score() -> None:
  from fusa_jax.measures import score

  folders = (pathlib.Path(FLAGS[name].value) for name in ('input', 'truth', 'output'))
  score.score(*folders, FLAGS.overwrite, arguments.classes())


def compare() -> None:
  from fusa_jax.runs import compare, run_config
  from fusa_jax.system import own_files
  from fusa_jax.training import side_by_side

  workdir, against = (pathlib.Path(folder) for folder in (FLAGS.workdir, FLAGS.against))
  output = pathlib.Path(FLAGS.output) if FLAGS.output else compare.default_output(workdir, against)
  if not FLAGS.overwrite:
    own_files.refuse(own_files.changed(output, ()))
  result, pictures = compare.compare(workdir, against), {}
  if FLAGS.overlays:
    data_dir = experiment.prepared(run_config.load_config(workdir))
    pictures = side_by_side.pictures(workdir, against, data_dir, FLAGS.overlays)
    logging.info('side by side: %s', output.with_suffix(''))
  files = {output.with_suffix('') / name: write for name, write in pictures.items()}
  if not FLAGS.overwrite:
    own_files.refuse(own_files.changed(output, files))
  own_files.write_together(output, result, files, own_files.files_of(output))


def compile_ahead() -> None:
  import jax

  from fusa_jax.chips import aot, topology
  from fusa_jax.runs import prepared_dataset

  jax.config.update('jax_platforms', 'cpu')  # the step is compiled for other devices than this machine's
  named = arguments.named_config()
  config_checks.check(named.config)
  if named.config.data.classes == AUTO:
    if named.config.data.dir:
      prepared_dataset.fill_classes(named.config, named.config.data.dir)
    else:
      logging.info("data.classes='auto': compiled for one class, because data.dir is not given")
  name = f'{pathlib.Path(named.path).stem}-{pathlib.Path(named.preset).stem}'
  chips = topology.parse(FLAGS.topology, FLAGS.slices)
  if FLAGS.sweep:
    if chips.platform != 'tpu':
      raise UserError(f'topology: {chips}, but --sweep compiles for TPUs only; leave out --sweep')
    aot.sweep(named.config, name, chips.kind, pathlib.Path('docs/scaling.md'))
  else:
    aot.aot(named.config, name, chips, pathlib.Path(FLAGS.output or 'runs/aot'))


def doctor() -> None:
  from data import prepare
  from fusa_jax.chips import doctor

  caches = {'prepared datasets': prepare.CACHE, 'compiled programs (a part of these)': program.COMPILED}
  doctor.doctor(experiment.load_preset(home.HOME / 'configs' / 'seg.py', 'demo'), caches)


MODES = {
  'train': Mode(
    train,
    'prepares the data, trains or resumes, then evaluates',
    ('config',),
    ('workdir', 'verbose', 'overwrite'),
    True,
  ),
  'evaluate': Mode(evaluate, 'evaluates a trained run again', ('workdir',), ('config', 'overwrite'), True),
  'predict': Mode(
    predict,
    'marks lesions in new scans',
    ('workdir', 'input', 'output'),
    ('config', *arguments.POINT, 'probabilities', 'explain', 'dicom', 'overwrite', 'strict'),
    True,
    survives=True,
  ),
  'prepare': Mode(prepare, 'checks a cohort and prepares its dataset', ('config',), (), True),
  'export': Mode(
    export, 'writes a model bundle that runs without this package', ('workdir', 'output'), (*arguments.POINT, 'license')
  ),
  'view': Mode(view, 'writes a web page per scan with its predicted mask', ('input', 'output'), ('overwrite',)),
  'score': Mode(
    score,
    'scores masks against reference masks',
    ('input', 'truth', 'output'),
    ('classes', 'ignore_label', 'overwrite'),
  ),
  'compare': Mode(
    compare, 'compares two runs patient by patient', ('workdir', 'against'), ('output', 'overlays', 'overwrite')
  ),
  'aot': Mode(
    compile_ahead,
    'compiles the training step for a TPU slice or GPUs',
    ('config',),
    ('topology', 'slices', 'sweep', 'output'),
  ),
  'doctor': Mode(doctor, 'checks the installation'),
}
# The config key to set, in place of a flag, in modes that choose the operating point.
_KEYS = {'threshold': 'target_sensitivity', 'tta': 'flips', 'lungs': 'lungs', 'smallest_ml': 'fit_smallest'}


def check_flags(mode: str) -> None:
  """Checks that the command line has the mode's required flags and no flag of another mode.

  Raises:
    UserError: a flag is missing, or does not apply to this mode.
  """
  for name in sorted({name for each in MODES.values() for name in each.flags} - set(MODES[mode].flags)):
    if FLAGS[name].present:
      modes = [other for other, each in MODES.items() if name in each.flags]
      instead = 'leave it out'
      if mode in ('train', 'evaluate') and name in _KEYS:
        instead = f'in {mode} use --config.evaluate.{_KEYS[name]}'
      raise UserError(f'--{name}: applies to --mode={", ".join(modes)}, not to {mode}; {instead}')
  for name in MODES[mode].needs:
    if name == 'config':
      arguments.named_config()
    elif not FLAGS[name].value:
      raise UserError(f'--{name}: missing; --mode={mode} needs it')


def help_text() -> str:
  """Returns the text of --help: modes with their flags, then the meaning of each flag."""
  lines = ['usage: python launch.py --mode=MODE --FLAG=VALUE ...   (installed: fusa-jax)', '']
  for name, mode in MODES.items():
    needed = ' '.join(f'--{flag}' for flag in mode.needs)
    taken = ' '.join(f'[--{flag}]' for flag in mode.takes)
    lines += [f'--mode={name}: {mode.does}', f'    {needed} {taken}'.rstrip() or '    (no flags)']
  together = ', '.join(name for name, mode in MODES.items() if mode.together)
  lines += ['', f'on several hosts ({together}): {" ".join(f"[--{flag}]" for flag in _HOSTS)}', '']
  listed = dict.fromkeys(['mode', 'config', *(flag for mode in MODES.values() for flag in mode.flags)])
  lines += [f'--{flag}: {FLAGS[flag].help}' for flag in listed]
  return '\n'.join(
    [*lines, '--config.KEY=VALUE: sets a key of configs/base.py', '--helpfull: lists the flags of the libraries']
  )


def main(_) -> None:
  """Runs the mode. Each mode imports its modules itself, so that a wrong command is refused without loading JAX."""
  program.start_logging(FLAGS.verbose)
  check_flags(FLAGS.mode)
  mode = MODES[FLAGS.mode]
  if not mode.together:
    mode.function()
    return
  from fusa_jax.system import hosts

  program.use_compilation_cache()
  hosts.connect(
    FLAGS.coordinator,
    FLAGS.num_processes,
    FLAGS.process_id,
    connect_timeout=FLAGS.connect_timeout,
    heartbeat_timeout=FLAGS.heartbeat_timeout,
    survives=mode.survives,
  )
  if not hosts.is_main():
    logging.getLogger().setLevel(logging.WARNING)
  mode.function()
  hosts.disconnect()


def start() -> None:
  """Starts the program, as fusa-jax and as launch.py."""
  arguments.define_flags(list(MODES))
  arguments.start(main, help_text)
