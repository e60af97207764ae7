"""Prints the size and cost of each model in the registry, as the table of docs/models.md.

python -m benchmarks.model_table
"""

import functools

import jax
import jax.numpy as jnp

from fusa_jax import models


def shapes(module, size: int, channels: int = 1) -> dict:
  """Returns the shapes of a model's variables for slices with this number of channels."""
  init = functools.partial(module.init, train=False)
  return jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, size, size, channels)))


def count(module, size: int = 64, channels: int = 1) -> int:
  """Returns the number of parameters of a model, without batch statistics."""
  return sum(leaf.size for leaf in jax.tree.leaves(shapes(module, size, channels)['params']))


def forward_gflops(module, size: int, channels: int = 1) -> float:
  """Returns 10^9 floating-point operations for one slice of size x size.

  A multiplication and an addition count as two. XLA counts all operations of the program before optimisation; nearly
  all are convolutions.
  """
  images = jax.ShapeDtypeStruct((1, size, size, channels), jnp.float32)
  # Only the CPU's client counts operations before compilation; those of GPUs and TPUs raise NotImplementedError.
  with jax.default_device(jax.devices('cpu')[0]):
    traced = jax.jit(functools.partial(module.apply, train=False)).trace(shapes(module, size, channels), images)
    lowered = traced.lower(lowering_platforms=('tpu',))  # the CPU forms of convolutions have other counts
    return lowered.cost_analysis()['flops'] / 1e9


def table() -> str:
  """Returns Markdown with a row per model; the parameters in FUSA are the difference to the plain model."""
  lines = ['| model | parameters | in FUSA | GFLOPs at 512 x 512 |', '| --- | ---: | ---: | ---: |']
  for name in models.NAMES:
    plain = models.create(name.removeprefix('fusa_'))
    module = models.create(name)
    total = count(module)
    lines.append(f'| `{name}` | {total:,} | {total - count(plain):,} | {forward_gflops(module, 512):.1f} |')
  return '\n'.join(lines)


if __name__ == '__main__':
  print(table())
