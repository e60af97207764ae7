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
import sys
from collections.abc import Callable, Sequence

# Both frameworks share the GPU.
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
  """Not on import: other benchmarks have flags of these names."""
  flags.DEFINE_list('models', ['resunet', 'fusa_resunet', 'resnet50', 'fusa_resnet50'], 'of the registry')
  flags.DEFINE_integer('image_size', 512, 'side of the slices')
  flags.DEFINE_integer('batch_size', 8, 'slices a batch')
  flags.DEFINE_integer('rounds', 5, 'times that each contestant has its turn; the median counts')
  flags.DEFINE_integer('steps', 3, 'steps in a turn')
  flags.DEFINE_bool('torch_compile', True, 'let torch.compile run as well')
  flags.DEFINE_string('json', None, 'a file for the numbers')


@dataclasses.dataclass
class Contestant:
  """One framework's form of a model: what a training step and inference are, and how to wait for them."""

  step: Callable[[], None]
  infer: Callable[[], object]  # the probabilities, an array of the framework's
  wait: Callable[[], None]
  memory: Callable[[], int]


def ours(name: str, settings: Settings) -> Contestant:
  work = workload.create(workload.config_of(name, settings))
  state_dict = original(name, settings).state_dict()
  running = workload.Running(work, torch_weights.from_torch(name, state_dict, **workload.options_of(settings)))
  return Contestant(running.step, running.infer, running.wait, running.memory)


def original(name: str, settings: Settings) -> torch.nn.Module:
  """PyTorch's model, with the weights that all contestants start from.

  Raises:
    UserError: a width that it does not have.
  """
  options = workload.options_of(settings)
  if options and name.removeprefix('fusa_') != 'resunet':
    raise UserError(f"--width: {settings.width}, but PyTorch's {name} exists at full width only; leave it out")
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


def compare(name: str, settings: Settings, frameworks: Sequence[str] = FRAMEWORKS) -> list[dict]:
  """The rows of one model, one for each of the frameworks; eager PyTorch, to which all ratios are, must be among them.

  Raises:
    UserError: the frameworks would not run on the same kind of device; a width that PyTorch's model does not have.
  """
  if DEVICE.type != ('cuda' if jax.default_backend() == 'gpu' else jax.default_backend()):
    raise UserError(f'JAX runs on {jax.default_backend()} and PyTorch on {DEVICE.type}; install both for one of them')
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
    except Exception as error:  # torch.compile fails in many ways, none of them ours
      if framework != 'PyTorch, torch.compile':
        raise  # all ratios are to eager PyTorch, so that there is no table without it
      print(f'{name}, {framework}: {str(error).strip().splitlines()[0]}', file=sys.stderr)
      continue
    outputs.append(np.asarray(probabilities.cpu() if torch.is_tensor(probabilities) else probabilities))
    difference = np.abs(outputs[-1] - outputs[0])
    # In bfloat16 single pixels of millions may differ by more than a wrong layer would make all of them differ.
    fits = difference.mean() < 0.02 if ON_GPU else difference.max() < 1e-3
    assert fits, f'{name}, {framework}: probabilities differ by {difference.max()}, {difference.mean()} in the mean'
    memory[framework] = peak_memory(contestant, before)
    contestants[framework] = contestant
  runs = {(f, kind): getattr(c, kind) for f, c in contestants.items() for kind in ('step', 'infer')}
  waits = {(framework, kind): contestants[framework].wait for framework, kind in runs}
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
