"""Measures how many slices per second the input path delivers to the devices, with nothing else running.

  python -m benchmarks.input_pipeline --data_dir=PREPARED --image_size=512 --batch_size=16
  python -m benchmarks.input_pipeline --context=0,1 --rounds=3

Without --data_dir, it draws and prepares phantoms: 10 patients with 16 slices each.

With --context, each slice has so many neighbours on each side. Several numbers take turns, so that other work on the
machine affects all of them equally. In the order of a test, neighbours are decoded once; in training, slices come in
random order.

Compare the result with two values in a run's log.jsonl: `train/slices_per_second`, and `train/input_wait`, the share of
the time in which the loop waited for a batch.
"""

import contextlib
import itertools
import pathlib
import statistics
import time
from collections.abc import Iterator
from typing import NamedTuple

import jax
from absl import app, flags

from data import prepare
from fusa_jax.scans.neighbours import Context
from fusa_jax.system import meshes
from fusa_jax.training import datasets, input_pipeline


def define_flags() -> None:
  """Defines the flags. Importing this module does not define them, because other benchmarks use the same names."""
  flags.DEFINE_string('data_dir', None, 'folder of a prepared dataset; default: phantoms')
  flags.DEFINE_integer('image_size', 512, 'side of the slices in pixels')
  flags.DEFINE_integer('batch_size', 16, 'slices per batch')
  flags.DEFINE_integer('steps', 60, 'number of timed batches, after 5 untimed ones')
  flags.DEFINE_list('context', ['0'], 'neighbours on each side; several numbers take turns')
  flags.DEFINE_integer('rounds', 1, 'number of turns; the medians are printed')


class Speed(NamedTuple):
  """Slices per second of time, and per second of processor time of all threads."""

  wall: float
  processor: float


def speed(batches: Iterator, batch_size: int, steps: int) -> Speed:
  """Returns the speed of `steps` batches, after 5 untimed ones; closes the iterator."""
  with contextlib.closing(batches):
    for _ in range(5):
      jax.block_until_ready(next(batches))
    began, used = time.perf_counter(), time.process_time()
    count = sum(1 for batch in itertools.islice(batches, steps) if jax.block_until_ready(batch))
    slices = count * batch_size
    return Speed(slices / (time.perf_counter() - began), slices / (time.process_time() - used))


def speeds(data_dir: str | pathlib.Path, image_size: int, batch_size: int, steps: int, context: int) -> dict:
  """Returns the speed of a prepared dataset in the order of training and in that of a test."""
  # Phantoms have thick slices: without a limit, each has neighbours.
  dataset = datasets.load_dataset(data_dir, 0, image_size, Context(context))
  options = {'seed': 0, 'first_step': 0, 'last_step': steps + 5, 'balanced': True}
  mesh = meshes.create_mesh()
  return {
    'training': speed(
      input_pipeline.train_batches(dataset.train, mesh, batch_size=batch_size, **options), batch_size, steps
    ),
    'test': speed(
      _repeated(lambda: input_pipeline.test_batches(dataset.train, mesh, batch_size=batch_size)), batch_size, steps
    ),
  }


def _repeated(start):
  """Yields the batches of a test again and again: a small dataset has fewer than are timed."""
  while True:
    with contextlib.closing(start()) as batches:
      yield from batches


def main(_):
  values = flags.FLAGS
  data_dir = values.data_dir or prepare.prepare_phantom('', values.image_size, patients=10, slices=16, seed=0)
  sizes = values.image_size, values.batch_size, values.steps
  turns = [{c: speeds(data_dir, *sizes, int(c)) for c in values.context} for _ in range(values.rounds)]
  for context, order in itertools.product(values.context, ('training', 'test')):
    wall, processor = (statistics.median(turn[context][order][k] for turn in turns) for k in (0, 1))
    print(
      f'context {context}, in the order of {order}: {wall:.0f} slices/s, {processor:.0f} per second of processor time, '
      f'{values.image_size} x {values.image_size} on {jax.devices()[0].device_kind}'
    )


if __name__ == '__main__':
  define_flags()
  app.run(main)
