"""Config files of runs: those of earlier versions open, and mean what they meant."""

import json
import subprocess
import sys

import pytest
from commands import ROOT
from conftest import tiny

from configs import base
from fusa_jax import tasks
from fusa_jax.runs import run_config
from fusa_jax.system.errors import UserError


def flat(config):
  return run_config._flat(run_config.plain(config).to_dict())


def test_a_config_without_the_later_keys_means_the_paper(tmp_path):
  """Each later key has the value that switches its part off, so that an earlier run resumes as it began."""
  run_config.save_config(tmp_path, tiny())
  saved = json.loads((tmp_path / 'config.json').read_text())
  for key in run_config._ADDED:
    section, *inner, name = key.split('.')
    del (saved[section][inner[0]] if inner else saved[section])[name]
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


NAMED = {'ground glass': [1, 3.0], 'b.c': (2,), 'a': (2, 1), 'background': (4,)}
PAIRS = (('ground glass', (1, 3)), ('b.c', (2,)), ('a', (2, 1)), ('background', (4,)))


def test_classes_keep_their_names_values_and_order(tmp_path):
  config = tiny(**{'data.classes': NAMED, 'data.ignore_label': 9})
  run_config.save_config(tmp_path, config)
  assert json.loads((tmp_path / 'config.json').read_text())['data']['classes'][0] == ['ground glass', [1, 3]]
  loaded = run_config.load_config(tmp_path)
  assert loaded.data.classes == PAIRS and loaded.data.ignore_label == 9
  assert tasks.classes_of(loaded) == tasks.classes_of(config)
  loaded.copy_and_resolve_references()  # a dictionary with these names could not be copied
  run_config.save_config(tmp_path, loaded)
  run_config.save_config(tmp_path, tiny(**{'data.classes': PAIRS, 'data.ignore_label': 9}))
  with pytest.raises(UserError, match='holds a run with another config: data.classes'):
    run_config.save_config(tmp_path, tiny(**{'data.classes': {'a': (1,)}, 'data.ignore_label': 9}))
  saved = json.loads((tmp_path / 'config.json').read_text())
  saved['data']['classes'] = {name: list(map(int, values)) for name, values in NAMED.items()}  # written by hand
  (tmp_path / 'config.json').write_text(json.dumps(saved))
  assert run_config.load_config(tmp_path).data.classes == PAIRS


@pytest.mark.parametrize('typed', [f'--config.data.classes={NAMED}', '--config.data.classes=lesion', ''])
def test_classes_of_flags_are_pairs(typed):
  """In the config, and in the values that are set again on the config of the demo or of a run."""
  code = (
    'import sys; from fusa_jax.runs import arguments; arguments.define_flags(["train"]); '
    'arguments.parse_flags(sys.argv); named = arguments.named_config(); '
    'print(repr((named.config.data.classes, named.overrides, '
    'arguments.experiment.resolve(*named).config.data.classes)))'
  )
  arguments = ['--config=configs/seg.py', *filter(None, [typed])]
  got = subprocess.run([sys.executable, '-c', code, *arguments], capture_output=True, text=True, cwd=ROOT, check=True)
  expected = {'': (), '--config.data.classes=lesion': 'lesion'}.get(typed, PAIRS)
  given = {'data.classes': expected} if typed else {}
  assert got.stdout.strip() == repr((expected, given, expected))
