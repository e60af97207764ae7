"""A run's test as one page that needs nothing beside it: what was trained on what, every number with its interval and
definition, pictures, and what the model must not be used for."""

import base64
import datetime
import importlib.metadata
import io
import json
import pathlib

import jax
import numpy as np
from PIL import Image

from fusa_jax import figures, input_pipeline, metrics, operating_point, pages, results, run_config, tasks, window

_OVERLAYS = 6
_LIBRARIES = ('jax', 'flax', 'optax', 'orbax-checkpoint', 'grain', 'numpy', 'scipy')


def write(workdir: pathlib.Path, data_dir: pathlib.Path, command: str) -> pathlib.Path:
  """Writes test/report.html of an evaluated run or cross-validation; gives its path.

  Args:
    workdir: of the run.
    data_dir: of the dataset that it was tested on.
    command: the line that repeats the run.

  Raises:
    UserError: the run was not evaluated.
  """
  config, folds = run_config.load(workdir), input_pipeline.folds(data_dir)
  table = results.read_table(workdir)
  result = results.read_numbers(workdir)
  kind = tasks.KINDS[config.task]
  runs = sorted(workdir.glob('fold*/')) if config.data.fold == 'all' else [workdir]
  charts = {name: figures.svg(figure) for name, figure in figures.charts(table, result).items()}
  curves = figures.learning_curves({run.name: _log(run) for run in runs}, kind.SELECTION)
  points = {run.name: operating_point.load(run) for run in runs}
  path = workdir / 'test' / 'report.html'
  pages.write(
    path,
    'report.html',
    config=config,
    result=result,
    kind=kind,
    command=command,
    definitions=metrics.DEFINITIONS,
    charts=charts,
    curves=figures.svg(curves),
    thresholds={
      name: figures.svg(figures.threshold_curve(p.curve, p.threshold)) for name, p in points.items() if p.curve
    },
    data=_data_card(folds, config.data.fold),
    caveat=results.caveat(result),
    low_high=window.black_and_white(config.data['values'], config.data.window),
    validated=bool(input_pipeline.parts(0, len(folds))['validation']),
    overlays=list(_overlays(kind, table, runs)),
    is_phantom='phantom' in result['dataset'],
    libraries={name: importlib.metadata.version(name) for name in _LIBRARIES},
    device=jax.devices()[0].device_kind,
    today=datetime.date.today(),
  )
  return path


def _data_card(folds, tested):
  """A row for each fold: what it was used for, patients, slices, lesion volumes where they are known."""
  roles = dict.fromkeys(range(len(folds)), 'tested once')
  if tested != 'all':
    parts = input_pipeline.parts(tested, len(folds))
    roles = {k: {'train': 'training'}.get(part, part) for part, chosen in parts.items() for k in chosen}
  rows = []
  for k, patients in enumerate(folds):
    slices = np.concatenate([patient['lesion_voxels'] for patient in patients])
    row = {
      'fold': k,
      'role': roles[k],
      'patients': len(patients),
      'without_lesion': sum(not any(patient['lesion_voxels']) for patient in patients),
      'slices': len(slices),
      'positive': int((slices > 0).sum()),
    }
    volumes = [patient['lesion_ml'] for patient in patients]
    if None not in volumes:  # as of pictures
      row |= {
        'lesion_ml': float(np.sum(volumes)),
        'median_ml': float(np.median(volumes)),
        'largest_ml': float(np.max(volumes)),
      }
    rows.append(row)
  return rows


def _overlays(kind, table, runs):
  """The pictures that evaluation drew of the worst and the best patients, as data URLs."""
  for row in figures.telling_slices(table, _OVERLAYS):
    name = results.overlay_name(table, row)
    for path in (run / 'test' / 'figures' / name for run in runs):
      if path.exists():
        out = io.BytesIO()
        Image.open(path).convert('RGB').save(out, 'WEBP', quality=90)
        url = 'data:image/webp;base64,' + base64.b64encode(out.getvalue()).decode()
        yield {'title': results.overlay_title(kind, table, row), 'url': url}


def _log(run):
  path = run / 'log.jsonl'
  return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
