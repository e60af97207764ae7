"""Classes of lesions: their names, the mask values that belong to each, and masks that hold several of them.

From the readers on, a mask is a field of bits, uint8: bit k is set where class k is, so classes may overlap. With one
class it is 1 for lesion and 0 for background. Where nobody knows the truth, only `IGNORED` is set.

Slices may have exclusive classes in place of masks: each slice belongs to exactly one. The truth of a slice is then the
bit of its class.
"""

import pathlib
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from fusa_jax.system.errors import UserError

# The bit of pixels that training and scores leave out. The bits below it are those of classes.
IGNORED = 1 << 7
MOST = 7
# The name of values that belong to no class, in data.classes.
BACKGROUND = 'background'
# The colours of the classes, in this order, which colour-blind people can tell apart: those of Okabe and Ito, without
# black. The first is a lighter orange than theirs, which stands out from grey.
COLOURS = (
  (255, 176, 0),
  (86, 180, 233),
  (204, 121, 167),
  (0, 158, 115),
  (213, 94, 0),
  (0, 114, 178),
  (240, 228, 66),
)
# The folders in the folder of a test, where each class has a folder: of pictures, and of comparisons (`against-...`).
_RESERVED = re.compile('figures|against-.*')
# The longest name, in characters: that of a segment in DICOM (SegmentLabel). And in bytes, as it is in names of files:
# all but rare characters have at most three. It leaves 35 bytes for the name of a scan in the longest name of a result.
_LONGEST = 64
_LONGEST_IN_FILES = 3 * _LONGEST


class Keys(NamedTuple):
  """What a user sets the classes with: config keys or flags. Messages name them.

  Attributes:
    classes: mask values by the name of the class.
    ignored: the mask value of pixels that are left out.
  """

  classes: str = 'data.classes'
  ignored: str = 'data.ignore_label'

  @property
  def example(self) -> str:
    """A valid value of `classes`, as it is typed."""
    typed = self.classes if self.classes.startswith('-') else f'--config.{self.classes}'
    return f"for example {typed}=\"{{'ground glass': (1,), 'consolidation': (2,)}}\""


KEYS = Keys()
# The value of data.classes that stands for the classes of the cohort.
AUTO = 'auto'
# The most exclusive classes: the bits of a slice are an int32 on the devices.
MOST_EXCLUSIVE = 30


class Classes(NamedTuple):
  """The classes of the masks of a cohort.

  Attributes:
    names: their names.
    values: for each class, the mask values (of DICOM SEG: the segment numbers) that belong to it. A value may belong to
      several classes. ((),) is one class in masks with 0 and one other value.
    ignored: the mask values of pixels that are left out.
    background: the mask values of no class. None: all others, without an error.
    keys: where the user gave them, for messages.
    exclusive: whether these are exclusive classes of slices. They have no mask values.
    meanings: what the source of the masks calls each value, if it says so, for messages.
  """

  names: tuple[str, ...] = ('lesion',)
  values: tuple[tuple[int, ...], ...] = ((),)
  ignored: tuple[int, ...] = ()
  background: tuple[int, ...] | None = None
  keys: Keys = KEYS
  exclusive: bool = False
  meanings: tuple[tuple[int, str], ...] = ()

  @property
  def is_binary(self) -> bool:
    """Whether masks have 0 and one other value, whichever it is."""
    return self.values == ((),)

  @property
  def are_given(self) -> bool:
    """Whether data.classes names them. Masks are then written with its values; otherwise with 1."""
    return self.background is not None

  @property
  def written(self) -> np.ndarray:
    """The value of a pixel in a written mask, by the bits of the pixel: whole numbers [2 ** classes].

    It is the lowest value that belongs to exactly the classes of the pixel. If there is none, it is the lowest value of
    the last of these classes, in the order of `names`: a mask file then cannot show all classes of the pixel.
    """
    if self.is_binary:
      return np.array([0, 1], np.uint8)
    lowest = {}
    for value in sorted(self.known, reverse=True):
      lowest[int(self.bits(np.array(value)))] = value
    last = lambda bits: min(self.values[bits.bit_length() - 1])
    table = [0, *(lowest.get(bits) or last(bits) for bits in range(1, 1 << len(self.names)))]
    return np.array(table, np.min_scalar_type(max(table)))

  @property
  def key(self) -> str:
    """The config key that gives the mask values."""
    return 'data.lesion_labels' if self.background is None else self.keys.classes

  @property
  def known(self) -> set[int]:
    """The mask values that have a meaning, without 0."""
    return {*(value for each in self.values for value in each), *self.ignored, *(self.background or ())}

  def bits(self, labels: np.ndarray) -> np.ndarray:
    """Converts mask values to bits: whole numbers [...] -> uint8 [...]. Not for `is_binary`."""
    found = np.zeros(labels.shape, np.uint8)
    for number, values in enumerate(self.values):
      found |= np.isin(labels, values).astype(np.uint8) << np.uint8(number)
    if self.ignored:
      found |= np.isin(labels, self.ignored).astype(np.uint8) * np.uint8(IGNORED)
    return found

  def labels(self, bits: np.ndarray) -> np.ndarray:
    """Converts bits to the mask values that are written (`written`): uint8 [...] -> whole numbers [...]."""
    return bits if self.is_binary else self.written[bits]

  def shown(self, bits: np.ndarray) -> list[int]:
    """The number of pixels of each class in the written mask of these bits [...]. It differs where `written` does."""
    counts = np.bincount(bits.ravel(), minlength=1 << len(self.names))
    of_file = self.bits(self.written)
    return [int(counts[of_class(of_file, number) > 0].sum()) for number in range(len(self.names))]

  def of_value(self, value: int) -> list[int]:
    """The numbers of the classes that a mask value belongs to."""
    bits = int(self.bits(np.array(value)))
    return [number for number in range(len(self.names)) if bits >> number & 1]

  @property
  def listed_meanings(self) -> str:
    """The values and what their source calls them: `1 ground glass, 2 consolidation`."""
    return ', '.join(f'{value} {meaning}' for value, meaning in self.meanings)

  def check(self, path: pathlib.Path | str, values: Iterable[int]) -> None:
    """Raises a UserError if the mask values of a file include one of no class, unless others are background."""
    unknown = [] if self.background is None else sorted(set(values) - self.known - {0})
    if unknown:
      meaning = dict(self.meanings).get(unknown[0])
      value = f'{unknown[0]} ({meaning})' if meaning else unknown[0]
      raise UserError(
        f'{path}: the mask value {value} belongs to no class of {self.keys.classes}; add it to a class, to '
        f"'{BACKGROUND}', or give it as {self.keys.ignored}"
      )


LESION = Classes()


def of_lesion(labels: Sequence[int]) -> Classes:
  """Returns the one class `lesion` with these mask values; () is any mask with one value besides 0."""
  return Classes(values=(tuple(map(int, labels)),))


def as_pairs(named: Mapping[str, Sequence[int]] | Sequence) -> tuple[tuple[str, tuple[int, ...]], ...]:
  """Returns data.classes as pairs of a name and mask values, in their order: JSON has no tuples and keeps no types.

  Raises:
    TypeError, ValueError: these are not names with values.
  """
  pairs = [*(named.items() if isinstance(named, Mapping) else named)]
  if any(isinstance(pair, str) for pair in pairs):  # of two letters, it would be a name and a value
    raise TypeError('names without values')
  pairs = [(name, tuple(values)) for name, values in pairs]
  return tuple((name, tuple(int(each) if _is_value(each) else each for each in values)) for name, values in pairs)


def chosen(named: Mapping[str, Sequence[int]] | Sequence, ignored: int | None, keys: Keys = KEYS) -> Classes:
  """Returns the classes of data.classes and data.ignore_label.

  Args:
    named: mask values by the name of the class, as a mapping or as pairs. The name `background` is for values of no
      class.
    ignored: the mask value of pixels to leave out, or None.
    keys: where the user gave them, for messages.

  Raises:
    UserError: there is no class, or there are too many; a name does not fit into a file name; two classes would have
      the same file names; a class has no value, or the same values as another; a value is not a whole number above 0;
      the ignored value belongs to a class.
  """
  key, example = keys.classes, keys.example
  try:
    pairs = as_pairs(named)
  except (TypeError, ValueError):
    raise UserError(f'{key}: {named!r} are not mask values by name; give {example}') from None
  names = [name for name, _ in pairs]
  for name, values in pairs:
    if not isinstance(name, str) or not name.strip() or not all(map(_is_value, values)) or not values:
      raise UserError(
        f'{key}: {name!r} has {values!r}, but needs a name and values (whole numbers above 0); give {example}'
      )
    if names.count(name) > 1:
      raise UserError(f'{key}: {name!r} is given twice; give each class once')
  of_class = {name: tuple(sorted(set(values))) for name, values in pairs if name != BACKGROUND}
  background = dict(pairs).get(BACKGROUND, ())
  if not 1 <= len(of_class) <= MOST:
    raise UserError(f'{key}: there are {len(of_class)} classes, but there must be 1 to {MOST}; {example}')
  _check_names(tuple(of_class), key)
  for name, values in of_class.items():
    same = next((other for other, theirs in of_class.items() if other != name and theirs == values), None)
    if same:
      raise UserError(f'{key}: {name!r} and {same!r} have the same mask values; leave one out')
    if set(values) & set(background):
      raise UserError(f'{key}: {name!r} and background share mask values; leave them out of one')
    if ignored in values:
      raise UserError(f'{keys.ignored}: {ignored} belongs to the class {name!r}; leave it out of one')
  if ignored is not None and (not _is_value(ignored) or ignored in background):
    raise UserError(f'{keys.ignored}: {ignored!r} must be a whole number above 0 that is not background')
  left_out = () if ignored is None else (int(ignored),)
  return Classes(tuple(of_class), tuple(of_class.values()), left_out, background, keys)


def check_keys(named: Mapping[str, Sequence[int]] | Sequence, ignored: int | None, lesion_labels: Sequence) -> None:
  """Checks the keys data.classes, data.ignore_label and data.lesion_labels, of which the last may be wrong itself.

  Raises:
    UserError: as `chosen`; two keys name mask values, or the value to leave out lacks classes.
  """
  if are_names(named):
    of_slices(named)
  elif have_values(named):
    chosen(named, ignored)
    if lesion_labels:
      raise UserError('data.classes and data.lesion_labels: both name mask values; give data.classes only')
  if ignored is not None and not have_values(named):
    raise UserError(
      'data.ignore_label: needs data.classes with mask values, for example --config.data.classes="{\'lesion\': (1,)}"'
    )


def _check_names(names, key):
  by_file = {BACKGROUND: BACKGROUND}
  for name in names:
    in_files = file_name(name)
    is_too_long = len(name) > _LONGEST or len(in_files.encode()) > _LONGEST_IN_FILES
    if is_too_long or not name.isprintable() or not in_files[0].isalnum():
      raise UserError(
        f'{key}: {name!r} is not a name for files; begin it with a letter or digit, and use at most {_LONGEST} '
        f'characters and {_LONGEST_IN_FILES} bytes'
      )
    other = by_file.setdefault(in_files, name)
    if _RESERVED.fullmatch(in_files):
      raise UserError(f'{key}: {name!r} is the name of another folder of a test ({in_files}); rename the class')
    if other != name:
      raise UserError(f'{key}: {other!r} and {name!r} would have the same files ({in_files}); rename one of the two')


def file_name(name: str) -> str:
  """The name of a class in the names of files: `Ground glass (left)` is `ground_glass_left_`."""
  return re.sub(r'(?:[^\w-]|_)+', '_', unicodedata.normalize('NFC', name).lower())


def are_names(named: object) -> bool:
  """Whether a value of data.classes names exclusive classes of slices, without mask values."""
  return isinstance(named, list | tuple) and len(named) > 0 and all(isinstance(name, str) for name in named)


def have_values(named: object) -> bool:
  """Whether a value of data.classes names classes of masks, with their mask values."""
  return bool(named) and named != AUTO and not are_names(named)


def of_slices(names: Sequence[str]) -> Classes:
  """Returns exclusive classes of slices with these names, in this order.

  Raises:
    UserError: there are fewer than two or too many; a name is empty, given twice, or not one for files; two names
      differ only in capitals and blanks, or would have the same files.
  """
  if not 2 <= len(names) <= MOST_EXCLUSIVE:
    raise UserError(
      f'data.classes: there are {len(names)} classes of slices ({", ".join(names)}), but there must be 2 to '
      f'{MOST_EXCLUSIVE}'
    )
  alike = {}
  for name in names:
    if not name.strip():
      raise UserError('data.classes: a class has an empty name; give each class a name')
    first = alike.setdefault(''.join(name.lower().split()), name)
    if names.count(name) > 1:
      raise UserError(f'data.classes: {name!r} is given twice; give each class once')
    if first != name:
      raise UserError(f'data.classes: {first!r} and {name!r} differ only in capitals or blanks; use one of them')
  _check_names(names, KEYS.classes)
  return Classes(tuple(names), ((),) * len(names), background=(), exclusive=True)


def _is_value(value):
  is_number = isinstance(value, int | float) and not isinstance(value, bool)
  return is_number and 0 < value < 2**31 and value == int(value)


def of_class(mask: np.ndarray, number: int) -> np.ndarray:
  """Returns the mask of class `number`: bits [...] -> uint8 {0, 1} [...]."""
  return (mask >> np.uint8(number)) & np.uint8(1)


def is_ignored(mask: np.ndarray) -> np.ndarray:
  """Returns where nobody knows the truth: bits [...] -> bool [...]."""
  return (mask & np.uint8(IGNORED)) > 0


def of_any(mask: np.ndarray) -> np.ndarray:
  """Returns where any class is: bits [...] -> bool [...]."""
  return (mask & np.uint8(IGNORED - 1)) > 0


def together(masks: Iterable[np.ndarray]) -> np.ndarray:
  """Returns the bits of masks, one per class in their order: uint8 {0, 1} [...] each -> uint8 [...]."""
  bits = 0
  for number, mask in enumerate(masks):
    bits = bits | (mask << np.uint8(number))
  return bits


def label_file(classes: Classes) -> str:
  """Returns the label description of ITK-SNAP for written masks: a line per mask value of a class.

  A value of several classes has the colour of the last one.
  """
  lines = [*_FIRST_LABELS]
  for value in sorted({value for values in classes.values for value in values}):
    numbers = classes.of_value(value)
    lines.append(_label(value, COLOURS[numbers[-1]], 1, ' + '.join(classes.names[number] for number in numbers)))
  return '\n'.join(lines) + '\n'


def labels_in(description: str) -> dict[int, str] | None:
  """Returns the values and names in a text of `label_file`, for any classes; None if it is another text."""
  *first, last = description.split('\n')
  if tuple(first[:2]) != _FIRST_LABELS or last:
    return None
  labels = {}
  for line in first[2:]:
    found = re.fullmatch(r' *(\d{1,10}) .*"(.*)"', line)
    if not found or line not in {_label(int(found[1]), colour, 1, found[2]) for colour in COLOURS}:
      return None
    labels[int(found[1])] = found[2]
  return labels


def _label(value, colour, is_shown, name):
  name = ' '.join(name.replace('"', "'").split())
  return f'{value:5} {colour[0]:5} {colour[1]:4} {colour[2]:4} {is_shown:8} {is_shown:2} {is_shown:2}    "{name}"'


# The first lines of each label description.
_FIRST_LABELS = (
  '# Label description of ITK-SNAP: index, red, green, blue, opacity, visible in slices, visible in 3D, name',
  _label(0, (0, 0, 0), 0, 'Clear Label'),
)
