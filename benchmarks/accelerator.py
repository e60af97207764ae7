"""Runs the benchmarks that matter on one accelerator, in one command of at most 8.5 minutes.

  python -m benchmarks.accelerator --output=FOLDER

The parts run in the order of their importance, each in its own process: the training step of FUSA-ResUnet with and
without FUSA beside the compiler's prediction, then PyTorch, the same for FUSA-ResNet-50, then the longest operations,
whole volumes and the input path. Each part has a share of the time, and also gets what earlier parts left. Compiled
programs are kept on disk, so that later parts start sooner.

Each part's Markdown is printed when the part ends. FOLDER/report.md has all parts so far, the .log files what the parts
wrote to standard error, and the .json files the numbers. A part that fails, hangs or runs out of memory does not stop
the others: the report has its reason, and the exit code is 1. docs/benchmarks.md says how to prepare a machine without
internet.
"""

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import time
from typing import NamedTuple

from absl import flags

from benchmarks.settings import define_size_flags
from fusa_jax.runs import arguments
from fusa_jax.system import exits, program
from fusa_jax.system.errors import UserError


class Part(NamedTuple):
  """A command of the benchmark.

  Attributes:
    name: names its files.
    seconds: its share of 8.5 minutes. It may also use the time that earlier parts left.
    arguments: the arguments for Python.
  """

  name: str
  seconds: float
  arguments: list[str]


def define_flags() -> None:
  define_size_flags(['fusa_resunet', 'fusa_resnet50'])
  flags.DEFINE_string('output', None, 'folder for the report and the numbers')
  flags.DEFINE_float('minutes', 8.5, 'time limit for all parts together', lower_bound=0.1)


def parts(output: pathlib.Path, models: list[str], sizes: dict[str, int | None]) -> list[Part]:
  """Returns the parts in the order of their importance.

  Args:
    output: folder for the files of the parts.
    models: names of models with FUSA. Each is also measured without FUSA.
    sizes: flags of benchmarks.settings and their values; None: the default of the part.
  """
  chosen = {name: value for name, value in sizes.items() if value is not None}

  def command(module, *names, **more):
    values = more | {name: chosen[name] for name in names if name in chosen}
    return ['-m', f'benchmarks.{module}', *(f'--{name}={value}' for name, value in values.items())]

  result = []
  for number, name in enumerate(models):
    both = f'{name},{name.removeprefix("fusa_")}'
    step = command('step_times', *sizes, models=both, output=output)
    eager = command('compare', *sizes, models=both, json=output / f'eager-{name}.json')
    compiled = command('compare', *sizes, models=name, json=output / f'compiled-{name}.json')
    # torch.compile may take minutes, so it is a part of its own.
    result += [
      Part(f'step-{name}', 55 if number else 150, step),
      Part(f'eager-{name}', 50 if number else 60, [*eager, '--notorch_compile']),
      Part(f'compiled-{name}', 50 if number else 75, compiled),
    ]
  profile = [*command('step_times', *sizes, models=models[0], output=output), '--profile']
  result.append(Part('operations', 20, profile))
  if 'fusa_resunet' in models:
    scans = {'size': sizes['image_size'], 'volumes': 4, 'slices': 100, 'rounds': 2, 'width': 64}
    volumes = command('prediction', 'image_size', 'batch_size', 'width', model='fusa_resunet', **scans)
    result.append(Part('volumes', 25, volumes))
  return [*result, Part('input', 25, command('input_pipeline', 'image_size', 'batch_size'))]


def run(part: Part, output: pathlib.Path, until: float) -> tuple[str, str | None]:
  """Runs a part until `until`, a time of time.monotonic; returns its output, and the reason if it is incomplete.

  The part's process and all that it started have ended when this returns.
  """
  log, began = output / f'{part.name}.log', time.monotonic()
  if until <= began:
    return '', 'no time was left'
  with (output / f'{part.name}.out').open('w+') as out, log.open('w') as err:
    process = subprocess.Popen(
      [sys.executable, *part.arguments],
      stdout=out,
      stderr=err,
      env=os.environ | {'PYTHONUNBUFFERED': '1'},
      start_new_session=True,
    )
    try:
      code = process.wait(until - began)
      reason = _reason(code, log.read_text(errors='replace')) if code else None
    except subprocess.TimeoutExpired:
      reason = f'stopped after {time.monotonic() - began:.0f} s, at the end of its time'
    finally:
      with contextlib.suppress(ProcessLookupError):  # also ends what the part started, for example compilers
        os.killpg(process.pid, signal.SIGKILL)
      process.wait()
    out.seek(0)
    return out.read().strip(), reason


def _reason(code: int, log: str) -> str:
  """Returns one line for a part that failed: its error, the last line of its log, or the signal that ended it."""
  if code < 0:
    return f'ended by {signal.Signals(-code).name}' + (', perhaps out of memory' if code == -signal.SIGKILL else '')
  lines = [line.strip() for line in log.splitlines() if line.strip()]
  errors = [line for line in lines if line.startswith('error: ')] or lines[-1:]
  return errors[0][:300] if errors else f'exit code {code}'


def measure(planned: list[Part], output: pathlib.Path, seconds: float) -> bool:
  """Runs the parts for at most `seconds`, prints each and rewrites report.md after it; returns whether all succeeded.

  Raises:
    UserError: the folder cannot be written.
  """
  try:
    output.mkdir(parents=True, exist_ok=True)
    (output / 'report.md').write_text('')
  except OSError as error:
    raise UserError(f'--output: {output}: cannot be written ({error.strerror}); give another folder') from None
  began, passed, complete, report = time.monotonic(), 0.0, True, ''
  for part in planned:
    passed += part.seconds
    started = time.monotonic()
    text, reason = run(part, output, began + seconds * passed / sum(each.seconds for each in planned))
    section = [f'### {part.name}, {time.monotonic() - started:.0f} s', *([text] if text else [])]
    if reason:
      section.append(f'Incomplete: {reason}')
      complete = False
    print('\n\n'.join(section), end='\n\n', flush=True)
    report += '\n\n'.join(section) + '\n\n'
    (output / 'report.md').write_text(report)
  return complete


def main(_):
  program.start_logging()
  values = flags.FLAGS
  if not values.output:
    raise UserError('--output: missing; give a folder for the report')
  for name in values.models or ['']:
    if not name.startswith('fusa_'):
      raise UserError(f'--models: {name!r} has no FUSA; give for example fusa_resunet, which also measures resunet')
  sizes = {name: getattr(values, name) for name in ('image_size', 'batch_size', 'rounds', 'steps', 'width')}
  output = pathlib.Path(values.output)
  if not measure(parts(output, values.models, sizes), output, 60 * values.minutes):
    exits.leave(1)


if __name__ == '__main__':
  define_flags()
  arguments.start(main)
