"""Compiles the training step for chips that this machine does not have: reports memory, traffic and time.

JAX's topology API and the chips' own compilers compile the same step that training runs: libtpu for TPUs
(requirements-aot.txt), XLA of jax[cuda12] for GPUs (requirements-aot-gpu.txt). Sizes and counts come from the compiler,
for one device's program. The TPU's compiler also estimates the cycles of each operation. All other times follow from
the counts and the chip's published rates: they are lower limits. Nothing is a measurement.
"""

import dataclasses
import importlib.metadata
import json
import logging
import pathlib
import re
import time

import jax
import ml_collections

from fusa_jax import tasks
from fusa_jax.chips import hlo, tpu
from fusa_jax.chips.topology import Topology
from fusa_jax.system import meshes, provenance
from fusa_jax.system.errors import DoesNotFitError
from fusa_jax.system.files import replacing, write_json
from fusa_jax.training import optimizers, train

_OPERATIONS, _SHOWN = 50, 10  # number of operations in a report and in its table


def report(config: ml_collections.ConfigDict, topology: Topology) -> dict:
  """Compiles a config's training step for a topology; returns memory, traffic and least times per device and step.

  Sizes are in bytes.
  - `flops`: of the lowered program of the whole batch in its general form, divided by the chips. They do not include
    what a form for a chip adds, as the zeros of a packed kernel (models/tpu/packing.py).
  - `bytes_moved`: bytes between memory and core. `bytes_accessed` is XLA's own number, which also counts data that
    stays in the core; None for GPUs.
  - `cycles`: the sum of the TPU compiler's estimates. None for GPUs.
  - `operations`: the operations that take the most cycles (TPUs) or move the most bytes (GPUs), largest first.
  - `layers`: bytes and cycles per layer of the model, forward and backward together.
  - `seconds`: the least times for arithmetic, for memory and for the network between chips.
  - `core_seconds`: `cycles` at the chip's clock. For GPUs, the larger of the least times for arithmetic and memory.
  - `step_seconds`: `core_seconds` plus the network's time, as if computation and network never overlapped.
  - `least_seconds`: the same with the least times, also for TPUs.
  - `peak_share`: share of the chip's peak: least time for arithmetic / `step_seconds`.
  - `efficiency`: the share of a step without the network time: throughput per chip / throughput of a single chip with
    its share of the batch.

  Raises:
    UserError: the config does not fit the topology, or the compiler is missing.
    DoesNotFitError: the step needs more memory than the chip has.
  """
  config = config.copy_and_resolve_references()
  mesh = meshes.create_mesh(config.mesh.data, config.mesh.space, topology.devices())
  meshes.check_divides(mesh, config.train.batch_size, config.data.image_size)
  task = tasks.create(config, topology.platform)
  optimizer, _ = optimizers.make_optimizer(config)
  shapes = train.state_shapes(task, optimizer, config, mesh)
  lowered = train.lower_step(task, optimizer, config, mesh, shapes)
  began = time.perf_counter()
  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    raise DoesNotFitError(_shortage(str(error))) from None
  compile_seconds = time.perf_counter() - began

  memory, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}
  peak = (
    memory.argument_size_in_bytes
    + memory.output_size_in_bytes
    - memory.alias_size_in_bytes
    + memory.temp_size_in_bytes
    + memory.generated_code_size_in_bytes
  )
  if peak > topology.chip.hbm:  # the TPU's compiler refuses by itself, the GPU's does not
    raise DoesNotFitError(_missing(peak / 2**30, topology.chip.hbm / 2**30))
  flops = _lowered_flops(config, optimizer, topology.platform) / topology.chips
  parameters, state = _nbytes(shapes.variables['params']), _nbytes(shapes)
  program = compiled.as_text()
  network, operations = hlo.collectives(program, mesh.devices.size), hlo.operations(program)
  moved, cycles = (sum(getattr(operation, name) for operation in operations) for name in ('nbytes', 'cycles'))
  operations.sort(key=lambda operation: (operation.cycles, operation.nbytes), reverse=True)
  chip = topology.chip
  seconds = {
    'compute': flops / chip.flops,
    'memory': moved / chip.hbm_rate,
    'interconnect': sum(topology.seconds(collective) for collective in network),
  }
  least = max(seconds['compute'], seconds['memory'])
  alone = cycles / chip.clock if cycles else least
  step_seconds = alone + seconds['interconnect']
  return {
    'task': config.task,
    'model': config.model.name,
    'topology': str(topology),
    'chips': topology.chips,
    'mesh': dict(mesh.shape),
    'image_size': config.data.image_size,
    'channels': tasks.context_of(config).channels,
    'classes': list(tasks.classes_of(config).names),
    'batch_size': config.train.batch_size,
    'batch_per_device': config.train.batch_size / topology.chips,
    'memory': {
      'parameters': parameters,
      'optimizer_and_statistics': state - parameters,
      'batch': memory.argument_size_in_bytes - state,
      'activations': memory.temp_size_in_bytes,
      'program': memory.generated_code_size_in_bytes,
      'peak': peak,
      'chip': chip.hbm,
    },
    'flops': flops,
    'bytes_moved': moved,
    'bytes_accessed': cost.get('bytes accessed'),
    'cycles': cycles or None,
    'operations': [dataclasses.asdict(operation) for operation in operations[:_OPERATIONS]],
    'layers': _by_layer(operations),
    'collectives': len(network),
    'bytes_all_reduced': sum(c.nbytes for c in network if c.kind == 'all-reduce'),
    'bytes_between_slices': sum(c.nbytes for c in network if c.kind == 'send'),
    'bytes_otherwise_sent': sum(c.nbytes for c in network if c.kind not in ('all-reduce', 'send')),
    'seconds': seconds,
    'bound': max(seconds, key=seconds.get),
    'core_seconds': alone,
    'step_seconds': step_seconds,
    'least_seconds': least + seconds['interconnect'],
    'peak_share': seconds['compute'] / step_seconds,
    'slices_per_second': config.train.batch_size / step_seconds,
    'efficiency': alone / step_seconds,
    'compile_seconds': compile_seconds,
    'versions': {name: importlib.metadata.version(name) for name in ('jax', *topology.packages)},
    'commit': provenance.commit(),
  }


def _by_layer(operations):
  """Sums bytes and cycles per layer of the model: {layer: {'nbytes': ..., 'cycles': ...}}, the largest first."""
  layers = {}
  for operation in operations:
    sums = layers.setdefault(_layer(operation.source), {'nbytes': 0, 'cycles': 0})
    sums['nbytes'] += operation.nbytes
    sums['cycles'] += operation.cycles
  return dict(sorted(layers.items(), key=lambda item: (item[1]['cycles'], item[1]['nbytes']), reverse=True))


def _lowered_flops(config, optimizer, platform):
  """The FLOPs of the whole batch in the general form of the step, with the dtype of a platform."""
  config = config.copy_and_resolve_references()
  config.mesh.update(data=1, space=1)
  config.model.dtype = tasks.resolved_dtype(config, platform)
  mesh, task = meshes.create_mesh(1, 1, jax.devices('cpu')[:1]), tasks.create(config)
  shapes = train.state_shapes(task, optimizer, config, mesh)
  # Lowered for TPUs, layers have their general forms; those for GPUs and CPUs have other products.
  return train.lower_step(task, optimizer, config, mesh, shapes, platform='tpu').cost_analysis()['flops']


def _shortage(message: str) -> str:
  """The shortage of memory in the compiler's message, as one line."""
  amounts = [float(amount) for amount in re.findall(r'([\d.]+)Gi?B?', message)]
  if len(amounts) < 2:
    return message.splitlines()[0]
  return _missing(*amounts[:2])


def _missing(needed, available):
  return f'needs {needed:.2f} GiB, has {available:.2f} GiB, {needed - available:.2f} GiB are missing'


def _nbytes(tree) -> int:
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def largest_batch(config: ml_collections.ConfigDict, topology: Topology) -> int:
  """The largest batch per device that fits, for a config with a batch that does not fit; 0 if one slice does not fit.

  It searches by bisection and compiles each candidate. Memory is not proportional to the batch, because the compiler
  schedules each batch size differently.
  """
  config = config.copy_and_resolve_references()
  devices = config.mesh.data if config.mesh.data > 0 else topology.chips // config.mesh.space
  fits, too_much = 0, config.train.batch_size // devices
  while too_much - fits > 1:
    candidate = (fits + too_much) // 2
    config.train.batch_size = candidate * devices
    logging.info('compiling with %d per device; %s fit, %d do not', candidate, fits or 'none yet', too_much)
    try:
      report(config, topology)
      fits = candidate
    except DoesNotFitError:
      too_much = candidate
  return fits


def table(result: dict) -> str:
  """Formats a report as a text table."""
  memory, seconds = result['memory'], result['seconds']
  rows = [
    ('model', f'{result["task"]}, {result["model"]}, {result["image_size"]} x {result["image_size"]}'),
    ('channels, classes', f'{result["channels"]}, {len(result["classes"])}: {", ".join(result["classes"])}'),
    ('topology', f'{result["topology"]}, {result["chips"]} chips, mesh {_mesh(result)}'),
    ('batch', f'{result["batch_size"]}, {result["batch_per_device"]:g} per device'),
    *_step_rows(result),
    ('compiled in', f'{result["compile_seconds"]:.0f} s'),
    ('parameters', f'{memory["parameters"] / 1e6:,.0f} MB'),
    ('optimizer, statistics', f'{memory["optimizer_and_statistics"] / 1e6:,.0f} MB'),
    ('activations', f'{memory["activations"] / 1e6:,.0f} MB, including all other temporaries'),
    ('program', f'{memory["program"] / 1e6:,.0f} MB'),
    (
      'peak memory',
      f'{memory["peak"] / 1e9:.2f} of {memory["chip"] / 1e9:.2f} GB: {memory["peak"] / memory["chip"]:.0%}',
    ),
    ('arithmetic', f'{result["flops"] / 1e9:,.0f} GFLOP: at least {_ms(seconds["compute"])}'),
    ('memory traffic', f'{result["bytes_moved"] / 1e9:,.1f} GB: at least {_ms(seconds["memory"])}'),
    *_attention_row(result),
    (
      'network',
      f'{result["bytes_all_reduced"] / 1e6:,.0f} MB all-reduced, {result["bytes_otherwise_sent"] / 1e6:,.0f} MB '
      f'otherwise, {result["bytes_between_slices"] / 1e6:,.0f} MB between slices, in {result["collectives"]} '
      f'exchanges: at least {_ms(seconds["interconnect"])}',
    ),
    ('largest least time', result['bound']),
    ('scaling efficiency', f'{result["efficiency"]:.1%}'),
  ]
  width = max(len(name) for name, _ in rows)
  lines = [f'{name:{width}}  {value}' for name, value in rows]
  key, unit, title = ('cycles', 'million cycles', 'slowest') if result['cycles'] else ('nbytes', 'MB', 'largest')
  lines.append(f'{title} operations')
  for operation in result['operations'][:_SHOWN]:
    lines.append(f'{operation[key] / 1e6:>{width},.2f}  {unit}: {operation["name"]}, {_place(operation["source"])}')
  lines.append(f'{title} layers')
  for layer, sums in list(result['layers'].items())[:_SHOWN]:
    lines.append(f'{sums[key] / 1e6:>{width},.2f}  {unit}: {layer}')
  return '\n'.join(lines)


def _step_rows(result):
  """The time of a step: by the TPU compiler's estimate and at least, or only at least (GPUs)."""
  rate = f'{result["slices_per_second"]:,.0f} slices/s on all chips, {result["peak_share"]:.0%} of the peak'
  if not result['cycles']:
    return [('step, at least', f'{_ms(result["step_seconds"])}: at most {rate}')]
  clock = result['cycles'] / result['core_seconds']
  return [
    (
      'cycles',
      f'{result["cycles"] / 1e6:,.0f} million, estimated by the compiler: {_ms(result["core_seconds"])}'
      f' at {clock / 1e9:.2f} GHz',
    ),
    ('step, estimated', f'{_ms(result["step_seconds"])}: {rate}'),
    ('step, at least', f'{_ms(result["least_seconds"])}, by arithmetic, bytes and network'),
  ]


def _attention_row(result):
  """The traffic and the cycles of the same model without FUSA, if they were counted."""
  without = result.get('bytes_moved_without_attention')
  if without is None:
    return []
  text = f'{without / 1e9:,.1f} GB: FUSA adds {result["bytes_moved"] / without - 1:.1%}'
  if result['cycles']:
    cycles = result['cycles_without_attention']
    text += f'; {cycles / 1e6:,.0f} million cycles: FUSA adds {result["cycles"] / cycles - 1:.1%}'
  return [('without FUSA', text)]


def without_attention(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict | None:
  """Returns the config of the same model without FUSA; None if the model has none."""
  plain = config.copy_and_resolve_references()
  plain.model.name = config.model.name.removeprefix('fusa_')
  return None if plain.model.name == config.model.name else plain


def aot(config: ml_collections.ConfigDict, name: str, topology: Topology, output: pathlib.Path) -> None:
  """Prints the report of a config on a topology, and writes it as JSON to the folder `output`, named after both.

  A model with FUSA is also compiled without it; `bytes_moved_without_attention` and `cycles_without_attention` are
  counted in that program.

  Raises:
    DoesNotFitError: the message says how much memory is missing, and names the largest batch per device that fits.
  """
  logging.info('compiling %s for %s; a full-size step takes minutes', name, topology)
  try:
    result = report(config, topology)
  except DoesNotFitError as error:
    most = largest_batch(config, topology)
    hint = f'the largest batch per device that fits is {most}' if most else 'one slice per device does not fit'
    raise DoesNotFitError(
      f'train.batch_size={config.train.batch_size} on {topology}: {error}; {hint}; a larger mesh.space splits images'
    ) from None
  if plain := without_attention(config):
    logging.info('compiling %s without FUSA', name)
    other = report(plain, topology)
    result['bytes_moved_without_attention'], result['cycles_without_attention'] = other['bytes_moved'], other['cycles']
  path = output / f'{name}-{str(topology).replace(":", "_").replace(" ", "")}.json'
  write_json(path, result)
  print(table(result))
  logging.info('as JSON: %s', path)


def sweep(config: ml_collections.ConfigDict, name: str, kind: str, page: pathlib.Path) -> None:
  """Writes reports of a config on slices of 8 to 256 chips to a folder, and a page about all reports in this folder.

  The folder has the name of the page without its ending. config.train.batch_size is for the smallest slice; the batch
  grows in proportion to the chips.
  """
  config = config.copy_and_resolve_references()
  first = tpu.Topology.parse(f'{kind}:{tpu.CHIPS[kind].sweep[0]}')
  per_chip, results = config.train.batch_size / first.chips, []
  for shape in tpu.CHIPS[kind].sweep:
    topology = tpu.Topology.parse(f'{kind}:{shape}')
    config.train.batch_size = round(per_chip * topology.chips)
    logging.info('compiling %s for %s', name, topology)
    results.append(report(config, topology))
    print(table(results[-1]), end='\n\n', flush=True)
  folder = page.with_suffix('')
  write_json(folder / f'{name}-{kind}-{per_chip:g}.json', results)
  with replacing(page) as partial:
    partial.write_text(scaling_page(folder))


def scaling_page(folder: pathlib.Path) -> str:
  """Returns Markdown with a section for each sweep in the folder."""
  parts = [_PAGE_HEAD]
  for path in sorted(folder.glob('*.json')):
    results = json.loads(path.read_text())
    first = results[0]
    parts.append(
      f'## `{path.stem}`: {first["task"]}, {first["model"]}, {first["image_size"]} x {first["image_size"]}, '
      f'{first["batch_per_device"]:g} per chip\n\n'
      f'jax {first["versions"]["jax"]}, libtpu {first["versions"]["libtpu"]}, commit {first["commit"][:7]}.\n'
      f'Each chip holds {first["memory"]["parameters"] / 1e6:,.0f} MB of parameters and '
      f'{first["memory"]["optimizer_and_statistics"] / 1e6:,.0f} MB of optimizer state and statistics.\n\n'
      '| slice | chips | batch | million cycles | step ms | slices/s | efficiency | of peak | at least ms | compute ms '
      '| memory ms | interconnect ms | GFLOP | GB moved | MB all-reduced | peak GB | compiled in |\n'
      '| --- | ' + ' | '.join(['---:'] * 16) + ' |'
    )
    for r in results:
      least = [r['least_seconds'], *(r['seconds'][bound] for bound in ('compute', 'memory', 'interconnect'))]
      cells = [
        f'`{r["topology"]}`',
        str(r['chips']),
        str(r['batch_size']),
        f'{r["cycles"] / 1e6:,.0f}',
        f'{r["step_seconds"] * 1e3:.1f}',
        f'{r["slices_per_second"]:,.0f}',
        f'{r["efficiency"]:.1%}',
        f'{r["peak_share"]:.0%}',
        *(f'{seconds * 1e3:.2f}' for seconds in least),
        f'{r["flops"] / 1e9:,.0f}',
        f'{r["bytes_moved"] / 1e9:.1f}',
        f'{r["bytes_all_reduced"] / 1e6:.0f}',
        f'{r["memory"]["peak"] / 1e9:.2f}',
        f'{r["compile_seconds"]:.0f} s',
      ]
      parts[-1] += '\n| ' + ' | '.join(cells) + ' |'
  return '\n\n'.join(parts) + '\n'


_PAGE_HEAD = """# Scaling

`python launch.py --config=configs/seg.py --mode=aot --sweep --config.train.batch_size=64` and the same with
`configs/cls.py` write this page and the reports in [scaling/](scaling). The TPU's own compiler compiled the training
step for TPU slices of 8 to 256 chips, on a CPU machine. Nothing here ran on a TPU. The batch is for the smallest slice:
eight CT slices per chip ([pods.md](pods.md) says why).

The first columns are the compiler's own estimate. The later ones are lower limits: the work that the compiler counted
in one chip's program, at the chip's published rates.

- **million cycles**: the sum of the compiler's estimates for the operations of one chip's program, without the
  interconnect.
- **step ms**: these cycles at the chip's clock, plus the interconnect's time. The clock follows from the published
  peak: each 128 x 128 matrix unit multiplies and adds that many numbers per cycle (v5e: 1.5 GHz).
- **slices/s**: CT slices per second over all chips, from the step's time. The interconnect overlaps with nothing here.
- **efficiency**: throughput per chip / throughput of a single chip with its share of the batch. It shows what the
  interconnect costs. It is a lower bound: in a real step, part of the interconnect's time overlaps with the rest.
- **of peak**: share of the chip's peak that the step reaches, by the compiler's estimate.
- **at least ms**: the larger of compute and memory, plus the interconnect.
- **compute**: FLOPs, at the chip's peak in bfloat16.
- **memory**: bytes between the chip's memory and its core, at the rate of that memory. They are counted operation by
  operation in the compiled program.
- **interconnect**: bytes that each chip must send, over all its links. Only half of the links count where an axis of
  the slice is not closed to a ring. Each hop between chips adds 1 microsecond (assumed).
- **compiled in**: seconds on the machine that wrote the report. Other work on that machine may have slowed it down."""


# JAX's path of an operation in the model. Rematerialised blocks repeat the model's name.
_IN_MODEL = re.compile(r'(transpose\()?jvp\(\w*\)\)?/(?:jvp\(\w*\)/)?(?:checkpoint/)?(?:rematted_computation/)?(.*)')


def _place(source: str) -> str:
  """Shortens the path that JAX gives: "forward" or "backward" and the modules. Other paths stay unchanged."""
  found = _IN_MODEL.search(source)
  return f'{"backward" if found[1] else "forward"} {found[2]}' if found else source or 'inserted by the compiler'


def _layer(source: str) -> str:
  """The layer of an operation: a block of the network, or one of an encoder's blocks."""
  found = _IN_MODEL.search(source)
  if not found:
    return 'outside the layers'  # input, loss, optimizer
  first, *rest = found[2].split('/')
  if not rest:
    return 'between the layers'  # joins and changes of dtype
  return f'{first}/{rest[0]}' if first == 'encoder' and len(rest) > 1 else first


def _mesh(result):
  return ' x '.join(f'{axis} {size}' for axis, size in result['mesh'].items())


def _ms(seconds):
  return f'{seconds * 1e3:.2f} ms'
