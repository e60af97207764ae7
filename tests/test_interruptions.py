"""Runs that are stopped anywhere and started again with the same command: the result is that of one that never was."""

import json
import pathlib
import random
import re
import signal
import time

import hosts
import numpy as np
import pytest

from fusa_jax import checkpoint

STEPS, EVERY = 24, 2


def command(data_dir, workdir, **overrides):
  settings = {'data.dir': data_dir, 'train.steps': STEPS, 'train.evaluate_every': EVERY} | overrides
  return [*hosts.TINY, *(f'--config.{key}={value}' for key, value in settings.items()), f'--workdir={workdir}']


def run(arguments, folder, devices=1, timeout=300, **environment) -> tuple[int, str]:
  """launch.py to its end: (exit code, what it printed)."""
  folder.mkdir(parents=True, exist_ok=True)
  log = folder / 'log'
  log.unlink(missing_ok=True)
  process = hosts.start(arguments, devices, log, folder / 'notes', **environment)
  try:
    return process.wait(timeout), log.read_text()
  finally:
    process.kill()


def saved(workdir) -> list[int]:
  """Steps that are saved, whole."""
  return sorted(int(path.name) for path in (workdir / 'checkpoints').glob('*') if path.name.isdigit())


def half_saved(workdir) -> list[pathlib.Path]:
  return list((workdir / 'checkpoints').glob('*tmp*'))


def arrays(workdir) -> dict[str, np.ndarray]:
  """All arrays of the latest checkpoint, read by Orbax alone."""
  import jax
  import orbax.checkpoint as ocp

  folder = workdir / 'checkpoints' / str(saved(workdir)[-1])
  with ocp.StandardCheckpointer() as checkpointer:
    items = [checkpointer.restore(folder / item) for item in ('variables', 'optimizer')]
  return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(items)}


def losses(workdir) -> list[tuple[int, float]]:
  entries = [json.loads(line) for line in (workdir / 'log.jsonl').read_text().splitlines()]
  return [(entry['step'], entry['train/loss']) for entry in entries if 'train/loss' in entry]


def killed(arguments, folder, devices, until, **environment) -> None:
  """Starts the run and kills it, as the power does, as soon as `until()`."""
  process = hosts.start(arguments, devices, folder / 'log', folder / 'notes', **environment)
  try:
    began = time.monotonic()
    while process.poll() is None and time.monotonic() < began + 120 and not until():
      time.sleep(0.001)
  finally:
    process.send_signal(signal.SIGKILL)
    process.wait()


@pytest.mark.slow
@pytest.mark.parametrize('elastic', [False, True], ids=['same devices', 'other devices each time'])
def test_killed_ten_times(data_dir, tmp_path, elastic):
  """Every second time inside a save, else a random while after a random number of steps.

  Sums over other devices are rounded otherwise, and Adam divides gradients by their size: where a gradient is zero but
  for rounding, its parameter goes anywhere. So other devices are compared in float64, where rounding stays below
  Adam's epsilon and any other difference would show.
  """
  exact, settings = ({'JAX_ENABLE_X64': '1'}, {'model.dtype': 'float64'}) if elastic else ({}, {})
  whole = tmp_path / 'whole'
  code, printed = run(command(data_dir, whole, **settings), tmp_path, **exact)
  assert code == 0, printed
  rng, workdir, inside = random.Random(0), tmp_path / 'run', 0
  arguments = command(data_dir, workdir, **settings)
  for attempt in range(10):
    before = saved(workdir)
    first = before[-1] if before else 0
    if attempt % 2:
      begun = set(half_saved(workdir))
      until = lambda begun=begun: set(half_saved(workdir)) - begun
    else:
      target = first + rng.choice([0, 1, 1, 2])
      until = lambda target=target: (log := workdir / 'log.jsonl').exists() and last_step(log) >= target
    killed(arguments, tmp_path, (2, 8, 1, 4)[attempt % 4] if elastic else 1, until, **exact)
    inside += bool(half_saved(workdir))
    # No checkpoint is lost, and what is there is whole.
    now = saved(workdir)
    assert (now[-1] if now else 0) >= first
    if now:
      with checkpoint.Checkpoints(workdir) as checkpoints:
        assert checkpoints.latest() == now[-1]
  assert inside >= 3, 'the kills missed the saves'
  code, printed = run(arguments, tmp_path, devices=2 if elastic else 1, **exact)
  assert code == 0, printed
  resumed = re.search(rf'resuming .* at step (\d+) of {STEPS}', printed)
  assert int(resumed[1]) == now[-1]
  assert saved(workdir)[-1] == saved(whole)[-1] == STEPS
  assert not half_saved(workdir)
  ours, theirs = arrays(workdir), arrays(whole)
  assert ours.keys() == theirs.keys()
  for name, value in theirs.items():
    if elastic:
      scale = np.abs(value).max()
      np.testing.assert_allclose(ours[name], value, rtol=1e-5, atol=1e-5 * scale, err_msg=name)
    else:
      np.testing.assert_array_equal(ours[name], value, err_msg=name)
  curves = np.array(losses(workdir)), np.array(losses(whole))
  assert curves[0][:, 0].tolist() == list(range(1, STEPS + 1))
  np.testing.assert_allclose(*curves, rtol=1e-5 if elastic else 0)


def last_step(log) -> int:
  try:
    return max((json.loads(line)['step'] for line in log.read_text().splitlines()), default=0)
  except json.JSONDecodeError:
    return 0
