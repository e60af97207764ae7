"""NVIDIA GPUs of one host: published rates, devices for the compiler, and the time of data exchanges."""

import dataclasses
import importlib.util
import os
import re

import jax
from jax.experimental import topologies

from fusa_jax.chips import hlo
from fusa_jax.system.errors import UserError

# Least time of an exchange over NVLink. This is an assumption, not a published value.
_EXCHANGE_SECONDS = 10e-6


@dataclasses.dataclass(frozen=True)
class Chip:
  """Published rates and limits of one GPU.

  The rates are those of NVIDIA's data sheets, the limits those of the CUDA programming guide for the compute
  capability: A100 80 GB SXM (nvidia.com/en-us/data-center/a100), H100 SXM (nvidia.com/en-us/data-center/h100), and B200
  in a DGX B200 (nvidia.com/en-us/data-center/dgx-b200), an eighth of that machine.

  Attributes:
    flops: FLOPs per second in bfloat16, without sparsity.
    hbm: bytes of memory.
    hbm_rate: bytes per second between memory and cores.
    nvlink_rate: bytes per second that a GPU sends to the other GPUs of its host.
    capability: compute capability, (major, minor).
    cores: number of streaming multiprocessors.
    lanes: float32 units per core.
    clock: highest clock rate in GHz.
    cache: bytes of the L2 cache.
    shared: bytes of shared memory per core. A block can use all but 1 KiB of it.
  """

  flops: float
  hbm: float
  hbm_rate: float
  nvlink_rate: float
  capability: tuple[int, int]
  cores: int
  lanes: int
  clock: float
  cache: int
  shared: int


CHIPS = {
  'a100': Chip(312e12, 80e9, 2039e9, 300e9, (8, 0), 108, 64, 1.41, 40 * 2**20, 164 * 2**10),
  'h100': Chip(989e12, 80e9, 3350e9, 450e9, (9, 0), 132, 128, 1.98, 50 * 2**20, 228 * 2**10),
  'b200': Chip(2250e12, 180e9, 8000e9, 900e9, (10, 0), 148, 128, 1.965, 126 * 2**20, 228 * 2**10),
}
_MOST = 8  # GPUs of a host

# What XLA asks a GPU that is there (GpuTargetConfigProto in text form). The limits of blocks and registers are equal in
# all of these compute capabilities. The version of cuDNN is the one that jax[cuda12] installs, or newer.
_TARGET = """
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {shared}
  shared_memory_per_block_optin: {optin}
  threads_per_core_limit: 2048
  core_count: {cores}
  fpus_per_core: {lanes}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {rate}
  l2_cache_size: {cache}
  clock_rate_ghz: {clock}
  device_memory_size: {memory}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  cuda_compute_capability {{ major: {major} minor: {minor} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 patch: 0 }}
device_description_str: "{name}"
"""


@dataclasses.dataclass(frozen=True)
class Topology:
  """`chips` GPUs of the kind `kind` in one host."""

  kind: str
  chips: int
  platform = 'gpu'
  # The packages that decide about the compiled program, beside jax.
  packages = ('jax-cuda12-pjrt', 'nvidia-cudnn-cu12')

  @classmethod
  def parse(cls, text: str) -> 'Topology':
    """Parses a text KIND:NUMBER, for example `h100:8`.

    Raises:
      UserError: the kind is not in CHIPS, or the number is not between 1 and 8.
    """
    kind, _, count = text.partition(':')
    if kind not in CHIPS or not re.fullmatch(r'[1-9]\d*', count) or int(count) > _MOST:
      raise UserError(
        f'topology: {text!r} is not the GPUs of a host; give KIND:NUMBER like h100:8, KIND one of '
        f'{", ".join(CHIPS)}, NUMBER from 1 to {_MOST}'
      )
    return cls(kind, int(count))

  @property
  def chip(self) -> Chip:
    return CHIPS[self.kind]

  def __str__(self) -> str:
    return f'{self.kind}:{self.chips}'

  def devices(self) -> list:
    """The device descriptions that the compiler needs in place of real GPUs.

    Raises:
      UserError: the compiler is missing, or rejects this topology.
    """
    os.environ.setdefault('JAX_SKIP_CUDA_CONSTRAINTS_CHECK', '1')  # compiling needs no NVIDIA driver
    if importlib.util.find_spec('jax_plugins') is None or importlib.util.find_spec('jax_plugins.xla_cuda12') is None:
      raise UserError('jax[cuda12]: the GPU compiler is not installed; pip install -r requirements-aot-gpu.txt')
    chip = self.chip
    target = _TARGET.format(
      shared=chip.shared,
      optin=chip.shared - 2**10,
      cores=chip.cores,
      lanes=chip.lanes,
      rate=int(chip.hbm_rate),
      cache=chip.cache,
      clock=chip.clock,
      memory=int(chip.hbm),
      major=chip.capability[0],
      minor=chip.capability[1],
      name=f'NVIDIA {self.kind.upper()}',  # newer releases of jax look up by this what Triton kernels may use
    )
    try:
      return topologies.get_topology_desc(
        self.kind, platform='cuda', target_config=target, topology=f'1x1x{self.chips}'
      ).devices
    except (jax.errors.JaxRuntimeError, RuntimeError) as error:
      raise UserError(
        f'topology: the compiler rejects {self} ({str(error).splitlines()[0]}); try h100:1, or another version of '
        'jax[cuda12]'
      ) from None

  def seconds(self, exchange: hlo.Collective) -> float:
    """The least time for the exchange, from the bytes that each GPU must send over NVLink."""
    whole = exchange.nbytes * (exchange.group if exchange.kind == 'reduce-scatter' else 1)
    share = 1.0 if exchange.kind == 'collective-permute' else (exchange.group - 1) / exchange.group
    rounds = 2 if exchange.kind == 'all-reduce' else 1  # once for the sum, once to return the result
    return rounds * share * whole / self.chip.nvlink_rate + _EXCHANGE_SECONDS
