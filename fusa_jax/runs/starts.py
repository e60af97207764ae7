"""Records each start of a training in starts.json: its first step, with dtype, devices, code and libraries."""

import logging
import pathlib

from fusa_jax.system import hosts
from fusa_jax.system.errors import UserError
from fusa_jax.system.files import read_json, write_json

_FILE = 'starts.json'


def record_start(workdir: pathlib.Path, step: int, facts: dict) -> None:
  """Adds a start to starts.json, on process 0. Logs a warning for each fact that differs from the previous start.

  Args:
    workdir: the folder of the run.
    step: the step that training starts or resumes at.
    facts: what changes the numbers besides the config and the data, by name; values that JSON can store.

  Raises:
    UserError: starts.json is damaged or cannot be written.
  """
  if hosts.is_main():
    before = load_starts(workdir)
    for key in sorted(facts):
      if before and before[-1].get(key) != facts[key]:
        logging.warning(
          '%s: from step %d on, %s is %s; before it was %s', workdir, step, key, facts[key], before[-1].get(key)
        )
    write_json(workdir / _FILE, [*before, {'step': step, **facts}])


def load_starts(workdir: pathlib.Path) -> list[dict]:
  """Returns the starts of a run, the oldest first; [] if an earlier version trained it.

  Raises:
    UserError: starts.json is damaged.
  """
  path, advice = workdir / _FILE, 'delete it; it only serves to notice changes'
  starts = read_json(path, advice) if path.exists() else []
  if not isinstance(starts, list) or not all(isinstance(one, dict) and 'dtype' in one for one in starts):
    raise UserError(f'{path}: damaged (it does not list the starts of the run); {advice}')
  return starts
