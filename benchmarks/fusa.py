"""Counts the cost of FUSA in one residual block on a TPU or GPU. It needs the compiler of that chip, but no chip.

  JAX_PLATFORMS=cpu python -m benchmarks.fusa
  JAX_PLATFORMS=cpu python -m benchmarks.fusa --topology=h100:1

The first needs requirements-aot.txt, the second requirements-aot-gpu.txt. The block is 4 x 512 x 512 x 64 in bfloat16,
forward and backward. It is compiled without attention, with the literal form, with the factored form under plain
autodiff, and with the factored form as it is.

The TPU's compiler counts the bytes and FLOPs itself. The GPU's compiler counts neither: there the bytes are those that
the operations of the compiled program read and write.
"""

import functools

import jax
import jax.numpy as jnp
from absl import app, flags

from fusa_jax import FUSA, fusa
from fusa_jax.chips import hlo, topology
from fusa_jax.models.layers import layers
from fusa_jax.models.resnet import BasicBlock
from fusa_jax.system import meshes

_SHAPE = flags.DEFINE_list('shape', ['4', '512', '512', '64'], 'shape of the block: batch, height, width, channels')
_TOPOLOGY = flags.DEFINE_string('topology', 'v5e:2x2', 'topology to compile for; the program is that of one chip')


class PlainAutodiff(FUSA):
  """The factored form without its hand-written backward passes."""

  def after(self, norm, x):
    pools, gate, suits = fusa.pools, fusa.gate, fusa.fusa_gpu.suits
    try:
      fusa.pools, fusa.gate, fusa.fusa_gpu.suits = pools.fun, gate.fun, lambda _: False
      return super().after(norm, x)
    finally:
      fusa.pools, fusa.gate, fusa.fusa_gpu.suits = pools, gate, suits


FORMS = {
  'none': None,
  'literal': functools.partial(FUSA, literal=True),
  'factored, plain autodiff': PlainAutodiff,
  'factored': FUSA,
}


def cost(attention, shape, chips: topology.Topology) -> tuple[float, float]:
  """Returns the bytes moved and the FLOPs (NaN for GPUs) of a block's loss and its gradients."""
  block = BasicBlock(shape[-1], attention=attention, **layers(train=True, dtype=jnp.bfloat16))
  mesh = meshes.create_mesh(1, 1, chips.devices()[:1])
  place = lambda tree: jax.tree.map(
    lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=meshes.replicated(mesh)), tree
  )
  x = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
  variables = jax.eval_shape(block.init, jax.random.key(0), x)

  def loss(params, stats, x):
    out, _ = block.apply({'params': params, 'batch_stats': stats}, x, mutable=['batch_stats'])
    return (out.astype(jnp.float32) ** 2).sum()

  with jax.set_mesh(mesh):
    run = jax.jit(jax.grad(loss, (0, 2)))
    compiled = run.lower(*place((variables['params'], variables['batch_stats'], x))).compile()
  counted = compiled.cost_analysis() or {}
  of_program = lambda: hlo.bytes_moved(compiled.as_text())
  return counted['bytes accessed'] if 'flops' in counted else of_program(), counted.get('flops', float('nan'))


def main(_):
  chips, shape = topology.parse(_TOPOLOGY.value), tuple(map(int, _SHAPE.value))
  print('| attention | GB moved | increase over none | GFLOP |\n| --- | ---: | ---: | ---: |')
  costs = {name: cost(attention, shape, chips) for name, attention in FORMS.items()}
  base = costs['none'][0]
  for name, (moved, flops) in costs.items():
    print(f'| {name} | {moved / 1e9:.2f} | {moved / base - 1:+.0%} | {flops / 1e9:.0f} |')


if __name__ == '__main__':
  app.run(main)
