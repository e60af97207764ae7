"""The page of a run: whole, without a network, and with the numbers that metrics.json has."""

import html.parser
import json
import re

import pytest

from configs import seg
from fusa_jax import tasks
from fusa_jax.measures import metrics, statistics
from fusa_jax.runs import report, run_config
from fusa_jax.system.errors import UserError
from fusa_jax.training import datasets


class Page(html.parser.HTMLParser):
  """What a page is made of: its tags in balance, what it links to, its text."""

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
def test_page_is_whole_and_needs_nothing_else(runs, data_dir, kind):
  path = report.write_report(runs[kind], datasets.card(data_dir, 0))
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
    assert f'{name} {shown} {"[{:.4f}, {:.4f}]".format(*pair) if pair else "none"}' in words
    assert metrics.DEFINITIONS[name] in words
  assert f'python launch.py --config={runs[kind]}/config.json --workdir=NEW_FOLDER' in words
  assert 'nothing here is a diagnosis' in words and 'What it must not be used for' in words
  path.unlink()


def test_every_number_has_a_definition(runs):
  for workdir in runs.values():
    result = json.loads((workdir / 'test' / 'metrics.json').read_text())
    slices = result['operating_point']['slices']['intervals']
    assert result['intervals'].keys() - statistics.method().keys() <= metrics.DEFINITIONS.keys()
    assert slices.keys() <= metrics.DEFINITIONS.keys()


def test_the_same_run_gives_the_same_page(runs, data_dir):
  pages = [report.write_report(runs['seg'], datasets.card(data_dir, 0)).read_text() for _ in range(2)]
  assert pages[0] == pages[1]
  (runs['seg'] / 'test' / 'report.html').unlink()


def test_a_run_that_was_not_evaluated_has_none(data_dir, tmp_path):
  run_config.save_config(tmp_path, seg.get_config('demo'))
  with pytest.raises(UserError, match='evaluate the run with --mode=evaluate'):
    report.write_report(tmp_path, datasets.card(data_dir, 0))
