"""A training step and inference of our models beside those of their PyTorch originals, on the device that is there.

  python -m benchmarks.compare --models=resunet,fusa_resunet --image_size=512 --batch_size=8 --json=FILE
  python -m benchmarks.compare --models=resnet18,fusa_resnet18 --image_size=128 --batch_size=4   (on a CPU)

Both start from the same weights and the same int16 HU batch on the device, and do the same: window, model, loss,
backward pass, AdamW; or window, model, sigmoid. Ours is the loop's own step, without augmentation. PyTorch runs
channels_last, eagerly and by `torch.compile` where that works; on a GPU under bfloat16 autocast, as our activations are
bfloat16 there. Before anything is timed, the probabilities of all must agree. All run in turn in this process; times
are medians over rounds.

The FLOP rate counts the same work for all: the forward pass of our factored form as XLA counts it, and three times that
for a training step. Memory is the most that was held at once: on a GPU what the allocator (PyTorch) and the compiler
(JAX) say, on a CPU the growth of the process.
"""

import ctypes
import dataclasses
import datetime
import functools
import gc
import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

# Both frameworks share the GPU.
os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')

import jax
import numpy as np
import torch
import torch.nn.functional as F
from absl import flags

import launch
from benchmarks import model_table, torch_reference
from configs import cls, seg
from fusa_jax import checkpoint, evaluate, models, sharding, tasks, torch_weights, train
from fusa_jax.files import write_json

_MODELS = flags.DEFINE_list('models', ['resunet', 'fusa_resunet', 'resnet50', 'fusa_resnet50'], 'of the registry')
_IMAGE_SIZE = flags.DEFINE_integer('image_size', 512, 'side of the slices')
_BATCH_SIZE = flags.DEFINE_integer('batch_size', 8, 'slices a batch')
_ROUNDS = flags.DEFINE_integer('rounds', 5, 'times that each contestant has its turn; the median counts')
_STEPS = flags.DEFINE_integer('steps', 3, 'steps in a turn')
_COMPILE = flags.DEFINE_bool('torch_compile', True, 'let torch.compile run as well')
_JSON = flags.DEFINE_string('json', None, 'a file for the numbers')

_SEED = 0
ON_GPU = torch.cuda.is_available()
DEVICE = torch.device('cuda' if ON_GPU else 'cpu')


@dataclasses.dataclass
class Contestant:
  """One framework's form of a model: what a training step and inference are, and how to wait for them."""

  name: str
  step: Callable[[], None]
  infer: Callable[[], object]  # the probabilities, an array of the framework's
  wait: Callable[[], None]
  memory: Callable[[], int]


def batch_of(size: int, count: int) -> dict[str, np.ndarray]:
  """A batch as the input pipeline has it, of random HU and some lesion."""
  rng = np.random.default_rng(0)
  mask = (rng.random((count, size, size)) < 0.05).astype(np.uint8)
  return {
    'image': rng.integers(-1000, 300, (count, size, size)).astype(np.int16),
    'mask': mask,
    'label': (np.arange(count) % 2).astype(np.int32),
    'index': np.arange(count, dtype=np.int32),
  }


def config_of(name: str):
  """The paper's experiment with a model, on one device and without augmentation."""
  config = (cls if name in models.CLASSIFIERS else seg).get_config(name)
  config.data.image_size, config.train.batch_size = _IMAGE_SIZE.value, _BATCH_SIZE.value
  config.augment.crop_probability = 0.0
  return config


def ours(name: str, batch: dict[str, np.ndarray]) -> Contestant:
  config = config_of(name)
  mesh = sharding.create_mesh(1, 1, jax.devices()[:1])
  everywhere = sharding.replicated(mesh)
  task = tasks.create(config)
  optimizer, _ = train.make_optimizer(config)
  init = train.compile_init(task, optimizer, config, everywhere)
  step = train.compile_step(task, optimizer, config, mesh, checkpoint.shapes(jax.eval_shape(init), everywhere))
  infer = jax.jit(task.probabilities)
  placed = {key: jax.device_put(value, sharding.batched(mesh, value.ndim)) for key, value in batch.items()}
  torch.manual_seed(_SEED)
  weights = torch_weights.from_torch(name, torch_reference.create(name).state_dict())
  state = init()
  held = {'state': state.replace(variables=torch_weights.overlay(state.variables, weights)), 'out': None}

  def run_step():
    held['state'], held['out'] = step(held['state'], placed)

  def run_infer():
    held['out'] = infer(held['state'].variables, placed['image'])
    return held['out']

  def memory():
    found = step.memory_analysis()
    outside = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    return outside + found.temp_size_in_bytes

  return Contestant('JAX', run_step, run_infer, lambda: jax.block_until_ready(held), memory)


def theirs(name: str, batch: dict[str, np.ndarray], compiled: bool) -> Contestant:
  config = config_of(name)
  low, high = config.data.window
  torch.manual_seed(_SEED)
  model = torch_reference.create(name).to(DEVICE, memory_format=torch.channels_last)
  optimizer = torch.optim.AdamW(
    model.parameters(), lr=config.train.learning_rate, weight_decay=config.train.weight_decay, fused=ON_GPU
  )
  placed = {key: torch.from_numpy(value).to(DEVICE) for key, value in batch.items()}
  autocast = functools.partial(torch.autocast, DEVICE.type, torch.bfloat16, enabled=ON_GPU)

  def logits_of(image):
    scaled = (image.float() - low) * (2 / (high - low)) - 1
    inputs = scaled.clamp(-1, 1)[:, None].contiguous(memory_format=torch.channels_last)
    with autocast():
      return model(inputs)[:, 0].float()

  def loss_of(image, mask, label):
    logits = logits_of(image)
    truth = (label if logits.ndim == 1 else mask).float()
    loss = F.binary_cross_entropy_with_logits(logits, truth)
    if logits.ndim == 1:
      return loss
    p = torch.sigmoid(logits)
    return loss + 1 - (2 * (p * truth).sum() + 2) / (p.sum() + truth.sum() + 2)

  probabilities_of = lambda image: torch.sigmoid(logits_of(image))
  if compiled:
    loss_of, probabilities_of = torch.compile(loss_of), torch.compile(probabilities_of)

  def run_step():
    model.train()
    loss_of(placed['image'], placed['mask'], placed['label']).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)

  def run_infer():
    model.eval()
    with torch.inference_mode():
      return probabilities_of(placed['image'])

  wait = torch.cuda.synchronize if ON_GPU else lambda: None
  title = 'PyTorch, torch.compile' if compiled else 'PyTorch, eager'
  return Contestant(title, run_step, run_infer, wait, lambda: torch.cuda.max_memory_allocated())


def peak_memory(contestant: Contestant, before: int) -> int:
  """Bytes at the highest point of a training step."""
  if ON_GPU:
    torch.cuda.reset_peak_memory_stats()
  else:
    pathlib.Path('/proc/self/clear_refs').write_text('5')  # the kernel's high-water mark starts anew
  contestant.step()
  contestant.wait()
  return contestant.memory() if ON_GPU else _status('VmHWM') - before


def _status(key):
  lines = pathlib.Path('/proc/self/status').read_text().splitlines()
  return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f'{key}:'))


def _resident():
  """The process's memory after all that is free has been given back."""
  gc.collect()
  ctypes.CDLL('libc.so.6').malloc_trim(0)
  return _status('VmRSS')


def timed(run: Callable, wait: Callable) -> float:
  """Seconds a call, over a turn of a few."""
  began = time.perf_counter()
  for _ in range(_STEPS.value):
    run()
  wait()
  return (time.perf_counter() - began) / _STEPS.value


def compare(name: str) -> list[dict]:
  """The rows of one model."""
  batch = batch_of(_IMAGE_SIZE.value, _BATCH_SIZE.value)
  forward = model_table.forward_gflops(models.create(name), _IMAGE_SIZE.value) * _BATCH_SIZE.value
  makers = [functools.partial(ours, name, batch), functools.partial(theirs, name, batch, False)]
  if _COMPILE.value:
    makers.append(functools.partial(theirs, name, batch, True))
  contestants, memory, outputs = [], {}, []
  for make in makers:
    before = 0 if ON_GPU else _resident()
    contestant = make()
    try:
      probabilities = contestant.infer()
      contestant.step()
      contestant.wait()
    except Exception as error:  # torch.compile fails in many ways, none of them ours
      if contestant.name != 'PyTorch, torch.compile':
        raise  # all ratios are to eager PyTorch, so that there is no table without it
      print(f'{name}, {contestant.name}: {str(error).strip().splitlines()[0]}', file=sys.stderr)
      continue
    outputs.append(np.asarray(probabilities.cpu() if torch.is_tensor(probabilities) else probabilities))
    difference = np.abs(outputs[-1] - outputs[0]).max()
    assert difference < (0.02 if ON_GPU else 1e-3), f'{name}, {contestant.name}: probabilities differ by {difference}'
    memory[contestant.name] = peak_memory(contestant, before)
    contestants.append(contestant)
  steps, inferences = ({c.name: [] for c in contestants} for _ in range(2))
  for _ in range(_ROUNDS.value):
    for contestant in contestants:
      steps[contestant.name].append(timed(contestant.step, contestant.wait))
      inferences[contestant.name].append(timed(contestant.infer, contestant.wait))
  rows = []
  for contestant in contestants:
    step, infer = (statistics.median(times[contestant.name]) for times in (steps, inferences))
    rows.append(
      {
        'model': name,
        'framework': contestant.name,
        'train_slices_per_second': _BATCH_SIZE.value / step,
        'train_ratio_to_eager': statistics.median(steps['PyTorch, eager']) / step,
        'train_gflops_per_second': 3 * forward / step,
        'train_peak_bytes': memory[contestant.name],
        'inference_slices_per_second': _BATCH_SIZE.value / infer,
        'inference_ratio_to_eager': statistics.median(inferences['PyTorch, eager']) / infer,
        'inference_gflops_per_second': forward / infer,
      }
    )
  return rows


def table(rows: list[dict]) -> str:
  """Markdown; ratios are to eager PyTorch, above 1 is faster."""
  lines = [
    '| model | framework | training: slices/s | ratio | GFLOP/s | peak MB | inference: slices/s | ratio | GFLOP/s |',
    '| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |',
  ]
  for row in rows:
    numbers = [
      f'{row["train_slices_per_second"]:.2f}',
      f'{row["train_ratio_to_eager"]:.2f}',
      f'{row["train_gflops_per_second"]:.0f}',
      f'{row["train_peak_bytes"] / 1e6:.0f}',
      f'{row["inference_slices_per_second"]:.2f}',
      f'{row["inference_ratio_to_eager"]:.2f}',
      f'{row["inference_gflops_per_second"]:.0f}',
    ]
    lines.append('| ' + ' | '.join([f'`{row["model"]}`', row['framework'], *numbers]) + ' |')
  return '\n'.join(lines)


def device_name() -> str:
  if ON_GPU:
    return torch.cuda.get_device_name()
  found = subprocess.run(['lscpu'], capture_output=True, text=True, check=False).stdout
  names = [line.split(':', 1)[1].strip() for line in found.splitlines() if line.startswith('Model name')]
  return f'{os.cpu_count()} cores of {names[0] if names else "a CPU"}'


def main(_):
  launch.start_logging()
  launch.use_compilation_cache()
  rows = [row for name in _MODELS.value for row in compare(name)]
  print(table(rows))
  facts = {
    'device': device_name(),
    'date': str(datetime.date.today()),
    'commit': evaluate.commit(),
    'jax': jax.__version__,
    'torch': torch.__version__,
    'image_size': _IMAGE_SIZE.value,
    'batch_size': _BATCH_SIZE.value,
    'activations': 'bfloat16' if ON_GPU else 'float32',
  }
  print('\n' + ', '.join(f'{key} {value}' for key, value in facts.items()))
  if _JSON.value:
    write_json(pathlib.Path(_JSON.value), facts | {'rows': rows})


if __name__ == '__main__':
  launch.start(main)
