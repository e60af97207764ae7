"""How many slices a second the input path delivers to the devices, with nothing else running.

  python -m benchmarks.input_pipeline --data_dir=PREPARED --image_size=512 --batch_size=16

Compare with `train/slices_per_second` in a run's log.jsonl, and with `train/input_wait`, the share of the time that the
loop waited for a batch.
"""

import pathlib
import time

import jax
from absl import app, flags

from fusa_jax.system import meshes
from fusa_jax.training import datasets, input_pipeline


def define_flags() -> None:
  """Not on import: other benchmarks have flags of these names."""
  flags.DEFINE_string('data_dir', None, 'a prepared dataset', required=True)
  flags.DEFINE_integer('image_size', 512, 'side of its slices')
  flags.DEFINE_integer('batch_size', 16, 'slices a batch')
  flags.DEFINE_integer('steps', 60, 'batches timed, after 5 that are not')


def rate(data_dir: str | pathlib.Path, image_size: int, batch_size: int, steps: int) -> float:
  """Slices a second of a prepared dataset, over so many batches, after 5 that are not timed."""
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
  found = rate(values.data_dir, values.image_size, values.batch_size, values.steps)
  print(f'{found:.0f} slices/s of {values.image_size} x {values.image_size} on {jax.devices()[0].device_kind}')


if __name__ == '__main__':
  define_flags()
  app.run(main)
