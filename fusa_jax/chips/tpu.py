"""Slices of TPU chips: their published rates, their devices for the compiler, and the cost of their data exchanges."""

import dataclasses
import importlib.util
import math
import os
import re

import jax
from jax.experimental import topologies

from fusa_jax.system.errors import UserError

# Least time of a message from a chip to its neighbour, and between slices. These are assumptions, not published values.
_HOP_SECONDS = 1e-6
_DCN_SECONDS = 50e-6


@dataclasses.dataclass(frozen=True)
class Chip:
  """Published rates of one chip (https://cloud.google.com/tpu/docs, one page per generation).

  Attributes:
    flops: FLOPs per second in bfloat16.
    hbm: bytes of memory.
    hbm_rate: bytes per second between memory and core.
    ici_rate: bytes per second that a chip sends over all its links to neighbours.
    dcn_rate: bytes per second and chip between slices.
    ring: an axis of a slice is a ring if its length is a multiple of this number, else a line.
    most: number of chips in the largest slice.
    sweep: shapes of the slices that --sweep compiles for.
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
  """TPU slices: `slices` slices with shape `shape` of the chip `kind`, connected by the data centre's network."""

  kind: str
  shape: tuple[int, ...]
  slices: int = 1

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


_SENDS = re.compile(
  r' = (?P<result>\(.*?\)|\S+) '
  r'(?P<kind>all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all|send(?=.*xla_megascale_runtime))'
  r'(?P<start>-start)?\('
)
# An array's type, bits, sizes and layout. S(n) in a layout means a memory inside the core.
_ARRAY = re.compile(r'\b(pred|[a-z]+?(\d+)(?:e\d\w*)?)\[([\d,]*)\](\{[^{}]*\})?')


@dataclasses.dataclass(frozen=True)
class Collective:
  """One exchange between devices in a compiled program.

  Attributes:
    kind: XLA's name of the operation; `send` is an all-reduce between slices.
    nbytes: bytes of the array that one device has at the end.
    group: number of devices that exchange with each other.
  """

  kind: str
  nbytes: int
  group: int

  def seconds(self, topology: Topology) -> float:
    """The least time for the exchange, from the bytes that each chip must send and the path that they take."""
    chip = topology.chip
    if self.kind == 'send':
      return 2 * (topology.slices - 1) / topology.slices * self.nbytes / chip.dcn_rate + _DCN_SECONDS
    if self.kind == 'collective-permute':  # to one neighbour, over one of the two links of an axis
      return self.nbytes * 2 * len(topology.shape) / chip.ici_rate + _HOP_SECONDS
    # The array is split over the group, and each part travels around the group once. In an all-reduce it travels twice:
    # once for the sum, once to return the result.
    rounds = 2 if self.kind == 'all-reduce' else 1
    whole = self.nbytes * (self.group if self.kind == 'reduce-scatter' else 1)
    sent = rounds * whole * (self.group - 1) / self.group
    axes = [n for n in topology.shape if n > 1]
    rings = [n % chip.ring == 0 for n in axes]
    # On a line, count half of the links: at its ends, one of two links is not connected.
    rate = chip.ici_rate * sum(1.0 if ring else 0.5 for ring in rings) / len(axes)
    hops = sum(n // 2 if ring else n - 1 for n, ring in zip(axes, rings, strict=True))
    return sent / rate + rounds * min(hops, self.group - 1) * _HOP_SECONDS


def collectives(program: str, devices: int) -> list[Collective]:
  """Finds the exchanges in a program for `devices` devices; `program` is the text of its optimised HLO."""
  exchanges = {}
  for number, line in enumerate(program.splitlines()):
    if match := _SENDS.search(line):
      # An exchange that runs during several computations appears in each of them, with the same channel.
      channel = re.search(r'channel_id=(\d+)', line)
      exchanges.setdefault(channel[1] if channel else -number, _parse(line, match, devices))
  return list(exchanges.values())


def _parse(line, match, devices):
  sizes = [size for size, _ in _arrays(match['result'])]
  # The result of an asynchronous start also contains its operands, and for some kinds one or two counters.
  if match['kind'] == 'send':
    sizes = sizes[:1]
  elif match['start'] and match['kind'] == 'collective-permute':
    sizes = sizes[1:2]
  elif match['start'] and match['kind'] != 'all-reduce':
    sizes = sizes[len(sizes) // 2 :]
  return Collective(match['kind'], sum(sizes), _group(line, devices))


def _arrays(shape: str) -> list[tuple[int, int]]:
  """The arrays in an operation's type: (bytes, bytes in HBM) for each."""
  arrays = []
  for dtype, bits, dims, layout in _ARRAY.findall(shape):
    size = math.prod(map(int, filter(None, dims.split(',')))) * (1 if dtype == 'pred' else int(bits) // 8)
    arrays.append((size, 0 if 'S(' in layout else size))
  return arrays


_OPERATION = re.compile(r'\s+(?:ROOT )?%(?P<name>[\w.-]+) = (?P<type>.*?) (?P<kind>[a-z][a-z-]*)\((?P<operands>[^)]*)')
_MOVES_NOTHING = ('bitcast', 'parameter', 'constant', 'after-all', 'optimization-barrier', 'while', 'conditional')


@dataclasses.dataclass(frozen=True)
class Movement:
  """The data that one operation of a compiled program moves between HBM and the core.

  Attributes:
    operation: XLA's name of the operation.
    nbytes: bytes read and written.
    source: the modules and the primitive that the operation comes from, as JAX names them. An operation that XLA
      inserted, for example a copy, has the source of its first operand.
  """

  operation: str
  nbytes: int
  source: str


def hbm_movements(program: str) -> list[Movement]:
  """Counts the bytes between HBM and the core in one run of a TPU program, per operation, from its optimised HLO text.

  Each operation reads its operands from HBM and writes its results to HBM. Data that stays in the core's own memory
  between two operations does not count here; in XLA's "bytes accessed" it does. An operand counts in full even if the
  operation needs only a part. Bodies of loops do not count: in a training step they only draw random numbers.
  """
  entry = program[program.index('\nENTRY') :]
  entry = re.sub(r'\n\s*(?![\s%]|ROOT)', ' ', entry[: entry.index('\n}')])  # join types that span several lines
  values, sources, movements = {}, {}, []
  for line in entry.splitlines():
    match = _OPERATION.match(line)
    if not match:
      continue
    kind, operands, moved = match['kind'], re.findall(r'%([\w.-]+)', match['operands']), 0
    result = _arrays(match['type'])
    if kind == 'get-tuple-element':
      result = [values[operands[0]][int(re.search(r'index=(\d+)', line)[1])]]
    elif kind == 'tuple':
      result = [(sum(s for s, _ in values[o]), sum(h for _, h in values[o])) for o in operands]
    elif kind.endswith('-start'):  # keep its operands: `-done` below must know whether they are in HBM
      result = [value for operand in operands for value in values[operand]]
    elif kind.endswith('-done'):
      size = sum(size for size, _ in result)
      moved = sum(hbm for _, hbm in result) + (size if any(hbm for _, hbm in values[operands[0]]) else 0)
    elif kind not in _MOVES_NOTHING and 'ConcatBitcast' not in line:
      moved = sum(hbm for _, hbm in result) + sum(hbm for o in operands for _, hbm in values[o])
    values[match['name']] = result
    source = re.search(r'op_name="([^"]*)"', line)
    sources[match['name']] = source[1] if source else sources.get(operands[0], '') if operands else ''
    if moved:
      movements.append(Movement(match['name'], moved, sources[match['name']]))
  return movements


def _group(line: str, devices: int) -> int:
  """Number of devices that exchange with each other, for each form in which XLA writes replica_groups."""
  if match := re.search(r'replica_groups=\[\d+,(\d+)\]', line):
    return int(match[1])
  if match := re.search(r'replica_groups=\{\{([\d,]+)\}', line):
    return match[1].count(',') + 1
  if match := re.search(r'replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}', line):
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
    # A group may use part of an axis: 'name':(size of the part before it)size.
    return math.prod(int(part or sizes[name]) for name, part in re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", match[2]))
  return devices
