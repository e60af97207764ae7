"""Reads the text of a compiled program (optimised HLO): its data exchanges, its memory traffic and its cycles."""

import dataclasses
import math
import re

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
class Operation:
  """One operation of a compiled program.

  Attributes:
    name: XLA's name of the operation.
    nbytes: bytes that it reads from HBM and writes to HBM.
    cycles: the TPU compiler's estimate of its time; 0 where the compiler states none, as for GPUs.
    source: the modules and the primitive that the operation comes from, as JAX names them. An operation that XLA
      inserted, for example a copy, has the source of its first operand.
  """

  name: str
  nbytes: int
  cycles: int
  source: str


def operations(program: str) -> list[Operation]:
  """Finds the operations of a program that take time; `program` is the text of its optimised HLO.

  Each operation reads its operands from HBM and writes its results to HBM. Data that stays in the core's own memory
  between two operations does not count here; in XLA's "bytes accessed" it does. An operand counts in full even if the
  operation needs only a part. Bodies of loops do not count: in a training step they only draw random numbers.
  The TPU's compiler writes its estimate of the cycles into each operation that it has scheduled. The largest 64-bit
  number stands for an operation that it cannot estimate.
  """
  entry = program[program.index('\nENTRY') :]
  entry = re.sub(r'\n\s*(?![\s%]|ROOT)', ' ', entry[: entry.index('\n}')])  # join types that span several lines
  values, sources, found = {}, {}, []
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
    estimate = re.search(r'"estimated_cycles":"(\d+)"', line)
    cycles = int(estimate[1]) if estimate and int(estimate[1]) < 2**63 - 1 else 0
    if moved or cycles:
      found.append(Operation(match['name'], moved, cycles, sources[match['name']]))
  return found


def bytes_moved(program: str) -> int:
  """The bytes that all operations of a program read from HBM and write to HBM."""
  return sum(operation.nbytes for operation in operations(program))


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
