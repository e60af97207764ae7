"""Pictures of slices: `images/` with `masks/` of the same names, or a folder for each class; PNG or JPEG.

That is how COVID-CT, SARS-CoV-2 CT and many others come. Whose each slice is stands in `slices.csv` (name,patient),
where anybody knows; a patient's slices are in the order of their names. Masks hold 0 and 255, or 0 and 1. Of the
classes, those without lesion are told by their names, which have one of the words non, no, not, normal, healthy,
negative or control in them, as CT_NonCOVID has.
"""

import csv
import logging
import pathlib
import re
from collections import defaultdict

from data.cohorts import Case, only_folder, refuse_lonely
from fusa_jax.scans import pictures
from fusa_jax.system.errors import UserError

_WITHOUT_LESION = re.compile(r'(?<![a-z])(non(?!specific)|not?(?![a-z])|normal|healthy|negative|control)')
_NO_CLASS = re.compile(r'mask|label|annot|segm')
_LIST = 'slices.csv'


def recognises(folder: pathlib.Path) -> bool:
  return bool(_images_and_masks(folder) or _classes(folder))


def find(folder: pathlib.Path) -> list[Case]:
  """A case for each patient of slices.csv; without it, for each slice.

  Raises:
    UserError: pictures without a mask or not in slices.csv, and names in it that are no picture, a line each; classes
      of which none, or all, are without lesion.
  """
  drawn = _images_and_masks(folder)
  if drawn:
    images, masks = map(_by_stem, drawn)
    refuse_lonely(
      images, masks, lambda name: f'its mask {drawn[1].name}/{name}.png is missing; add it, or take the picture out'
    )
    found = [(path, masks[name], None) for name, path in images.items()]
  else:
    classes = _classes(folder)
    labels = _labels(folder, classes)
    found = [(path, None, labels[name]) for name, inner in classes.items() for path in _by_stem(inner).values()]
  if not (folder / _LIST).exists():
    # Classes may share their slices' names.
    name = lambda path: path.stem if drawn else f'{path.parent.name}-{path.stem}'
    return [_case(name(one[0]), [one], named=False) for one in found]
  patients = _patients(folder, [path for path, *_ in found])
  grouped = defaultdict(list)
  for one in found:
    grouped[patients[one[0]]].append(one)
  return [_case(patient, group, named=True) for patient, group in sorted(grouped.items())]


def _case(patient, group, named):
  paths, masks, labels = zip(*group, strict=True)
  if labels[0] is None:
    return Case(patient, paths, masks, intensity='grey', named=named)
  return Case(patient, paths, None, intensity='grey', named=named, labels=labels)


def _images_and_masks(folder):
  """The folders of the two, whatever their case and number; None where there are no such."""
  by_name = {path.name.lower().removesuffix('s'): path for path in folder.iterdir() if path.is_dir()}
  if not {'image', 'mask'} <= by_name.keys() or not _by_stem(by_name['image']):
    return None
  return by_name['image'], by_name['mask']


def _classes(folder):
  """By name, the folders that hold pictures, also in one folder more; there are two or more, or they are no classes."""
  inner = {path.name: only_folder(path) for path in sorted(folder.iterdir()) if path.is_dir()}
  found = {name: path for name, path in inner.items() if _by_stem(path)}
  return found if len(found) > 1 else {}


def _labels(folder, classes):
  """By name of a class, 1 with lesion or 0 without; says which is which."""
  odd = [name for name in classes if _NO_CLASS.search(name.lower())]
  if odd:
    raise UserError(
      f'{folder / odd[0]}: pictures that are no class of slices; call the folders of slices and of their masks images '
      'and masks, or take it out'
    )
  words = {name: re.sub(r'(?<=[A-Za-z])(?=[A-Z][a-z])|(?<=[a-z])(?=[A-Z])', ' ', name).lower() for name in classes}
  labels = {name: int(not _WITHOUT_LESION.search(text)) for name, text in words.items()}
  logging.info(
    '%s: with lesion: %s; without: %s',
    folder,
    *(', '.join(name for name in labels if labels[name] == label) or 'none' for label in (1, 0)),
  )
  if len(set(labels.values())) != 2:
    raise UserError(
      f'{folder}: which of its folders ({", ".join(labels)}) is without lesion is not clear; '
      'give that one a name that begins with non, normal, healthy or negative, and no other'
    )
  return labels


def _by_stem(folder):
  """The pictures of a folder by their names without .png or .jpg, in the order of people: 2 before 10.

  Raises:
    UserError: two of one name.
  """
  found = {}
  natural = lambda path: [int(part) if part.isdigit() else part for part in re.split(r'(\d+)', path.name)]
  for path in sorted(folder.iterdir(), key=natural):
    if pictures.is_picture_file(path):
      if path.stem in found:
        raise UserError(f'{path}: a second picture of the name {path.stem}; remove one, or rename it')
      found[path.stem] = path
  return found


def _patients(folder, paths):
  """The patient of each path, by slices.csv: its names are file names, with or without ending and class."""
  try:
    with (folder / _LIST).open(newline='', encoding='utf-8-sig') as file:
      reader = csv.DictReader(file)
      if not {'name', 'patient'} <= set(reader.fieldnames or ()):
        raise UserError(f'{folder / _LIST}: no columns name and patient; separate by commas, first line name,patient')
      rows = [(str(row['name']).strip(), str(row['patient'] or '').strip()) for row in reader]
  except (UnicodeDecodeError, csv.Error) as error:
    raise UserError(f'{folder / _LIST}: no CSV in UTF-8 ({error}); save it as such, with commas') from None
  known = defaultdict(list)
  for path in paths:
    for name in {path.name, path.stem, f'{path.parent.name}/{path.name}', f'{path.parent.name}/{path.stem}'}:
      known[name].append(path)
  patients, errors = {}, []
  for line, (name, patient) in enumerate(rows, start=2):
    where = f'{folder / _LIST}: line {line}: '
    if len(known[name]) != 1:
      count = 'no picture' if not known[name] else f'{len(known[name])} pictures'
      errors.append(f'{where}{count} of the name {name!r}; correct it, with its folder where two have the name')
    elif not patient:
      errors.append(f'{where}{name!r} has no patient; add the patient, or take the picture out')
    elif patients.setdefault(known[name][0], patient) != patient:
      errors.append(f'{where}{name!r} has another patient above; correct one of the two')
  errors += [
    f'{path}: it is not in {_LIST}; add it with its patient, or take it out' for path in paths if path not in patients
  ]
  if errors:
    raise UserError('\n'.join(errors))
  return patients
