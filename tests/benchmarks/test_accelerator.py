"""The accelerator benchmark: its computations from times, and that a failure loses no measured number."""

import importlib.metadata
import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys
import time
import types

import jax
import jax.numpy as jnp
import pytest

from benchmarks import accelerator, accelerator_parts, accelerator_report
from benchmarks.settings import Options
from fusa_jax.system import program
from fusa_jax.system.errors import UserError

OPTIONS = Options(
  models=('fusa_resunet',),
  image_size=32,
  batch_size=2,
  width=4,
  rounds=1,
  steps=1,
  memory_limit=None,
  folder='',
)


def test_share_is_the_extra_time_relative_to_the_step():
  seconds, memory = {'without': 0.3, 'FUSA': 0.4, 'literal': 0.6}, {'without': 1, 'FUSA': 2, 'literal': 3}
  rows = accelerator_parts.share_rows('fusa_resunet', seconds, memory, 8, 39_560.0, 'NVIDIA H100 80GB HBM3')
  assert [row['form'] for row in rows] == ['without', 'FUSA', 'literal']
  assert [row['share'] for row in rows] == pytest.approx([0, 0.25, 0.5])
  assert [row['slices_per_second'] for row in rows] == pytest.approx([8 / 0.3, 20, 8 / 0.6])
  assert rows[1]['mfu'] == pytest.approx(0.1)  # 98.9 of 989 TFLOP/s
  assert [row['peak_bytes'] for row in rows] == [1, 2, 3]


@pytest.mark.parametrize(
  ('kind', 'peak'),
  [
    ('NVIDIA H100 80GB HBM3', 989),
    ('NVIDIA H100 PCIe', 756),
    ('NVIDIA H200', 989),
    ('NVIDIA A100-SXM4-40GB', 312),
    ('NVIDIA L4', 121),
    ('NVIDIA L40S', 362),
    ('NVIDIA A10G', 70),
    ('NVIDIA A10', 125),
    ('TPU v5 lite', 197),
    ('Tesla T4', None),
    ('cpu', None),
  ],
)
def test_peak_of_known_and_unknown_devices(kind, peak):
  assert accelerator_report.peak_tflops(kind) == peak
  assert accelerator_report.mfu(500.0, kind) == (None if peak is None else pytest.approx(0.5 / peak))


@pytest.mark.parametrize(
  ('fixed', 'each', 'first', 'limit'),
  [(500, 100, 8, 10_000), (0, 7, 4, 1000), (900, 100, 64, 1650), (500, 100, 8, 550), (5, 1, 1, 400)],
)
@pytest.mark.parametrize('tells', [True, False])
def test_the_largest_batch_is_found(fixed, each, first, limit, tells):
  """Finds the largest batch that the memory formula allows, within a sixteenth, in at most ten attempts."""
  tried = []

  def attempt(batch):
    tried.append(batch)
    needs = fixed + each * batch
    return (needs if tells or needs <= limit else None), needs <= limit

  last = list(accelerator_parts.search_batch(attempt, limit, first))[-1]
  most = (limit - fixed) // each
  assert len(tried) == len(set(tried)) <= 10
  assert (last['fits'] or 0) <= most < last['too_large'] <= (last['fits'] or 0) + max((last['fits'] or 0) // 16, 1)
  if most > 0:
    assert last['fits_bytes'] == fixed + each * last['fits'] <= limit


def test_kernel_times_of_a_profile(tmp_path):
  """Profiles three runs of a function with two products and a sine."""
  product = jax.jit(lambda x: jnp.sin(x @ x) @ x)
  x = jnp.ones((256, 256))
  product(x).block_until_ready()
  with jax.profiler.trace(tmp_path):
    for _ in range(3):
      product(x).block_until_ready()
  (path,) = tmp_path.rglob('*.xplane.pb')
  kernels = accelerator_parts.kernel_seconds(path)
  assert sum(calls for name, (_, calls) in kernels.items()) % 3 == 0
  assert 2 <= len(kernels) <= 6 and all(seconds > 0 for seconds, _ in kernels.values())


def test_top_kernels():
  kernels = {f'k{n}': (float(n), 2) for n in range(1, 13)}
  rows = accelerator_parts.top_kernels(kernels)
  assert [row['kernel'] for row in rows] == [f'k{n}' for n in range(12, 2, -1)]
  assert rows[0] == {'kernel': 'k12', 'seconds': 12.0, 'calls': 2, 'share': 12 / 78}


def test_a_kill_between_parts_loses_nothing(tmp_path, monkeypatch):
  """The first part reports numbers twice; the command is stopped during the second part."""
  out, seen = tmp_path / 'numbers.json', []

  def run(name, options, until):
    if name == 'profile':
      raise KeyboardInterrupt
    yield 'facts', {'device': 'a device', 'commit': None}
    for speed in (5.0, 7.0):
      yield 'result', {'slices_per_second': speed}
      seen.append(json.loads(out.read_text())['parts']['input_path']['slices_per_second'])

  monkeypatch.setattr(accelerator, '_run', run)
  with pytest.raises(KeyboardInterrupt):
    accelerator.measure(OPTIONS, ['input_path', 'profile'], 480, out)
  written = json.loads(out.read_text())
  assert seen == [5.0, 7.0]
  assert written['device'] == 'a device' and written['parts'] == {'input_path': {'slices_per_second': 7.0}}
  assert list(written['seconds']) == ['input_path'] and written['not_whole'] == {}
  assert list(tmp_path.iterdir()) == [out]


def test_parts_get_their_share_of_the_remaining_time(tmp_path, monkeypatch):
  ends = {}
  began = time.monotonic()
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: name)  # PyTorch need not be installed
  monkeypatch.setattr(accelerator, '_run', lambda name, options, until: ends.update({name: until - began}) or ())
  accelerator.measure(OPTIONS, list(accelerator.PARTS), 480, tmp_path / 'numbers.json')
  shares = [part.seconds for part in accelerator.PARTS.values()]
  times = list(ends.values())
  assert times == sorted(times) and times[-1] <= 480
  for k, name in enumerate(ends):
    assert ends[name] == pytest.approx(sum(shares[: k + 1]) / sum(shares) * times[-1], abs=1)


def test_a_part_that_takes_too_long_is_stopped():
  """It is stopped before it has imported JAX."""
  (found,) = accelerator._run('profile', OPTIONS, time.monotonic() + 0.5)
  assert found[0] == 'reason' and re.fullmatch(r'stopped after \d+ s, at the end of its share of the time', found[1])


def test_a_part_that_dies_is_reported(monkeypatch):
  monkeypatch.setattr(accelerator, '_work', print)  # the process ends without a report
  (found,) = accelerator._run('profile', OPTIONS, time.monotonic() + 600)
  assert found == ('reason', 'its process ended with code 0, perhaps because it ran out of memory')


def test_a_missing_package_is_named(tmp_path, monkeypatch):
  find = importlib.util.find_spec
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None if name in ('nibabel', 'torch') else find(name))
  monkeypatch.setattr(accelerator, '_run', lambda *_: pytest.fail('a process was started'))
  report = accelerator.measure(OPTIONS, ['prediction', 'compare'], 480, tmp_path / 'numbers.json')
  assert report['not_whole']['prediction'].startswith('needs nibabel, missing on this machine')
  assert 'torch' in report['not_whole']['compare'] and 'nibabel' in report['not_whole']['compare']
  assert not report['parts']


def test_input_path_is_compared_with_training():
  share = [{'form': 'FUSA', 'slices_per_second': 20.0}, {'form': 'literal', 'slices_per_second': 90.0}]
  compared = [
    {'framework': 'JAX', 'train_slices_per_second': 40.0},
    {'framework': 'x', 'train_slices_per_second': 80.0},
  ]
  parts = {'input_path': {'slices_per_second': 60.0}, 'fusa_share': {'rows': share}, 'compare': {'rows': compared}}
  assert accelerator_report.finished({'parts': parts})['parts']['input_path']['to_training'] == 1.5
  alone = {'input_path': {'slices_per_second': 60.0}}
  assert 'to_training' not in accelerator_report.finished({'parts': alone})['parts']['input_path']


@pytest.mark.parametrize(
  ('changes', 'reason'),
  [
    ({'out': None}, '--out: missing'),
    ({'parts': ['compare', 'speed']}, "--parts: 'speed' is unknown; choose from compare, fusa_share"),
    ({'models': ['resnet19']}, "--models: 'resnet19' is unknown; choose from densenet121"),
    ({'models': []}, "--models: '' is unknown"),
    ({'out': '/proc/numbers.json'}, '/proc/numbers.json: cannot be written'),
  ],
)
def test_invalid_flags_are_refused(changes, reason, tmp_path, monkeypatch):
  values = {
    'out': str(tmp_path / 'numbers.json'),
    'models': ['fusa_resunet'],
    'parts': ['profile'],
    'minutes': 8.0,
    'image_size': 32,
    'batch_size': 2,
    'width': 4,
    'rounds': 1,
    'steps': 1,
    'memory_limit_mb': None,
  }
  monkeypatch.setattr(accelerator, 'flags', types.SimpleNamespace(FLAGS=types.SimpleNamespace(**values | changes)))
  monkeypatch.setattr(accelerator, '_run', lambda *_: pytest.fail('a process was started'))
  monkeypatch.setattr(program, 'start_logging', lambda: None)
  with pytest.raises(UserError, match=reason):
    accelerator.main([])
  assert not list(tmp_path.iterdir())


def test_the_documented_wheels_are_complete():
  """The packages that the parts need are in the list of docs/benchmarks.md or come with jax."""
  command = re.search(r'pip download .*?```', pathlib.Path('docs/benchmarks.md').read_text(), re.DOTALL)[0]
  carried = {re.sub(r'[-_.]+', '-', word).lower() for word in re.findall(r'[\w-]+', command)}
  known = importlib.metadata.packages_distributions()
  for module in {*accelerator.EVERYWHERE, *accelerator.PARTS['input_path'].needs} - {'scipy'}:
    assert {re.sub(r'[-_.]+', '-', name).lower() for name in known[module]} & carried, module


@pytest.mark.slow
def test_the_command(tmp_path):
  """Runs the command at a tiny size without the PyTorch parts; no batch fits the memory limit."""
  out = tmp_path / 'numbers.json'
  command = [sys.executable, '-m', 'benchmarks.accelerator', f'--out={out}', '--models=fusa_resunet', '--image_size=32']
  command += ['--batch_size=2', '--width=4', '--rounds=1', '--steps=1', '--memory_limit_mb=1', '--minutes=30']
  command += ['--parts=fusa_share,largest_batch,prediction,profile']
  environment = os.environ | {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': '--xla_backend_optimization_level=0'}
  done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
  assert done.returncode == 0, done.stderr
  report = json.loads(out.read_text())
  assert report['not_whole'] == {}
  assert report['versions']['jax'] == jax.__version__ and report['platform'] == 'cpu' and report['peak_tflops'] is None
  without, fusa, literal = report['parts']['fusa_share']['rows']
  assert (without['form'], fusa['form'], literal['form']) == ('without', 'FUSA', 'literal')
  assert fusa['share'] == pytest.approx(1 - without['step_seconds'] / fusa['step_seconds'])
  assert without['share'] == 0 and fusa['mfu'] is None
  assert report['parts']['largest_batch']['fits'] is None and report['parts']['largest_batch']['too_large'] == 1
  assert report['parts']['prediction']['slices'] == 300 and report['parts']['prediction']['seconds'] > 0
  kernels = report['parts']['profile']['rows']
  assert len(kernels) == 10 and 0 < sum(row['share'] for row in kernels) <= 1
  for text in ("| model | form | step ms | slices/s | FUSA's share |", 'Largest batch', 'Prediction of 300 slices'):
    assert text in done.stdout
