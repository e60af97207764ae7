"""A run in a Google Cloud Storage bucket equals a local run. An emulator on this machine stands for the bucket."""

import importlib.util
import json
import os
import pathlib
import re
import signal
import time

import gcs_emulator
import nibabel as nib
import numpy as np
import pytest
import several_hosts

from fusa_jax.system import paths

pytestmark = pytest.mark.skipif(
  not all(map(importlib.util.find_spec, ('gcsfs', 'gcp_storage_emulator'))), reason='needs requirements-test.txt'
)

STEPS, EVERY = 8, 2
FOLDER = 'runs/mine'
RUN = f'gs://bucket/{FOLDER}'


@pytest.fixture
def bucket(monkeypatch):
  with gcs_emulator.running('bucket') as bucket:
    for name, value in bucket.environment.items():
      monkeypatch.setenv(name, value)
    yield bucket


def launch(folder, *arguments) -> tuple[int, str]:
  log = folder / 'log'
  log.unlink(missing_ok=True)
  process = several_hosts.start(arguments, 1, log, folder / 'notes')
  try:
    return process.wait(200), log.read_text()
  finally:
    process.kill()
    process.wait()


def train(data_dir, workdir):
  settings = {'data.dir': data_dir, 'train.steps': STEPS, 'train.evaluate_every': EVERY}
  return [*several_hosts.TINY, *(f'--config.{key}={value}' for key, value in settings.items()), f'--workdir={workdir}']


@pytest.mark.slow
def test_a_run_in_a_bucket_equals_a_local_run(bucket, data_dir, raw_dir, tmp_path):
  """Trained, killed during a save, the latest checkpoint damaged, resumed, evaluated, predicted from, exported."""
  local = tmp_path / 'local'
  code, printed = launch(tmp_path, *train(data_dir, local))
  assert code == 0, printed

  process = several_hosts.start(train(data_dir, RUN), 1, tmp_path / 'killed', tmp_path / 'notes')
  until = time.monotonic() + 120
  while process.poll() is None and time.monotonic() < until and max(steps_of(bucket), default=0) < 6:
    time.sleep(0.01)
  process.send_signal(signal.SIGKILL)
  process.wait()
  printed = (tmp_path / 'killed').read_text()
  commits = [name for name in bucket.names(f'{FOLDER}/checkpoints') if re.fullmatch(r'\d+/commit_success.txt', name)]
  saved = {int(name.split('/')[0]) for name in commits}
  assert len(saved) > 1 and max(saved) < STEPS, printed
  *_, latest = sorted(saved)
  saved.remove(latest)
  bucket.write(f'{FOLDER}/checkpoints/{latest}/optimizer/manifest.ocdbt', b'damage')

  code, printed = launch(tmp_path, *train(data_dir, RUN))
  assert code == 0, printed
  assert f'resuming {RUN} at step {max(saved)} of {STEPS}' in printed
  assert f'{latest} is damaged and not used: optimizer/manifest.ocdbt has changed since it was saved' in printed
  assert 'optimizer/manifest.ocdbt' in bucket.names(f'{FOLDER}/damaged/{latest}')
  assert not pathlib.Path('gs:').exists()

  same_result(bucket, local)
  names = {path.relative_to(local / 'test').as_posix() for path in (local / 'test').rglob('*') if path.is_file()}
  assert names == bucket.names(f'{FOLDER}/test')
  assert bucket.names(f'{FOLDER}/tensorboard')
  lines = [json.loads(line) for line in bucket.read(f'{FOLDER}/log.jsonl').decode().splitlines()]
  expected = [json.loads(line) for line in (local / 'log.jsonl').read_text().splitlines()]
  losses = lambda entries: [(entry['step'], entry['train/loss']) for entry in entries if 'train/loss' in entry]
  assert losses(lines) == losses(expected) and len(losses(lines)) == STEPS

  code, printed = launch(tmp_path, '--mode=evaluate', f'--workdir={RUN}')
  assert code == 0, printed
  same_result(bucket, local)

  masks = []
  for name, workdir in (('ours', RUN), ('theirs', local)):
    scan = raw_dir / 'volume-phantom-A-0001_ct.nii.gz'
    code, printed = launch(
      tmp_path, '--mode=predict', f'--workdir={workdir}', f'--input={scan}', f'--output={tmp_path / name}'
    )
    assert code == 0, printed
    (mask,) = (tmp_path / name).glob('*_mask.nii.gz')
    masks.append(np.asarray(nib.load(mask).dataobj))
  np.testing.assert_array_equal(*masks)

  code, printed = launch(tmp_path, '--mode=export', f'--workdir={RUN}', f'--output={tmp_path / "bundle"}')
  assert code == 0, printed


def steps_of(bucket):
  """The steps of the checkpoints in the bucket, complete or not."""
  return {int(step) for name in bucket.names(f'{FOLDER}/checkpoints') if (step := name.split('/')[0]).isdigit()}


def same_result(bucket, local):
  ours, theirs = bucket.read(f'{FOLDER}/test/metrics.json'), (local / 'test' / 'metrics.json').read_bytes()
  results = [json.loads(content) for content in (ours, theirs)]
  for result in results:
    for key in ('made_of', 'files', 'sha256_of_this_record'):
      del result[key]
  assert results[0] == results[1]


def test_which_texts_are_paths_in_a_bucket():
  assert isinstance(paths.to_path('runs/mine'), pathlib.Path)
  path = paths.to_path(RUN) / 'test'
  assert os.fspath(path) == f'{path}' == f'{RUN}/test'
  assert paths.in_bucket(path) and not paths.in_bucket(pathlib.Path('gs:/bucket'))
