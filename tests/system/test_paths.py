"""Which texts are folders of this machine, and which are in a bucket."""

import importlib.util
import pathlib

import pytest

from fusa_jax.system import paths
from fusa_jax.system.errors import UserError
from fusa_jax.system.files import writing


def test_a_bucket_needs_gcsfs(monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(UserError, match=r'gs://bucket/run: a bucket needs gcsfs; pip install -r requirements-gcs.txt'):
    paths.to_path('gs://bucket/run')
  assert paths.to_path('runs/mine') == pathlib.Path('runs/mine')


def test_an_error_of_a_bucket_names_the_bucket():
  expected = r'gs://b/x: cannot be written \(no access\); check the name of the bucket'
  with pytest.raises(UserError, match=expected), writing('gs://b/x'):
    raise OSError('no access')


def test_folders_are_moved_and_removed(tmp_path):
  (tmp_path / 'a' / 'b').mkdir(parents=True)
  (tmp_path / 'a' / 'b' / 'file').write_text('x')
  (tmp_path / 'link').symlink_to('nowhere')
  assert paths.files_under(tmp_path / 'a') == ['b/file']
  paths.move_folder(tmp_path / 'a', tmp_path / 'c' / 'd')
  assert paths.files_under(tmp_path / 'c') == ['d/b/file'] and not paths.exists(tmp_path / 'a')
  paths.remove_folder(tmp_path / 'c')
  assert not paths.exists(tmp_path / 'c') and paths.exists(tmp_path / 'link')
