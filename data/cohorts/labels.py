"""What the classes of slices or patients mean: with and without lesion, or one of several exclusive classes."""

import logging
import pathlib
import re
from collections.abc import Sequence

from fusa_jax.scans import classes
from fusa_jax.scans.classes import LESION, Classes
from fusa_jax.system.errors import UserError

_WITHOUT_LESION = re.compile(r'(?<![a-z])(non(?!specific)|not?(?![a-z])|normal|healthy|negative|control|ct-0$)')


def is_without_lesion(name: str) -> bool:
  """Whether the name of a class says that it is without lesion, for example 0, CT_NonCOVID or healthy."""
  words = re.sub(r'(?<=[A-Za-z])(?=[A-Z][a-z])|(?<=[a-z])(?=[A-Z])', ' ', name).lower()
  return name == '0' or bool(_WITHOUT_LESION.search(words))


def meaning(
  names: Sequence[str], named: Sequence | str, place: pathlib.Path, of: str, advice: str
) -> tuple[Classes, dict[str, int]]:
  """Decides what the classes of a cohort mean, and logs it.

  With data.classes='auto', two classes of which one is without lesion are the one class `lesion`. All others are
  exclusive: those without lesion first, the rest sorted by name. With (), names without lesion are one group and all
  others another. With names, the classes are exclusive, in this order.

  Args:
    names: the names of the classes in the cohort.
    named: the value of data.classes: (), 'auto', or names.
    place: the folder or list of the classes, for messages.
    of: what has the classes: 'slices' or 'patients'.
    advice: what to do if names do not tell which classes are without lesion.

  Returns:
    the classes, and for each name its label: 1 with lesion and 0 without, or the number of the exclusive class.

  Raises:
    UserError: the names do not tell which classes are without lesion; data.classes has other names, or mask values.
  """
  names = list(dict.fromkeys(names))
  without = {name: is_without_lesion(name) for name in names}
  if named == classes.AUTO and len(names) > 1 and (len(names) > 2 or len(set(without.values())) == 1):
    named = sorted(names, key=lambda name: (not without[name], name))
  if named and named != classes.AUTO:
    return _exclusive(names, named, place, of)
  of_group = [', '.join(name for name in names if without[name] == group) or 'none' for group in (False, True)]
  logging.info('%s: %s with lesion: %s; without: %s', place, of, *of_group)
  if len(set(without.values())) != 2:
    raise UserError(f'{place}: cannot tell which {advice}')
  return LESION, {name: int(not without[name]) for name in names}


def _exclusive(names, named, place, of):
  if not classes.are_names(named):
    raise UserError(
      f'data.classes: gives mask values, but {place} has classes of {of} ({", ".join(names)}); leave data.classes out'
    )
  if set(named) != set(names):
    raise UserError(
      f'data.classes: {", ".join(named)}, but {place} has {", ".join(names)}; give the same names, or leave '
      'data.classes out'
    )
  found = classes.of_slices(named)
  logging.info('%s: exclusive classes of %s: %s', place, of, ', '.join(found.names))
  return found, {name: number for number, name in enumerate(found.names)}
