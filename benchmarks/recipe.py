"""Measures what each part of the recipe `strong` costs: processor time per slice, and the compilers' bytes.

  JAX_PLATFORMS=cpu python -m benchmarks.recipe --topology=v5e:2x2

The first table is of the augmentation alone, per slice of 512 x 512 and on one device: time on this machine, and, with
--topology, the bytes that the program for a TPU moves. The second is of whole training steps of the segmentation demo.
"""

import functools
import statistics
import time

import jax
import numpy as np
from absl import flags

from benchmarks import workload
from configs import seg
from fusa_jax.chips import hlo, tpu
from fusa_jax.runs import arguments
from fusa_jax.training import augment

_TOPOLOGY = flags.DEFINE_string('topology', None, 'TPU to compile the augmentation for, for example v5e:2x2')

SIZE, COUNT, ROUNDS, STEPS = 512, 2, 5, 3
PARTS = ('affine', 'noise', 'blur', 'low_resolution', 'contrast', 'gamma')


def augmentations() -> dict[str, augment.Augmentation]:
  """Returns the augmentation of each part alone, of the paper's crops, and of the preset `strong`."""
  paper, strong = (augment.create(seg.get_config(preset)) for preset in ('paper', 'strong'))
  off = strong._replace(
    crop_probability=0.0, flip=False, hu_shift=0.0, hu_scale=0.0, **{f'{part}_probability': 0.0 for part in PARTS}
  )
  named = {part: {f'{part}_probability': 0.5} for part in PARTS}
  named['crop within affine'] = {'affine_probability': 0.5, 'crop_probability': 0.3}
  return {
    'nothing': off,
    "the paper's crops": paper,
    **{part.replace('_', ' '): off._replace(**changes) for part, changes in named.items()},
    'strong': strong,
  }


def run_of(options: augment.Augmentation):
  return jax.jit(lambda key, image, mask: augment.augment(key, image, mask, options))


def moved(options: augment.Augmentation, topology: tpu.Topology) -> int:
  """Returns the bytes that the compiled augmentation moves between a TPU's memory and core, per slice."""
  place = jax.sharding.SingleDeviceSharding(topology.devices()[0])
  shape = lambda dtype: jax.ShapeDtypeStruct((COUNT, SIZE, SIZE), dtype, sharding=place)
  key = jax.ShapeDtypeStruct((), jax.random.key(0).dtype, sharding=place)
  program = run_of(options).lower(key, shape(np.int16), shape(np.uint8)).compile().as_text()
  return hlo.bytes_moved(program) // COUNT


def measure(calls: dict) -> dict[str, tuple[float, float]]:
  """Returns the median (seconds of wall time, seconds of processor time) of each call; the calls take turns."""
  for call in calls.values():
    jax.block_until_ready(call())
  seconds = {name: [] for name in calls}
  for _ in range(ROUNDS):
    for name, call in calls.items():
      wall, processor = time.perf_counter(), time.process_time()
      jax.block_until_ready(call())
      seconds[name].append((time.perf_counter() - wall, time.process_time() - processor))
  return {name: tuple(map(statistics.median, zip(*values, strict=True))) for name, values in seconds.items()}


def steps() -> dict:
  """Returns a function per recipe that runs some training steps of the segmentation demo, by the recipe's name."""
  strong = seg.get_config('demo-strong')
  changes = {
    'demo': {},
    'with the augmentation of strong': {'augment': strong.augment.to_dict()},
    'with clip_norm': {'train': {'clip_norm': strong.train.clip_norm}},
    'with ema': {'train': {'ema': 0.999}},
    'with deep_supervision': {'train': {'deep_supervision': True}},
    'demo-strong': {'augment': strong.augment.to_dict(), 'train': strong.train.to_dict()},
  }
  runs = {}
  for name, change in changes.items():
    config = seg.get_config('demo')
    for section, values in change.items():
      config[section].update(values)
    config.mesh.data = 1
    runs[name] = workload.Running(workload.create(config))

  def call(run):
    for _ in range(STEPS):
      run.step()
    run.wait()

  return {name: functools.partial(call, run) for name, run in runs.items()}


def main(_):
  batch = workload.batch_of(SIZE, COUNT)
  arrays = jax.random.key(0), jax.device_put(batch['image']), jax.device_put(batch['mask'])
  topology = tpu.Topology.parse(_TOPOLOGY.value) if _TOPOLOGY.value else None
  options = augmentations()
  times = measure({name: functools.partial(run_of(one), *arrays) for name, one in options.items()})
  print('| augmentation | ms per slice | ms of processor time | MB moved on the TPU |\n| --- | ---: | ---: | ---: |')
  for name, (wall, processor) in times.items():
    size = f'{moved(options[name], topology) / 1e6:.1f}' if topology else ''
    print(f'| {name} | {1e3 * wall / COUNT:.1f} | {1e3 * processor / COUNT:.1f} | {size} |', flush=True)
  config = seg.get_config('demo')
  slices = STEPS * config.train.batch_size
  print('\n| training step | slices/s | ms of processor time per slice |\n| --- | ---: | ---: |')
  for name, (wall, processor) in measure(steps()).items():
    print(f'| {name} | {slices / wall:.1f} | {1e3 * processor / slices:.1f} |', flush=True)
  print(f'\n{workload.device_name()}, jax {jax.__version__}')


if __name__ == '__main__':
  arguments.start(main)
