"""Jobs that share a machine: how cores and GPUs are divided, and how workers end."""

import collections
import os
import signal
import time

import pytest

from benchmarks import jobs, processes
from fusa_jax.system.errors import UserError

# Workers can run functions of this file: they import it by name.
CPU, GPUS = jobs.Machine('cpu', 'cpu', 8), jobs.Machine('gpu', 'H100', 4)


class Say:
  """A job that returns its text."""

  def __init__(self, text):
    self.text = text

  def __str__(self):
    return f'job {self.text}'

  def __call__(self):
    return self.text


def refuse():
  raise UserError('train: the loss is nan')


def fail():
  raise KeyError('missing')


def die():
  os.kill(os.getpid(), signal.SIGKILL)


def sleep():
  time.sleep(600)


def cores():
  return os.sched_getaffinity(0), signal.getsignal(signal.SIGINT)


def test_each_core_is_in_one_share(monkeypatch):
  monkeypatch.setattr(jobs, '_cores', lambda: [1, 3, 4, 5, 8, 9, 10])
  dealt = [share.cores for share in jobs.shares(3, CPU)]
  assert sorted(sum(dealt, ())) == [1, 3, 4, 5, 8, 9, 10]
  assert sorted(map(len, dealt)) == [2, 2, 3]
  with pytest.raises(UserError, match='^--jobs: 8, but there are 7 CPU cores; give --jobs=7 or fewer$'):
    jobs.shares(8, CPU)


def test_each_job_gets_one_visible_gpu(monkeypatch):
  monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
  assert [share.device for share in jobs.shares(3, GPUS)] == ['0', '1', '2']
  monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '6,2,GPU-8a,1')
  assert [share.device for share in jobs.shares(4, GPUS)] == ['6', '2', 'GPU-8a', '1']
  with pytest.raises(UserError, match='^--jobs: 5, but there are 4 GPUs; give --jobs=4 or fewer$'):
    jobs.shares(5, GPUS)


def test_a_tpu_is_not_shared():
  with pytest.raises(UserError, match='^--jobs: 2, but only one process can use a TPU; leave --jobs out$'):
    jobs.shares(2, jobs.Machine('tpu', 'TPU v5e', 4))


@pytest.mark.parametrize('shares', [[], [jobs.Share()] * 2], ids=['in this process', 'by two workers'])
def test_jobs_may_be_added_while_others_run(shares):
  todo, seen = collections.deque([Say('a'), Say('b'), Say('c')]), []
  for job, value, _ in jobs.run(todo, shares):
    assert job.text == value
    seen.append(value)
    if value == 'c':
      todo.append(Say('d'))
  assert sorted(seen) == ['a', 'b', 'c', 'd']


@pytest.mark.skipif(not hasattr(os, 'sched_setaffinity'), reason='the system deals the cores')
def test_workers_use_their_share_and_ignore_ctrl_c():
  mine, heard = sorted(os.sched_getaffinity(0)), signal.getsignal(signal.SIGINT)
  ((_, (seen, handler), _),) = jobs.run(collections.deque([cores]), [jobs.Share((mine[-1],))])
  assert seen == {mine[-1]}
  assert handler == signal.SIG_IGN
  assert sorted(os.sched_getaffinity(0)) == mine
  assert signal.getsignal(signal.SIGINT) == heard


@pytest.mark.parametrize(
  ('job', 'error', 'reason'),
  [
    (refuse, UserError, 'refuse.*: train: the loss is nan$'),
    (fail, RuntimeError, "KeyError: 'missing'"),
    (die, RuntimeError, 'its process was killed, perhaps because it ran out of memory'),
  ],
)
def test_an_error_stops_the_other_workers(job, error, reason, monkeypatch):
  """The other job would sleep for ten minutes."""
  started, start = [], processes.start
  monkeypatch.setattr(processes, 'start', lambda *args: started.append(start(*args)) or started[-1])
  with pytest.raises(error, match=reason):
    list(jobs.run(collections.deque([sleep, job]), [jobs.Share()] * 2))
  assert len(started) == 2
  assert not any(process.is_alive() for process, _ in started)


def test_a_worker_that_was_killed_between_jobs_is_reported(monkeypatch):
  started, start = [], processes.start
  monkeypatch.setattr(processes, 'start', lambda *args: started.append(start(*args)) or started[-1])
  todo = collections.deque([Say('a')])
  running = jobs.run(todo, [jobs.Share()])
  next(running)
  started[0][0].kill()
  started[0][0].join()
  todo.append(Say('b'))
  with pytest.raises(RuntimeError, match='^job b: its process was killed, perhaps because it ran out of memory$'):
    next(running)
