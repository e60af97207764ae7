"""Average of the weights, heads, augmentation and patience on two hosts: SIGTERM and resuming change no bit."""

import json
import signal
import time

import jax
import numpy as np
import pytest
import several_hosts
from conftest import final_state, tiny

SETTINGS = {
  **{'train.steps': 40, 'train.evaluate_every': 5, 'train.patience': 3},
  **{'train.ema': 0.9, 'train.deep_supervision': True, 'train.clip_norm': 1.0, 'augment.affine_probability': 0.5},
}


def last_step(workdir) -> int:
  log = workdir / 'log.jsonl'
  lines = log.read_text().split('\n')[:-1] if log.exists() else []
  return json.loads(lines[-1])['step'] if lines else 0


@pytest.mark.slow
def test_sigterm_on_two_hosts_changes_no_bit(data_dir, tmp_path):
  command = lambda workdir: [
    *(flag.replace('multiples=(1,2)', 'multiples=(1,1,2)') for flag in several_hosts.TINY),
    f'--config.data.dir={data_dir}',
    *(f'--config.{key}={value}' for key, value in SETTINGS.items()),
    f'--workdir={workdir}',
  ]
  with several_hosts.Hosts(2, 1, command(tmp_path / 'whole'), tmp_path / 'first') as two:
    assert two.wait(900) == [0, 0], two.log(0)
  with several_hosts.Hosts(2, 1, command(tmp_path / 'run'), tmp_path / 'second') as two:
    until = time.monotonic() + 600
    while last_step(tmp_path / 'run') < 7:
      assert time.monotonic() < until and all(process.poll() is None for process in two.processes), two.log(0)
      time.sleep(0.01)
    two.processes[1].send_signal(signal.SIGTERM)
    assert two.wait() == [143, 143], two.log(0)
  with several_hosts.Hosts(2, 1, command(tmp_path / 'run'), tmp_path / 'third') as two:
    assert two.wait(900) == [0, 0], two.log(0)
    assert 'resuming' in two.log(0)
  config = tiny(**SETTINGS, **{'model.multiples': (1, 1, 2)})
  whole, resumed = (final_state(config, tmp_path / name) for name in ('whole', 'run'))
  assert whole[1]['optimizer'].keys() == {'opt_state', 'variables', 'heads'}
  assert jax.tree.structure(whole) == jax.tree.structure(resumed)
  jax.tree.map(np.testing.assert_array_equal, whole, resumed)
