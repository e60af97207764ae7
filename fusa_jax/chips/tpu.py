"""Slices of TPU chips: what they are, what stands for them when compiling, and what an exchange between them costs."""

import dataclasses
import importlib.util
import math
import os
import re

import jax
from jax.experimental import topologies

from fusa_jax.system.errors import UserError

# What a message needs, however short: from a chip to its neighbour, and between slices. Assumptions, not published.
_HOP_SECONDS = 1e-6
_DCN_SECONDS = 50e-6


@dataclasses.dataclass(frozen=True)
class Chip:
  """Published rates of one chip (https://cloud.google.com/tpu/docs, a page for each generation).

  Attributes:
    flops: bfloat16, per second.
    hbm: bytes of memory.
    hbm_rate: bytes per second between memory and core.
    ici_rate: bytes per second out of a chip, over all its links to neighbours.
    dcn_rate: bytes per second and chip between slices.
    ring: an axis of a slice is closed to a ring where its length is a multiple of this; else it is a line.
    most: chips of the largest slice.
    sweep: the slices that --sweep compiles for.
  """

  flops: float
  hbm: float
  hbm_rate: float
  ici_rate: float
  dcn_rate: float
  ring: int
  most: int
  sweep: tuple[str, ...]


_PLANE = ('2x4', '4x4', '4x8', '8x8', '8x16', '16x16')
_CUBE = ('2x2x2', '2x2x4', '2x4x4', '4x4x4', '4x4x8', '4x8x8')
CHIPS = {
  'v4': Chip(275e12, 32 * 2**30, 1228e9, 300e9, 6.25e9, 4, 4096, _CUBE),
  'v5e': Chip(197e12, 16 * 2**30, 819e9, 200e9, 3.125e9, 16, 256, _PLANE),
  'v5p': Chip(459e12, 95 * 2**30, 2765e9, 600e9, 6.25e9, 4, 6144, _CUBE),
  'v6e': Chip(918e12, 32 * 2**30, 1640e9, 400e9, 12.5e9, 16, 256, _PLANE),
}


@dataclasses.dataclass(frozen=True)
class Topology:
  """Slices of TPU chips: `slices` of the shape `shape` of the chip `kind`, connected by the data centre's network."""

  kind: str
  shape: tuple[int, ...]
  slices: int = 1

  @classmethod
  def parse(cls, text: str, slices: int = 1) -> 'Topology':
    """Of `v5e:4x4`.

    Raises:
      UserError: not a kind of chip that is known here, or not a shape of a slice of it.
    """
    kind, _, shape = text.partition(':')
    if kind not in CHIPS or not re.fullmatch(r'[1-9]\d*(x[1-9]\d*)+', shape):
      raise UserError(f'topology: {text!r} is no slice; give KIND:SHAPE like v5e:4x4, KIND one of {", ".join(CHIPS)}')
    topology = cls(kind, tuple(map(int, shape.split('x'))), slices)
    if math.prod(topology.shape) > CHIPS[kind].most:
      raise UserError(f'topology: a slice of {kind} has at most {CHIPS[kind].most} chips, {text} would have more')
    if slices < 1:
      raise UserError(f'slices: {slices}; give 1 or more')
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
    """What stands for the chips when compiling.

    Raises:
      UserError: the compiler is missing, or knows no such slice.
    """
    # Read when libtpu is first loaded: let several processes compile at once, and ask no TPU host for its place.
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
      options['chip_config_name'] = 'megacore'  # a device is a chip, as in the other kinds
    name = f'{self.kind}:{"x".join(map(str, self.shape))}'
    try:
      return topologies.get_topology_desc(platform='tpu', topology_name=name, **options).devices
    except jax.errors.JaxRuntimeError as error:
      reason = str(error).splitlines()[0]
      raise UserError(f'topology: the compiler takes no {name} ({reason}); try {self.chip.sweep[1]}') from None


_SENDS = re.compile(
  r' = (?P<result>\(.*?\)|\S+) '
  r'(?P<kind>all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all|send(?=.*xla_megascale_runtime))'
  r'(?P<start>-start)?\('
)
# An array's type, its bits, its sizes, and its layout, in which S(n) is a memory of the core's own.
_ARRAY = re.compile(r'\b(pred|[a-z]+?(\d+)(?:e\d\w*)?)\[([\d,]*)\](\{[^{}]*\})?')


@dataclasses.dataclass(frozen=True)
class Collective:
  """One exchange between devices in a compiled program.

  Attributes:
    kind: XLA's name of the operation; `send` is an all-reduce between slices.
    nbytes: of the array that one device ends up with.
    group: devices that take part together.
  """

  kind: str
  nbytes: int
  group: int

  def seconds(self, topology: Topology) -> float:
    """The least time for it, by the bytes that each chip must send and the way that they must go."""
    chip = topology.chip
    if self.kind == 'send':
      return 2 * (topology.slices - 1) / topology.slices * self.nbytes / chip.dcn_rate + _DCN_SECONDS
    if self.kind == 'collective-permute':  # to one neighbour, over one link of the two on each axis
      return self.nbytes * 2 * len(topology.shape) / chip.ici_rate + _HOP_SECONDS
    # Of an array of n bytes, split over the group: each part goes around once; in a sum, and back to all.
    rounds = 2 if self.kind == 'all-reduce' else 1
    whole = self.nbytes * (self.group if self.kind == 'reduce-scatter' else 1)
    sent = rounds * whole * (self.group - 1) / self.group
    axes = [n for n in topology.shape if n > 1]
    rings = [n % chip.ring == 0 for n in axes]
    # At the ends of a line half of the links lead nowhere.
    rate = chip.ici_rate * sum(1.0 if ring else 0.5 for ring in rings) / len(axes)
    hops = sum(n // 2 if ring else n - 1 for n, ring in zip(axes, rings, strict=True))
    return sent / rate + rounds * min(hops, self.group - 1) * _HOP_SECONDS


def collectives(program: str, devices: int) -> list[Collective]:
  """The exchanges in a program for so many devices, given as the text of its optimised HLO."""
  exchanges = {}
  for number, line in enumerate(program.splitlines()):
    if found := _SENDS.search(line):
      # One that goes on behind several computations is written down in each of them, with the channel that it has.
      channel = re.search(r'channel_id=(\d+)', line)
      exchanges.setdefault(channel[1] if channel else -number, _parse(line, found, devices))
  return list(exchanges.values())


def _parse(line, found, devices):
  sizes = [size for size, _ in _arrays(found['result'])]
  # What begins asynchronously gives its operands too, and some kinds a counter or two.
  if found['kind'] == 'send':
    sizes = sizes[:1]
  elif found['start'] and found['kind'] == 'collective-permute':
    sizes = sizes[1:2]
  elif found['start'] and found['kind'] != 'all-reduce':
    sizes = sizes[len(sizes) // 2 :]
  return Collective(found['kind'], sum(sizes), _group(line, devices))


def _arrays(shape: str) -> list[tuple[int, int]]:
  """The arrays in an operation's type: (bytes, bytes that lie in HBM) of each."""
  found = []
  for kind, bits, dims, layout in _ARRAY.findall(shape):
    size = math.prod(map(int, filter(None, dims.split(',')))) * (1 if kind == 'pred' else int(bits) // 8)
    found.append((size, 0 if 'S(' in layout else size))
  return found


_OPERATION = re.compile(r'\s+(?:ROOT )?%(?P<name>[\w.-]+) = (?P<type>.*?) (?P<kind>[a-z][a-z-]*)\((?P<operands>[^)]*)')
_MOVES_NOTHING = ('bitcast', 'parameter', 'constant', 'after-all', 'optimization-barrier', 'while', 'conditional')


@dataclasses.dataclass(frozen=True)
class Movement:
  """What one operation of a compiled program moves between HBM and the core.

  Attributes:
    operation: XLA's name of it.
    nbytes: read and written.
    source: the path of modules and the primitive that it was made from, as JAX names them; of what XLA put in, such as
      a copy, that of what it takes.
  """

  operation: str
  nbytes: int
  source: str


def hbm_movements(program: str) -> list[Movement]:
  """Bytes between HBM and the core in one run of a TPU program, operation by operation, from its optimised HLO's text.

  Each operation reads its operands and writes its results, where these lie in HBM; what stays in the core's own memory
  between two operations is not counted, as it is in XLA's "bytes accessed". Bodies of loops are left out: in a training
  step they only draw random numbers. An operand is counted whole, also where an operation needs a part of it.
  """
  entry = program[program.index('\nENTRY') :]
  entry = re.sub(r'\n\s*(?![\s%]|ROOT)', ' ', entry[: entry.index('\n}')])  # long types go over several lines
  values, sources, movements = {}, {}, []
  for line in entry.splitlines():
    found = _OPERATION.match(line)
    if not found:
      continue
    kind, operands, moved = found['kind'], re.findall(r'%([\w.-]+)', found['operands']), 0
    result = _arrays(found['type'])
    if kind == 'get-tuple-element':
      result = [values[operands[0]][int(re.search(r'index=(\d+)', line)[1])]]
    elif kind == 'tuple':
      result = [(sum(s for s, _ in values[o]), sum(h for _, h in values[o])) for o in operands]
    elif kind.endswith('-start'):  # it gives what it takes: where that lies is all that is needed when it is done
      result = [value for operand in operands for value in values[operand]]
    elif kind.endswith('-done'):
      size = sum(size for size, _ in result)
      moved = sum(hbm for _, hbm in result) + (size if any(hbm for _, hbm in values[operands[0]]) else 0)
    elif kind not in _MOVES_NOTHING and 'ConcatBitcast' not in line:
      moved = sum(hbm for _, hbm in result) + sum(hbm for o in operands for _, hbm in values[o])
    values[found['name']] = result
    source = re.search(r'op_name="([^"]*)"', line)
    sources[found['name']] = source[1] if source else sources.get(operands[0], '') if operands else ''
    if moved:
      movements.append(Movement(found['name'], moved, sources[found['name']]))
  return movements


def _group(line: str, devices: int) -> int:
  """How many devices exchange with one another, in any of the ways in which XLA writes replica_groups."""
  if found := re.search(r'replica_groups=\[\d+,(\d+)\]', line):
    return int(found[1])
  if found := re.search(r'replica_groups=\{\{([\d,]+)\}', line):
    return found[1].count(',') + 1
  if found := re.search(r'replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}', line):
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
    # An axis may be used in part: 'name':(what is left out before)size.
    return math.prod(int(part or sizes[name]) for name, part in re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", found[2]))
  return devices
