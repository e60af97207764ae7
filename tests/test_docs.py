"""What the documents state of the code is computed here again."""

import pathlib
import re

from benchmarks import model_table


def test_model_table_is_the_computed_one():
  assert model_table.table() in pathlib.Path('docs/models.md').read_text()


def test_links_lead_somewhere():
  for document in [pathlib.Path('README.md'), *pathlib.Path('docs').glob('*.md')]:
    for target in re.findall(r'\]\(([^)#:]+)(?:#[^)]*)?\)', document.read_text()):
      assert (document.parent / target).exists(), f'{document}: {target}'
