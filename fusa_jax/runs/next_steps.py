"""The last lines of a command: where its results are, and the commands that a user types next."""

import logging
import pathlib
import shlex
from collections.abc import Sequence

from fusa_jax.system import hosts, paths, program


def after_test(workdir: pathlib.Path, test: pathlib.Path, scan: pathlib.Path | None = None) -> None:
  """After an evaluation: the report, a picture if one was drawn, and how to predict.

  Args:
    workdir: folder of the run.
    test: folder of the test.
    scan: a scan to predict as an example; None prints a placeholder.
  """
  masks = 'masks' if paths.in_bucket(workdir) else workdir / 'masks'
  source, picture = str(scan) if scan else 'SCAN_OR_FOLDER', test / 'figures' / 'overview.png'
  _log(
    [
      ('results', test / 'metrics.json'),
      ('report', test / 'report.html'),
      *([('picture', picture)] if picture.is_file() else []),
      ('predict', _command('predict', workdir=workdir, input=source, output=masks)),
      ('view', _command('view', input=source, output=masks)),
    ]
  )


def after_prediction(source: str, output: str) -> None:
  """After a prediction: how to look at the masks."""
  _log([('results', output), ('view', _command('view', input=source, output=output))])


def after_preparation(data_dir: pathlib.Path) -> None:
  """After preparing a cohort: how to train on it."""
  _log([('prepared', data_dir), ('train', 'the same command without --mode=prepare')])


def after_export(bundle: pathlib.Path) -> None:
  """After an export: the model card, and how to predict with the bundle."""
  command = _command('predict', workdir=bundle, input='SCAN_OR_FOLDER', output='masks')
  _log([('exported', bundle), ('card', bundle / 'README.md'), ('predict', command)])


def _command(mode, **flags):
  return f'{program.command()} --mode={mode} ' + ' '.join(f'--{key}={shlex.quote(str(v))}' for key, v in flags.items())


def _log(lines: Sequence[tuple[str, object]]) -> None:
  if hosts.is_main():
    width = max(len(name) for name, _ in lines) + 2
    logging.info('\n'.join(f'{name + ":":{width}}{value}' for name, value in lines))
