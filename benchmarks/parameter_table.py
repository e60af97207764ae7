"""The number of parameters of every model in the registry, as the table of docs/models.md.

python -m benchmarks.parameter_table
"""

import functools

import jax
import jax.numpy as jnp

from fusa_jax import models


def count(name: str, **options) -> int:
  """The parameters of a model for one-channel slices and one logit; batch statistics are not counted."""
  module = models.create(name, **options)
  variables = jax.eval_shape(functools.partial(module.init, train=False), jax.random.key(0), jnp.zeros((1, 64, 64, 1)))
  return sum(leaf.size for leaf in jax.tree.leaves(variables['params']))


def table() -> str:
  """Markdown: a row for each model, with what FUSA adds to the plain one of the same name."""
  lines = ['| model | parameters | of these FUSA |', '| --- | ---: | ---: |']
  for name in models.NAMES:
    plain = name.removeprefix('fusa_')
    total = count(name)
    lines.append(f'| `{name}` | {total:,} | {total - count(plain):,} |')
  return '\n'.join(lines)


if __name__ == '__main__':
  print(table())
