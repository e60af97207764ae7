"""The cache of compiled programs."""

import pathlib
import subprocess
import sys

import jax

from fusa_jax.system import program


def test_the_cache_folder_can_be_moved(tmp_path):
  code = 'from fusa_jax.system import home, program; print(home.CACHE); print(program.COMPILED)'
  for variables, folder in (
    ({'HOME': str(tmp_path), 'XDG_CACHE_HOME': '~/x'}, tmp_path / 'x'),
    ({'HOME': str(tmp_path)}, tmp_path / '.cache'),
  ):
    output = subprocess.run([sys.executable, '-c', code], env=variables, check=True, capture_output=True, text=True)
    assert output.stdout.splitlines() == [str(folder / 'fusa_jax'), str(folder / 'fusa_jax' / 'compiled')]


def test_a_cache_that_cannot_be_written_is_not_used(tmp_path, monkeypatch, caplog):
  caplog.set_level('INFO')
  before = jax.config.jax_compilation_cache_dir
  (tmp_path / 'file').write_bytes(b'')
  monkeypatch.setattr(program, 'COMPILED', tmp_path / 'file' / 'compiled')
  program.use_compilation_cache()
  assert caplog.messages == [
    f'{tmp_path}/file/compiled: cannot be written, so compiled programs are not kept; set XDG_CACHE_HOME to a folder '
    'that can'
  ]
  assert jax.config.jax_compilation_cache_dir == before
  monkeypatch.setattr(program, 'COMPILED', tmp_path / 'new' / 'compiled')
  try:
    program.use_compilation_cache()
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / 'new' / 'compiled')
  finally:
    jax.config.update('jax_compilation_cache_dir', before)
  assert pathlib.Path(tmp_path / 'new' / 'compiled').is_dir()
