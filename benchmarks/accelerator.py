"""Measures training, memory, input and prediction on one accelerator, in one command of at most eight minutes.

  python -m benchmarks.accelerator --out=FILE

With JAX_PLATFORMS=cpu and tiny sizes, it also runs on a CPU: docs/benchmarks.md has the command. The same page lists
the wheels to copy to a machine without internet that has jax, flax, optax, torch and torchvision.

Each part runs in its own process and has a share of the time. A part that crashes, hangs or runs out of memory loses
only its own numbers. Each new number rewrites the complete FILE. FILE and the tables also give the reason why a part is
incomplete: a missing package, the end of its time, or an error.
"""

import dataclasses
import datetime
import importlib.util
import logging
import os
import pathlib
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator
from typing import Any

from absl import flags

from benchmarks import accelerator_report, processes
from benchmarks.settings import Options
from fusa_jax import models
from fusa_jax.system import exits, program
from fusa_jax.system.errors import UserError
from fusa_jax.system.files import write_json

# Packages that every part needs and that jax, flax and optax do not install.
EVERYWHERE = (
  'clu',
  'grain',
  'isal',
  'matplotlib',
  'ml_collections',
  'nibabel',
  'safetensors',
  'scipy',
  'tensorboardX',
  'tensorflow_datasets',
  'tqdm',
)
_OWN_TIME = 15  # seconds, for the command itself to start and end


@dataclasses.dataclass(frozen=True)
class Part:
  """A function of benchmarks/accelerator_parts.py.

  Attributes:
    seconds: its share of eight minutes. It may also use the time that earlier parts left.
    needs: the packages that this part needs in addition to EVERYWHERE.
  """

  seconds: int
  needs: tuple[str, ...] = ()


_TORCH = ('torch', 'torchvision')
PARTS = {
  'compare': Part(160, _TORCH),
  'fusa_share': Part(80),
  'largest_batch': Part(60),
  'input_path': Part(25, ('array_record', 'importlib_resources', 'termcolor', 'tree')),
  'prediction': Part(45),
  'profile': Part(25),
  'torch_compile': Part(80, _TORCH),
}


def define_flags() -> None:
  """Defines the flags. Importing this module does not define them, because other benchmarks use the same names."""
  flags.DEFINE_string('out', None, 'file for the numbers, as JSON')
  flags.DEFINE_list('models', ['fusa_resunet', 'resunet', 'fusa_resnet50', 'resnet50'], 'names of models')
  flags.DEFINE_list('parts', list(PARTS), 'parts to run')
  flags.DEFINE_float('minutes', 8.0, 'time limit in minutes for all parts together', lower_bound=0.1)
  flags.DEFINE_integer('image_size', 512, 'side of the slices in pixels', lower_bound=1)
  flags.DEFINE_integer('batch_size', 8, 'slices per batch', lower_bound=1)
  flags.DEFINE_integer('width', None, "channels of the first level; default: the model's own", lower_bound=1)
  flags.DEFINE_integer('rounds', 5, 'turns of each contestant; the median counts', lower_bound=1)
  flags.DEFINE_integer('steps', 5, 'steps per turn', lower_bound=1)
  flags.DEFINE_integer(
    'memory_limit_mb', None, "memory limit for the largest batch; default: the device's memory", lower_bound=1
  )


def main(_):
  program.start_logging()
  values = flags.FLAGS
  if not values.out:
    raise UserError('--out: missing; give a file for the numbers')
  for flag, given, known in (('parts', values.parts, PARTS), ('models', values.models, models.NAMES)):
    for name in given or ['']:
      if name not in known:
        raise UserError(f'--{flag}: {name!r} is unknown; choose from {", ".join(known)}')
  limit = values.memory_limit_mb * 10**6 if values.memory_limit_mb else None
  with tempfile.TemporaryDirectory() as folder:
    options = Options(
      models=tuple(values.models),
      image_size=values.image_size,
      batch_size=values.batch_size,
      width=values.width,
      rounds=values.rounds,
      steps=values.steps,
      memory_limit=limit,
      folder=folder,
    )
    report = measure(options, values.parts, 60 * values.minutes, pathlib.Path(values.out))
  if not report['parts']:
    reasons = '\n'.join(f'{name}: {reason}' for name, reason in report['not_whole'].items())
    raise UserError(f'nothing was measured\n{reasons}')
  print(accelerator_report.markdown(report))


def measure(options: Options, parts: list[str], seconds: float, out: pathlib.Path) -> dict:
  """Runs the parts for at most `seconds`, writes the report to `out` at each new number, and returns it.

  The keys of the report are `device`, `date`, `commit`, `versions` and `settings`; `parts`: the numbers of each part;
  `not_whole`: the reason why a part is incomplete; `seconds`: the time of each part.

  Raises:
    UserError: `out` cannot be written.
  """
  settings = dataclasses.asdict(options)
  del settings['folder']
  report = {
    'device': None,
    'date': str(datetime.date.today()),
    'commit': None,
    'versions': {},
    'settings': settings,
    'parts': {},
    'not_whole': {},
    'seconds': {},
  }
  write_json(out, report)
  began = time.monotonic()
  weight = sum(PARTS[name].seconds for name in parts)
  passed = 0
  for name in parts:
    passed += PARTS[name].seconds
    until = began + (seconds - _OWN_TIME) * passed / weight
    started = time.monotonic()
    missing = [package for package in (*EVERYWHERE, *PARTS[name].needs) if not importlib.util.find_spec(package)]
    if missing:
      reason = f'needs {", ".join(missing)}, missing on this machine; docs/benchmarks.md lists the wheels to install'
    else:
      logging.info('%s: %.0f s at most', name, until - started)
      reason = None
      for topic, value in _run(name, options, until):
        if topic == 'facts':
          report.update(value)
        elif topic == 'result':
          report['parts'][name] = value
        else:
          reason = value
        write_json(out, accelerator_report.finished(report))
    report['seconds'][name] = round(time.monotonic() - started, 1)
    if reason is not None:
      report['not_whole'][name] = reason
      logging.warning('%s: %s', name, reason)
    write_json(out, accelerator_report.finished(report))
  return report


def _run(name: str, options: Options, until: float) -> Iterator[tuple[str, Any]]:
  """Yields the messages of the part's process until `until`, a time of time.monotonic.

  A message is ('facts' | 'result', dict), or at the end ('reason', text) if the part is incomplete.
  """
  started = time.monotonic()
  process, connection = processes.start(_work, name, options)
  try:
    while connection.poll(max(0.0, until - time.monotonic())):
      topic, value = connection.recv()
      if topic == 'done':
        return
      yield topic, value
      if topic == 'reason':
        return
    yield 'reason', f'stopped after {time.monotonic() - started:.0f} s, at the end of its share of the time'
  except EOFError:
    process.join()
    yield 'reason', f'its process ended with code {process.exitcode}, perhaps because it ran out of memory'
  finally:
    process.kill()
    process.join()


def _work(connection, name: str, options: Options) -> None:
  """Measures a part in its own process and sends the messages that `_run` reads; the last is 'done' or 'reason'."""
  import tqdm

  tqdm.tqdm.set_lock(threading.RLock())  # tqdm's default lock is a semaphore, and Python would report it as leaked
  program.start_logging()
  program.use_compilation_cache()
  try:
    if 'torch' in PARTS[name].needs:
      from benchmarks import compare  # noqa: F401 (keeps JAX from taking all of the GPU's memory)
    from benchmarks import accelerator_parts

    connection.send(('facts', accelerator_parts.facts()))
    for result in getattr(accelerator_parts, name)(options):
      connection.send(('result', result))
    connection.send(('done', None))
  except UserError as error:
    connection.send(('reason', str(error)))
  except ModuleNotFoundError as error:
    connection.send(
      ('reason', f'needs {error.name}, missing on this machine; docs/benchmarks.md lists the wheels to install')
    )
  except Exception as error:
    traceback.print_exc()
    connection.send(('reason', f'{type(error).__name__}: {(str(error).strip() or "no message").splitlines()[0]}'))
  connection.close()
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(0)  # do not wait for the threads of the input pipeline and of Orbax


if __name__ == '__main__':
  define_flags()
  try:
    from fusa_jax.runs import arguments
  except ModuleNotFoundError as error:
    exits.fail(UserError(f'{error.name}: missing on this machine; docs/benchmarks.md lists the wheels to install'))
  # Import this file by its module name: the parts' processes find _work by that name.
  from benchmarks import accelerator

  arguments.start(accelerator.main)
