"""The table of a study with the paper's columns, and the difference of FUSA and plain models patient by patient."""

import datetime
import json
import pathlib
import statistics
from collections.abc import Iterator

import jax
import ml_collections

from benchmarks import model_table
from benchmarks.jobs import Machine
from fusa_jax import models, tasks
from fusa_jax.runs import compare, result_files, results, run_config
from fusa_jax.runs.split import TEST
from fusa_jax.system.files import replacing, write_csv, write_json

# The paper's rows, in its order and spelling, with the names of our models.
ROWS = {
  'classification': {
    'VGG-Net': 'vgg16',
    'DenseNet': 'densenet121',
    'MobileNet': 'mobilenet_v2',
    'ResNet-18': 'resnet18',
    'FUSAResNet18': 'fusa_resnet18',
    'ResNet-50': 'resnet50',
    'FUSAResNet50': 'fusa_resnet50',
  },
  'segmentation': {
    'LinkNet': 'linknet',
    'ResUNet': 'resunet',
    'PSPNet': 'pspnet',
    'DeepLabV3': 'deeplabv3',
    'FUSA-ResUnet': 'fusa_resunet',
  },
}
# The paper's columns, with the keys of metrics.json. We added macro Dice: the paper's Dice may be this (docs/paper.md).
SCORES = {
  'classification': {'Acc': 'accuracy', 'Precision': 'precision', 'Recall': 'recall', 'F1': 'f1', 'AUC': 'auc'},
  'segmentation': {'Dice': 'dice', 'Precision': 'precision', 'Recall': 'recall', 'Macro Dice': 'dice_macro'},
}


def folder(workdir: pathlib.Path, name: str, seed: int) -> pathlib.Path:
  """Returns the workdir of a model and a seed."""
  return workdir / f'{name}-seed{seed}'


def row_config(config: ml_collections.ConfigDict, name: str, seed: int) -> ml_collections.ConfigDict:
  """Returns the protocol with a row's model and a seed. Rows differ only in the model and its width."""
  one = ml_collections.ConfigDict(config.to_dict())
  one.seed = seed
  one.model.name = name
  if config.model.width is not None:
    # Keep the ratio of the config's width to the default width of the config's model.
    default = {n: models.create(n).width for n in (config.model.name, name)}
    one.model.width = config.model.width * default[name] // default[config.model.name]
  return one


def write(
  config: ml_collections.ConfigDict,
  names: list[str],
  seeds: list[int],
  workdir: pathlib.Path,
  machine: Machine,
  jobs: int,
  pending: set[tuple[str, int]] = frozenset(),
) -> str:
  """Writes table.csv, table.md and differences.json from the finished runs; returns the text of table.md.

  Args:
    config: the protocol.
    names: the models; each with a finished run gets a row.
    seeds: the seeds of the study; a row uses the finished ones.
    workdir: the folder of the study.
    machine: the machine that ran the study.
    jobs: the number of runs that shared the machine at a time.
    pending: model and seed of runs that will be tested again; they are left out.
  """
  is_complete = lambda name, seed: result_files.is_complete(folder(workdir, name, seed) / TEST)
  finished = {name: [s for s in seeds if (name, s) not in pending and is_complete(name, s)] for name in names}
  records = [_record(config, name, workdir, done) for name, done in finished.items() if done]
  write_csv(workdir / 'table.csv', records)
  differences = list(_differences(config, workdir, finished))
  write_json(workdir / 'differences.json', differences)

  titles = [*SCORES[config.task], 'Parameters', 'GFLOPs', 'slices/s']
  lines = ['| ' + ' | '.join(['Model', *titles]) + ' |', '| --- |' + ' ---: |' * len(titles)]
  for record in records:
    cells = [cell(record, title) for title in SCORES[config.task]]
    cells += [f'{record["parameters"]:,}', f'{record["gflops"]:.2f}', f'{record["slices_per_second"]:.0f}']
    lines.append('| ' + ' | '.join([record['model'], *cells]) + ' |')
  lines += ['', _caption(config, workdir, finished, seeds, machine, jobs)]
  for each in differences:
    title = f'{each["run"]} minus {each["against"]}, {_seeds(each["seeds"])}'
    title += f', {each["class"]}' if 'class' in each else ''
    lines += ['', f'{title}: {compare.per_patient_line(each["per_patient"])}']
  text = '\n'.join(lines)
  with replacing(workdir / 'table.md') as partial:
    partial.write_text(text + '\n')
  return text


def _record(config, name, workdir, seeds):
  """Returns a row of table.csv: mean and standard deviation over the seeds; empty if a score is undefined."""
  runs = [folder(workdir, name, seed) for seed in seeds]
  tests = [result_files.read_numbers(run) for run in runs]
  task = tasks.create(row_config(config, name, 0))
  channels = task.context.channels
  titles = {row: title for title, row in ROWS[config.task].items()}
  record = {'model': titles.get(name, name), 'name': name, 'seeds': len(runs)}
  for column, key in SCORES[config.task].items():
    values = [result[key] for result in tests]
    values = [] if None in values else values  # a mean over only some of the seeds would mislead
    record[column] = statistics.fmean(values) if values else None
    record[f'{column} sd'] = statistics.stdev(values) if len(values) > 1 else None
    # A single run has an interval over patients. The spread over seeds does not include the variation of patients.
    interval = tests[0]['intervals'][key] if len(tests) == 1 else None
    record[f'{column} low'], record[f'{column} high'] = interval or (None, None)
  return record | {
    'parameters': model_table.count(task.model, channels=channels),
    'gflops': model_table.forward_gflops(task.model, config.data.image_size, channels),
    'slices_per_second': statistics.fmean(training_rate(run) for run in runs),
  }


def training_rate(run: pathlib.Path) -> float:
  """Returns the training speed in slices per second: the median over a run's log, the mean over the folds.

  The log's speeds exclude compilation and validation.
  """
  logs = [run / 'log.jsonl'] if (run / 'log.jsonl').exists() else sorted(run.glob('fold*/log.jsonl'))
  return statistics.fmean(_rate(log) for log in logs)


def _rate(log):
  entries = map(json.loads, log.read_text().splitlines())
  return statistics.median(e['train/slices_per_second'] for e in entries if 'train/slices_per_second' in e)


def cell(record: dict, column: str) -> str:
  """Returns a score as the paper prints it: in percent, AUC as a fraction.

  The spread over seeds follows, or the 95% interval if there is one seed.
  """
  mean, spread, low, high = (record[f'{column}{part}'] for part in ('', ' sd', ' low', ' high'))
  scale, digits, unit = (1, 3, '') if column == 'AUC' else (100, 2, '%')
  if mean is None:
    return 'undefined'
  shown = lambda value: f'{value * scale:.{digits}f}'
  beside = f' ± {shown(spread)}' if spread is not None else f' [{shown(low)}, {shown(high)}]' if low is not None else ''
  return f'{shown(mean)}{unit}{beside}'


def _differences(config, workdir, finished) -> Iterator[dict]:
  """Yields the comparison of each model with its FUSA variant: over all seeds that both have, then for each seed.

  There is none if the labels are of patients.
  """
  for plain in finished:
    fusa = f'fusa_{plain}'
    common = [seed for seed in finished[plain] if seed in finished.get(fusa, ())]
    tests = [result_files.read_numbers(folder(workdir, name, seed)) for name in (fusa, plain) for seed in common]
    if not all(map(results.scores_slices, tests)):
      continue  # labels are of patients, so the tables count inherited labels
    classes = tasks.classes_of(config).names
    parts = {
      name: {seed: result_files.read_parts(folder(workdir, name, seed), classes) for seed in common}
      for name in (fusa, plain)
    }
    for seeds in ([common] if len(common) > 1 else []) + [[seed] for seed in common]:
      for of_class in classes:
        one, other = ([parts[name][seed][of_class].table for seed in seeds] for name in (fusa, plain))
        about = {'run': fusa, 'against': plain, 'fold': config.data.fold, 'seeds': seeds}
        about |= {'class': of_class} if len(classes) > 1 else {}
        yield about | compare.paired(tasks.type_of(config.task), one, other)


def _seeds(seeds):
  return f'seed{"s" * (len(seeds) > 1)} {", ".join(map(str, seeds))}'


def _length(config):
  if config.train.epochs is None:
    return f'{config.train.steps} steps'
  return f'{config.train.epochs:g} epochs in steps'


def _caption(config, workdir, finished, seeds, machine, jobs):
  name, done = next((name, done) for name, done in finished.items() if done)
  result = result_files.read_numbers(folder(workdir, name, done[0]))
  fold = 'all folds, each patient tested once' if run_config.is_cross_validation(config) else f'fold {config.data.fold}'
  missing = [f'{name} {len(done)} of {len(seeds)}' for name, done in finished.items() if len(done) < len(seeds)]
  return (
    f'{result["dataset"]}, {fold}{results.caveat(result)}: '
    f'{result["num_slices"]} test slices of {result["num_patients"]} patients, '
    f'{config.data.image_size} x {config.data.image_size}. '
    f'{_length(config)} of {config.train.batch_size} slices, {_seeds(seeds)}.'
    + (f' Unfinished: {", ".join(missing)} seeds.' if missing else '')
    + (' Mean ± standard deviation over the seeds.' if len(seeds) > 1 else ' Brackets: 95% interval over patients.')
    + f' GFLOPs: forward pass of one slice. slices/s: in training, on {machine}'
    + (f' shared by {jobs} runs at a time' if jobs > 1 else '')
    + f'. {datetime.date.today()}, jax {jax.__version__}, commit {result["commit"]}.'
  )
