"""How many slices a second the input path delivers to the devices, with nothing else running.

  python -m benchmarks.input_pipeline --data_dir=PREPARED --image_size=512 --batch_size=16

Compare with `train/slices_per_second` in a run's log.jsonl, and with `train/input_wait`, the share of the time that the
loop waited for a batch.
"""

import time

import jax
from absl import app, flags

from fusa_jax import input_pipeline, sharding

_DATA_DIR = flags.DEFINE_string('data_dir', None, 'a prepared dataset', required=True)
_IMAGE_SIZE = flags.DEFINE_integer('image_size', 512, 'side of its slices')
_BATCH_SIZE = flags.DEFINE_integer('batch_size', 16, 'slices a batch')
_STEPS = flags.DEFINE_integer('steps', 60, 'batches timed, after 5 that are not')


def main(_):
  dataset = input_pipeline.load(_DATA_DIR.value, fold=0, image_size=_IMAGE_SIZE.value)
  batches = input_pipeline.train_batches(
    dataset.train,
    sharding.create_mesh(),
    batch_size=_BATCH_SIZE.value,
    seed=0,
    first_step=0,
    last_step=_STEPS.value + 5,
    balanced=True,
  )
  for _ in range(5):
    jax.block_until_ready(next(batches))
  began = time.perf_counter()
  for _ in range(_STEPS.value):
    jax.block_until_ready(next(batches))
  rate = _STEPS.value * _BATCH_SIZE.value / (time.perf_counter() - began)
  batches.close()
  print(f'{rate:.0f} slices/s of {_IMAGE_SIZE.value} x {_IMAGE_SIZE.value} on {jax.devices()[0].device_kind}')


if __name__ == '__main__':
  app.run(main)
