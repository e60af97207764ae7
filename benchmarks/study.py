"""Trains and tests models, folds and seeds under one protocol, and compares FUSA with plain models per patient.

  python -m benchmarks.study --config=configs/seg.py --config.data.raw_dir=FOLDER_OF_SCANS \
    --models=resunet,fusa_resunet --folds=all --seeds=0,1 --jobs=2

Data, steps, batches and augmentation come from the config and are the same for all models. In the workdir, MODEL-seedS
is the run of a model and a seed, as launch.py makes it; with --folds=all it is their cross-validation. After each of
these, the command rewrites `table.md`, `table.csv` and `differences.json`.

Rerun the command to resume it: it keeps finished runs and resumes the others. It refuses a config that would mix two
protocols in one table.
"""

import collections
import dataclasses
import logging
import pathlib

import jax
import ml_collections
from absl import flags
from ml_collections import config_flags

from benchmarks import jobs, study_table
from fusa_jax import tasks
from fusa_jax.measures import statistics
from fusa_jax.runs import arguments, experiment, result_files, run_config
from fusa_jax.runs.split import TEST
from fusa_jax.system import program
from fusa_jax.system.errors import UserError
from fusa_jax.training import cross_validation, evaluate


def define_flags() -> None:
  """Defines the flags. Importing this module does not define them, because other benchmarks also define --models."""
  arguments.define_config()
  flags.DEFINE_string(
    'workdir', None, "folder of the study; default: runs/study/NAME or runs/tables/NAME, with the config's name"
  )
  flags.DEFINE_list('models', None, "names of models; default: the models of the paper's table")
  flags.DEFINE_list(
    'seeds', ['0'], 'seeds of initialisation, sampling and augmentation; each row is the mean over the seeds'
  )
  flags.DEFINE_string('folds', None, "all, or one fold number; default: the config's data.fold")
  flags.DEFINE_integer(
    'jobs', 1, 'runs at a time; on a CPU they share the cores, otherwise each has its own GPU', lower_bound=1
  )


def main(_):
  program.start_logging()
  config, name, _ = arguments.named_experiment()
  run(config, flags.FLAGS.workdir or f'runs/study/{name}')


def run(config: ml_collections.ConfigDict, workdir: str) -> None:
  """Runs the study of a config with the options of the flags, and prints its table."""
  names = read_models(flags.FLAGS.models, config.task)
  seeds = read_seeds(flags.FLAGS.seeds)
  if flags.FLAGS.folds is not None:
    given = config_flags.get_override_values(flags.FLAGS['config']).get('data.fold')
    config.data.fold = read_fold(flags.FLAGS.folds, given)
  program.use_compilation_cache()
  machine, shares = jobs.prepare(flags.FLAGS.jobs)
  print(make(config, names, seeds, pathlib.Path(workdir), experiment.prepared(config), machine, shares))


def read_models(texts: list[str] | None, task: str) -> list[str]:
  """Returns the names of the models; by default, the models of the paper's table.

  Raises:
    UserError: a name is unknown, belongs to the other task, or is given twice.
  """
  if texts is None:
    return list(study_table.ROWS[task].values())
  known = tasks.type_of(task).models
  for name in texts or ['']:
    if name not in known:
      raise UserError(f'--models: {name!r} is not a {task} model; choose from {", ".join(known)}')
  return _once('models', texts)


def read_seeds(texts: list[str]) -> list[int]:
  """Returns the seeds; raises UserError if there are none, or if one is not a whole number or is given twice."""
  if not texts or not all(text.strip().isdigit() for text in texts):
    raise UserError(f'--seeds: {",".join(texts)!r} must be whole numbers; for example, give --seeds=0,1,2')
  return _once('seeds', [int(text) for text in texts])


def _once(flag, values):
  twice = [value for value, count in collections.Counter(values).items() if count > 1]
  if twice:
    raise UserError(f'--{flag}: {twice[0]} is given more than once; name each once')
  return values


def read_fold(text: str, configured: int | str | None) -> int | str:
  """Returns data.fold from --folds.

  Raises:
    UserError: `text` is not a fold, or contradicts --config.data.fold.
  """
  if text != 'all' and not text.isdigit():
    raise UserError(f"--folds: {text!r} must be 'all' or one fold number; for example, give --folds=0")
  if configured is not None and str(configured) != text:
    raise UserError(f'--folds: {text}, but --config.data.fold is {configured}; give only one of them')
  return 'all' if text == 'all' else int(text)


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
  """A run for the next free process to train and test. If data.fold is 'all', the job pools the runs of all folds.

  Attributes:
    config: the config of the run.
    run: the workdir of the run.
    data_dir: the folder of the prepared dataset.
  """

  config: ml_collections.ConfigDict
  run: pathlib.Path
  data_dir: pathlib.Path

  def __str__(self) -> str:
    fold = {'all': 'all folds'}.get(self.config.data.fold, f'fold {self.config.data.fold}')
    return f'{self.config.model.name}, seed {self.config.seed}, {fold}'

  def __call__(self) -> float | None:
    """Trains and tests the run; returns the score by which the task selects checkpoints."""
    result = cross_validation.train_and_test(self.config, self.run, self.data_dir)
    cross_validation.write_reports(self.config, self.run, self.data_dir)
    jax.clear_caches()  # the next model cannot use compiled programs of this one
    return result[tasks.type_of(self.config.task).selection]


def make(
  config: ml_collections.ConfigDict,
  names: list[str],
  seeds: list[int],
  workdir: pathlib.Path,
  data_dir: pathlib.Path,
  machine: jobs.Machine,
  shares: list[jobs.Share],
) -> str:
  """Runs all unfinished jobs, seed by seed; returns the text of the table, which it writes after each model and seed.

  Raises:
    UserError: a run raised it, or the workdir holds a run with another protocol.
  """
  todo, wholes, left, total = collections.deque(), {}, collections.Counter(), 0
  for seed in seeds:
    for name in names:
      whole = Job(study_table.row_config(config, name, seed), study_table.folder(workdir, name, seed), data_dir)
      parts = _parts(whole)
      begin = [job for job in parts if not _is_finished(job, machine)]
      if len(parts) > 1:
        run_config.save_config(whole.run, whole.config)  # refuses a folder that holds a run of one fold
        if not begin and not result_files.is_complete(whole.run / TEST):
          begin = [whole]
      todo.extend(begin)
      total += len(parts)
      left[whole] = len(begin)
      wholes |= dict.fromkeys([whole, *parts], whole)
  done = total - sum(not run_config.is_cross_validation(job.config) for job in todo)
  if done:
    logging.info('%d of %d runs are finished', done, total)

  def write():
    # Results that are about to change do not belong in the table.
    pending = {(whole.config.model.name, whole.config.seed) for whole, count in left.items() if count}
    return study_table.write(config, names, seeds, workdir, machine, max(1, len(shares)), pending)

  for job, score, seconds in jobs.run(todo, shares):
    done += not run_config.is_cross_validation(job.config)
    logging.info('[%d/%d] %s: %s, %.0f s', done, total, job, statistics.shown(score), seconds)
    whole = wholes[job]
    if job is whole:
      left[whole] = 0
      write()
      continue
    left[whole] -= 1
    if not left[whole]:
      left[whole] = 1  # until the folds are pooled
      todo.appendleft(whole)
  return write()


def _parts(whole):
  """Returns the runs of a model and a seed: one, or one per fold."""
  if not run_config.is_cross_validation(whole.config):
    return [whole]
  runs = cross_validation.runs(whole.config, whole.run, whole.data_dir)
  return [dataclasses.replace(whole, config=one, run=run) for run, one in runs.items()]


def _is_finished(job, machine):
  """Returns whether a run has been trained and tested as its config says; raises UserError if its protocol differs."""
  if not evaluate.is_finished(job.config, job.run, job.data_dir, platform=machine.platform):
    return False
  run_config.save_config(job.run, job.config)
  return True


if __name__ == '__main__':
  define_flags()
  arguments.start(main)
