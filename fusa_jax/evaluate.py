"""Every slice of a split exactly once -> a table of slices -> numbers with their intervals, files and pictures."""

import csv
import json
import logging
import math
import pathlib
import shutil
import subprocess
import zipfile
import zlib
from collections.abc import Mapping
from types import ModuleType

import jax
import ml_collections
import numpy as np
import tqdm

from fusa_jax import (
  ct,
  figures,
  histogram,
  input_pipeline,
  metrics,
  operating_point,
  predict,
  score,
  sharding,
  statistics,
  tasks,
)
from fusa_jax.errors import UserError
from fusa_jax.files import replacing, write_csv, writing

COLUMNS = ('patient', 'slice', 'label', 'score', *metrics.COUNTS)
TABLE = 'table.npz'
# The same at any threshold.
_OF_SCORES = ('auc', 'brier', 'ece')


class Scorer:
  """Scores the slices of a split on a mesh, in batches of any size; compiled once."""

  def __init__(self, task: tasks.Task, mesh: jax.sharding.Mesh, batch_size: int):
    self._mesh, self._batch_size = mesh, sharding.fitting_batch(mesh, batch_size)

    def run(variables, batch, temperature):
      logits = task.logits(variables, batch['image'])
      highest = logits.reshape(len(logits), -1).max(axis=1)
      counts = histogram.count(logits, task.kind.truth(batch), temperature)
      score = jax.nn.sigmoid(highest / temperature)
      return counts | {'score': score, 'logit': highest, 'index': batch['index']}

    # Every host gets every row: a few thousand numbers each.
    self._run = sharding.compiled_together(jax.jit(run, out_shardings=sharding.replicated(mesh)))

  def table(
    self, variables: dict, split: input_pipeline.Split, temperature: float = 1.0, progress: bool = False
  ) -> dict[str, np.ndarray]:
    """The table of slices, in the split's order.

    Its columns: those of COLUMNS, with the counts at threshold 0.5; `logit`, the highest of the slice, by which slices
    are ranked (probabilities near 0 and 1 round to the same number); and those of `histogram.count`.
    """
    columns, seen = {}, np.zeros(len(split), np.int64)
    steps = math.ceil(len(split) / self._batch_size)
    batches = input_pipeline.test_batches(split, self._mesh, batch_size=self._batch_size)
    divisor = jax.device_put(np.float32(temperature), sharding.replicated(self._mesh))
    for batch in tqdm.tqdm(batches, total=steps, desc='Evaluating', unit='batch', disable=not progress, leave=False):
      rows = jax.device_get(self._run(variables, batch, divisor))
      index = rows.pop('index')
      real = index >= 0
      seen[index[real]] += 1
      for key, values in rows.items():
        if key not in columns:
          columns[key] = np.zeros((len(split), *values.shape[1:]), values.dtype)
        columns[key][index[real]] = values[real]
    assert (seen == 1).all(), 'a slice was read more or less than once'
    columns['logit'] = columns['logit'].astype(np.float64) / temperature
    table = {'patient': split.patient, 'slice': split.slice, 'label': split.label.astype(np.int64), **columns}
    return table | counts_at(table, histogram.BINS // 2)


def counts_at(table: dict[str, np.ndarray], bin: int) -> dict[str, np.ndarray]:
  """tp, fp, fn, tn of each slice, were every pixel from that bin of its histogram up called a lesion."""
  above = table['histogram'][..., bin:].sum(axis=-1, dtype=np.int64)
  below = table['histogram'][..., :bin].sum(axis=-1, dtype=np.int64)
  return {'tp': above[:, 1], 'fp': above[:, 0], 'fn': below[:, 1], 'tn': below[:, 0]}


def evaluate(
  config: ml_collections.ConfigDict,
  workdir: pathlib.Path,
  data_dir: pathlib.Path,
  scans: Mapping[str, tuple[pathlib.Path, pathlib.Path]] | None = None,
) -> dict:
  """Scores a run's best checkpoint on its test fold; process 0 writes test/. Gives what metrics.json holds.

  The operating point is chosen first, on the validation fold; until it is saved, the test fold is not read.

  Args:
    config: of the run.
    workdir: of the run.
    data_dir: of the prepared dataset.
    scans: the scan and the mask as released, by patient, where they are at hand: a segmenter's masks are then also
      compared with them as volumes, on each scan's own grid (by a run of one process).

  Raises:
    UserError: a config that does not fit the data or the devices; no checkpoint, or none that is whole.
  """
  mesh = sharding.create_mesh(config.mesh.data, config.mesh.space)
  batch_size = sharding.fitting_batch(mesh, config.train.batch_size)
  sharding.check_divides(mesh, batch_size, config.data.image_size)
  dataset = input_pipeline.load(data_dir, config.data.fold, config.data.image_size)
  task = tasks.create(config)
  step, variables = predict.load_variables(config, task, workdir, mesh)
  scorer = Scorer(task, mesh, batch_size)

  # ---- the operating point
  point = operating_point.OperatingPoint(step=step)
  if dataset.validation is not None:
    point = operating_point.choose(
      scorer.table(variables, dataset.validation, progress=sharding.is_main()),
      step=step,
      source='the validation fold',
      target_sensitivity=config.evaluate.get('target_sensitivity'),
      fit_temperature=config.evaluate.get('fit_temperature', False),
    )
  if sharding.is_main():
    point.save(workdir)

  # ---- the test fold
  table = scorer.table(variables, dataset.test, point.temperature, progress=sharding.is_main())
  table |= {f'{key}_chosen': values for key, values in counts_at(table, point.bin).items()}
  volumes = None
  if scans and config.task == 'segmentation' and jax.process_count() == 1:
    predictor = predict.Predictor(config, task, mesh, step, variables, point)
    volumes = score_volumes(predictor, scans, list(dict.fromkeys(table['patient'].tolist())))
  result = numbers(task.kind, table, config.evaluate.get('prevalences', ()))
  result['operating_point'] = point.about() | result['operating_point']
  size = sum(x.size for x in jax.tree.leaves(variables['params']))
  result |= {'step': step, 'parameters': size, 'dataset': dataset.name, 'commit': commit()}
  if volumes:
    result['volumes'] = score.summary(volumes)
  if sharding.is_main():
    clear(workdir / 'test')
    _draw(config, task, variables, dataset.test, table, point, workdir / 'test' / 'figures')
    write(workdir / 'test', table, result, volumes)
    logging.info('test fold %s, step %d: %s', config.data.fold, step, one_line(task.kind, result))
  return result


def summary(kind: ModuleType, table: dict[str, np.ndarray]) -> dict[str, float | int | None]:
  """A table's numbers and counts at threshold 0.5, without intervals: what is looked at while training."""
  patients = metrics.by_patient(table)
  return statistics.estimates(patients.statistic(kind.definition), len(patients)) | _counts(patients)


def numbers(kind: ModuleType, table: dict[str, np.ndarray], prevalences=()) -> dict:
  """All that follows from a table of slices, each number with its interval: what metrics.json holds of them."""
  half, chosen = metrics.by_patient(table), metrics.by_patient(table, '_chosen')
  at_chosen = _with_intervals(chosen, kind.definition)
  for name in _OF_SCORES:
    at_chosen.pop(name, None), at_chosen['intervals'].pop(name, None)
  found = _with_intervals(chosen, metrics.detection)
  found['at_prevalence'] = [
    {'prevalence': share, **_with_intervals(chosen, lambda totals, at=share: metrics.detection_at(totals, at))}
    for share in prevalences
  ]
  at_half = _with_intervals(half, kind.definition)
  return {
    **{name: value for name, value in at_half.items() if name != 'intervals'},
    **_counts(half),
    'counted': kind.COUNTED,
    'threshold': 0.5,
    'num_slices': len(table['label']),
    'num_patients': len(half),
    'intervals': {**statistics.method(), **at_half['intervals']},
    'operating_point': {**at_chosen, **_counts(chosen), 'slices': found},
  }


def _with_intervals(patients, definition):
  statistic = patients.statistic(definition)
  return {
    **statistics.estimates(statistic, len(patients)),
    'intervals': statistics.intervals(statistic, len(patients)),
  }


def _counts(patients):
  return {key: int(patients.sums[key].sum()) for key in metrics.COUNTS}


def score_volumes(predictor: predict.Predictor, scans, patients: list[str]) -> list[dict]:
  """A row of `score.volume` for each patient, on process 0: the predictor's mask against the released one."""
  rows = []
  for patient in tqdm.tqdm(patients, desc='Scoring volumes', unit='scan', leave=False, disable=not sharding.is_main()):
    scan = ct.read(scans[patient][0])
    mask = predictor(scan)[1]['mask']
    if sharding.is_main():
      truth = ct.read_mask(scans[patient][1], scan)
      rows.append({'case': patient, **score.volume(mask, truth, scan.spacing, scan.voxel_ml)})
  return rows


def clear(folder: pathlib.Path) -> None:
  """Takes away what must not stand beside the files of another evaluation: its numbers and its pictures."""
  with writing(folder):
    for name in ('metrics.json', 'report.html', 'volumes.csv'):
      (folder / name).unlink(missing_ok=True)
  shutil.rmtree(folder / 'figures', ignore_errors=True)


def write(folder: pathlib.Path, table: dict[str, np.ndarray], result: dict, volumes: list[dict] | None) -> None:
  """The files of test/: metrics.json last, so that a folder with it is complete."""
  slices = zip(*(table[key] for key in COLUMNS), strict=True)
  write_csv(folder / 'slices.csv', (dict(zip(COLUMNS, row, strict=True)) for row in slices))
  half, chosen = metrics.by_patient(table), metrics.by_patient(table, '_chosen')
  rows = metrics.patient_rows(half)
  for row, other in zip(rows, metrics.patient_rows(chosen), strict=True):
    row['dice_at_operating_point'] = other['dice']
  write_csv(folder / 'patients.csv', rows)
  if volumes:
    write_csv(folder / 'volumes.csv', volumes)
  with replacing(folder / TABLE) as partial:
    np.savez_compressed(partial, **table)
  figures.write_charts(folder / 'figures', table, result)
  with replacing(folder / 'metrics.json') as partial:
    partial.write_text(json.dumps(result, indent=2) + '\n')


def read_volumes(workdir: pathlib.Path) -> list[dict]:
  """The rows of test/volumes.csv; none where the scans were not at hand."""
  path = workdir / 'test' / 'volumes.csv'
  if not path.exists():
    return []
  with path.open(newline='') as file:
    rows = list(csv.DictReader(file))
  return [{key: value if key == 'case' else float(value or 'nan') for key, value in row.items()} for row in rows]


def read_table(workdir: pathlib.Path) -> dict[str, np.ndarray]:
  """The table of slices that an evaluation left in a run's test/.

  Raises:
    UserError: the run was not evaluated, or the file is damaged.
  """
  path = workdir / 'test' / TABLE
  try:
    with np.load(path, allow_pickle=False) as archive:
      table = dict(archive)
    missing = {
      *COLUMNS,
      *(f'{key}_chosen' for key in metrics.COUNTS),
      'logit',
      'histogram',
      'reliability',
    } - table.keys()
    if missing:
      raise ValueError(f'without {", ".join(sorted(missing))}')
    return table
  except FileNotFoundError:
    raise UserError(f'{path}: missing; evaluate the run with --mode=evaluate --workdir={workdir}') from None
  except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
    raise UserError(
      f'{path}: damaged, or of another version ({error}); make it anew with --mode=evaluate --workdir={workdir}'
    ) from None


def _draw(config, task, variables, split, table, point, folder):
  """Overlays of some slices, computed on one device of this process alone."""
  variables = jax.tree.map(lambda x: x.addressable_data(0), variables)
  probabilities = jax.jit(lambda variables, hu: task.probabilities(variables, hu, point.temperature))
  for row in tqdm.tqdm(figures.telling_slices(table, config.evaluate.num_overlays), desc='Drawing', leave=False):
    example = split.source[row]
    predicted = None
    if config.task == 'segmentation':
      predicted = np.asarray(probabilities(variables, example['image'][None])[0] >= point.threshold)
    title = f'{overlay_title(task.kind, table, row)}, threshold {point.threshold:.3f}'
    path = folder / overlay_name(table, row)
    figures.write_overlay(path, example['image'], example['mask'], predicted, config.data.window, title)


def overlay_title(kind: ModuleType, table: dict[str, np.ndarray], row: int) -> str:
  """Patient, slice, and how well the model did on it at the operating point."""
  tp, fp, fn, tn = (table[f'{key}_chosen'][row] for key in metrics.COUNTS)
  if kind.COUNTED == 'pixels':
    how = f'Dice {statistics.shown(statistics.defined(metrics.dice(tp, fp, fn)))}'
  else:
    how = f'score {table["score"][row]:.3f}, {"rightly" if tp + tn else "wrongly"} called {("no ", "")[tp + fp]}lesion'
  return f'patient {table["patient"][row]}, slice {table["slice"][row]} (0 is the lowest): {how}'


def overlay_name(table: dict[str, np.ndarray], row: int) -> str:
  """The file of a slice's overlay in test/figures/."""
  return f'{table["patient"][row]}_{table["slice"][row]:03d}.png'


def one_line(kind: ModuleType, summary: dict) -> str:
  """The scores for a log: those of the paper's table, with intervals where there are any."""
  return ', '.join(
    f'{name} {statistics.shown(summary[name], summary.get("intervals", {}).get(name))}' for name in kind.SHOWN
  )


def commit() -> str | None:
  """The commit that this code was checked out at; None outside of a repository."""
  folder = pathlib.Path(__file__).parent
  try:
    found = subprocess.run(['git', 'rev-parse', 'HEAD'], cwd=folder, capture_output=True, text=True, check=True)
  except (OSError, subprocess.CalledProcessError):
    return None
  return found.stdout.strip()
