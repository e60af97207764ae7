"""The report of a run's test: one self-contained page with the training, the data, every result with its interval and
definition, pictures, and the limits of use."""

import base64
import datetime
import importlib.metadata
import io
import json
import logging
import pathlib
import shlex
from collections.abc import Sequence

import jax
import numpy as np
from PIL import Image

from fusa_jax import tasks
from fusa_jax.measures import exclusive, masks, metrics
from fusa_jax.runs import figures, operating_point, result_files, results, run_config
from fusa_jax.runs.split import TEST
from fusa_jax.scans.classes import file_name
from fusa_jax.system import own_files, pages
from fusa_jax.tasks import window

_OVERLAYS = 6
_ALT = {
  'confusion_matrix': 'Confusion matrix',
  'roc': 'ROC curve of slices',
  'roc_of_patients': 'ROC curve of patients',
  'precision_recall': 'Precision against recall',
  'calibration': 'Share with lesion against predicted probability',
  'patients': 'Score of each patient with lesion',
}
_LIBRARIES = ('jax', 'flax', 'optax', 'orbax-checkpoint', 'grain', 'numpy', 'scipy')


def write_report(workdir: pathlib.Path, data_cards: Sequence[dict], test: str = TEST) -> pathlib.Path:
  """Writes report.html of an evaluated run or cross-validation and returns its path.

  A run of several classes has a report for each, in the folder of the class, and a page with the numbers of all.

  It does not replace a report that somebody has changed.

  Args:
    workdir: folder of the run.
    data_cards: `datasets.card` of the test data for each class.
    test: name of the folder of the test.

  Raises:
    UserError: the run was not evaluated.
  """
  config = run_config.load_config(workdir)
  result = result_files.read_numbers(workdir, test)
  classes = tasks.classes_of(config).names
  parts = result_files.read_parts(workdir, classes, test)
  for number, (name, numbers) in enumerate(results.by_class(result, classes).items()):
    of_class = name if len(classes) > 1 else None
    _write_class(workdir, test, config, numbers, parts[name], data_cards[number], of_class, classes)
  if len(classes) > 1:
    _write(
      workdir / test / result_files.REPORT,
      'report_classes.html',
      config=config,
      result=result,
      task_type=tasks.type_of(config.task),
      classes={name: file_name(name) for name in classes},
      labels=metrics.LABELS,
      definitions=metrics.DEFINITIONS,
      exclusive_labels=exclusive.LABELS,
      confusion={
        counted: figures.svg(figure, f'Confusion matrix of {counted}')
        for counted, figure in result_files.confusion_matrices(result).items()
      },
      caveat=results.caveat(result),
      has_slices=results.scores_slices(result),
      is_phantom='phantom' in result['dataset'],
      report=result_files.REPORT,
      today=datetime.date.today(),
    )
  return workdir / test / result_files.REPORT


def _write(path, template, **values):
  """Writes a page, unless somebody has changed it."""
  if own_files.has_changed(path, None):
    logging.warning('%s was changed since, so no new report is written', path)
    return
  pages.write_page(path, template, **values)


def _write_class(workdir, test, config, result, part, data_card, of_class, classes):
  """Writes the report of a class.

  Args:
    workdir, test: as in `write_report`.
    config: the config of the run.
    result: the contents of metrics.json for the class.
    part: what the test found for it.
    data_card: `datasets.card` for it.
    of_class: its name; None if it is the only one.
    classes: the names of all classes.
  """
  name = of_class or classes[0]
  table = part.table
  task_type = tasks.type_of(config.task)
  folds = sorted(path for path in workdir.glob('fold*') if path.is_dir())
  runs = folds if run_config.is_cross_validation(config) else [workdir]
  volumes = {row['case']: row for row in part.volumes}
  drawn = figures.charts(table, result, part.patients)
  charts = {name: figures.svg(figure, _ALT[name]) for name, figure in drawn.items()}
  has_slices = results.scores_slices(result)
  logs = {run.name: _log(run) for run in runs}
  # The training data decide which score chose the checkpoint; the tested data may have labels of another kind.
  validated = {key for log in logs.values() for entry in log for key in entry if key.startswith('validation/')}
  of_patients = f'validation/{results.PATIENT_SELECTION}' in validated
  selection = results.PATIENT_SELECTION if of_patients else task_type.selection
  selection_label = metrics.LABELS[selection] + (' of patients' if of_patients else '')
  curves = figures.learning_curves(logs, selection)
  points = {run.name: operating_point.load_points(run, classes)[name] for run in runs}
  tests = [result_files.folder_of(run / test, name, classes) for run in runs]
  _write(
    result_files.folder_of(workdir / test, name, classes) / result_files.REPORT,
    result_files.REPORT,
    of_class=of_class,
    is_exclusive=tasks.classes_of(config).exclusive,
    config=config,
    augmentations=_augmentations(config),
    result=result,
    task_type=task_type,
    command=shlex.join(['python', 'launch.py', f'--config={workdir}/config.json', '--workdir=NEW_FOLDER']),
    labels=metrics.LABELS,
    definitions=metrics.DEFINITIONS,
    volume_labels=masks.LABELS,
    charts=charts,
    curves=figures.svg(curves, 'Training loss and validation score by step'),
    thresholds={
      name: figures.svg(
        figures.threshold_curve(p.curve, p.threshold, task_type.overlap), 'Scores by threshold on validation patients'
      )
      for name, p in points.items()
      if p.curve
    },
    data=data_card['folds'],
    caveat=results.caveat(result),
    low_high=window.black_and_white(config.data.intensity, config.data.window),
    validated=bool(validated) if any(logs.values()) else data_card['validated'],
    overlays=list(_overlays(task_type, table, tests, volumes)) if has_slices else [],
    healthy=healthy(table, volumes),
    has_slices=has_slices,
    selection_label=selection_label + (' as the mean over the classes' if of_class else ''),
    is_phantom='phantom' in result['dataset'],
    libraries={name: importlib.metadata.version(name) for name in _LIBRARIES},
    device=jax.devices()[0].device_kind,
    today=datetime.date.today(),
  )


def healthy(table: dict[str, np.ndarray], volumes: dict[str, dict]) -> dict:
  """Counts false marks in the test patients without lesion, at the operating point.

  Args:
    table: of slices.
    volumes: rows of volumes.csv by patient; {} if no scan was available.

  Returns:
    patients: number of patients without lesion. clean: number of these without a mark. pixels: marks of each of the
    others, in what `counted` names. ml: their volumes in mL on the scan's grid; None if one of them has no volume.
  """
  patients = metrics.by_patient(table, '_chosen')
  labelled = set(table['owner'][np.asarray(table['label']) > 0].tolist())
  rows = dict(zip(patients.owners, metrics.patient_rows(patients), strict=True))
  rows = {owner: row for owner, row in rows.items() if owner not in labelled}
  marked = [row for row in rows.values() if row['fp']]
  scans = np.unique(table['patient'][np.isin(table['owner'], list(rows))]).tolist()
  # A cohort may hold scans for some patients and single slices for others.
  ml = None
  if rows and all(scan in volumes for scan in scans):
    ml = dict.fromkeys(rows, 0.0)
    for scan, owner in zip(scans, results.owners_of(table, scans), strict=True):
      ml[owner] += volumes[scan]['predicted_ml']
    ml = list(ml.values())
  return {
    'patients': len(rows),
    'clean': len(rows) - len(marked) if ml is None else sum(value == 0 for value in ml),
    'pixels': [row['fp'] for row in marked],
    'ml': None if ml is None else [value for value in ml if value],
  }


def _overlays(task_type, table, tests, volumes):
  """Yields the pictures that the evaluation drew of the worst and the best patients, as data URLs."""
  for row in figures.telling_slices(table, _OVERLAYS):
    name = results.overlay_name(table, row)
    for path in (folder / 'figures' / name for folder in tests):
      if path.exists():
        out = io.BytesIO()
        Image.open(io.BytesIO(path.read_bytes())).convert('RGB').save(out, 'WEBP', quality=90)
        url = 'data:image/webp;base64,' + base64.b64encode(out.getvalue()).decode()
        yield {'title': results.overlay_title(task_type, table, row, volumes), 'url': url}


def _log(run):
  path = run / 'log.jsonl'
  return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _augmentations(config):
  """Returns the other parts of the augmentation that are on, with their probabilities, as text."""
  ending = '_probability'
  parts = {key.removesuffix(ending): value for key, value in config.augment.items() if key.endswith(ending) and value}
  parts.pop('crop', None)
  return ''.join(f'; {name.replace("_", " ")} with probability {value:g}' for name, value in parts.items())
