"""Counts the cost of FUSA in one residual block on a TPU. It needs requirements-aot.txt, but no TPU.

  JAX_PLATFORMS=cpu python -m benchmarks.fusa

The TPU's own compiler counts the bytes moved and the FLOPs, forward and backward. The block is 4 x 512 x 512 x 64 in
bfloat16. It is compiled without attention, with the literal form, with the factored form under plain autodiff, and with
the factored form as it is.
"""

import functools

import jax
import jax.numpy as jnp
from absl import app, flags
from jax.sharding import SingleDeviceSharding

from fusa_jax import FUSA, fusa
from fusa_jax.chips import tpu
from fusa_jax.models.layers import layers
from fusa_jax.models.resnet import BasicBlock

_SHAPE = flags.DEFINE_list('shape', ['4', '512', '512', '64'], 'shape of the block: batch, height, width, channels')
_TOPOLOGY = flags.DEFINE_string('topology', 'v5e:2x2', 'topology to compile for')


class PlainAutodiff(FUSA):
  """The factored form without its hand-written backward passes."""

  def after(self, norm, x):
    pools, gate = fusa.pools, fusa.gate
    try:
      fusa.pools, fusa.gate = pools.fun, gate.fun
      return super().after(norm, x)
    finally:
      fusa.pools, fusa.gate = pools, gate


FORMS = {
  'none': None,
  'literal': functools.partial(FUSA, literal=True),
  'factored, plain autodiff': PlainAutodiff,
  'factored': FUSA,
}


def cost(attention, shape, sharding) -> dict[str, float]:
  """Returns the compiler's cost analysis of a block's loss and its gradients."""
  block = BasicBlock(shape[-1], attention=attention, **layers(train=True, dtype=jnp.bfloat16))
  place = lambda tree: jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), tree)
  x = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
  variables = jax.eval_shape(block.init, jax.random.key(0), x)

  def loss(params, stats, x):
    out, _ = block.apply({'params': params, 'batch_stats': stats}, x, mutable=['batch_stats'])
    return (out.astype(jnp.float32) ** 2).sum()

  run = jax.jit(jax.grad(loss, (0, 2)))
  return run.lower(*place((variables['params'], variables['batch_stats'], x))).compile().cost_analysis()


def main(_):
  sharding = SingleDeviceSharding(tpu.Topology.parse(_TOPOLOGY.value).devices()[0])
  shape = tuple(map(int, _SHAPE.value))
  print('| attention | GB moved | increase over none | GFLOP |\n| --- | ---: | ---: | ---: |')
  costs = {name: cost(attention, shape, sharding) for name, attention in FORMS.items()}
  base = costs['none']['bytes accessed'] / 1e9
  for name in FORMS:
    moved = costs[name]['bytes accessed'] / 1e9
    print(f'| {name} | {moved:.2f} | {moved / base - 1:+.0%} | {costs[name]["flops"] / 1e9:.0f} |')


if __name__ == '__main__':
  app.run(main)
