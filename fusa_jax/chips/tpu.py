"""Slices of TPU chips: their published rates, their devices for the compiler, and the time of their data exchanges."""

import dataclasses
import importlib.util
import math
import os
import re

import jax
from jax.experimental import topologies

from fusa_jax.chips import hlo
from fusa_jax.system.errors import UserError

# Least time of a message from a chip to its neighbour, and between slices. These are assumptions, not published values.
_HOP_SECONDS = 1e-6
_DCN_SECONDS = 50e-6


@dataclasses.dataclass(frozen=True)
class Chip:
  """Published rates of one chip (https://cloud.google.com/tpu/docs, one page per generation).

  Attributes:
    flops: FLOPs per second in bfloat16.
    units: number of 128 x 128 matrix units; one of 256 x 256 counts as four. Google's pages give 2 or 4 large units for
      v6e; the compiler's estimate for a large matrix product only fits 4.
    hbm: bytes of memory.
    hbm_rate: bytes per second between memory and core.
    ici_rate: bytes per second that a chip sends over all its links to neighbours.
    dcn_rate: bytes per second and chip between slices.
    ring: an axis of a slice is a ring if its length is a multiple of this number, else a line.
    most: number of chips in the largest slice.
    sweep: shapes of the slices that --sweep compiles for.
  """

  flops: float
  units: int
  hbm: float
  hbm_rate: float
  ici_rate: float
  dcn_rate: float
  ring: int
  most: int
  sweep: tuple[str, ...]

  @property
  def clock(self) -> float:
    """Cycles per second: each matrix unit multiplies and adds 128 x 128 numbers per cycle at the published peak."""
    return self.flops / (self.units * 128**2 * 2)


# 8, 32 and 128 or 256 chips. With the same batch per chip, only the exchanges between chips differ.
_PLANE = ('2x4', '4x8', '16x16')
_CUBE = ('2x2x2', '2x4x4', '4x8x8')
CHIPS = {
  'v4': Chip(275e12, 8, 32 * 2**30, 1228e9, 300e9, 6.25e9, 4, 4096, _CUBE),
  'v5e': Chip(197e12, 4, 16 * 2**30, 819e9, 200e9, 3.125e9, 16, 256, _PLANE),
  'v5p': Chip(459e12, 8, 95 * 2**30, 2765e9, 600e9, 6.25e9, 4, 6144, _CUBE),
  'v6e': Chip(918e12, 16, 32 * 2**30, 1640e9, 400e9, 12.5e9, 16, 256, _PLANE),
}


@dataclasses.dataclass(frozen=True)
class Topology:
  """TPU slices: `slices` slices with shape `shape` of the chip `kind`, connected by the data centre's network."""

  kind: str
  shape: tuple[int, ...]
  slices: int = 1
  platform = 'tpu'
  # The packages that decide about the compiled program, beside jax.
  packages = ('libtpu',)

  @classmethod
  def parse(cls, text: str, slices: int = 1) -> 'Topology':
    """Parses a text KIND:SHAPE, for example `v5e:4x4`.

    Raises:
      UserError: the kind is not in CHIPS, the shape is not valid for it, or `slices` is less than 1.
    """
    kind, _, shape = text.partition(':')
    if kind not in CHIPS or not re.fullmatch(r'[1-9]\d*(x[1-9]\d*)+', shape):
      raise UserError(
        f'topology: {text!r} is not a TPU slice; give KIND:SHAPE like v5e:4x4, KIND one of {", ".join(CHIPS)}'
      )
    topology = cls(kind, tuple(map(int, shape.split('x'))), slices)
    if math.prod(topology.shape) > CHIPS[kind].most:
      raise UserError(f'topology: {text} has too many chips; give a slice of {kind} with at most {CHIPS[kind].most}')
    if slices < 1:
      raise UserError(f'slices: {slices} is too few; give 1 or more')
    return topology

  @property
  def chip(self) -> Chip:
    return CHIPS[self.kind]

  @property
  def chips(self) -> int:
    return math.prod(self.shape) * self.slices

  def __str__(self) -> str:
    return f'{self.kind}:{"x".join(map(str, self.shape))}' + (f' x {self.slices} slices' if self.slices > 1 else '')

  def devices(self) -> list:
    """The device descriptions that the compiler needs in place of real chips.

    Raises:
      UserError: the compiler is missing, or does not support this slice.
    """
    # libtpu reads these when it is first loaded. With them, several processes can compile at once, and libtpu does not
    # look for a TPU host.
    for key, value in {
      'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
      'TPU_SKIP_MDS_QUERY': '1',
      'TPU_WORKER_HOSTNAMES': 'localhost',
      'TPU_ACCELERATOR_TYPE': 'v5litepod-16',
    }.items():
      os.environ.setdefault(key, value)
    if importlib.util.find_spec('libtpu') is None:
      raise UserError('libtpu: the TPU compiler is not installed; pip install -r requirements-aot.txt')
    options = {'num_slices': self.slices} if self.slices > 1 else {}
    if self.kind == 'v4':
      options['chip_config_name'] = 'megacore'  # one device per chip, as for the other kinds
    name = f'{self.kind}:{"x".join(map(str, self.shape))}'
    try:
      return topologies.get_topology_desc(platform='tpu', topology_name=name, **options).devices
    except jax.errors.JaxRuntimeError as error:
      reason = str(error).splitlines()[0]
      raise UserError(
        f'topology: the compiler rejects {name} ({reason}); try {self.kind}:{self.chip.sweep[1]}'
      ) from None

  def seconds(self, exchange: hlo.Collective) -> float:
    """The least time for the exchange, from the bytes that each chip must send and the path that they take."""
    if exchange.kind == 'send':
      return 2 * (self.slices - 1) / self.slices * exchange.nbytes / self.chip.dcn_rate + _DCN_SECONDS
    if exchange.kind == 'collective-permute':  # to one neighbour, over one of the two links of an axis
      return exchange.nbytes * 2 * len(self.shape) / self.chip.ici_rate + _HOP_SECONDS
    # The array is split over the group, and each part travels around the group once. In an all-reduce it travels twice:
    # once for the sum, once to return the result.
    rounds = 2 if exchange.kind == 'all-reduce' else 1
    whole = exchange.nbytes * (exchange.group if exchange.kind == 'reduce-scatter' else 1)
    sent = rounds * whole * (exchange.group - 1) / exchange.group
    axes = [n for n in self.shape if n > 1]
    rings = [n % self.chip.ring == 0 for n in axes]
    # On a line, count half of the links: at its ends, one of two links is not connected.
    rate = self.chip.ici_rate * sum(1.0 if ring else 0.5 for ring in rings) / len(axes)
    hops = sum(n // 2 if ring else n - 1 for n, ring in zip(axes, rings, strict=True))
    return sent / rate + rounds * min(hops, exchange.group - 1) * _HOP_SECONDS
