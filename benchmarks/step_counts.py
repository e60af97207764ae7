"""What a training step and inference of each model consist of, as XLA counts it: docs/step_counts.json.

  JAX_PLATFORMS=cpu python -m benchmarks.step_counts

writes that file anew, after a change that was meant to change it; under each release of jax that the tests run under,
since what is compiled differs between them (the other releases' numbers stay). tests/benchmarks/test_step_counts.py
fails where a count has grown: no time is measured, so that it tells the same on any machine.

All are of a tiny size on one CPU device. Of each model, the program as it is handed to the compiler (StableHLO): its
operations, arithmetic and the bytes that these would read and write one by one. Of two models also the compiled one:
what fusion left of those bytes, temporaries, and the convolutions and products that are in it.
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
# Both kinds of task, of block and of upsampling; a compilation takes from 5 to 30 seconds.
COMPILED = ('fusa_resnet18', 'fusa_resunet')
# The least growth that is one: releases of jax lower the same model with some scalars more or less (0.05% seen), and
# on other processors XLA compiles to somewhat other loops.
MARGINS = {'lowered': 0.01, 'compiled': 0.05}


def lowered(name: str, **changes) -> dict[str, dict[str, int]]:
  """The counts of a model's programs before they are compiled; `changes` are of its attributes, as `attention=None`."""
  work = workload.create(workload.config_of(name, SETTINGS), **changes)
  return {'train': _of_lowered(work.lower_step()), 'inference': _of_lowered(work.lower_infer())}


def compiled(name: str) -> dict[str, dict[str, int]]:
  """Those of the compiled programs."""
  work = workload.create(workload.config_of(name, SETTINGS))
  return {'train': _of_compiled(work.lower_step()), 'inference': _of_compiled(work.lower_infer())}


def _of_lowered(program):
  cost = program.cost_analysis()
  # Functions that are called twice are written once: nearly all are jnp's own, without convolutions.
  kinds = collections.Counter(re.findall(r'(?<!#)\bstablehlo\.(\w+)', program.as_text()))
  return {
    'flops': int(cost['flops']),
    'bytes': int(cost['bytes accessed']),
    'convolutions': kinds['convolution'],
    'dots': kinds['dot_general'],
    'operations': kinds.total(),
  }


def _of_compiled(program):
  # How well LLVM optimises the loops is no matter of these counts, and takes most of the time.
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
  """A line for each count that is more than it was, by more than the margin."""
  return [
    f'{program} {kind}: {before[program][kind]:,} -> {count:,}'
    for program, counts in now.items()
    for kind, count in counts.items()
    if count > before[program][kind] * (1 + margin)
  ]


def series() -> str:
  """The release of jax, without its last number."""
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
  print(f'{PAGE}: written under jax {jax.__version__}')


if __name__ == '__main__':
  app.run(main)
