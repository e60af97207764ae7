"""Locks on folders: one job at a time."""

import logging

import filelock
import pytest
from conftest import tiny

from fusa_jax.system import locks
from fusa_jax.system.errors import UserError
from fusa_jax.training import cross_validation, evaluate, train


def test_a_second_job_is_refused_and_leaves_the_folder(tmp_path):
  folder = tmp_path / 'a' / 'b'
  first, second = (locks.alone(folder, 'name', 'busy') for _ in range(2))
  with first, pytest.raises(UserError, match='^busy$'), second:
    pass
  assert not (tmp_path / 'a').exists()  # nothing was written there
  with locks.alone(folder, 'name', 'busy'):
    (folder / 'file').touch()
  with locks.alone(folder, 'name', 'busy'), locks.alone(folder, 'other', 'busy'):
    pass
  assert (folder / 'file').exists()


def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch, caplog):
  def acquire(*_, **__):
    raise NotImplementedError

  monkeypatch.setattr(filelock.FileLock, 'acquire', acquire)
  with caplog.at_level(logging.WARNING), locks.alone(tmp_path, 'name', 'busy'):
    pass
  assert 'its file system has no locks; do not start two jobs there at once' in caplog.text


@pytest.mark.parametrize(
  'function', [train.train, evaluate.evaluate, cross_validation.train_and_test, cross_validation.evaluate_again]
)
def test_training_and_evaluation_need_the_workdir_for_themselves(runs, data_dir, function):
  with (
    locks.alone(runs['seg'], 'run', 'busy'),
    pytest.raises(UserError, match=r'workdir: another job works in .* now; wait until it ends, or name another folder'),
  ):
    function(tiny(), runs['seg'], data_dir)
