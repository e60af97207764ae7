"""Compares studies that differ in the recipe: every model of the first one with the same model of the others.

  python -m benchmarks.study --config=configs/seg.py --models=resunet --folds=all --workdir=runs/paper
  python -m benchmarks.study --config=configs/seg.py:strong --models=resunet --folds=all --workdir=runs/strong
  python -m benchmarks.ablation --studies=runs/paper,runs/strong

Choose a recipe by the column of validation: the mean Dice per validation patient (classification: the AUC of the
validation fold) at the chosen checkpoints, over all folds. Test patients must not choose anything.

Below the table, each study is followed by the config keys in which it differs from the first one.
"""

import dataclasses
import datetime
import json
import pathlib

import numpy as np
from absl import flags

from benchmarks import study_table
from fusa_jax import tasks
from fusa_jax.measures import metrics
from fusa_jax.runs import arguments, compare, result_files, results, run_config, split
from fusa_jax.system import provenance
from fusa_jax.system.errors import UserError

_STUDIES = flags.DEFINE_list('studies', None, 'workdirs of benchmarks.study; the others are compared with the first')
# The number of the log that chooses a recipe, by task.
_VALIDATED = {'segmentation': 'dice_per_patient', 'classification': 'auc'}
# Keys that differ between the runs of a study.
_NOT_OF_RECIPE = [f'config.{key}' for key in ('seed', 'data.fold', 'model.name', 'model.width')]


@dataclasses.dataclass(frozen=True)
class Study:
  """The finished runs of a study.

  Attributes:
    workdir: its folder.
    recipe: the config keys that its runs share.
    runs: the folders of its runs by (model, seed).
    task: the type of task.
  """

  workdir: pathlib.Path
  recipe: dict
  runs: dict[tuple[str, int], pathlib.Path]
  task: tasks.TaskType


def main(_):
  if not _STUDIES.value:
    raise UserError('--studies: is missing; name the workdirs of two or more studies, with commas')
  print(table([load_study(pathlib.Path(text)) for text in _STUDIES.value]))
  print(f'\n{datetime.date.today()}, commit {provenance.commit()}')


def load_study(workdir: pathlib.Path) -> Study:
  """Returns a study with its finished runs.

  Raises:
    UserError: the folder has no finished run of a study; its labels are of patients: slices are not scored then; or
      there are several classes.
  """
  runs, config = {}, None
  for folder in sorted(workdir.glob('*-seed*')):
    if result_files.is_complete(folder / split.TEST):
      if not results.scores_slices(result_files.read_numbers(folder)):
        raise UserError(f'--studies: {folder} has labels of patients, so its slices have no scores to compare')
      config = run_config.load_config(folder)
      runs[config.model.name, config.seed] = folder
  if config is None:
    raise UserError(f'--studies: {workdir} has no finished run of a study; run python -m benchmarks.study first')
  if len(tasks.classes_of(config).names) > 1:
    raise UserError(f'--studies: {workdir} has several classes; give studies of one class')
  recipe = {key: value for key, value in run_config.facts(config).items() if key not in _NOT_OF_RECIPE}
  return Study(workdir, recipe, runs, tasks.type_of(config.task))


def table(studies: list[Study]) -> str:
  """Returns a Markdown table with a row per model and study, and what each study changes in the recipe.

  Raises:
    UserError: the studies have different tasks, test patients, slices or masks.
  """
  first, task = studies[0], studies[0].task
  if any(study.task is not task for study in studies):
    raise UserError('--studies: some segment and some classify; name studies of one task')
  lines = [
    f'| model | study | seeds | validation, {_VALIDATED[task.name]} | test, {task.patient_score_name} per patient '
    f'| minus {first.workdir.name}, per test patient | slices/s |',
    '| --- | --- | ---: | ---: | ---: | --- | ---: |',
  ]
  for name in dict.fromkeys(name for study in studies for name, _ in study.runs):
    lines += [_row(study, first, name) for study in studies if _seeds(study, name)]
  return '\n'.join([*lines, '', *(f'- {study.workdir.name}: {changes(study, first)}' for study in studies[1:])])


def changes(study: Study, first: Study) -> str:
  """Returns the config keys in which a study differs from the first one, with their values."""
  different = {key: value for key, value in study.recipe.items() if value != first.recipe[key]}
  return ', '.join(f'{key.removeprefix("config.")}={value}' for key, value in different.items()) or 'the same recipe'


def _seeds(study, name):
  return [seed for model, seed in study.runs if model == name]


def _row(study, first, name):
  seeds, common = _seeds(study, name), set(_seeds(study, name)) & set(_seeds(first, name))
  runs = [study.runs[name, seed] for seed in seeds]
  tables = {seed: _table(run) for seed, run in zip(seeds, runs, strict=True)}
  scores = np.mean([study.task.patient_score(metrics.by_patient(one).sums) for one in tables.values()], axis=0)
  validation = [validated(study.task, run) for run in runs]
  shown = 'undefined' if None in validation else f'{np.mean(validation):.4f}'
  cells = [name, study.workdir.name, str(len(seeds)), shown]
  cells += [f'{np.nanmean(scores):.4f}', '', f'{np.mean([study_table.training_rate(run) for run in runs]):.0f}']
  if study is not first and common:
    others = [_table(first.runs[name, seed]) for seed in sorted(common)]
    found = compare.paired(study.task, [tables[seed] for seed in sorted(common)], others)
    cells[-2] = compare.per_patient_line(found['per_patient'])
  return '| ' + ' | '.join(cells) + ' |'


def _table(run):
  (part,) = result_files.read_parts(run, tasks.classes_of(run_config.load_config(run)).names).values()
  return part.table


def validated(task: tasks.TaskType, run: pathlib.Path) -> float | None:
  """Returns the validation score of a run at its chosen checkpoint; of a cross-validation, the mean over patients.

  Returns None if a fold has no validation score.
  """
  folds = [path for path in (run, *sorted(run.glob('fold*'))) if (path / 'log.jsonl').exists()]
  key, scores, patients = f'validation/{_VALIDATED[task.name]}', [], []
  for fold in folds:
    step = result_files.read_numbers(fold)['step']
    entries = map(json.loads, (fold / 'log.jsonl').read_text().splitlines())
    scores += [one[key] for one in entries if one['step'] == step and key in one]
    patients.append(len(split.load_split(fold)['validation']))
  return None if len(scores) < len(folds) or None in scores else float(np.average(scores, weights=patients))


if __name__ == '__main__':
  arguments.start(main)
