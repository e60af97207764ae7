"""The accelerator benchmark: what follows from a measured step, and that a failing part loses no other."""

import gzip
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

from benchmarks import accelerator, model_table, step_times, workload
from benchmarks.settings import Settings
from fusa_jax.chips import gpu, hlo
from fusa_jax.system import program
from fusa_jax.system.errors import UserError

H100 = gpu.CHIPS['h100']
SETTINGS = Settings(image_size=32, batch_size=2, rounds=1, steps=1, width=4)
SIZES = {'image_size': 32, 'batch_size': 2, 'rounds': 1, 'steps': 1, 'width': 4}


def part(name, code, seconds=60.0):
  return accelerator.Part(name, seconds, ['-c', code])


def test_the_prediction_beside_a_measured_step():
  """98.9 TFLOP take 100 ms at an H100's peak, and 670 GB take 200 ms at the rate of its memory."""
  row = step_times.row('fusa_resunet', 0.4, 98_900.0, 670 * 10**9, 8, H100)
  assert row['slices_per_second'] == pytest.approx(20) and row['mfu'] == pytest.approx(0.25)
  assert row['least_seconds'] == pytest.approx({'arithmetic': 0.1, 'memory': 0.2})
  assert row['step_to_least'] == pytest.approx(2) and row['bytes_per_second'] == pytest.approx(1675e9)
  unknown = step_times.row('fusa_resunet', 0.4, 98_900.0, 670 * 10**9, 8, None)
  assert unknown['mfu'] is unknown['least_seconds'] is unknown['step_to_least'] is None
  for each in (row, unknown):
    cells = step_times.line(each | {'peak_bytes': 1, 'compile_seconds': 1.0}).split('|')
    assert len(cells) == len(step_times._HEAD.splitlines()[0].split('|'))


def test_share_is_the_extra_time_relative_to_the_step():
  plain = step_times.row('resunet', 9.0, 98_900.0, 469 * 10**9, 8, H100)
  fusa = step_times.row('fusa_resunet', 9.0, 98_900.0, 670 * 10**9, 8, H100)
  seconds = {'fusa_resunet': 0.4, 'resunet': 0.3}
  measured = "FUSA's share of the step of `fusa_resunet`: 25.0% (400.00 ms with FUSA, 300.00 ms without it, in turn)"
  assert step_times.shares([fusa, plain], seconds) == [f'{measured}, predicted 30.0%.']
  assert step_times.shares([fusa], seconds) == step_times.shares([plain], seconds) == []
  assert step_times.shares([each | {'least_seconds': None} for each in (fusa, plain)], seconds) == [f'{measured}.']


@pytest.mark.parametrize(
  ('kind', 'rates'),
  [
    ('NVIDIA H100 80GB HBM3', (989e12, 3350e9)),
    ('NVIDIA H200', (989e12, 4800e9)),
    ('NVIDIA H100 PCIe', None),
    ('TPU v5 lite', (197e12, 819e9)),
    ('cpu', None),
  ],
)
def test_rates_of_known_and_unknown_devices(kind, rates, monkeypatch):
  monkeypatch.setattr(jax, 'devices', lambda: [types.SimpleNamespace(device_kind=kind)])
  chip = workload.chip()
  assert (chip and (chip.flops, chip.hbm_rate)) == rates
  assert workload.mfu(500.0, chip) == (None if rates is None else pytest.approx(500e9 / rates[0]))


def test_flops_are_counted_on_the_cpu(monkeypatch):
  """The clients of GPUs and TPUs cannot count operations before compilation."""
  devices = []

  class Module:
    def init(self, key, x, train):
      return {}

    def apply(self, variables, x, train):
      devices.append(jax.config.jax_default_device)
      return x[0, ..., 0] @ x[0, ..., 0]

  assert model_table.forward_gflops(Module(), 4) == pytest.approx(2 * 4**3 / 1e9)
  assert [device.platform for device in devices] == ['cpu']


def test_operations_of_a_step_have_their_time_and_bytes():
  """Two products of 256 x 256 in float32: the profile has their time, the compiled program their bytes."""
  product = jax.jit(lambda x: jnp.sin(x @ x) @ x)
  x = jnp.ones((256, 256))
  compiled = product.lower(x).compile()
  calls = []
  running = types.SimpleNamespace(
    step=lambda: calls.append(compiled(x)), wait=lambda: jax.block_until_ready(calls), program=compiled.as_text
  )
  rows = step_times.operations(running, 3, H100)
  assert len(calls) == 3 and sum(row['share'] for row in rows) == pytest.approx(1)
  assert [row['seconds'] for row in rows] == sorted((row['seconds'] for row in rows), reverse=True)
  moved = {operation.name: operation.nbytes for operation in hlo.operations(compiled.as_text())}
  known = [row for row in rows if row['bytes_moved']]
  assert len(known) >= 2 and all(row['bytes_moved'] == moved[row['operation']] for row in known)
  assert all(row['least_seconds'] == pytest.approx(row['bytes_moved'] / 3350e9) for row in known)
  table = step_times.operations_table(rows, shown=2)
  assert table.count('\n| `') == 2 and f'{len(rows)} operations take ' in table


def test_parts_run_in_order_and_a_failure_does_not_stop_the_others(tmp_path, capsys):
  planned = [
    part('first', 'print("| 1 |")'),
    part('second', 'import sys; print("| 2 |"); print("noise", file=sys.stderr); sys.exit("error: no disk; buy one")'),
    part('third', 'print("| 3 |", flush=True); 1 / 0'),
    part('fourth', 'import os; os.kill(os.getpid(), 9)'),
    part('fifth', 'print("| 5 |")'),
  ]
  assert not accelerator.measure(planned, tmp_path, 300)
  printed = capsys.readouterr().out
  assert printed == (tmp_path / 'report.md').read_text()
  assert re.sub(r', \d+ s', '', printed) == (
    '### first\n\n| 1 |\n\n'
    '### second\n\n| 2 |\n\nIncomplete: error: no disk; buy one\n\n'
    '### third\n\n| 3 |\n\nIncomplete: ZeroDivisionError: division by zero\n\n'
    '### fourth\n\nIncomplete: ended by SIGKILL, perhaps out of memory\n\n'
    '### fifth\n\n| 5 |\n\n'
  )
  assert 'noise' in (tmp_path / 'second.log').read_text()
  assert accelerator.measure(planned[::4], tmp_path, 300)


def test_a_kill_between_parts_loses_nothing(tmp_path):
  """The second part interrupts the command, as Ctrl-C does."""
  code = f'import os, signal; os.kill({os.getpid()}, signal.SIGINT); import time; time.sleep(60)'
  with pytest.raises(KeyboardInterrupt):
    accelerator.measure([part('first', 'print("| 1 |")'), part('second', code)], tmp_path, 300)
  assert '| 1 |' in (tmp_path / 'report.md').read_text()


def test_a_part_that_takes_too_long_is_stopped_with_all_its_processes(tmp_path):
  """It keeps what it printed. Its child would write a file after a second."""
  child = f"import time, pathlib; time.sleep(1); pathlib.Path('{tmp_path}/late').touch()"
  code = f'import subprocess, sys; print("| 1 |"); subprocess.run([sys.executable, "-c", {child!r}]); print("| 2 |")'
  text, reason = accelerator.run(part('slow', code), tmp_path, time.monotonic() + 0.5)
  assert text in ('| 1 |', '') and re.fullmatch(r'stopped after \d+ s, at the end of its time', reason)
  time.sleep(1.5)
  assert not (tmp_path / 'late').exists()
  assert accelerator.run(part('late', 'print(1)'), tmp_path, time.monotonic()) == ('', 'no time was left')


def test_parts_get_their_share_of_the_remaining_time(tmp_path, monkeypatch):
  ends = []
  began = time.monotonic()
  monkeypatch.setattr(accelerator, 'run', lambda part, output, until: (ends.append(until - began), ('', None))[1])
  accelerator.measure([part('a', '', 1.0), part('b', '', 3.0), part('c', '', 4.0)], tmp_path, 480)
  assert ends == pytest.approx([60, 240, 480], abs=1)


def test_the_plan():
  """FUSA-ResUnet's step comes first. Sizes reach all parts; without a width, volumes have the model's own."""
  sizes = SIZES | {'width': None}
  models = ['fusa_resunet', 'fusa_resnet50']
  planned = {part.name: part for part in accelerator.parts(pathlib.Path('out'), models, sizes)}
  assert list(planned) == [
    *('step-fusa_resunet', 'eager-fusa_resunet', 'compiled-fusa_resunet'),
    *('step-fusa_resnet50', 'eager-fusa_resnet50', 'compiled-fusa_resnet50'),
    *('operations', 'volumes', 'input'),
  ]
  assert planned['step-fusa_resunet'].arguments[:3] == ['-m', 'benchmarks.step_times', '--models=fusa_resunet,resunet']
  assert all('--image_size=32' in part.arguments and '--batch_size=2' in part.arguments for part in planned.values())
  assert sum(part.seconds for part in planned.values()) == 8.5 * 60
  assert '--width=64' in planned['volumes'].arguments
  assert not any('width' in argument for argument in planned['eager-fusa_resunet'].arguments)
  narrow = accelerator.parts(pathlib.Path('out'), ['fusa_resunet'], SIZES)
  assert all('--width=4' in part.arguments for part in narrow[:-1])


@pytest.mark.parametrize(
  ('changes', 'reason'),
  [
    ({'output': None}, '--output: missing'),
    ({'models': ['resnet50']}, "--models: 'resnet50' has no FUSA"),
    ({'models': []}, "--models: '' has no FUSA"),
    ({'output': '/proc/results'}, '--output: /proc/results: cannot be written'),
  ],
)
def test_invalid_flags_are_refused(changes, reason, tmp_path, monkeypatch):
  values = {'output': str(tmp_path / 'results'), 'models': ['fusa_resunet'], 'minutes': 8.5, **SIZES}
  monkeypatch.setattr(accelerator, 'flags', types.SimpleNamespace(FLAGS=types.SimpleNamespace(**values | changes)))
  monkeypatch.setattr(accelerator, 'run', lambda *_: pytest.fail('a process was started'))
  monkeypatch.setattr(program, 'start_logging', lambda: None)
  with pytest.raises(UserError, match=reason):
    accelerator.main([])
  assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_command(tmp_path):
  """Runs the command at a tiny size. PyTorch has no narrow ResNet-18, so its parts fail and the others run."""
  command = [sys.executable, '-m', 'benchmarks.accelerator', f'--output={tmp_path}', '--models=fusa_resnet18']
  command += ['--image_size=32', '--batch_size=2', '--width=4', '--rounds=1', '--steps=1', '--minutes=30']
  environment = os.environ | {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': '--xla_backend_optimization_level=0'}
  done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
  assert done.returncode == 1, done.stderr
  report = (tmp_path / 'report.md').read_text()
  assert done.stdout == report
  sections = re.split(r'^### (\S+), \d+ s$', report, flags=re.MULTILINE)[1:]
  texts = dict(zip(sections[::2], sections[1::2], strict=True))
  pytorch = ['eager-fusa_resnet18', 'compiled-fusa_resnet18']
  assert list(texts) == ['step-fusa_resnet18', *pytorch, 'operations', 'input']
  assert [name for name, text in texts.items() if 'Incomplete' in text] == pytorch
  assert re.search(r'Incomplete: error: (--width: 4, but|torch: not installed)', texts['eager-fusa_resnet18'])
  fusa, plain = (json.loads((tmp_path / f'step-{name}.json').read_text()) for name in ('fusa_resnet18', 'resnet18'))
  assert fusa['versions']['jax'] == jax.__version__ and fusa['least_seconds'] is None
  assert fusa['gflops'] == pytest.approx(3 * workload.forward_gflops('fusa_resnet18', SETTINGS))
  assert fusa['bytes_moved'] > plain['bytes_moved'] > 0
  compiled = gzip.decompress((tmp_path / 'step-resnet18.hlo.gz').read_bytes()).decode()
  assert plain['bytes_moved'] == sum(operation.nbytes for operation in hlo.operations(compiled))
  assert re.search(r"FUSA's share of the step of `fusa_resnet18`: -?[\d.]+% \(", texts['step-fusa_resnet18'])
  assert json.loads((tmp_path / 'operations-fusa_resnet18.json').read_text())['operations'][0]['seconds'] > 0
  assert re.search(r'\d+ slices/s, \d+ per second of processor time, 32 x 32 on cpu', texts['input'])
