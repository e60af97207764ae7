"""A file is written completely or not at all."""

import os
import resource

import pytest

from fusa_jax.system.errors import UserError
from fusa_jax.system.files import replacing


def test_a_file_appears_when_complete(tmp_path):
  path = tmp_path / 'new' / 'a.txt'
  with replacing(path) as partial:
    partial.write_text('one')
    assert not path.exists() and partial.parent == path.parent and partial.suffix == path.suffix
  with replacing(path) as partial:
    partial.write_text('two')
    assert path.read_text() == 'one'
  assert path.read_text() == 'two'
  assert os.listdir(path.parent) == ['a.txt']


def write(path, text, error=None):
  with replacing(path) as partial:
    partial.write_text(text)
    if error:
      raise error


def test_an_error_keeps_the_old_file(tmp_path):
  path = tmp_path / 'a.txt'
  path.write_text('one')
  with pytest.raises(KeyboardInterrupt):
    write(path, 'tw', KeyboardInterrupt())
  assert path.read_text() == 'one' and os.listdir(tmp_path) == ['a.txt']


def test_system_errors_are_reported_in_one_line(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(UserError, match=r'file/a.txt: cannot be written \(File exists\); free space there, or give'):
    write(tmp_path / 'file' / 'a.txt', '')
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
  try:
    with pytest.raises(UserError, match=r'b.txt: cannot be written \(File too large\)'):
      write(tmp_path / 'b.txt', 'x' * 5000)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  assert os.listdir(tmp_path) == ['file']
