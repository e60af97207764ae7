"""All that is to be known of one accelerator, in one command of at most eight minutes.

  python -m benchmarks.accelerator --out=FILE

JAX_PLATFORMS=cpu and tiny sizes rehearse it anywhere; docs/benchmarks.md has that command, and which wheels must be
carried to a machine that has jax, flax, optax, torch and torchvision but no internet.

Each part is a process of its own, with a share of the time: what crashes, hangs or runs out of memory costs its own
numbers only. FILE is written anew, whole, at each number found. What a part could not give, FILE and the tables say:
a package that is missing, the end of its time, an error.
"""

import dataclasses
import datetime
import importlib.util
import logging
import multiprocessing
import os
import pathlib
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator
from typing import Any

from absl import flags

from benchmarks import accelerator_report
from fusa_jax import models
from fusa_jax.system import exits, program
from fusa_jax.system.errors import UserError
from fusa_jax.system.files import write_json

# What training and prediction import, besides what jax, flax and optax bring: no part can do without.
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
class Asked:
  """The command's flags, and a folder for what a part must write."""

  models: tuple[str, ...]
  image_size: int
  batch_size: int
  width: int | None
  rounds: int
  steps: int
  memory_limit: int | None
  folder: str


@dataclasses.dataclass(frozen=True)
class Part:
  """A function of benchmarks/accelerator_parts.py; of eight minutes it has `seconds`, and what parts before it left."""

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
  """Not on import: other benchmarks have flags of these names."""
  flags.DEFINE_string('out', None, 'a file for the numbers, as JSON')
  flags.DEFINE_list('models', ['fusa_resunet', 'resunet', 'fusa_resnet50', 'resnet50'], 'of the registry')
  flags.DEFINE_list('parts', list(PARTS), 'which of the parts')
  flags.DEFINE_float('minutes', 8.0, 'for all of it; each part has its share', lower_bound=0.1)
  flags.DEFINE_integer('image_size', 512, 'side of the slices', lower_bound=1)
  flags.DEFINE_integer('batch_size', 8, 'slices a batch', lower_bound=1)
  flags.DEFINE_integer('width', None, "of a model's first level; default: its own", lower_bound=1)
  flags.DEFINE_integer('rounds', 5, 'times that each contestant has its turn; the median counts', lower_bound=1)
  flags.DEFINE_integer('steps', 5, 'steps in a turn', lower_bound=1)
  flags.DEFINE_integer('memory_limit_mb', None, "of the largest batch; default: the device's own", lower_bound=1)


def main(_):
  program.start_logging()
  asked = flags.FLAGS
  if not asked.out:
    raise UserError('--out: missing; name a file for the numbers')
  for flag, given, known in (('parts', asked.parts, PARTS), ('models', asked.models, models.NAMES)):
    for name in given or ['']:
      if name not in known:
        raise UserError(f'--{flag}: there is no {name!r}; one or more of {", ".join(known)}')
  limit = asked.memory_limit_mb * 10**6 if asked.memory_limit_mb else None
  with tempfile.TemporaryDirectory() as folder:
    wanted = Asked(
      models=tuple(asked.models),
      image_size=asked.image_size,
      batch_size=asked.batch_size,
      width=asked.width,
      rounds=asked.rounds,
      steps=asked.steps,
      memory_limit=limit,
      folder=folder,
    )
    report = measure(wanted, asked.parts, 60 * asked.minutes, pathlib.Path(asked.out))
  if not report['parts']:
    reasons = '\n'.join(f'{name}: {reason}' for name, reason in report['not_whole'].items())
    raise UserError(f'nothing was measured\n{reasons}')
  print(accelerator_report.markdown(report))


def measure(asked: Asked, parts: list[str], seconds: float, out: pathlib.Path) -> dict:
  """Runs the parts, writing the report to `out` whenever something is found; gives the report.

  It has `device`, `date`, `commit`, `versions`; `settings`; `parts`, what each of them found; `not_whole`, why one
  found nothing or not all; and `seconds`, how long each took.

  Raises:
    UserError: `out` cannot be written.
  """
  settings = dataclasses.asdict(asked)
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
      reason = f'needs {", ".join(missing)}, which the machine lacks; docs/benchmarks.md says how to carry them'
    else:
      logging.info('%s: %.0f s at most', name, until - started)
      reason = None
      for kind, value in _run(name, asked, until):
        if kind == 'facts':
          report.update(value)
        elif kind == 'found':
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


def _run(name: str, asked: Asked, until: float) -> Iterator[tuple[str, Any]]:
  """What the part's process sends, until it has ended or its time is over: ('facts' | 'found', a dict), or a reason."""
  # Spawned, not forked: it must find the device as a new process does.
  context = multiprocessing.get_context('spawn')
  here, there = context.Pipe(duplex=False)
  process = context.Process(target=_work, args=(there, name, asked))
  started = time.monotonic()
  process.start()
  there.close()  # so that the part's end is the only one, and its death is seen
  try:
    while here.poll(max(0.0, until - time.monotonic())):
      kind, value = here.recv()
      if kind == 'done':
        return
      yield kind, value
      if kind == 'reason':
        return
    yield 'reason', f'stopped after {time.monotonic() - started:.0f} s: its share of the time was over'
  except EOFError:
    process.join()
    yield 'reason', f'its process died with code {process.exitcode}, perhaps for want of memory'
  finally:
    process.kill()
    process.join()


def _work(connection, name: str, asked: Asked) -> None:
  """A part's process."""
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the command too, which ends this
  import tqdm

  from benchmarks import jobs

  tqdm.tqdm.set_lock(threading.RLock())  # one that processes share would be reported as leaked
  threading.Thread(target=jobs.leave_with_parent, daemon=True).start()
  program.start_logging()
  program.use_compilation_cache()
  try:
    if 'torch' in PARTS[name].needs:
      from benchmarks import compare  # noqa: F401 (before JAX takes the GPU's memory: PyTorch needs some)
    from benchmarks import accelerator_parts

    connection.send(('facts', accelerator_parts.facts()))
    for found in getattr(accelerator_parts, name)(asked):
      connection.send(('found', found))
    connection.send(('done', None))
  except UserError as error:
    connection.send(('reason', str(error)))
  except ModuleNotFoundError as error:
    connection.send(('reason', f'needs {error.name}, which the machine lacks; docs/benchmarks.md says how to carry it'))
  except Exception as error:
    traceback.print_exc()
    connection.send(('reason', f'{type(error).__name__}: {(str(error).strip() or "no message").splitlines()[0]}'))
  connection.close()
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(0)  # threads of the input pipeline and of Orbax have nothing left to finish


if __name__ == '__main__':
  define_flags()
  try:
    from fusa_jax.runs import arguments
  except ModuleNotFoundError as error:
    exits.fail(UserError(f'{error.name}: missing on this machine; docs/benchmarks.md says which wheels to carry'))
  # Under its own name, by which the parts' processes know it.
  from benchmarks import accelerator

  arguments.start(accelerator.main)
