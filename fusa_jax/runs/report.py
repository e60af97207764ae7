"""A run's test as one page that needs nothing beside it: what was trained on what, every number with its interval and
definition, pictures, and what the model must not be used for."""

import base64
import datetime
import importlib.metadata
import io
import json
import pathlib
import shlex

import jax
from PIL import Image

from fusa_jax import tasks
from fusa_jax.measures import metrics
from fusa_jax.runs import figures, operating_point, results, run_config
from fusa_jax.system import pages
from fusa_jax.tasks import window

_OVERLAYS = 6
_LIBRARIES = ('jax', 'flax', 'optax', 'orbax-checkpoint', 'grain', 'numpy', 'scipy')


def write_report(workdir: pathlib.Path, data_card: dict) -> pathlib.Path:
  """Writes test/report.html of an evaluated run or cross-validation; gives its path.

  Args:
    workdir: of the run.
    data_card: `datasets.card` of what it was tested on.

  Raises:
    UserError: the run was not evaluated.
  """
  config = run_config.load_config(workdir)
  table = results.read_table(workdir)
  result = results.read_numbers(workdir)
  task_type = tasks.type_of(config.task)
  runs = sorted(workdir.glob('fold*/')) if run_config.is_cross_validation(config) else [workdir]
  charts = {name: figures.svg(figure) for name, figure in figures.charts(table, result).items()}
  curves = figures.learning_curves({run.name: _log(run) for run in runs}, task_type.selection)
  points = {run.name: operating_point.load_point(run) for run in runs}
  path = workdir / 'test' / 'report.html'
  pages.write_page(
    path,
    'report.html',
    config=config,
    result=result,
    task_type=task_type,
    command=shlex.join(['python', 'launch.py', f'--config={workdir}/config.json', '--workdir=NEW_FOLDER']),
    definitions=metrics.DEFINITIONS,
    charts=charts,
    curves=figures.svg(curves),
    thresholds={
      name: figures.svg(figures.threshold_curve(p.curve, p.threshold)) for name, p in points.items() if p.curve
    },
    data=data_card['folds'],
    caveat=results.caveat(result),
    low_high=window.black_and_white(config.data.intensity, config.data.window),
    validated=data_card['validated'],
    overlays=list(_overlays(task_type, table, runs)),
    is_phantom='phantom' in result['dataset'],
    libraries={name: importlib.metadata.version(name) for name in _LIBRARIES},
    device=jax.devices()[0].device_kind,
    today=datetime.date.today(),
  )
  return path


def _overlays(task_type, table, runs):
  """The pictures that evaluation drew of the worst and the best patients, as data URLs."""
  for row in figures.telling_slices(table, _OVERLAYS):
    name = results.overlay_name(table, row)
    for path in (run / 'test' / 'figures' / name for run in runs):
      if path.exists():
        out = io.BytesIO()
        Image.open(path).convert('RGB').save(out, 'WEBP', quality=90)
        url = 'data:image/webp;base64,' + base64.b64encode(out.getvalue()).decode()
        yield {'title': results.overlay_title(task_type, table, row), 'url': url}


def _log(run):
  path = run / 'log.jsonl'
  return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
