"""Times a training step and inference of our models and of their PyTorch originals on this machine's device.

  python -m benchmarks.compare --models=resunet,fusa_resunet --image_size=512 --batch_size=8 --json=FILE
  python -m benchmarks.compare --models=resnet18,fusa_resnet18 --image_size=128 --batch_size=4   (on a CPU)

Both start from the same weights and the same int16 HU batch on the device, and do the same work. A training step is
window, model, loss, backward pass and AdamW; inference is window, model and sigmoid. Our step is the step of the
training loop, without augmentation.

PyTorch runs with channels_last, eagerly and with `torch.compile` where that works. On a GPU it runs under bfloat16
autocast, because our activations are bfloat16 there. The probabilities of all must agree before any timing starts. All
run in turn in this process; times are medians over rounds.

The FLOP rate counts the same work for all. For inference, this is the forward pass of our factored form as XLA counts
it; for a training step, three times that. Memory is the peak. On a GPU, the allocator (PyTorch) and the compiler (JAX)
report it; on a CPU, it is the growth of the process.
"""

import ctypes
import dataclasses
import datetime
import functools
import gc
import os
import pathlib
import sys
from collections.abc import Callable, Sequence

# Both frameworks share the GPU: JAX must not reserve its memory.
os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')

import jax
import numpy as np
import torch
import torch.nn.functional as F
from absl import flags

from benchmarks import compare_table, torch_reference, workload
from benchmarks.settings import Settings
from fusa_jax import torch_weights
from fusa_jax.runs import arguments
from fusa_jax.system import program, provenance
from fusa_jax.system.errors import UserError
from fusa_jax.system.files import write_json

_SEED = 0
ON_GPU = torch.cuda.is_available()
DEVICE = torch.device('cuda' if ON_GPU else 'cpu')
FRAMEWORKS = ('JAX', 'PyTorch, eager', 'PyTorch, torch.compile')


def define_flags() -> None:
  """Defines the flags. Importing this module does not define them, because other benchmarks use the same names."""
  flags.DEFINE_list('models', ['resunet', 'fusa_resunet', 'resnet50', 'fusa_resnet50'], 'names of models')
  flags.DEFINE_integer('image_size', 512, 'side of the slices in pixels')
  flags.DEFINE_integer('batch_size', 8, 'slices per batch')
  flags.DEFINE_integer('rounds', 5, 'turns of each contestant; the median counts')
  flags.DEFINE_integer('steps', 3, 'steps per turn')
  flags.DEFINE_bool('torch_compile', True, 'also run torch.compile')
  flags.DEFINE_string('json', None, 'file for the numbers')


@dataclasses.dataclass
class Contestant:
  """A model in one framework: functions for a training step, for inference, to wait for them, and for peak memory."""

  step: Callable[[], None]
  infer: Callable[[], object]  # returns the probabilities, as an array of the framework
  wait: Callable[[], None]
  memory: Callable[[], int]


def ours(name: str, settings: Settings) -> Contestant:
  work = workload.create(workload.config_of(name, settings))
  state_dict = original(name, settings).state_dict()
  running = workload.Running(work, torch_weights.from_torch(name, state_dict, **workload.options_of(settings)))
  return Contestant(running.step, running.infer, running.wait, running.memory)


def original(name: str, settings: Settings) -> torch.nn.Module:
  """Returns PyTorch's model, with the weights from which all contestants start.

  Raises:
    UserError: PyTorch's model does not have this width.
  """
  options = workload.options_of(settings)
  if options and name.removeprefix('fusa_') != 'resunet':
    raise UserError(f"--width: {settings.width}, but PyTorch's {name} exists at full width only; leave --width out")
  torch.manual_seed(_SEED)
  return torch_reference.create(name, **options)


def theirs(name: str, settings: Settings, compiled: bool) -> Contestant:
  config = workload.config_of(name, settings)
  low, high = config.data.window
  model = original(name, settings).to(DEVICE, memory_format=torch.channels_last)
  optimizer = torch.optim.AdamW(
    model.parameters(), lr=config.train.learning_rate, weight_decay=config.train.weight_decay, fused=ON_GPU
  )
  batch = workload.batch_of(settings.image_size, settings.batch_size)
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
  return Contestant(run_step, run_infer, wait, lambda: torch.cuda.max_memory_allocated())


def peak_memory(contestant: Contestant, before: int) -> int:
  """Returns the peak memory of a training step in bytes."""
  if ON_GPU:
    torch.cuda.reset_peak_memory_stats()
  else:
    pathlib.Path('/proc/self/clear_refs').write_text('5')  # resets the kernel's high-water mark
  contestant.step()
  contestant.wait()
  return contestant.memory() if ON_GPU else _status('VmHWM') - before


def _status(key):
  lines = pathlib.Path('/proc/self/status').read_text().splitlines()
  return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f'{key}:'))


def _resident():
  """Returns the process's memory in bytes, after it has returned free memory to the system."""
  gc.collect()
  ctypes.CDLL('libc.so.6').malloc_trim(0)
  return _status('VmRSS')


def compare(name: str, settings: Settings, frameworks: Sequence[str] = FRAMEWORKS) -> list[dict]:
  """Returns one row per framework for a model. `frameworks` must include eager PyTorch: all ratios refer to it.

  Raises:
    UserError: the frameworks would run on different kinds of device, or PyTorch's model does not have the width.
  """
  if DEVICE.type != ('cuda' if jax.default_backend() == 'gpu' else jax.default_backend()):
    raise UserError(
      f'JAX runs on {jax.default_backend()} and PyTorch on {DEVICE.type}; install both for the same device'
    )
  makers = {
    'JAX': functools.partial(ours, name, settings),
    'PyTorch, eager': functools.partial(theirs, name, settings, False),
    'PyTorch, torch.compile': functools.partial(theirs, name, settings, True),
  }
  forward = workload.forward_gflops(name, settings)
  contestants, memory, outputs = {}, {}, []
  for framework in frameworks:
    before = 0 if ON_GPU else _resident()
    try:
      contestant = makers[framework]()
      probabilities = contestant.infer()
      contestant.step()
      contestant.wait()
    except Exception as error:  # torch.compile may fail for many reasons outside this code
      if framework != 'PyTorch, torch.compile':
        raise  # the other two must run: all ratios refer to eager PyTorch
      print(f'{name}, {framework}: {str(error).strip().splitlines()[0]}', file=sys.stderr)
      continue
    outputs.append(np.asarray(probabilities.cpu() if torch.is_tensor(probabilities) else probabilities))
    difference = np.abs(outputs[-1] - outputs[0])
    # In bfloat16 a few of millions of pixels may differ much; a wrong layer changes all pixels, and so the mean.
    agrees = difference.mean() < 0.02 if ON_GPU else difference.max() < 1e-3
    assert agrees, f'{name}, {framework}: probabilities differ by up to {difference.max()}, mean {difference.mean()}'
    memory[framework] = peak_memory(contestant, before)
    contestants[framework] = contestant
  runs = {(f, work): getattr(c, work) for f, c in contestants.items() for work in ('step', 'infer')}
  waits = {(framework, work): contestants[framework].wait for framework, work in runs}
  seconds = workload.in_turn(runs, waits, settings)
  return [
    {
      'model': name,
      'framework': framework,
      'train_slices_per_second': settings.batch_size / seconds[framework, 'step'],
      'train_ratio_to_eager': seconds['PyTorch, eager', 'step'] / seconds[framework, 'step'],
      'train_gflops_per_second': 3 * forward / seconds[framework, 'step'],
      'train_peak_bytes': memory[framework],
      'inference_slices_per_second': settings.batch_size / seconds[framework, 'infer'],
      'inference_ratio_to_eager': seconds['PyTorch, eager', 'infer'] / seconds[framework, 'infer'],
      'inference_gflops_per_second': forward / seconds[framework, 'infer'],
    }
    for framework in contestants
  ]


def main(_):
  program.start_logging()
  program.use_compilation_cache()
  values = flags.FLAGS
  settings = Settings(values.image_size, values.batch_size, values.rounds, values.steps)
  frameworks = FRAMEWORKS if values.torch_compile else FRAMEWORKS[:2]
  rows = [row for name in values.models for row in compare(name, settings, frameworks)]
  print(compare_table.table(rows))
  facts = {
    'device': workload.device_name(),
    'date': str(datetime.date.today()),
    'commit': provenance.commit(),
    'jax': jax.__version__,
    'torch': torch.__version__,
    'image_size': settings.image_size,
    'batch_size': settings.batch_size,
    'activations': 'bfloat16' if ON_GPU else 'float32',
  }
  print('\n' + ', '.join(f'{key} {value}' for key, value in facts.items()))
  if values.json:
    write_json(pathlib.Path(values.json), facts | {'rows': rows})


if __name__ == '__main__':
  define_flags()
  arguments.start(main)
