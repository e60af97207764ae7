"""Digests of files and folders: compared with hashlib; kept only as long as the files have not changed."""

import hashlib
import os
import time

import pytest

from data import digests
from fusa_jax.system.errors import UserError


def sha256(content):
  return hashlib.sha256(content).hexdigest()


@pytest.fixture
def count(monkeypatch):
  """The number of files that were read since the last call."""
  read = []
  real = digests._digest
  monkeypatch.setattr(digests, '_digest', lambda path: (read.append(path), real(path))[1])
  monkeypatch.setattr(digests, '_SETTLED_NS', 0)
  return lambda: (len(read), read.clear())[0]


def test_digests_of_files_and_folders(tmp_path):
  (tmp_path / 'a').write_bytes(b'one')
  (tmp_path / 'b' / 'c').mkdir(parents=True)
  (tmp_path / 'b' / '2').write_bytes(b'two'), (tmp_path / 'b' / 'c' / '1').write_bytes(b'one')
  (tmp_path / 'b' / '.DS_Store').write_bytes(b'x')
  of_folder = sha256(''.join(sorted([sha256(b'one'), sha256(b'two')])).encode())
  assert digests.of([tmp_path / 'a', tmp_path / 'b']) == [sha256(b'one'), of_folder]
  (tmp_path / 'b' / '2').rename(tmp_path / 'b' / '3')
  assert digests.of([tmp_path / 'b']) == [of_folder]
  with pytest.raises(UserError, match=r'nothing: cannot be read \(No such file or directory\); copy it again'):
    digests.of([tmp_path / 'nothing'])


def test_unchanged_files_are_read_once(tmp_path, count):
  paths, cache = [tmp_path / name for name in 'abc'], tmp_path / 'cache' / 'digests.json'
  for path in paths:
    path.write_bytes(path.name.encode())
  first = digests.of(paths, cache)
  assert count() == 3 and digests.of(paths, cache) == first and count() == 0
  os.utime(paths[0])
  assert digests.of(paths, cache) == first and count() == 1
  # The same size and modification time, as after a corrected voxel of an uncompressed mask.
  state = paths[1].stat()
  paths[1].write_bytes(b'x')
  os.utime(paths[1], ns=(state.st_atime_ns, state.st_mtime_ns))
  assert digests.of(paths, cache) == [first[0], sha256(b'x'), first[2]] and count() == 1
  # Another file with the times of the old one, renamed to its place.
  (tmp_path / 'new').write_bytes(b'y')
  os.utime(tmp_path / 'new', ns=(state.st_atime_ns, state.st_mtime_ns))
  os.replace(tmp_path / 'new', paths[1])
  assert digests.of(paths, cache)[1] == sha256(b'y') and count() == 1


def test_files_that_have_just_changed_are_not_kept(tmp_path, count, monkeypatch):
  monkeypatch.setattr(digests, '_SETTLED_NS', 10**12)
  (tmp_path / 'a').write_bytes(b'a')
  for _ in range(2):
    digests.of([tmp_path / 'a'], tmp_path / 'cache')
    assert count() == 1


def test_a_cache_that_cannot_be_used(tmp_path, count):
  (tmp_path / 'a').write_bytes(b'a')
  time.sleep(0.01)
  for content in ('', '[1]', '{"a": '):
    (tmp_path / 'cache').write_text(content)
    assert digests.of([tmp_path / 'a'], tmp_path / 'cache') == [sha256(b'a')] and count() == 1
  assert digests.of([tmp_path / 'a'], tmp_path / 'cache') == [sha256(b'a')] and count() == 0
  assert digests.of([tmp_path / 'a'], tmp_path / 'a' / 'cache') == [sha256(b'a')]
