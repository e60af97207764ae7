"""Writes docs/step_counts.json: the operations of each model's training step and inference, as XLA counts them.

  JAX_PLATFORMS=cpu python -m benchmarks.step_counts

Run this after a change that should change the counts, once under each release of jax that the tests use. Releases
compile different programs, and a run keeps the counts of the other releases. tests/benchmarks/test_step_counts.py fails
if a count has grown. It measures no time, so it gives the same result on any machine.

All programs are of a tiny size, for one CPU device. Each model has counts of the program that the compiler receives
(StableHLO): operations, arithmetic, and the bytes that single operations would read and write. Two models also have
counts of the compiled program: the bytes that remain after fusion, temporaries, convolutions and products.
"""

import collections
import json
import pathlib
import re

import jax
from absl import app

from benchmarks import workload
from benchmarks.settings import Settings
from fusa_jax import models
from fusa_jax.system.files import write_json

PAGE = pathlib.Path('docs/step_counts.json')
SETTINGS = Settings(image_size=64, batch_size=2, width=8)
# These two cover both tasks, both kinds of block and both kinds of upsampling. A compilation takes 5 to 30 seconds.
COMPILED = ('fusa_resnet18', 'fusa_resunet')
# Smaller relative increases are ignored. Releases of jax lower the same model with slightly different scalars (0.05%
# seen), and XLA compiles slightly different loops for other processors.
MARGINS = {'lowered': 0.01, 'compiled': 0.05}


def lowered(name: str, **changes) -> dict[str, dict[str, int]]:
  """Returns the counts of a model's programs before compilation.

  `changes` replace attributes of the model, for example `attention=None`.
  """
  work = workload.create(workload.config_of(name, SETTINGS), **changes)
  return {'train': _of_lowered(work.lower_step()), 'inference': _of_lowered(work.lower_infer())}


def compiled(name: str) -> dict[str, dict[str, int]]:
  """Returns the counts of a model's compiled programs."""
  work = workload.create(workload.config_of(name, SETTINGS))
  return {'train': _of_compiled(work.lower_step()), 'inference': _of_compiled(work.lower_infer())}


def _of_lowered(program):
  cost = program.cost_analysis()
  # The text contains a function once, even if it is called twice. Nearly all of these are jnp's, without convolutions.
  operations = collections.Counter(re.findall(r'(?<!#)\bstablehlo\.(\w+)', program.as_text()))
  return {
    'flops': int(cost['flops']),
    'bytes': int(cost['bytes accessed']),
    'convolutions': operations['convolution'],
    'dots': operations['dot_general'],
    'operations': operations.total(),
  }


def _of_compiled(program):
  # Switch off LLVM's optimisation of loops: it does not change these counts, and takes most of the time.
  program = program.compile(compiler_options={'xla_backend_optimization_level': 0})
  cost, text = program.cost_analysis(), program.as_text()
  return {
    'flops': int(cost['flops']),
    'bytes': int(cost['bytes accessed']),
    'temporaries': program.memory_analysis().temp_size_in_bytes,
    'convolutions': len(re.findall(r' convolution\(', text)),
    'dots': len(re.findall(r' dot\(', text)),
  }


def grown(now: dict[str, dict[str, int]], before: dict[str, dict[str, int]], margin: float) -> list[str]:
  """Returns a line for each count that has grown by more than the margin."""
  return [
    f'{program} {unit}: {before[program][unit]:,} -> {count:,}'
    for program, counts in now.items()
    for unit, count in counts.items()
    if count > before[program][unit] * (1 + margin)
  ]


def series() -> str:
  """Returns the release of jax without its last number."""
  return '.'.join(jax.__version__.split('.')[:2])


def main(_):
  before = json.loads(PAGE.read_text()) if PAGE.exists() else {'compiled': {}}
  write_json(
    PAGE,
    {
      'image_size': SETTINGS.image_size,
      'batch_size': SETTINGS.batch_size,
      'width': SETTINGS.width,
      'lowered': {name: lowered(name) for name in models.NAMES},
      'compiled': before['compiled'] | {series(): {name: compiled(name) for name in COMPILED}},
    },
  )
  print(f'{PAGE}: written with jax {jax.__version__}')


if __name__ == '__main__':
  app.run(main)
