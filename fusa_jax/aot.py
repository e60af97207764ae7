"""The training step compiled for TPUs that are not here: whether it fits, and what it would cost.

JAX's topology API with the compiler in libtpu (requirements-aot.txt) compiles the very step that training runs. What is
reported is the compiler's own account of one device's program; times follow from it and the chip's published rates, so
each is the least that the chip allows, not a measurement.
"""

import dataclasses
import importlib.metadata
import importlib.util
import json
import logging
import math
import os
import pathlib
import re
import time

import jax
import ml_collections
from jax.experimental import topologies

from fusa_jax import checkpoint, evaluate, sharding, tasks, train
from fusa_jax.errors import DoesNotFitError, UserError
from fusa_jax.files import replacing

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
      raise UserError(f'--topology: {text!r} is no slice; give KIND:SHAPE like v5e:4x4, KIND one of {", ".join(CHIPS)}')
    topology = cls(kind, tuple(map(int, shape.split('x'))), slices)
    if math.prod(topology.shape) > CHIPS[kind].most:
      raise UserError(f'--topology: a slice of {kind} has at most {CHIPS[kind].most} chips, {text} would have more')
    if slices < 1:
      raise UserError(f'--slices: {slices}; give 1 or more')
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
      raise UserError('--mode=aot: the TPU compiler is not installed; pip install -r requirements-aot.txt')
    options = {'num_slices': self.slices} if self.slices > 1 else {}
    if self.kind == 'v4':
      options['chip_config_name'] = 'megacore'  # a device is a chip, as in the other kinds
    name = f'{self.kind}:{"x".join(map(str, self.shape))}'
    try:
      return topologies.get_topology_desc(platform='tpu', topology_name=name, **options).devices
    except jax.errors.JaxRuntimeError as error:
      reason = str(error).splitlines()[0]
      raise UserError(f'--topology: the compiler takes no {name} ({reason}); try {self.chip.sweep[1]}') from None


def report(config: ml_collections.ConfigDict, topology: Topology) -> dict:
  """Compiles a config's training step for a topology; what it needs, and the times that follow, per device and step.

  Sizes are bytes. `seconds` has the least time that arithmetic, memory and the network between chips would each allow;
  `step_seconds` takes the slower of the first two and adds the third, as if nothing were sent while something is
  computed. `efficiency` is the share of a step that is not spent on that network: throughput per chip against that of
  one chip on its own share of the batch.

  Raises:
    UserError: a config that does not fit the topology; no compiler.
    DoesNotFitError: more memory is needed than the chip has.
  """
  config = config.copy_and_resolve_references()
  if config.model.dtype == 'auto':
    config.model.dtype = 'bfloat16'  # as on the chip
  mesh = sharding.create_mesh(config.mesh.data, config.mesh.space, topology.devices())
  sharding.check_divides(mesh, config.train.batch_size, config.data.image_size)
  task = tasks.create(config)
  optimizer, _ = train.make_optimizer(config)
  init = train.compile_init(task, optimizer, config, None)
  like = checkpoint.shapes(jax.eval_shape(init), sharding.replicated(mesh))
  lowered = train.lower_step(task, optimizer, config, mesh, like)
  began = time.perf_counter()
  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    raise DoesNotFitError(_shortage(str(error))) from None
  compile_seconds = time.perf_counter() - began

  memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
  parameters, state = _nbytes(like.variables['params']), _nbytes(like)
  network = [
    Collective.parse(line, mesh.devices.size) for line in compiled.as_text().splitlines() if _SENDS.search(line)
  ]
  chip = topology.chip
  seconds = {
    'compute': cost['flops'] / chip.flops,
    'memory': cost['bytes accessed'] / chip.hbm_rate,
    'interconnect': sum(collective.seconds(topology) for collective in network),
  }
  alone = max(seconds['compute'], seconds['memory'])
  step_seconds = alone + seconds['interconnect']
  return {
    'task': config.task,
    'model': config.model.name,
    'topology': str(topology),
    'chips': topology.chips,
    'mesh': dict(mesh.shape),
    'image_size': config.data.image_size,
    'batch_size': config.train.batch_size,
    'batch_per_device': config.train.batch_size / topology.chips,
    'memory': {
      'parameters': parameters,
      'optimizer_and_statistics': state - parameters,
      'batch': memory.argument_size_in_bytes - state,
      'activations': memory.temp_size_in_bytes,
      'program': memory.generated_code_size_in_bytes,
      'peak': memory.argument_size_in_bytes
      + memory.output_size_in_bytes
      - memory.alias_size_in_bytes
      + memory.temp_size_in_bytes
      + memory.generated_code_size_in_bytes,
      'chip': chip.hbm,
    },
    'flops': cost['flops'],
    'bytes_moved': cost['bytes accessed'],
    'collectives': len(network),
    'bytes_all_reduced': sum(c.nbytes for c in network if c.kind == 'all-reduce'),
    'bytes_between_slices': sum(c.nbytes for c in network if c.kind == 'send'),
    'bytes_otherwise_sent': sum(c.nbytes for c in network if c.kind not in ('all-reduce', 'send')),
    'seconds': seconds,
    'bound': max(seconds, key=seconds.get),
    'step_seconds': step_seconds,
    'slices_per_second': config.train.batch_size / step_seconds,
    'efficiency': alone / step_seconds,
    'compile_seconds': compile_seconds,
    'versions': {name: importlib.metadata.version(name) for name in ('jax', 'libtpu')},
    'commit': evaluate.commit(),
  }


_SENDS = re.compile(
  r' = (?P<result>\(.*?\)|\S+) '
  r'(?P<kind>all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all|send(?=.*xla_megascale_runtime))'
  r'(?P<start>-start)?\('
)
_ARRAY = re.compile(r'\b(pred|[a-z]+?(\d+)(?:e\d\w*)?)\[([\d,]*)\]')


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

  @classmethod
  def parse(cls, line: str, devices: int) -> 'Collective':
    """From a line of the optimised HLO in which `_SENDS` finds something."""
    found = _SENDS.search(line)
    sizes = [
      math.prod(map(int, filter(None, dims.split(',')))) * (1 if kind == 'pred' else int(bits) // 8)
      for kind, bits, dims in _ARRAY.findall(found['result'])
    ]
    # What begins asynchronously gives its operands too, and some kinds a counter or two.
    if found['kind'] == 'send':
      sizes = sizes[:1]
    elif found['start'] and found['kind'] == 'collective-permute':
      sizes = sizes[1:2]
    elif found['start'] and found['kind'] != 'all-reduce':
      sizes = sizes[len(sizes) // 2 :]
    return cls(found['kind'], sum(sizes), _group(line, devices))

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


def _shortage(message: str) -> str:
  """What the compiler says is missing, in one line."""
  amounts = [float(amount) for amount in re.findall(r'([\d.]+)G', message)]
  if len(amounts) < 2:
    return message.splitlines()[0]
  needed, available = amounts[:2]
  return f'needs {needed:.2f} GiB of {available:.2f} GiB, {needed - available:.2f} GiB are missing'


def _nbytes(tree) -> int:
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def largest_batch(config: ml_collections.ConfigDict, topology: Topology) -> int:
  """The largest batch per device that fits, below config's own, which does not; 0 where not even one slice each does.

  Found by compiling, halving what is between: the compiler arranges a step anew for each batch, so that memory does not
  grow in proportion.
  """
  config = config.copy_and_resolve_references()
  devices = config.mesh.data if config.mesh.data > 0 else topology.chips // config.mesh.space
  fits, too_much = 0, config.train.batch_size // devices
  while too_much - fits > 1:
    tried = (fits + too_much) // 2
    config.train.batch_size = tried * devices
    logging.info('compiling with %d per device, of which %s fit and %d do not', tried, fits or 'none yet', too_much)
    try:
      report(config, topology)
      fits = tried
    except DoesNotFitError:
      too_much = tried
  return fits


def table(result: dict) -> str:
  """A report for eyes."""
  memory, seconds = result['memory'], result['seconds']
  rows = [
    ('model', f'{result["task"]}, {result["model"]}, {result["image_size"]} x {result["image_size"]}'),
    ('topology', f'{result["topology"]}, {result["chips"]} chips, mesh {_mesh(result)}'),
    ('batch', f'{result["batch_size"]}, {result["batch_per_device"]:g} per device'),
    ('compiled in', f'{result["compile_seconds"]:.0f} s'),
    ('parameters', f'{memory["parameters"] / 1e6:,.0f} MB'),
    ('optimizer, statistics', f'{memory["optimizer_and_statistics"] / 1e6:,.0f} MB'),
    ('activations', f'{memory["activations"] / 1e6:,.0f} MB, with all other temporaries'),
    ('program', f'{memory["program"] / 1e6:,.0f} MB'),
    (
      'peak memory',
      f'{memory["peak"] / 1e9:.2f} of {memory["chip"] / 1e9:.2f} GB: {memory["peak"] / memory["chip"]:.0%}',
    ),
    ('arithmetic', f'{result["flops"] / 1e9:,.0f} GFLOP: {_ms(seconds["compute"])}'),
    ('memory traffic', f'{result["bytes_moved"] / 1e9:,.1f} GB: {_ms(seconds["memory"])}'),
    (
      'network',
      f'{result["bytes_all_reduced"] / 1e6:,.0f} MB all-reduced, {result["bytes_otherwise_sent"] / 1e6:,.0f} MB '
      f'otherwise, {result["bytes_between_slices"] / 1e6:,.0f} MB between slices, in {result["collectives"]} '
      f'exchanges: {_ms(seconds["interconnect"])}',
    ),
    ('bound by', result['bound']),
    ('step, at best', f'{_ms(result["step_seconds"])}: {result["slices_per_second"]:,.0f} slices/s on all chips'),
    ('scaling efficiency', f'{result["efficiency"]:.1%}'),
  ]
  width = max(len(name) for name, _ in rows)
  return '\n'.join(f'{name:{width}}  {value}' for name, value in rows)


def aot(config: ml_collections.ConfigDict, name: str, topology: Topology, output: pathlib.Path) -> None:
  """Prints the report of a config on a topology and writes it to `output` as JSON, named after both.

  Raises:
    DoesNotFitError: as its text, what is missing, and the largest batch per device that fits.
  """
  logging.info('compiling %s for %s; a full-size step takes minutes', name, topology)
  try:
    result = report(config, topology)
  except DoesNotFitError as error:
    most = largest_batch(config, topology)
    hint = f'the largest batch per device that fits is {most}' if most else 'not one slice per device fits'
    raise DoesNotFitError(
      f'train.batch_size={config.train.batch_size} on {topology}: {error}; {hint}, and mesh.space shares images'
    ) from None
  path = output / f'{name}-{str(topology).replace(":", "_").replace(" ", "")}.json'
  with replacing(path) as partial:
    partial.write_text(json.dumps(result, indent=2) + '\n')
  print(table(result))
  logging.info('as JSON: %s', path)


def sweep(config: ml_collections.ConfigDict, name: str, kind: str, page: pathlib.Path) -> None:
  """Reports of a config on slices of 8 to 256 chips, as a section of a page; the reports lie in a folder beside it.

  The batch grows with the slice: config.train.batch_size is for the smallest.
  """
  config = config.copy_and_resolve_references()
  first = Topology.parse(f'{kind}:{CHIPS[kind].sweep[0]}')
  per_chip, results = config.train.batch_size / first.chips, []
  for shape in CHIPS[kind].sweep:
    topology = Topology.parse(f'{kind}:{shape}')
    config.train.batch_size = round(per_chip * topology.chips)
    logging.info('compiling %s for %s', name, topology)
    results.append(report(config, topology))
    print(table(results[-1]), end='\n\n', flush=True)
  folder = page.with_suffix('')
  with replacing(folder / f'{name}-{kind}-{per_chip:g}.json') as partial:
    partial.write_text(json.dumps(results, indent=2) + '\n')
  with replacing(page) as partial:
    partial.write_text(scaling_page(folder))


def scaling_page(folder: pathlib.Path) -> str:
  """Markdown: a section for each sweep in the folder."""
  parts = [_PAGE_HEAD]
  for path in sorted(folder.glob('*.json')):
    results = json.loads(path.read_text())
    first = results[0]
    parts.append(
      f'## `{path.stem}`: {first["task"]}, {first["model"]}, {first["image_size"]} x {first["image_size"]}, '
      f'{first["batch_per_device"]:g} per chip\n\n'
      f'jax {first["versions"]["jax"]}, libtpu {first["versions"]["libtpu"]}, commit {first["commit"][:7]}. '
      f'Each chip holds {first["memory"]["parameters"] / 1e6:,.0f} MB of parameters and '
      f'{first["memory"]["optimizer_and_statistics"] / 1e6:,.0f} MB of optimizer state and statistics.\n\n'
      '| slice | chips | batch | peak GB | GFLOP | GB moved | MB all-reduced | compute ms | memory ms '
      '| interconnect ms | slices/s | efficiency | compiled in |\n'
      '| --- | ' + ' | '.join(['---:'] * 12) + ' |'
    )
    for r in results:
      ms = [f'{r["seconds"][bound] * 1e3:.2f}' for bound in ('compute', 'memory', 'interconnect')]
      cells = [
        f'`{r["topology"]}`',
        str(r['chips']),
        str(r['batch_size']),
        f'{r["memory"]["peak"] / 1e9:.2f}',
        f'{r["flops"] / 1e9:,.0f}',
        f'{r["bytes_moved"] / 1e9:.1f}',
        f'{r["bytes_all_reduced"] / 1e6:.0f}',
        *ms,
        f'{r["slices_per_second"]:,.0f}',
        f'{r["efficiency"]:.1%}',
        f'{r["compile_seconds"]:.0f} s',
      ]
      parts[-1] += '\n| ' + ' | '.join(cells) + ' |'
  return '\n\n'.join(parts) + '\n'


_PAGE_HEAD = """# Scaling

Written by `python launch.py --mode=aot --sweep`, from the reports in [scaling/](scaling): the training step compiled
for TPU slices of 8 to 256 chips by the TPU's own compiler, on a CPU machine. Nothing here was run on a TPU. Each time
is the least that the chip's published rates allow for what the compiler counted in one chip's program:

- **compute**: FLOPs at the chip's peak in bfloat16;
- **memory**: bytes that the program's operations read and write, at the rate of the chip's memory. An upper count: what
  stays in the core's own memory between two operations is in it;
- **interconnect**: bytes that each chip must send, over all its links (half of them where an axis of the slice is not
  closed to a ring), and 1 microsecond for each chip that a message passes, which is an assumption;
- **slices/s**: of CT, over all chips, if compute and memory overlap and the interconnect overlaps with neither;
- **efficiency**: throughput per chip against a chip alone with its share of the batch: what the interconnect leaves."""


def _mesh(result):
  return ' x '.join(f'{axis} {size}' for axis, size in result['mesh'].items())


def _ms(seconds):
  return f'{seconds * 1e3:.2f} ms'
