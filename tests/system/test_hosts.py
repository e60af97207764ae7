"""Several processes as one run: the same result, each reads its share; and how all end when one fails."""

import csv
import itertools
import json
import os
import shutil
import signal
import threading
import time

import nibabel as nib
import numpy as np
import pytest
import several_hosts
from conftest import SIZE

from fusa_jax.scans import archives
from fusa_jax.system import hosts, store

STEPS, BATCH = 20, 8


def arguments(data_dir, workdir, **overrides):
  settings = {'data.dir': data_dir, 'train.steps': STEPS, 'train.evaluate_every': STEPS // 2} | overrides
  return [*several_hosts.TINY, *(f'--config.{key}={value}' for key, value in settings.items()), f'--workdir={workdir}']


def results(workdir) -> tuple[np.ndarray, list[dict]]:
  """Returns the losses of all steps and the rows of slices.csv."""
  entries = [json.loads(line) for line in (workdir / 'log.jsonl').read_text().splitlines()]
  with (workdir / 'test' / 'slices.csv').open() as file:
    return np.array([e['train/loss'] for e in entries if 'train/loss' in e]), list(csv.DictReader(file))


FLOAT64 = {'JAX_ENABLE_X64': '1'}
# In float64, and with neighbouring slices as channels.
WITH_NEIGHBOURS = {'model.dtype': 'float64', 'data.context': 1, 'data.context_mm': 25.0}


def one_process(data_dir, folder, environment, **settings):
  """Runs 20 steps and an evaluation in one process with eight devices. Returns (workdir, slices read)."""
  with several_hosts.Hosts(1, 8, arguments(data_dir, folder / 'run', **settings), folder, **environment) as alone:
    assert alone.wait() == [0], alone.log(0)
    return folder / 'run', alone.reads(0)


@pytest.fixture(scope='module')
def one_host(data_dir, tmp_path_factory):
  return one_process(data_dir, tmp_path_factory.mktemp('one_host'), {})


@pytest.fixture(scope='module')
def one_host_float64(data_dir, tmp_path_factory):
  return one_process(data_dir, tmp_path_factory.mktemp('float64'), FLOAT64, **WITH_NEIGHBOURS)


@pytest.mark.slow
@pytest.mark.parametrize(('processes', 'devices', 'space', 'float64'), [(4, 2, 1, False), (2, 4, 2, True)])
def test_the_result_does_not_depend_on_the_hosts(data_dir, tmp_path, request, processes, devices, space, float64):
  """In float32 the results agree up to rounding, which 20 steps of Adam enlarge; in float64 to many more digits."""
  workdir, alone = request.getfixturevalue('one_host_float64' if float64 else 'one_host')
  settings = {'mesh.space': space} | (WITH_NEIGHBOURS if float64 else {})
  run = arguments(data_dir, tmp_path / 'run', **settings)
  with several_hosts.Hosts(processes, devices, run, tmp_path, **(FLOAT64 if float64 else {})) as several:
    assert several.wait() == [0] * processes, several.log(0)
    reads = [several.reads(k) for k in range(processes)]
    printed = [several.log(k) for k in range(processes)]

  (losses, rows), (expected, expected_rows) = results(tmp_path / 'run'), results(workdir)
  assert len(losses) == STEPS
  np.testing.assert_allclose(losses, expected, rtol=1e-9 if float64 else 1e-5)
  for name in ('patient', 'slice', 'label'):
    assert [row[name] for row in rows] == [row[name] for row in expected_rows]
  column = lambda rows, name: np.array([float(row[name]) for row in rows])
  np.testing.assert_allclose(column(rows, 'score'), column(expected_rows, 'score'), atol=1e-6 if float64 else 1e-3)
  for name in ('tp', 'fp', 'fn', 'tn'):  # a few of 1024 pixels near 0.5 may change sides
    np.testing.assert_allclose(column(rows, name), column(expected_rows, name), atol=0 if float64 else 10)

  # Each process reads only its share of every batch; together they read the same as one process. Process 0 also draws
  # two slices.
  assert all(len(read['train']) == STEPS * BATCH // processes for read in reads)
  for name, drawn in (('train', 0), ('validation', 0), ('test', 2)):
    assert sorted(itertools.chain.from_iterable(read[name] for read in reads)) == sorted(alone[name])
    assert {len(read[name]) for read in reads[1:]} == {(len(alone[name]) - drawn) // processes}
  # Only process 0 writes files and shows progress.
  writers = {path.name for path in (tmp_path / 'run').rglob('ocdbt.process_*')}
  assert writers == {'ocdbt.process_0'}
  assert len(list((tmp_path / 'run' / 'tensorboard').iterdir())) == 1
  assert 'parameters' in printed[0] and 'Training ' in printed[0] and 'Testing ' in printed[0]
  assert not any('Training ' in text or 'parameters' in text or 'Testing ' in text for text in printed[1:])


@pytest.mark.slow
def test_hosts_with_only_repeated_slices(data_dir, one_host, tmp_path):
  """The batch of 64 is larger than the test fold of 32 slices: the last two of four hosts score only repeats."""
  workdir, _ = one_host
  run = ['--mode=evaluate', f'--workdir={tmp_path / "run"}', '--config=configs/seg.py', f'--config.data.dir={data_dir}']
  (tmp_path / 'run').mkdir()
  for name in ('config.json', 'checkpoints'):
    (tmp_path / 'run' / name).symlink_to(workdir / name)
  config = json.loads((workdir / 'config.json').read_text())
  config['train']['batch_size'] = 64
  (tmp_path / 'run' / 'config.json').unlink()
  (tmp_path / 'run' / 'config.json').write_text(json.dumps(config))
  with several_hosts.Hosts(4, 1, run, tmp_path) as several:
    assert several.wait() == [0] * 4, several.log(0)
  read = lambda folder: json.loads((folder / 'test' / 'metrics.json').read_text())
  ours, theirs = read(tmp_path / 'run'), read(workdir)
  assert ours['num_slices'] == theirs['num_slices'] == 32
  assert ours['dice'] == pytest.approx(theirs['dice'], abs=1e-3)
  assert sum(ours[key] for key in ('tp', 'fp', 'fn', 'tn')) == 32 * 32 * 32


@pytest.mark.slow
def test_prediction_on_two_hosts(raw_dir, one_host, tmp_path):
  """One of two hosts takes the scan. The mask of the mean of a run with itself equals that of one process."""
  scan = raw_dir / 'volume-phantom-A-0001_ct.nii.gz'
  masks = {}
  for processes, devices in ((1, 1), (2, 2)):
    out = tmp_path / str(processes)
    workdirs = ','.join([str(one_host[0])] * processes)
    run = ['--mode=predict', f'--workdir={workdirs}', f'--input={scan}', f'--output={out}']
    with several_hosts.Hosts(processes, devices, run, tmp_path / f'logs{processes}') as several:
      assert several.wait() == [0] * processes, several.log(0)
    written = {path.name for path in out.iterdir() if 'predictions.' not in path.name}
    assert written == {f'{scan.name[:-7]}.json', f'{scan.name[:-7]}_mask.nii.gz'}
    masks[processes] = np.asarray(nib.load(out / f'{scan.name[:-7]}_mask.nii.gz').dataobj)
  assert masks[1].shape == masks[2].shape
  assert np.count_nonzero(masks[1] != masks[2]) <= 2


@pytest.mark.slow
def test_sigterm_to_one_host_saves_the_same_step_on_all(data_dir, tmp_path):
  """Afterwards the same command resumes from this step. A second SIGTERM, before its first step, changes nothing."""
  run = arguments(data_dir, tmp_path / 'run', **{'train.steps': 400, 'train.evaluate_every': 200})
  with several_hosts.Hosts(2, 1, run, tmp_path / 'first') as two:
    wait_for_step(two, tmp_path / 'run', 3)
    two.processes[1].send_signal(signal.SIGTERM)
    assert two.wait(60) == [143, 143]
    stops = [line for k in (0, 1) for line in two.log(k).splitlines() if line.startswith('stopped by SIGTERM')]
  assert len(stops) == 2 and stops[0] == stops[1]
  (saved,) = [int(path.name) for path in (tmp_path / 'run' / 'checkpoints').iterdir() if path.name.isdigit()]
  assert f'stopped by SIGTERM at step {saved}, which is saved; rerun the same command' in stops[0]
  assert 3 <= saved < 400
  files = lambda: {path: path.stat().st_mtime_ns for path in (tmp_path / 'run').rglob('*') if path.is_file()}
  with several_hosts.Hosts(2, 1, run, tmp_path / 'again') as two:
    starts = tmp_path / 'run' / 'starts.json'
    wait_until(lambda: len(json.loads(starts.read_text())) == 2, two)  # the last file before the first step
    assert f'at step {saved} of 400' in two.log(0)
    before = files()
    two.processes[1].send_signal(signal.SIGTERM)
    assert two.wait(30) == [143, 143]
    assert two.log(1).splitlines()[-1] == 'stopped by SIGTERM; rerun the same command to resume'
    assert two.log(0).splitlines()[-1] == 'stopped by SIGTERM on process 1; rerun the same command to resume'
    assert 'Traceback' not in two.log(0) + two.log(1)
  assert files() == before
  with several_hosts.Hosts(2, 1, run, tmp_path / 'second') as two:
    wait_for_step(two, tmp_path / 'run', saved + 1)
    assert f'at step {saved} of 400' in two.log(0)


def wait_for_step(several, workdir, step):
  log = workdir / 'log.jsonl'
  wait_until(lambda: log.exists() and len(log.read_text().splitlines()) >= step, several)


def wait_until(condition, several):
  until = time.monotonic() + 120
  while not condition():
    assert all(process.poll() is None for process in several.processes), several.log(0) + several.log(1)
    assert time.monotonic() < until, several.log(0)
    time.sleep(0.02)


@pytest.mark.slow
def test_sigterm_during_a_test_of_a_cross_validation(data_dir, tmp_path):
  """All stop during the test of fold 0. The same command tests it again, with the result of an uninterrupted run."""
  few = {'train.steps': 4, 'train.evaluate_every': 2}
  run, fold = arguments(data_dir, tmp_path / 'run', **few, **{'data.fold': 'all'}), tmp_path / 'run' / 'fold0'
  with several_hosts.Hosts(2, 1, run, tmp_path / 'first') as two:
    wait_until((fold / 'operating_point.json').exists, two)
    two.processes[1].send_signal(signal.SIGTERM)
    assert two.wait(30) == [143, 143], two.log(0)
    assert 'Traceback' not in two.log(0) + two.log(1)
  assert not (tmp_path / 'run' / 'fold1' / 'checkpoints').exists()
  # The signal may also have come between the end of this test and the training of fold 1.
  was_tested = (fold / 'test' / 'metrics.json').exists()
  with several_hosts.Hosts(2, 1, run, tmp_path / 'second') as two:
    wait_until(lambda: 'fold 1' in two.log(0), two)
    assert (f'{fold} is finished' if was_tested else f'resuming {fold} at step 4 of 4') in two.log(0)
  with several_hosts.Hosts(2, 1, arguments(data_dir, tmp_path / 'whole', **few), tmp_path / 'third') as two:
    assert two.wait() == [0, 0], two.log(0)
  for name in ('slices.csv', 'patients.csv'):
    assert (fold / 'test' / name).read_bytes() == (tmp_path / 'whole' / 'test' / name).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
  ('victim', 'how'), [(1, signal.SIGKILL), (0, signal.SIGKILL), (1, signal.SIGSTOP)], ids=['other', 'first', 'silent']
)
def test_when_one_host_is_lost_the_others_end_in_time(data_dir, tmp_path, victim, how):
  """A host is killed or silent: a stopped process keeps its connections but does not reply."""
  run = arguments(data_dir, tmp_path / 'run', **{'train.steps': 100_000, 'train.evaluate_every': 50_000})
  with several_hosts.Hosts(2, 1, [*run, '--heartbeat_timeout=10'], tmp_path) as two:
    wait_for_step(two, tmp_path / 'run', 2)
    two.processes[victim].send_signal(how)
    began = time.monotonic()
    code = two.processes[1 - victim].wait(60)
    assert time.monotonic() - began < 45
    assert code not in (0, 2, 3)
    printed = two.log(1 - victim)
  reasons = ('process died', 'Connection', 'heartbeats', 'Failed to send RPC', 'closed')
  assert any(reason in printed for reason in reasons), printed


@pytest.mark.slow
def test_other_processes_wait_for_process_0_and_fail_with_it(tmp_path):
  """Only process 0 reads the cohort; all processes report its error."""
  (tmp_path / 'raw').mkdir()
  with several_hosts.Hosts(
    2, 1, ['--config=configs/seg.py', f'--config.data.raw_dir={tmp_path / "raw"}'], tmp_path
  ) as two:
    assert two.wait(60) == [2, 2]
    first, second = two.log(0), two.log(1)
  assert first.splitlines()[-1].startswith(f'error: {tmp_path / "raw"}: no known layout of scans and masks')
  assert second.splitlines()[-1].startswith(f'error: process 0 of 2: {tmp_path / "raw"}: no known layout')


@pytest.mark.slow
def test_a_workdir_that_is_not_shared_is_refused(data_dir, tmp_path):
  """Process 1 has a folder of the same kind, with an earlier run."""
  (tmp_path / 'b').mkdir()
  (tmp_path / 'b' / 'config.json').write_text('{}')
  run = [a for a in arguments(data_dir, 'run') if not a.startswith('--workdir')]
  folders = [[f'--workdir={tmp_path / "a"}'], [f'--workdir={tmp_path / "b"}']]
  with several_hosts.Hosts(2, 1, run, tmp_path, each=folders) as two:
    assert two.wait(60) == [2, 2]
    reason = f'process 1 does not see the files of process 0 in {tmp_path / "a"}; name a folder that all hosts share'
    assert f'error: --workdir: {reason}' in two.log(0)
    assert f'error: process 0 of 2: --workdir: {reason}' in two.log(1)
  assert not (tmp_path / 'a').exists()


@pytest.mark.slow
def test_a_cache_that_is_not_shared_is_refused_before_the_work(raw_dir, tmp_path):
  """Without data.dir, process 0 prepares into a cache folder; here each process has its own."""
  run = ['--config=configs/seg.py', f'--config.data.raw_dir={raw_dir}', f'--workdir={tmp_path / "run"}']
  run += ['--coordinator=localhost:18477', '--num_processes=2']
  tasks = [
    several_hosts.start(
      [*run, f'--process_id={k}'], 1, tmp_path / f'{k}.log', tmp_path / 'notes', XDG_CACHE_HOME=str(tmp_path / str(k))
    )
    for k in range(2)
  ]
  assert [task.wait(60) for task in tasks] == [2, 2]
  first, second = ((tmp_path / f'{k}.log').read_text() for k in range(2))
  reason = f'data.dir: process 1 does not see the files of process 0 in {tmp_path / "0" / "fusa_jax"}; give a data.dir'
  assert first.splitlines()[-1].startswith(f'error: {reason} that all hosts share')
  assert second.splitlines()[-1].startswith(f'error: process 0 of 2: {reason}')
  assert 'Checking scans' not in first


@pytest.mark.slow
@pytest.mark.parametrize('present', [0, 1])
def test_waiting_for_a_missing_host_has_a_limit(data_dir, tmp_path, present):
  run = [*arguments(data_dir, tmp_path / 'run'), '--connect_timeout=4']
  lonely = [*run, '--coordinator=localhost:18476', '--num_processes=2', f'--process_id={present}']
  process = several_hosts.start(lonely, 1, tmp_path / 'log', tmp_path / 'notes')
  assert process.wait(60) == 2
  printed = (tmp_path / 'log').read_text()
  assert f'process {present} of 2, waiting for the others at localhost:18476' in printed
  assert 'error: hosts: not all processes connected at localhost:18476 within 4 s; start' in printed
  assert not (tmp_path / 'run').exists()


@pytest.mark.slow
def test_slurm_is_detected(raw_dir, tmp_path):
  """Two tasks with the variables of srun and no flags: process 0 prepares the cohort, the other waits."""
  run = ['--mode=prepare', '--config=configs/seg.py', f'--config.data.raw_dir={raw_dir}']
  run += [f'--config.data.image_size={SIZE}', f'--config.data.dir={tmp_path / "prepared"}']
  job = {'SLURM_JOB_ID': '4711', 'SLURM_STEP_NODELIST': 'localhost', 'SLURM_NTASKS': '2', 'SLURM_STEP_NUM_NODES': '1'}
  tasks = [
    several_hosts.start(
      run, 1, tmp_path / f'{k}.log', tmp_path / 'notes', **job, SLURM_PROCID=str(k), SLURM_LOCALID=str(k)
    )
    for k in range(2)
  ]
  assert [task.wait(120) for task in tasks] == [0, 0]
  first, second = ((tmp_path / f'{k}.log').read_text() for k in range(2))
  assert f'prepared: {tmp_path / "prepared"}' in first
  assert 'prepared' not in second and 'Checking scans' not in second


@pytest.mark.slow
def test_other_processes_report_a_late_error_of_process_0(data_dir, one_host, tmp_path):
  """Process 0 cannot write the results, because a folder has the name of a file; the other process reports it."""
  (tmp_path / 'run').mkdir()
  for name in ('config.json', 'checkpoints'):
    (tmp_path / 'run' / name).symlink_to(one_host[0] / name)
  (tmp_path / 'run' / 'test' / 'slices.csv').mkdir(parents=True)
  run = ['--mode=evaluate', f'--workdir={tmp_path / "run"}', '--config=configs/seg.py', f'--config.data.dir={data_dir}']
  with several_hosts.Hosts(2, 1, run, tmp_path) as two:
    assert two.wait(120) == [2, 2]
    last = two.log(0).splitlines()[-1]
    assert last.startswith(f'error: {tmp_path / "run" / "test"}/') and 'cannot be written (Is a directory); ' in last
    assert two.log(1).splitlines()[-1] == f'error: process 0 of 2: {last.removeprefix("error: ")}'


def test_unpacked_files_are_removed_when_another_process_fails(monkeypatch):
  """The process ends by os._exit, without unwinding the stack."""

  class Store:
    def key_value_dir_get(self, _):
      return [('', '[2, "scan.nii.gz: bad"]')]

    def key_value_set(self, *_):
      pass

    key_value_increment = key_value_set

  def end(code):
    raise SystemExit(code)

  monkeypatch.setattr(store, 'client', Store)
  for name in ('_leaving', '_ending'):
    monkeypatch.setattr(hosts, name, threading.Event())
  monkeypatch.setattr(hosts._leaving, 'wait', lambda _: False)
  monkeypatch.setattr(os, '_exit', end)
  with archives.unpacking() as folder:
    (folder / 'scan').write_text('patient data')
    with pytest.raises(SystemExit, match='2'):
      hosts._watch()
    assert not folder.exists()


@pytest.mark.slow
@pytest.mark.parametrize('differing', ['config', 'data'])
def test_processes_with_another_config_or_data_are_refused(data_dir, tmp_path, differing):
  """Before step 1, with the name of the process and of what differs. A copy of the data elsewhere is the same."""
  copy = tmp_path / 'copy'
  shutil.copytree(data_dir, copy)
  each = [[], [f'--config.data.dir={copy}']]
  if differing == 'config':
    each[1] += ['--config.train.learning_rate=0.5', '--config.seed=1']
    reasons = ['config.seed (1, not 0)', 'config.train.learning_rate (0.5, not 0.003)']
  else:
    (path,) = copy.rglob('metadata.json')
    metadata = json.loads(path.read_text())
    metadata['folds']['fold0'], metadata['folds']['fold1'] = metadata['folds']['fold1'], metadata['folds']['fold0']
    path.write_text(json.dumps(metadata))
    reasons = ['data (']
  run = arguments(data_dir, tmp_path / 'run')
  with several_hosts.Hosts(2, 1, run, tmp_path / 'logs', each=each) as two:
    assert two.wait(120) == [2, 2], two.log(0)
    lines = [[line for line in two.log(k).splitlines() if line.startswith('error')] for k in (0, 1)]
  for reason, line in zip(reasons, lines[0], strict=True):
    assert line.startswith(f'error: hosts: process 1 differs from process 0 in {reason}')
  assert all('differs from process 0' in line for line in lines[1]) and lines[1]
  assert not (tmp_path / 'run').exists()
