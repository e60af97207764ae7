"""Pages of one file each, which need nothing beside it: Jinja's templates in templates/, HTML in one style."""

import pathlib
from typing import Any

import jinja2
import numpy as np

from fusa_jax.system.files import replacing

TEMPLATES = pathlib.Path(__file__).parent / 'templates'


def write_page(path: pathlib.Path, template: str, **values: Any) -> None:
  """Writes the page that a template and its values make.

  Raises:
    UserError: the system refuses to write there.
  """
  environment = jinja2.Environment(
    loader=jinja2.FileSystemLoader(TEMPLATES),
    autoescape=jinja2.select_autoescape(['html']),
    keep_trailing_newline=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
  )
  environment.filters |= {'number': _number, 'interval': _interval}
  text = environment.get_template(template).render(values)
  with replacing(path) as partial:
    partial.write_text(text, encoding='utf-8')


def _number(value, digits=4):
  if value is None or (isinstance(value, float) and np.isnan(value)):
    return 'undefined'
  return f'{value:,}' if isinstance(value, int | np.integer) else f'{value:.{digits}f}'


def _interval(pair, digits=4):
  return '[{:.{d}f}, {:.{d}f}]'.format(*pair, d=digits) if pair else 'none'
