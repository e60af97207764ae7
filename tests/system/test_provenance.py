"""What a file says about the code that wrote it."""

from fusa_jax.system import provenance


def test_files_that_change_while_the_program_runs_do_not_change_its_code(tmp_path, monkeypatch):
  (tmp_path / 'fusa_jax' / 'system').mkdir(parents=True)
  file = tmp_path / 'fusa_jax' / 'system' / 'provenance.py'
  file.write_text('x = 1')
  monkeypatch.setattr(provenance, '__file__', str(file))
  provenance.code_sha256.cache_clear()
  before = provenance.code()
  file.write_text('x = 2')
  assert provenance.code() == before
  provenance.code_sha256.cache_clear()
  assert provenance.code()['sha256'] != before['sha256']
  monkeypatch.undo()
  provenance.code_sha256.cache_clear()
