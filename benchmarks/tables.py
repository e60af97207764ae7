"""The paper's Table I or II under one protocol: every model of it trained and evaluated on the same data.

  python -m benchmarks.tables --config=configs/cls.py --config.data.raw_dir=FOLDER_OF_SCANS --seeds=0,1,2
  python -m benchmarks.tables --config=configs/seg.py                               (no data named: the demo's size)

Data, steps, batches, augmentation and seeds are the config's, the same for all rows. `table.md` and `table.csv` in the
workdir are written anew after each run. The command may be stopped at any time: given again, it keeps what is finished,
resumes what is not, and refuses a config that would mix two protocols in one table.
"""

import csv
import datetime
import json
import logging
import os
import pathlib
import statistics

import jax
import ml_collections
from absl import flags
from ml_collections import config_flags

import launch
from benchmarks import model_table
from configs import command
from fusa_jax import compare, evaluate, models, report, results, run_config, tasks, train
from fusa_jax.errors import UserError
from fusa_jax.files import replacing

_SEEDS = flags.DEFINE_list(
  'seeds', ['0'], 'of initialisation, sampling and augmentation; each row is the mean over them'
)

# The paper's rows, in its order and spelling, with the names of our registry.
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
# The paper's columns, with the keys of metrics.json. The macro Dice is ours: its Dice may be that (docs/paper.md).
SCORES = {
  'classification': {'Acc': 'accuracy', 'Precision': 'precision', 'Recall': 'recall', 'F1': 'f1', 'AUC': 'auc'},
  'segmentation': {'Dice': 'dice', 'Precision': 'precision', 'Recall': 'recall', 'Macro Dice': 'dice_macro'},
}
# The ablation: models that differ in FUSA alone.
PAIRS = {
  'classification': (('fusa_resnet18', 'resnet18'), ('fusa_resnet50', 'resnet50')),
  'segmentation': (('fusa_resunet', 'resunet'),),
}
# A table is finished on two CPU cores within half an hour. The demo of classification alone has twice the steps.
_DEMO_STEPS = {'classification': 1000, 'segmentation': 900}


def main(_):
  launch.start_logging()
  launch.use_compilation_cache()
  seeds = read_seeds(_SEEDS.value)
  config, name = launch.resolve_config()
  if config.data.fold == 'all':
    raise UserError('data.fold: a table is of one fold; give its number, as in --config.data.fold=0')
  if '-demo' in name and 'train.steps' not in config_flags.get_override_values(flags.FLAGS['config']):
    config.train.steps = _DEMO_STEPS[config.task]
  workdir = pathlib.Path(flags.FLAGS.workdir or f'runs/tables/{name}')
  make_table(config, seeds, workdir, launch.prepared(config))


def read_seeds(texts: list[str]) -> list[int]:
  """Raises UserError where one is no whole number, or none is given."""
  if not texts or not all(text.strip().isdigit() for text in texts):
    raise UserError(f'--seeds: {",".join(texts)!r} are not whole numbers; give --seeds=0,1,2')
  return [int(text) for text in texts]


def make_table(
  config: ml_collections.ConfigDict, seeds: list[int], workdir: pathlib.Path, data_dir: pathlib.Path
) -> None:
  """Trains and evaluates what is not finished, seed after seed, and writes the table after each run."""
  rows = ROWS[config.task]
  for seed in seeds:
    for name in rows.values():
      run = workdir / f'{name}-seed{seed}'
      one = row_config(config, name, seed)
      if results.is_complete(run):
        run_config.save(run, one)  # refuses a run of another protocol
        continue
      logging.info('%s, seed %d', name, seed)
      train.train(one, run, data_dir)
      evaluate.evaluate(one, run, data_dir)
      report.write(run, data_dir, command.command(one))
      jax.clear_caches()  # nothing of one model's is of use to the next
      write_table(config, seeds, workdir)
  print(write_table(config, seeds, workdir))


def row_config(config: ml_collections.ConfigDict, name: str, seed: int) -> ml_collections.ConfigDict:
  """The protocol with a row's model and a seed; only the names and the widths that go with them differ."""
  one = ml_collections.ConfigDict(config.to_dict())
  one.seed = seed
  one.model.name = name
  if config.model.width is not None:
    # Relative to an architecture's own, as the config has it for its own model.
    own = {n: models.create(n).width for n in (config.model.name, name)}
    one.model.width = config.model.width * own[name] // own[config.model.name]
  return one


def write_table(config: ml_collections.ConfigDict, seeds: list[int], workdir: pathlib.Path) -> str:
  """Writes table.csv and table.md from the finished runs; gives the latter's text."""
  records = []
  for title, name in ROWS[config.task].items():
    runs = [run for run in (workdir / f'{name}-seed{seed}' for seed in seeds) if results.is_complete(run)]
    if runs:
      records.append(_record(config, title, name, runs))
  header = list(records[0])
  with replacing(workdir / 'table.csv') as partial, partial.open('w', newline='') as file:
    writer = csv.DictWriter(file, header)
    writer.writeheader()
    writer.writerows(records)

  titles = [*SCORES[config.task], 'Parameters', 'GFLOPs', 'slices/s']
  lines = ['| ' + ' | '.join(['Model', *titles]) + ' |', '| --- |' + ' ---: |' * len(titles)]
  for record in records:
    cells = [_cell(record, title) for title in SCORES[config.task]]
    cells += [f'{record["parameters"]:,}', f'{record["gflops"]:.2f}', f'{record["slices_per_second"]:.0f}']
    lines.append('| ' + ' | '.join([record['model'], *cells]) + ' |')
  text = '\n'.join([*lines, '', _caption(config, seeds, workdir, records), *_ablation(config, seeds, workdir)])
  with replacing(workdir / 'table.md') as partial:
    partial.write_text(text + '\n')
  return text


def _record(config, title, name, runs):
  """A row of table.csv: mean and standard deviation over the seeds; empty where a score is undefined."""
  tests = [results.read_numbers(run) for run in runs]
  module = tasks.create(row_config(config, name, 0)).model
  record = {'model': title, 'name': name, 'seeds': len(runs)}
  for column, key in SCORES[config.task].items():
    values = [result[key] for result in tests if result[key] is not None]
    record[column] = statistics.fmean(values) if values else None
    record[f'{column} sd'] = statistics.stdev(values) if len(values) > 1 else None
    # Over patients, of a single run; what several runs of the same patients have in common is not in their spread.
    interval = tests[0]['intervals'][key] if len(tests) == 1 else None
    record[f'{column} low'], record[f'{column} high'] = interval or (None, None)
  return record | {
    'parameters': model_table.count(module),
    'gflops': model_table.forward_gflops(module, config.data.image_size),
    'slices_per_second': statistics.fmean(_rate(run) for run in runs),
  }


def _rate(run):
  """Slices trained on per second: the median over the run's log, which leaves out compilation and validation."""
  entries = map(json.loads, (run / 'log.jsonl').read_text().splitlines())
  return statistics.median(e['train/slices_per_second'] for e in entries if 'train/slices_per_second' in e)


def _cell(record, column):
  """As the paper prints it: percent, AUC as a fraction; with the spread over seeds or, of one, the 95% interval."""
  mean, spread, low, high = (record[f'{column}{part}'] for part in ('', ' sd', ' low', ' high'))
  scale, digits, unit = (1, 3, '') if column == 'AUC' else (100, 2, '%')
  if mean is None:
    return 'undefined'
  shown = lambda value: f'{value * scale:.{digits}f}'
  beside = f' ± {shown(spread)}' if spread is not None else f' [{shown(low)}, {shown(high)}]' if low is not None else ''
  return f'{shown(mean)}{unit}{beside}'


def _ablation(config, seeds, workdir):
  """A line for each pair of models with and without FUSA, and each seed: the difference, patient by patient."""
  for fusa, plain in PAIRS[config.task]:
    for seed in seeds:
      runs = [workdir / f'{name}-seed{seed}' for name in (fusa, plain)]
      if all(map(results.is_complete, runs)):
        tables = [results.read_table(run) for run in runs]
        found = compare.paired(tasks.KINDS[config.task], *([table] for table in tables))['per_patient']
        yield f'\n{fusa} minus {plain}, seed {seed}: {compare.per_patient_line(found)}'


def _caption(config, seeds, workdir, records):
  first = next(workdir.glob(f'{records[0]["name"]}-seed*/test/metrics.json'))
  result = json.loads(first.read_text())
  device = jax.devices()[0]
  machine = (
    f'{os.cpu_count()} CPU cores' if device.platform == 'cpu' else f'{jax.device_count()} x {device.device_kind}'
  )
  spread = ' Mean ± standard deviation over the seeds.' if len(seeds) > 1 else ' In brackets: 95% over patients.'
  return (
    f'{result["dataset"]}, fold {config.data.fold}: {result["num_slices"]} test slices of {result["num_patients"]} '
    f'patients, {config.data.image_size} x {config.data.image_size}. {config.train.steps} steps of '
    f'{config.train.batch_size} slices, seeds {", ".join(map(str, seeds))}.{spread} GFLOPs: one slice forward. '
    f'slices/s: in training, on {machine}. {datetime.date.today()}, jax {jax.__version__}, commit {result["commit"]}.'
  )


if __name__ == '__main__':
  launch.start(main)
