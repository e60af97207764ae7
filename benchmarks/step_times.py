"""Times the training step of models on this machine's device, beside the least time that the compiled program allows.

  python -m benchmarks.step_times --models=fusa_resunet,resunet --image_size=512 --batch_size=8 --output=FOLDER

The least times are predicted as in --mode=aot: the FLOPs at the chip's published peak, and the bytes that the compiled
step moves, operation by operation, at the published rate of the chip's memory. `step / least` says how many times
longer the measured step takes than the larger of the two. FLOPs are three times those of the forward pass, as in
benchmarks.compare. If the model without FUSA is there too, both run in turn, and the last line is FUSA's share of the
step.

--profile lists the operations that take longest, each beside the least time for its bytes. --output keeps the numbers,
and the text of the compiled steps.
"""

import gzip
import logging
import pathlib
import re
import tempfile
import time

import jax
from absl import flags
from jax.profiler import ProfileData

from benchmarks import workload
from benchmarks.settings import Settings, define_size_flags
from fusa_jax.chips import gpu, hlo, tpu
from fusa_jax.runs import arguments
from fusa_jax.system import program
from fusa_jax.system.errors import UserError
from fusa_jax.system.files import write_json

_HEAD = (
  '| model | step ms | slices/s | MFU | peak MB | GB moved | GB/s | least ms: arithmetic | memory | step / least '
  '| compiled in |\n| --- |' + ' ---: |' * 10
)
_OPERATIONS_HEAD = '| operation | ms | share | MB moved | least ms | from |\n| --- |' + ' ---: |' * 4 + ' --- |'


def define_flags() -> None:
  define_size_flags(['fusa_resunet', 'resunet'])
  flags.DEFINE_bool('profile', False, 'list the operations that take longest')
  flags.DEFINE_string('output', None, 'folder for the numbers and the compiled programs')


def row(
  name: str, seconds: float, gflops: float, moved: int, batch_size: int, chip: gpu.Chip | tpu.Chip | None
) -> dict:
  """Returns what follows from the time of a step, its FLOPs and its bytes; None for a chip without published rates."""
  least = {'arithmetic': 1e9 * gflops / chip.flops, 'memory': moved / chip.hbm_rate} if chip else None
  return {
    'model': name,
    'step_seconds': seconds,
    'slices_per_second': batch_size / seconds,
    'gflops': gflops,
    'mfu': workload.mfu(gflops / seconds, chip),
    'bytes_moved': moved,
    'bytes_per_second': moved / seconds,
    'least_seconds': least,
    'step_to_least': seconds / max(least.values()) if least else None,
  }


def line(row: dict) -> str:
  """Returns a row as Markdown."""
  least = [f'{seconds * 1e3:.2f}' for seconds in row['least_seconds'].values()] if row['least_seconds'] else ['-', '-']
  cells = [
    f'`{row["model"]}`',
    f'{row["step_seconds"] * 1e3:.2f}',
    f'{row["slices_per_second"]:.1f}',
    workload.percent(row['mfu']),
    f'{row["peak_bytes"] / 1e6:.0f}',
    f'{row["bytes_moved"] / 1e9:.2f}',
    f'{row["bytes_per_second"] / 1e9:.0f}',
    *least,
    f'{row["step_to_least"]:.2f}' if row['step_to_least'] else '-',
    f'{row["compile_seconds"]:.0f} s',
  ]
  return f'| {" | ".join(cells)} |'


def shares(rows: list[dict], seconds: dict[str, float]) -> list[str]:
  """Returns a sentence for each FUSA variant with its plain model: FUSA's share of the measured and the least time.

  `seconds` are the times of the models' steps, measured in turn.
  """
  by_name, sentences = {row['model']: row for row in rows}, []
  for name, fusa in by_name.items():
    if plain := by_name.get(name.removeprefix('fusa_')) if name.startswith('fusa_') else None:
      with_fusa, without = seconds[name], seconds[plain['model']]
      text = f"FUSA's share of the step of `{name}`: {1 - without / with_fusa:.1%}"
      text += f' ({with_fusa * 1e3:.2f} ms with FUSA, {without * 1e3:.2f} ms without it, in turn)'
      if fusa['least_seconds']:
        least = 1 - max(plain['least_seconds'].values()) / max(fusa['least_seconds'].values())
        text += f', predicted {least:.1%}'
      sentences.append(f'{text}.')
  return sentences


def operation_seconds(path: pathlib.Path) -> dict[str, float]:
  """Returns the seconds of each operation of the compiled programs in a trace of jax.profiler.

  A GPU runs an operation as one or several kernels, which its streams list. A kernel without the name of an operation
  counts under its own name.
  """
  took = {}
  for plane in ProfileData.from_file(str(path)).planes:
    for line in plane.lines:
      is_stream = plane.name.startswith('/device:GPU') and line.name.startswith('Stream')
      for event in line.events:
        # Skip loops and calls: they contain other operations, which the trace lists too.
        is_container = re.match(r'(while|call|conditional)\b', event.name)
        operation = next((str(value) for key, value in event.stats if key == 'hlo_op'), None)
        if is_stream or (operation and not is_container):
          name = operation or event.name
          took[name] = took.get(name, 0.0) + event.duration_ns / 1e9
  return took


def operations(running: workload.Running, steps: int, chip: gpu.Chip | tpu.Chip | None) -> list[dict]:
  """Returns the operations of a step, the longest first: seconds, share of the total, bytes, and least seconds.

  Raises:
    UserError: the profiler recorded no operation.
  """
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      for _ in range(steps):
        running.step()
      running.wait()
    took = [operation_seconds(path) for path in pathlib.Path(folder).rglob('*.xplane.pb')]
  if not took or not took[0]:
    raise UserError('the profiler recorded no operation')
  moves = {operation.name: operation for operation in hlo.operations(running.program())}
  total, rows = sum(took[0].values()), []
  for name, seconds in sorted(took[0].items(), key=lambda item: -item[1]):
    moved = moves[name].nbytes if name in moves else None
    rows.append(
      {
        'operation': name,
        'seconds': seconds / steps,
        'share': seconds / total,
        'bytes_moved': moved,
        'least_seconds': moved / chip.hbm_rate if chip and moved is not None else None,
        'source': moves[name].source if name in moves else '',
      }
    )
  return rows


def operations_table(rows: list[dict], shown: int = 12) -> str:
  """Returns the longest operations as Markdown, and the total of all."""
  number = lambda value, unit: '-' if value is None else f'{value / unit:.2f}'
  lines = [
    f'| `{row["operation"][:60]}` | {row["seconds"] * 1e3:.2f} | {row["share"]:.1%} '
    f'| {number(row["bytes_moved"], 1e6)} | {number(row["least_seconds"], 1e-3)} | {row["source"][-60:]} |'
    for row in rows[:shown]
  ]
  total = sum(row['seconds'] for row in rows)
  return '\n'.join([_OPERATIONS_HEAD, *lines, f'\n{len(rows)} operations take {total * 1e3:.2f} ms per step.'])


def main(_):
  program.start_logging()
  program.use_compilation_cache()
  sizes, values, chip = Settings.from_flags(), flags.FLAGS, workload.chip()
  output, facts = values.output and pathlib.Path(values.output), workload.facts(sizes)
  if output:
    output.mkdir(parents=True, exist_ok=True)
  models, rows, seconds = {}, [], {}
  print(f'{workload.sentence(facts)}\n' + ('' if values.profile else f'\n{_HEAD}'), flush=True)
  for name in values.models:
    work = workload.create(workload.config_of(name, sizes))
    began = time.perf_counter()
    running = workload.Running(work)
    compile_seconds = time.perf_counter() - began
    running.step()
    running.wait()
    if values.profile:
      found = operations(running, sizes.steps, chip)
      print(f'{name}:\n\n{operations_table(found)}', flush=True)
      if output:
        write_json(output / f'operations-{name}.json', facts | {'model': name, 'operations': found})
      continue
    text = running.program()
    if output:  # first of all: from the program, everything but the time can be computed elsewhere
      (output / f'step-{name}.hlo.gz').write_bytes(gzip.compress(text.encode()))
    models[name] = running
    steps, waits = ({key: getattr(each, do) for key, each in models.items()} for do in ('step', 'wait'))
    seconds = workload.in_turn(steps, waits, sizes)
    logging.info('%s: %.2f ms per step', name, seconds[name] * 1e3)
    moved = hlo.bytes_moved(text)
    rows.append(row(name, seconds[name], 3 * workload.forward_gflops(name, sizes), moved, sizes.batch_size, chip))
    rows[-1] |= {'peak_bytes': running.memory(), 'compile_seconds': compile_seconds}
    print(line(rows[-1]), flush=True)
    if output:
      write_json(output / f'step-{name}.json', facts | rows[-1])
  if sentences := shares(rows, seconds):
    print('\n' + '\n'.join(sentences))


if __name__ == '__main__':
  define_flags()
  arguments.start(main)
