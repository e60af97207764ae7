"""A run that is stopped anywhere and resumed with the same command gives the same result as an uninterrupted run."""

import contextlib
import json
import random
import re
import signal
import time

import numpy as np
import pytest
import several_hosts

from fusa_jax.runs import checkpoint

STEPS, EVERY = 24, 2


def command(data_dir, workdir, **overrides):
  settings = {'data.dir': data_dir, 'train.steps': STEPS, 'train.evaluate_every': EVERY} | overrides
  return [*several_hosts.TINY, *(f'--config.{key}={value}' for key, value in settings.items()), f'--workdir={workdir}']


def run(arguments, folder, devices=1, timeout=300, **environment) -> tuple[int, str]:
  """Runs launch.py to its end. Returns (exit code, output)."""
  folder.mkdir(parents=True, exist_ok=True)
  log = folder / 'log'
  log.unlink(missing_ok=True)
  process = several_hosts.start(arguments, devices, log, folder / 'notes', **environment)
  try:
    return process.wait(timeout), log.read_text()
  finally:
    process.kill()


def saved(workdir) -> list[int]:
  """Returns the steps with a complete checkpoint."""
  return sorted(int(path.name) for path in (workdir / 'checkpoints').glob('*') if path.name.isdigit())


def half_saved(workdir) -> set[tuple[str, int]]:
  """Returns the unfinished saves: the name and inode number of each folder."""
  unfinished = set()
  for path in (workdir / 'checkpoints').glob('*tmp*'):
    with contextlib.suppress(FileNotFoundError):  # the save has just finished
      unfinished.add((path.name, path.stat().st_ino))
  return unfinished


def arrays(workdir) -> dict[str, np.ndarray]:
  """Returns all arrays of the latest checkpoint, read with Orbax only."""
  import jax
  import orbax.checkpoint as ocp

  folder = workdir / 'checkpoints' / str(saved(workdir)[-1])
  with ocp.StandardCheckpointer() as checkpointer:
    items = [checkpointer.restore(folder / item) for item in ('variables', 'optimizer')]
  return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(items)}


def losses(workdir) -> list[tuple[int, float]]:
  entries = [json.loads(line) for line in (workdir / 'log.jsonl').read_text().splitlines()]
  return [(entry['step'], entry['train/loss']) for entry in entries if 'train/loss' in entry]


def killed(arguments, folder, devices, until, after=0.0, **environment) -> None:
  """Starts the run and kills it `after` seconds after `until()` is true, as a power failure would."""
  process = several_hosts.start(arguments, devices, folder / 'log', folder / 'notes', **environment)
  try:
    began = time.monotonic()
    while process.poll() is None and time.monotonic() < began + 120 and not until():
      time.sleep(0.001)
    time.sleep(after)
  finally:
    process.send_signal(signal.SIGKILL)
    process.wait()


@pytest.mark.slow
@pytest.mark.parametrize('elastic', [False, True], ids=['same devices', 'other devices each time'])
def test_killed_many_times(data_dir, tmp_path, elastic):
  """Half of the kills hit a save. The others come at a random time after a random number of steps, or after a save.

  Another number of devices rounds sums differently, and Adam divides gradients by their size. A parameter with a
  gradient of rounding errors only therefore moves at random. For this reason other devices are compared in float64:
  rounding then stays below Adam's epsilon, and any other difference is visible.
  """
  exact, settings = ({'JAX_ENABLE_X64': '1'}, {'model.dtype': 'float64'}) if elastic else ({}, {})
  whole = tmp_path / 'whole'
  code, printed = run(command(data_dir, whole, **settings), tmp_path, **exact)
  assert code == 0, printed
  rng, workdir, inside = random.Random(0), tmp_path / 'run', 0
  arguments = command(data_dir, workdir, **settings)
  kills = 4 if elastic else 6
  for attempt in range(kills):
    before = saved(workdir)
    first, begun = before[-1] if before else 0, half_saved(workdir)
    if attempt % 2:
      until = lambda begun=begun: half_saved(workdir) - begun
    elif attempt % 4 == 2:
      until = lambda first=first: max(saved(workdir), default=0) > first
    else:
      target = first + rng.choice([0, 1, 1, 2])
      until = lambda target=target: (log := workdir / 'log.jsonl').exists() and last_step(log) >= target
    killed(arguments, tmp_path, (2, 8, 1, 4)[attempt % 4] if elastic else 1, until, rng.uniform(0, 0.05), **exact)
    inside += bool(half_saved(workdir) - begun)
    # No checkpoint is lost, and the latest is complete.
    now = saved(workdir)
    assert (now[-1] if now else 0) >= first
    if now:
      with checkpoint.Checkpoints(workdir) as checkpoints:
        assert checkpoints.latest() == now[-1]
  assert inside >= kills // 3, 'the kills missed the saves'
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
      np.testing.assert_allclose(ours[name], value, rtol=1e-7, atol=1e-7 * scale, err_msg=name)
    else:
      np.testing.assert_array_equal(ours[name], value, err_msg=name)
  curves = np.array(losses(workdir)), np.array(losses(whole))
  assert curves[0][:, 0].tolist() == list(range(1, STEPS + 1))
  np.testing.assert_allclose(*curves, rtol=1e-7 if elastic else 0)


def last_step(log) -> int:
  try:
    return max((json.loads(line)['step'] for line in log.read_text().splitlines()), default=0)
  except json.JSONDecodeError:
    return 0


@pytest.mark.slow
def test_sigterm_saves_and_the_same_command_resumes(data_dir, tmp_path):
  """SIGTERM during training, between two evaluations: the current step is saved, without unfinished files.

  Before, a second job in the workdir is refused.
  """
  workdir = tmp_path / 'run'
  arguments = command(data_dir, workdir, **{'train.steps': 1000, 'train.evaluate_every': 500})
  process = several_hosts.start(arguments, 1, tmp_path / 'log', tmp_path / 'notes')
  wait_until(lambda: (log := workdir / 'log.jsonl').exists() and last_step(log) >= 3, process)
  code, printed = run(arguments, tmp_path / 'other')
  assert code == 2
  advice = 'wait until it ends, or name another folder'
  assert printed.splitlines()[-1] == f'error: --workdir: another job works in {workdir} now; {advice}'
  process.send_signal(signal.SIGTERM)
  assert process.wait(60) == 143
  (step,) = saved(workdir)
  printed = (tmp_path / 'log').read_text()
  expected = f'stopped by SIGTERM at step {step}, which is saved; rerun the same command to resume'
  assert printed.splitlines()[-1] == expected
  assert 'Traceback' not in printed
  assert last_step(workdir / 'log.jsonl') == step
  assert not half_saved(workdir)
  process = several_hosts.start(arguments, 1, tmp_path / 'second', tmp_path / 'notes')
  wait_until(lambda: 'resuming' in (tmp_path / 'second').read_text(), process)
  process.kill()
  process.wait()
  assert f'at step {step} of 1000' in (tmp_path / 'second').read_text()


def wait_until(condition, process, seconds=120):
  until = time.monotonic() + seconds
  while not condition():
    assert process.poll() is None and time.monotonic() < until
    time.sleep(0.01)


@pytest.mark.slow
def test_sigterm_before_training_leaves_nothing_behind(raw_dir, tmp_path):
  """SIGTERM during the start: the run ends at once and says so."""
  arguments = [*several_hosts.TINY, f'--config.data.raw_dir={raw_dir}', f'--config.data.dir={tmp_path / "prepared"}']
  process = several_hosts.start([*arguments, f'--workdir={tmp_path / "run"}'], 1, tmp_path / 'log', tmp_path / 'notes')
  wait_until(lambda: 'Checking scans' in (tmp_path / 'log').read_text(), process)
  process.send_signal(signal.SIGTERM)
  assert process.wait(60) == 143
  assert (tmp_path / 'log').read_text().splitlines()[-1].startswith('stopped by SIGTERM; rerun the same command')
  assert not (tmp_path / 'run').exists()


@pytest.mark.slow
def test_resume_skips_a_damaged_checkpoint(data_dir, tmp_path):
  """A run is killed after its checkpoint at step 6, a file of its latest checkpoint is truncated, and it resumes."""
  workdir = tmp_path / 'run'
  settings = {'train.steps': 8, 'train.evaluate_every': 2}
  arguments = command(data_dir, workdir, **settings)
  killed(arguments, tmp_path, 1, lambda: 6 in saved(workdir))
  newest = saved(workdir)[-1]
  victim = max((workdir / 'checkpoints' / str(newest) / 'variables').rglob('*'), key=lambda path: path.stat().st_size)
  with victim.open('r+b') as file:
    file.truncate(victim.stat().st_size - 1)
  code, printed = run(arguments, tmp_path)
  assert code == 0, printed
  name = victim.relative_to(workdir / 'checkpoints' / str(newest))
  assert f'{newest} is damaged and not used: {name} has changed since it was saved' in printed
  assert f'resuming {workdir} at step {newest - 2} of 8' in printed
  assert saved(workdir)[-1] == 8


@pytest.mark.slow
def test_a_full_disk_ends_the_run_in_one_line(data_dir, tmp_path):
  """The system refuses files over 200 kB, and a checkpoint is larger. Exit code 2, the reason, no traceback."""
  settings = {'train.steps': 1000, 'train.evaluate_every': 500, 'model.width': 32}
  arguments = command(data_dir, tmp_path / 'run', **settings)
  process = several_hosts.start(arguments, 1, tmp_path / 'log', tmp_path / 'notes', FILE_LIMIT='200000')
  wait_until(lambda: (log := tmp_path / 'run' / 'log.jsonl').exists() and last_step(log) >= 2, process)
  process.send_signal(signal.SIGTERM)  # the run now saves a checkpoint
  assert process.wait(60) == 2
  # Threads of TensorStore may still print; the error can share its line with their output.
  line = f'error: {tmp_path / "run" / "checkpoints"}: a checkpoint could not be saved (File too large);'
  assert line in (tmp_path / 'log').read_text().splitlines()[-1]
  assert saved(tmp_path / 'run') == []
