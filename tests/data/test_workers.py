"""The pool of processes that read scans."""

import os
import subprocess
import sys
import time

START = """
import multiprocessing
import os

from data import workers

if __name__ == '__main__':
  with workers.pool(1) as run:
    list(run(pow, [2], [3]))
    print(*(process.pid for process in multiprocessing.active_children()), flush=True)
    os._exit(1)
"""


def test_workers_end_with_a_parent_that_is_killed(tmp_path):
  """Otherwise they would wait for tasks for ever, on a machine that the scheduler has taken back."""
  script = tmp_path / 'start.py'
  script.write_text(START)
  output = tmp_path / 'output'
  with output.open('w') as file:
    # Not through a pipe, which a worker that stays would keep open.
    code = subprocess.call([sys.executable, script], stdout=file, env=os.environ | {'PYTHONPATH': os.getcwd()})
  assert code == 1
  (worker,) = map(int, output.read_text().split())
  until = time.monotonic() + 20
  while is_alive(worker) and time.monotonic() < until:
    time.sleep(0.05)
  assert not is_alive(worker)


def is_alive(pid: int) -> bool:
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return False
  return True
