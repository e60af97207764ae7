"""Measures how many slices per second the input path delivers to the devices, with nothing else running.

  python -m benchmarks.input_pipeline --data_dir=PREPARED --image_size=512 --batch_size=16

Without --data_dir, it draws and prepares phantoms: 10 patients with 16 slices each.

Compare the result with two values in a run's log.jsonl: `train/slices_per_second`, and `train/input_wait`, the share of
the time in which the loop waited for a batch.
"""

import pathlib
import time

import jax
from absl import app, flags

from data import prepare
from fusa_jax.system import meshes
from fusa_jax.training import datasets, input_pipeline


def define_flags() -> None:
  """Defines the flags. Importing this module does not define them, because other benchmarks use the same names."""
  flags.DEFINE_string('data_dir', None, 'folder of a prepared dataset; default: phantoms')
  flags.DEFINE_integer('image_size', 512, 'side of the slices in pixels')
  flags.DEFINE_integer('batch_size', 16, 'slices per batch')
  flags.DEFINE_integer('steps', 60, 'number of timed batches, after 5 untimed ones')


def rate(data_dir: str | pathlib.Path, image_size: int, batch_size: int, steps: int) -> float:
  """Returns the slices per second of a prepared dataset over `steps` batches, after 5 untimed batches."""
  dataset = datasets.load_dataset(data_dir, fold=0, image_size=image_size)
  batches = input_pipeline.train_batches(
    dataset.train,
    meshes.create_mesh(),
    batch_size=batch_size,
    seed=0,
    first_step=0,
    last_step=steps + 5,
    balanced=True,
  )
  for _ in range(5):
    jax.block_until_ready(next(batches))
  began = time.perf_counter()
  for _ in range(steps):
    jax.block_until_ready(next(batches))
  seconds = time.perf_counter() - began
  batches.close()
  return steps * batch_size / seconds


def main(_):
  values = flags.FLAGS
  data_dir = values.data_dir or prepare.prepare_phantom('', values.image_size, patients=10, slices=16, seed=0)
  speed = rate(data_dir, values.image_size, values.batch_size, values.steps)
  print(f'{speed:.0f} slices/s of {values.image_size} x {values.image_size} on {jax.devices()[0].device_kind}')


if __name__ == '__main__':
  define_flags()
  app.run(main)
