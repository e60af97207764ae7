"""Writes self-contained pages, one file each, from the Jinja templates in templates/."""

import os
import pathlib
import urllib.parse
from typing import Any

import jinja2
import numpy as np

from fusa_jax.system import own_files
from fusa_jax.system.files import replacing

TEMPLATES = pathlib.Path(__file__).parent / 'templates'


def fill(template: str, **values: Any) -> str:
  """Returns the text of a template with values. In scripts, template statements are comments that begin with `# %`."""
  environment = jinja2.Environment(
    loader=jinja2.FileSystemLoader(TEMPLATES),
    autoescape=jinja2.select_autoescape(['html']),
    keep_trailing_newline=True,
    trim_blocks=True,
    lstrip_blocks=True,
    line_statement_prefix='# %',
    undefined=jinja2.StrictUndefined,
  )
  environment.filters |= {'number': _number, 'interval': _interval, 'file_url': _file_url}
  return environment.get_template(template).render(values)


def write_page(path: pathlib.Path, template: str, **values: Any) -> None:
  """Fills a template with values and writes the page.

  Raises:
    UserError: the page cannot be written.
  """
  text = fill(template, **values)
  # File names may have bytes that are not UTF-8.
  text = text.encode('utf-8', 'surrogateescape').decode('utf-8', 'backslashreplace')
  with replacing(path) as partial:
    partial.write_text(own_files.sealed(text) if path.suffix == '.html' else text, encoding='utf-8')


def _file_url(name):
  """A file name in a link, byte by byte: it need not be UTF-8."""
  return urllib.parse.quote(os.fsencode(name), safe='')


def _number(value, digits=4):
  if value is None or (isinstance(value, float) and np.isnan(value)):
    return 'undefined'
  return f'{value:,}' if isinstance(value, int | np.integer) else f'{value:.{digits}f}'


def _interval(pair, digits=4):
  return '[{:.{d}f}, {:.{d}f}]'.format(*pair, d=digits) if pair else 'none'
