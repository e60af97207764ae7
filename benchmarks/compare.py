"""Times a training step and inference of our models and of their PyTorch originals on this machine's device.

  python -m benchmarks.compare --models=resunet,fusa_resunet --image_size=512 --batch_size=8 --json=FILE
  python -m benchmarks.compare --models=resnet18,fusa_resnet18 --image_size=128 --batch_size=4   (on a CPU)

Both start from the same weights and the same int16 HU batch on the device, and do the same work. A training step is
window, model, loss, backward pass and AdamW; inference is window, model and sigmoid. Our step is the step of the
training loop, without augmentation.

PyTorch runs with channels_last, eagerly and with `torch.compile` where that works. On a GPU it runs under bfloat16
autocast, because our activations are bfloat16 there, and cuDNN tries its algorithms first, as XLA does. The
probabilities of all must agree before any timing starts. All run in turn in this process; times are medians over
rounds. JAX and eager PyTorch are timed, printed and written to --json before `torch.compile` starts.

The FLOP rate counts the same work for all. For inference, this is the forward pass of our factored form as XLA counts
it; for a training step, three times that. MFU is the FLOP rate in training / the chip's published peak in bfloat16.
Memory is the peak. On a GPU, the allocator (PyTorch) and the compiler (JAX) report it; on a CPU, it is the growth of
the process.
"""

import ctypes
import dataclasses
import functools
import gc
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence

# Both frameworks share the GPU: JAX must not reserve its memory.
os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')

import jax
import numpy as np
from absl import flags

from benchmarks import workload
from benchmarks.settings import Settings, define_size_flags
from fusa_jax import torch_weights
from fusa_jax.runs import arguments
from fusa_jax.system import exits, program
from fusa_jax.system.errors import UserError, one_line
from fusa_jax.system.files import write_json

try:
  import torch
  import torch.nn.functional as F

  from benchmarks import torch_reference
except ModuleNotFoundError as error:
  if __name__ != '__main__':
    raise
  exits.fail(f'{error.name}: not installed; pip install -r requirements-torch.txt, or the build for your GPU')

_SEED = 0
ON_GPU = torch.cuda.is_available()
DEVICE = torch.device('cuda' if ON_GPU else 'cpu')
FRAMEWORKS = ('JAX', 'PyTorch, eager', 'PyTorch, torch.compile')


_HEAD = (
  '| model | framework | training: slices/s | ratio | GFLOP/s | MFU | peak MB | inference: slices/s | ratio | GFLOP/s '
  '|\n| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |'
)


def define_flags() -> None:
  define_size_flags(['resunet', 'fusa_resunet', 'resnet50', 'fusa_resnet50'])
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


def compare(name: str, settings: Settings, frameworks: Sequence[str] = FRAMEWORKS) -> Iterator[dict]:
  """Yields one row per framework for a model. `frameworks` must begin with JAX and eager PyTorch.

  These two are timed before `torch.compile` is tried, because it takes minutes. If it fails, its row has only the
  model, the framework and the reason, `failed`.

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
  contestants, memory, outputs, timed = {}, {}, [], set()
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
      yield {'model': name, 'framework': framework, 'failed': f'{type(error).__name__}: {one_line(error, 200)}'}
      continue
    outputs.append(np.asarray(probabilities.cpu() if torch.is_tensor(probabilities) else probabilities))
    difference = np.abs(outputs[-1] - outputs[0])
    # In bfloat16 a few of millions of pixels may differ much; a wrong layer changes all pixels, and so the mean.
    agrees = difference.mean() < 0.02 if ON_GPU else difference.max() < 1e-3
    assert agrees, f'{name}, {framework}: probabilities differ by up to {difference.max()}, mean {difference.mean()}'
    memory[framework] = peak_memory(contestant, before)
    contestants[framework] = contestant
    if 'PyTorch, eager' in contestants:
      seconds = _seconds(contestants, settings)
      yield from (_row(name, new, seconds, memory, forward, settings) for new in contestants if new not in timed)
      timed.update(contestants)


def _seconds(contestants, settings):
  """Returns the seconds of each framework's (framework, 'step') and (framework, 'infer')."""
  runs = {(f, work): getattr(c, work) for f, c in contestants.items() for work in ('step', 'infer')}
  waits = {(framework, work): contestants[framework].wait for framework, work in runs}
  return workload.in_turn(runs, waits, settings)


def _row(name, framework, seconds, memory, forward, settings):
  row = {'model': name, 'framework': framework, 'train_peak_bytes': memory[framework]}
  for work, key, gflops in (('step', 'train', 3 * forward), ('infer', 'inference', forward)):
    row |= {
      f'{key}_slices_per_second': settings.batch_size / seconds[framework, work],
      f'{key}_ratio_to_eager': seconds['PyTorch, eager', work] / seconds[framework, work],
      f'{key}_gflops_per_second': gflops / seconds[framework, work],
    }
  return row | {'train_mfu': workload.mfu(row['train_gflops_per_second'], workload.chip())}


def line(row: dict) -> str:
  """Returns a row as Markdown. A ratio above 1 means faster than eager PyTorch."""
  cells = [f'`{row["model"]}`', row['framework']]
  if 'failed' in row:
    return f'| {" | ".join([*cells, "failed: " + row["failed"].replace("|", "/")])} |' + ' |' * 7
  cells += [
    f'{row["train_slices_per_second"]:.2f}',
    f'{row["train_ratio_to_eager"]:.2f}',
    f'{row["train_gflops_per_second"]:.0f}',
    workload.percent(row['train_mfu']),
    f'{row["train_peak_bytes"] / 1e6:.0f}',
    f'{row["inference_slices_per_second"]:.2f}',
    f'{row["inference_ratio_to_eager"]:.2f}',
    f'{row["inference_gflops_per_second"]:.0f}',
  ]
  return f'| {" | ".join(cells)} |'


def main(_):
  program.start_logging()
  program.use_compilation_cache()
  torch.backends.cudnn.benchmark = True
  values, settings, rows = flags.FLAGS, Settings.from_flags(), []
  facts = workload.facts(settings, 'torch', 'torchvision')
  print(f'{workload.sentence(facts)}\n\n{_HEAD}', flush=True)
  for name in values.models:
    for row in compare(name, settings, FRAMEWORKS if values.torch_compile else FRAMEWORKS[:2]):
      rows.append(row)
      print(line(row), flush=True)
      if values.json:
        write_json(pathlib.Path(values.json), facts | {'rows': rows})


if __name__ == '__main__':
  define_flags()
  arguments.start(main)
