"""The numbers of classes in NAME.json: of one class beside the others, of several by their names under `classes`."""

from collections.abc import Mapping
from typing import Any

from fusa_jax.runs.operating_point import CLASSES
from fusa_jax.scans.classes import COLOURS, LESION, Classes

# What is the same for all classes, among the options of an operating point.
_SHARED = ('flips', 'lungs')


def combined(
  classes: Classes,
  head: Mapping[str, Any],
  options: Mapping[str, Mapping[str, Any]],
  tail: Mapping[str, Any],
  results: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
  """Returns the numbers of a scan or picture.

  Args:
    classes: the classes of the model.
    head: numbers of all classes that come before the options.
    options: the options of the operating point by class.
    tail: numbers of all classes that come after the options.
    results: the results by class.
  """
  names = classes.names
  if len(names) == 1:
    return {**head, **_about(classes, 0), **options[names[0]], **tail, **results[names[0]]}
  shared = {key: options[names[0]][key] for key in _SHARED if key in options[names[0]]}
  of_each = {}
  for number, name in enumerate(names):
    own = {key: value for key, value in options[name].items() if key not in shared}
    of_each[name] = {**_about(classes, number), **own, **results[name]}
  return {**head, **shared, **tail, CLASSES: of_each}


def _about(classes, number):
  """The mask value and the colour of a class; {} if no config gives its mask values, or it has none."""
  if not classes.are_given or classes.exclusive:
    return {}
  about = {'class': classes.names[0]} if len(classes.names) == 1 else {}
  return about | {
    'value': int(classes.written[1 << number]),
    'mask_values': list(classes.values[number]),
    'colour': list(COLOURS[number]),
  }


def by_class(numbers: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
  """Returns the part of the numbers that holds the results of each class, by its name."""
  return dict(numbers[CLASSES]) if CLASSES in numbers else {numbers.get('class', LESION.names[0]): numbers}


def with_numbers(numbers: Mapping[str, Any], changed: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
  """Returns the numbers with others for some results of the classes, given by their names."""
  if CLASSES not in numbers:
    return {**numbers, **next(iter(changed.values()))}
  return {**numbers, CLASSES: {name: {**own, **changed[name]} for name, own in numbers[CLASSES].items()}}


def classes_of(numbers: Mapping[str, Any]) -> Classes:
  """Returns the classes of numbers, to read a mask: other mask values have no meaning.

  Raises:
    KeyError, TypeError, ValueError: the numbers are damaged.
  """
  of_each = by_class(numbers)
  if CLASSES not in numbers and 'class' not in numbers:
    return LESION
  return Classes(tuple(of_each), tuple(tuple(map(int, each['mask_values'])) for each in of_each.values()), (), ())
