"""Measures the effect of flips, lungs, the smallest lesion and ensembles, patient by patient, with intervals.

  python launch.py --config=configs/seg.py --config.data.fold=all --workdir=RUNS
  python -m benchmarks.better_masks --workdir=RUNS --out=FILE.md

The command evaluates each fold of a finished cross-validation with each option alone and with all of them. Each time,
it chooses the operating point again on the fold's own validation patients. New phantoms, which no fold has seen, show
the effect of the mean of the folds compared with a single fold. Rerun the command to resume it.
"""

import datetime
import pathlib

import jax
import numpy as np
from absl import flags

from data import prepare
from fusa_jax import tasks
from fusa_jax.inference import predictor
from fusa_jax.measures import statistics
from fusa_jax.measures.masks import SUPPORT
from fusa_jax.runs import arguments, experiment, result_files, run_config, split
from fusa_jax.system import program, provenance
from fusa_jax.system.errors import UserError
from fusa_jax.system.files import replacing
from fusa_jax.training import cross_validation, evaluate

_OUT = flags.DEFINE_string('out', None, 'file for the tables; default: better_masks.md in the workdir')
_NEW = flags.DEFINE_integer('new', 40, 'number of phantoms that no fold has seen')
_SEED = flags.DEFINE_integer('seed', 8, 'seed of the new phantoms')

PLAIN, ALL = 'as they are', 'all three'
VARIANTS = {
  PLAIN: (),
  'flips': ('flips',),
  'lungs': ('lungs',),
  'smallest lesion': ('fit_smallest',),
  ALL: ('flips', 'lungs', 'fit_smallest'),
}
# Title: (column of volumes.csv, digits, whether a patient's row counts).
MEASURES = {
  'Dice': ('dice', 4, lambda row: True),
  'HD95, mm': ('hd95_mm', 1, lambda row: True),
  'lesions found': ('lesion_sensitivity', 3, lambda row: True),
  'false lesions': ('false_positives', 2, lambda row: True),
  'mL in scans without lesion': ('predicted_ml', 2, lambda row: row['true_ml'] == 0),
}


def main(_):
  program.start_logging()
  program.use_compilation_cache()
  workdir = arguments.path_flag('workdir')
  config = run_config.load_config(workdir)
  data_dir, scans = experiment.prepared(config), experiment.scans_at_hand(config)
  tested, folders, classes = {}, {}, tasks.classes_of(config).names
  if len(classes) > 1:
    raise UserError('workdir: has several classes; give a run of one class')
  for name, options in VARIANTS.items():
    folders[name] = [
      evaluated(run, one, workdir / 'better_masks' / name.replace(' ', '_'), options, data_dir, scans)
      for run, one in cross_validation.runs(config, workdir, data_dir).items()
    ]
    parts = [result_files.read_parts(folder, classes)[classes[0]] for folder in folders[name]]
    tested[name] = [row for part in parts for row in part.volumes]
  phantoms = dict(config.data.phantom) | {'patients': _NEW.value, 'seed': _SEED.value}
  new = prepare.scans(prepare.draw_phantoms(config.data.image_size, **phantoms))
  each = [scored(predictor.load_predictor(folder), new) for folder in folders[PLAIN]]
  single = [
    {key: value if key == 'case' else np.mean([row[key] for row in rows]) for key, value in rows[0].items()}
    for rows in zip(*each, strict=True)
  ]
  unseen = {'single folds, averaged': single} | {
    f'mean of the folds{"" if name == PLAIN else ", " + name}': scored(predictor.load_predictor(folders[name]), new)
    for name in (PLAIN, 'flips', ALL)
  }
  chosen = {
    name: [predictor.load_predictor(folder).points[classes[0]].smallest_ml for folder in folders[name]]
    for name in VARIANTS
  }
  text = '\n'.join(
    [
      f'{len(scans)} patients, each tested by the fold that has not seen it:\n',
      table({'no option' if name == PLAIN else name: rows for name, rows in tested.items()}),
      f'\n{len(new)} new phantoms (seed {_SEED.value}), which none of the {len(each)} folds has seen:\n',
      table(unseen),
      '\nThe other rows are differences from the first row. Brackets: 95% intervals over patients. Pairs with an '
      'undefined value are left out, for example the Dice of two empty masks.',
      f'Smallest lesions that the folds chose, mL: {chosen["smallest lesion"]}; with all three: {chosen[ALL]}.',
      f'{config.model.name} of width {config.model.width} at {config.data.image_size} x {config.data.image_size}, '
      f'{jax.devices()[0].device_kind}, jax {jax.__version__}, {datetime.date.today()}, commit {provenance.commit()}',
    ]
  )
  print(text)
  with replacing(pathlib.Path(_OUT.value or workdir / 'better_masks.md')) as partial:
    partial.write_text(text + '\n')


def evaluated(run: pathlib.Path, config, folder: pathlib.Path, options, data_dir, scans) -> pathlib.Path:
  """Evaluates a run's checkpoints with the options, in a folder of its own; returns that folder."""
  copy = folder / run.name
  for key in ('flips', 'lungs', 'fit_smallest'):
    config.evaluate[key] = key in options
  config.evaluate.num_overlays = 0
  if not result_files.is_complete(copy / split.TEST):
    run_config.save_config(copy, config)
    if not (copy / 'checkpoints').exists():
      (copy / 'checkpoints').symlink_to((run / 'checkpoints').resolve())
    evaluate.evaluate(config, copy, data_dir, scans)
  return copy


def scored(run: predictor.Predictor, scans) -> list[dict]:
  (rows,) = evaluate.score_volumes(run, scans, list(scans)).values()
  return rows


def table(rows_of: dict[str, list[dict]]) -> str:
  """Returns Markdown: means over patients in the first row, then mean differences from it, patient by patient."""
  (first, base), *others = rows_of.items()
  lines = [f'| | {" | ".join(MEASURES)} |', f'| --- |{" --- |" * len(MEASURES)}']
  for name, rows in [(first, base), *others]:
    assert [row['case'] for row in rows] == [row['case'] for row in base]
    cells = []
    for key, digits, is_counted in MEASURES.values():
      kept = [number for number, row in enumerate(base) if is_counted(row)]
      values = np.array([rows[k][key] - (0 if rows is base else base[k][key]) for k in kept], float)
      cells.append(shown(values, digits, SUPPORT[key] if rows is base else (-np.inf, np.inf)))
    lines.append(f'| {name} | {" | ".join(cells)} |')
  return '\n'.join(lines)


def shown(values: np.ndarray, digits: int, support: tuple[float, float]) -> str:
  """Returns the mean of values [patients] and its interval as text; differences, which have no support, with a sign."""
  low, high = statistics.mean_interval(values, support)
  number = f'{{:{"" if np.isfinite(support).any() else "+"}.{digits}f}}'.format
  return f'{number(np.nanmean(values))} [{number(low)}, {number(high)}]'


if __name__ == '__main__':
  arguments.start(main)
