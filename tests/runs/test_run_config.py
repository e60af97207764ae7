"""Config files of runs: those of earlier versions open, and mean what they meant."""

import json

import pytest
from conftest import tiny

from configs import base
from fusa_jax.runs import run_config
from fusa_jax.system.errors import UserError


def flat(config):
  return run_config._flat(run_config.plain(config).to_dict())


def test_a_config_without_the_later_keys_means_the_paper(tmp_path):
  """Each later key has the value that switches its part off, so that an earlier run resumes as it began."""
  run_config.save_config(tmp_path, tiny())
  saved = json.loads((tmp_path / 'config.json').read_text())
  for key in run_config._ADDED:
    section, name = key.split('.')
    del saved[section][name]
  (tmp_path / 'config.json').write_text(json.dumps(saved))
  now = tiny(**{'data.context_mm': base.paper().data.context_mm})
  assert flat(run_config.load_config(tmp_path)) == flat(now)
  run_config.save_config(tmp_path, tiny())  # the same run: without context, data.context_mm does not matter
  assert {key: flat(now)[key] for key in run_config._ADDED} == {
    key: value for key, value in flat(base.paper()).items() if key in run_config._ADDED
  }


def test_a_config_without_another_key_is_refused(tmp_path):
  run_config.save_config(tmp_path, tiny())
  saved = json.loads((tmp_path / 'config.json').read_text())
  del saved['train']['loss']
  (tmp_path / 'config.json').write_text(json.dumps(saved))
  with pytest.raises(UserError, match=r'config.json: from another version \(the keys train.loss differ\)'):
    run_config.load_config(tmp_path)
