"""The chips that `--mode=aot` compiles for: TPU slices, or the GPUs of a host."""

from fusa_jax.chips import gpu, tpu
from fusa_jax.system.errors import UserError

Topology = tpu.Topology | gpu.Topology


def parse(text: str, slices: int = 1) -> Topology:
  """Parses `v5e:4x4`, a TPU slice, or `h100:8`, GPUs.

  Raises:
    UserError: the text is neither, or several slices of GPUs are asked for.
  """
  kind = text.partition(':')[0]
  if kind in gpu.CHIPS:
    if slices != 1:
      raise UserError(f'slices: {slices}, but only TPUs have slices; leave it out')
    return gpu.Topology.parse(text)
  if kind not in tpu.CHIPS:
    raise UserError(
      f'topology: {text!r} is unknown; give a TPU slice like v5e:4x4 ({", ".join(tpu.CHIPS)}), or GPUs like h100:8 '
      f'({", ".join(gpu.CHIPS)})'
    )
  return tpu.Topology.parse(text, slices)
