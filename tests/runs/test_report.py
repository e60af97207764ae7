"""The report of a run: a complete page that loads no other file, with the numbers of metrics.json."""

import html.parser
import json
import re
import shutil

import numpy as np
import pytest

from configs import seg
from fusa_jax import tasks
from fusa_jax.measures import masks, metrics, statistics
from fusa_jax.runs import figures, report, run_config
from fusa_jax.system.errors import UserError
from fusa_jax.training import datasets


class Page(html.parser.HTMLParser):
  """A parsed page: it checks that tags are closed, and collects links and text."""

  VOID = ('meta', 'img', 'br', 'link', 'path', 'use', 'rect', 'circle', 'line')

  def __init__(self, text):
    super().__init__()
    self.open, self.links, self.words = [], [], []
    self.feed(text)
    self.close()

  def handle_starttag(self, tag, attributes):
    if tag not in self.VOID:
      self.open.append(tag)
    self.links += [value for name, value in attributes if name in ('src', 'href', 'xlink:href')]

  def handle_endtag(self, tag):
    if tag not in self.VOID:
      assert self.open.pop() == tag

  def handle_data(self, data):
    self.words.append(data)


@pytest.mark.parametrize('kind', ['seg', 'cls'])
def test_page_is_complete_and_loads_no_other_file(runs, data_dir, kind):
  path = report.write_report(runs[kind], [datasets.card(data_dir, 0)])
  text = path.read_text()
  page = Page(text)
  assert not page.open
  assert all(link.startswith(('#', 'data:image/')) for link in page.links)
  assert sum(link.startswith('data:image/webp') for link in page.links) == 2
  assert not re.search(r'(?:src|href)="https?:|@import|url\(http', text)
  assert path.stat().st_size < 3_000_000
  assert '<script' not in text
  words = ' '.join(' '.join(page.words).split())
  result = json.loads((runs[kind] / 'test' / 'metrics.json').read_text())
  config = run_config.load_config(runs[kind])
  for name in tasks.type_of(config.task).shown:
    value, pair = result[name], result['intervals'][name]
    shown = 'undefined' if value is None else f'{value:.4f}'
    assert f'{metrics.LABELS[name]} {shown} {"[{:.4f}, {:.4f}]".format(*pair) if pair else "none"}' in words
    assert metrics.DEFINITIONS[name] in words
  of = result['patient']
  for name, pair in of['intervals'].items():
    value, label = of[name], metrics.LABELS[f'patient_{name}']
    shown = 'undefined' if value is None else f'{value:.4f}'
    assert f'{label} {shown} {"[{:.4f}, {:.4f}]".format(*pair) if pair else "none"}' in words
    assert metrics.DEFINITIONS[f'patient_{name}'] in words
  assert metrics.DEFINITIONS['noisy_or'] in words and metrics.DEFINITIONS[of['score_name']] in words
  assert f'{of["num_with_lesion"]} of {of["num_patients"]} test patients have a lesion' in words
  assert 'ROC curve of patients' in text
  assert f'python launch.py --config={runs[kind]}/config.json --workdir=NEW_FOLDER' in words
  assert 'Do not use it for diagnosis' in words and 'Do not use this model for' in words
  assert not re.search(r'dice_|_ml\b|_mm\b|hd95', words)  # names for programs
  path.unlink()


def test_the_training_decides_which_score_is_said_to_choose_the_checkpoint(runs, data_dir, tmp_path, monkeypatch):
  """A run on labels of patients, tested on slices with labels of their own."""
  shutil.copytree(runs['cls'], tmp_path / 'run')
  log, drawn, draw = tmp_path / 'run' / 'log.jsonl', [], figures.learning_curves
  monkeypatch.setattr(figures, 'learning_curves', lambda logs, score: drawn.append(score) or draw(logs, score))
  card = datasets.card(data_dir, 0) | {'validated': False}  # the tested data may have too few folds
  words = lambda: report.write_report(tmp_path / 'run', [card]).read_text()
  assert words().count('best score (AUC) on validation patients') == 2
  log.write_text(log.read_text().replace('"validation/auc"', '"validation/patient_auc"'))
  assert words().count('best score (AUC of patients) on validation patients') == 2
  assert drawn == ['auc', 'patient_auc']


def test_patients_without_lesion_have_a_volume_and_no_dice():
  """Counted by hand: 'a' has lesion; 'b' and 'c' have none, and 'b' has 3 + 1 false pixels."""
  table = {
    'patient': np.array(['a', 'b', 'b', 'c']),
    'owner': np.array(['a', 'b', 'b', 'c']),
    'label': np.array([1, 0, 0, 0]),
    'logit': np.zeros(4),
    'tp_chosen': np.array([5, 0, 0, 0]),
    'fp_chosen': np.array([1, 3, 1, 0]),
    'fn_chosen': np.array([0, 0, 0, 0]),
    'tn_chosen': np.array([3, 6, 8, 9]),
    'reliability': np.zeros((4, 3, 20)),
    'squared_error': np.zeros(4),
  }
  assert report.healthy(table, {}) == {'patients': 2, 'clean': 1, 'pixels': [4], 'ml': None}
  assert report.healthy(table, {'b': {'predicted_ml': 1.5, 'true_ml': 0.0}})['ml'] is None  # 'c' has no scan
  volumes = {name: {'predicted_ml': ml, 'true_ml': 0.0} for name, ml in (('a', 9.0), ('b', 1.5), ('c', 0.0))}
  assert report.healthy(table, volumes) == {'patients': 2, 'clean': 1, 'pixels': [4], 'ml': [1.5]}
  # With 'b' and 'c' as scans of one person, there is one patient with all of their marks.
  person = table | {'owner': np.array(['a', 'x', 'x', 'x'])}
  volumes['c']['predicted_ml'] = 0.5
  assert report.healthy(person, volumes) == {'patients': 1, 'clean': 0, 'pixels': [4], 'ml': [2.0]}


def test_every_number_has_a_label_and_a_definition(runs):
  for workdir in runs.values():
    result = json.loads((workdir / 'test' / 'metrics.json').read_text())
    slices = result['operating_point']['slices']['intervals']
    assert result['intervals'].keys() - statistics.method().keys() <= metrics.DEFINITIONS.keys()
    assert slices.keys() <= metrics.DEFINITIONS.keys()
  assert metrics.LABELS.keys() == metrics.DEFINITIONS.keys() and masks.LABELS.keys() == masks.DEFINITIONS.keys()


def test_the_same_run_gives_the_same_page(runs, data_dir):
  pages = [report.write_report(runs['seg'], [datasets.card(data_dir, 0)]).read_text() for _ in range(2)]
  assert pages[0] == pages[1]
  (runs['seg'] / 'test' / 'report.html').unlink()


def test_a_run_without_evaluation_is_refused(data_dir, tmp_path):
  run_config.save_config(tmp_path, seg.get_config('demo'))
  with pytest.raises(UserError, match='evaluate the run with --mode=evaluate'):
    report.write_report(tmp_path, [datasets.card(data_dir, 0)])
