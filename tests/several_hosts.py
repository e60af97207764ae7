"""Starts real processes over loopback as the hosts of one run. Each runs launch.py and records the slices it reads.

With JAX_ENABLE_X64=1 the whole state is float64; sums in another order then agree to many more digits.
With FILE_LIMIT=BYTES the system refuses larger files, as a full disk does.

As a script: python tests/several_hosts.py NOTES.json, followed by arguments of launch.py.
"""

import atexit
import importlib.abc
import json
import os
import pathlib
import resource
import signal
import socket
import subprocess
import sys

from conftest import SIZE

from fusa_jax import cli

ROOT = pathlib.Path(__file__).parent.parent
TINY = [
  '--config=configs/seg.py:demo',
  '--config.model.width=4',
  '--config.model.multiples=(1,2)',
  f'--config.data.image_size={SIZE}',
  '--config.train.batch_size=8',
  '--config.train.warmup_steps=1',
  '--config.train.log_every=1',
  '--config.evaluate.num_overlays=1',
]


class Hosts:
  """Processes 0 to n - 1 of one run, with their output. As a context manager it kills them at the end."""

  def __init__(self, processes, devices, arguments: list[str], folder: pathlib.Path, each=(), **environment):
    """Starts process k with `devices` fake devices, `arguments` and each[k]; its output goes to folder/k.log."""
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
      free.bind(('localhost', 0))
      port = free.getsockname()[1]
    self._folder, self.processes = folder, []
    for k in range(processes):
      own = [f'--coordinator=localhost:{port}', f'--num_processes={processes}', f'--process_id={k}']
      own = [*(own if processes > 1 else []), *(each[k] if each else [])]
      self.processes.append(
        start([*arguments, *own], devices, folder / f'{k}.log', folder / f'{k}.json', **environment)
      )

  def __enter__(self):
    return self

  def __exit__(self, *_):
    for process in self.processes:
      process.kill()
      process.wait()

  def wait(self, timeout: float = 300) -> list[int]:
    """Waits for the end of all processes and returns their exit codes."""
    return [process.wait(timeout) for process in self.processes]

  def log(self, k: int) -> str:
    return (self._folder / f'{k}.log').read_text()

  def reads(self, k: int) -> dict[str, list[int]]:
    return json.loads((self._folder / f'{k}.json').read_text())


def start(arguments, devices, log, notes, **environment) -> subprocess.Popen:
  """Starts launch.py in its own process."""
  settings = {
    'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0',
    'PYTHONPATH': os.pathsep.join([str(ROOT), str(ROOT / 'tests')]),
    'PYTHONUNBUFFERED': '1',
  }
  with log.open('a') as output:
    return subprocess.Popen(
      [sys.executable, __file__, str(notes), *arguments],
      cwd=ROOT,
      env=os.environ | settings | environment,
      stdout=output,
      stderr=output,
    )


class _Noting:
  """A source of slices that records which were read."""

  def __init__(self, source, read):
    self._source, self._read = source, read

  def __len__(self):
    return len(self._source)

  def __getitem__(self, index):
    self._read.append(int(index))
    return self._source[index]

  def __getattr__(self, name):
    return getattr(self._source, name)


class _WithoutTorch(importlib.abc.MetaPathFinder):
  """Hides PyTorch: tensorboardX would import it, which takes longer than the training of a test."""

  def find_spec(self, name, *_):
    if name == 'torch':
      raise ModuleNotFoundError(name)


def main():
  sys.meta_path.insert(0, _WithoutTorch())
  import dataclasses

  import jax

  from fusa_jax import tasks
  from fusa_jax.training import datasets

  signal.signal(signal.SIGINT, signal.default_int_handler)  # background processes of a shell ignore Ctrl-C
  notes, reads = pathlib.Path(sys.argv.pop(1)), {}
  load = datasets.load_dataset

  def noting(*arguments):
    dataset = load(*arguments)
    splits = {
      name: dataclasses.replace(split, source=_Noting(split.source, reads.setdefault(name, [])))
      for name in ('train', 'validation', 'test')
      if (split := getattr(dataset, name)) is not None
    }
    return dataclasses.replace(dataset, **splits)

  datasets.load_dataset = noting
  if limit := os.environ.get('FILE_LIMIT'):
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
  if jax.config.jax_enable_x64:
    init = tasks.Task.init
    tasks.Task.init = lambda *arguments: jax.tree.map(lambda x: x.astype('float64'), init(*arguments))
  atexit.register(lambda: notes.write_text(json.dumps(reads)))
  cli.start()


if __name__ == '__main__':
  main()
