"""Pictures of slices in PNG or JPEG: `images/` with `masks/` of the same names, or one folder per class.

COVID-CT, SARS-CoV-2 CT and many others have this layout. If patients are known, `slices.csv` (name,patient) maps each
slice to its patient. The slices of a patient are sorted by name. Masks have the values 0 and 255, or 0 and 1. The name
of a class without lesion contains non, no, not, normal, healthy, negative or control, for example CT_NonCOVID.
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
  """One case per patient in slices.csv; without slices.csv, one case per slice.

  Raises:
    UserError: a picture has no mask or is not in slices.csv, or a name in it has no picture, one line each; all classes
      are with lesion, or all without.
  """
  drawn = _images_and_masks(folder)
  if drawn:
    images, masks = map(_by_stem, drawn)
    refuse_lonely(
      images, masks, lambda name: f'the mask {drawn[1].name}/{name}.png is missing; add it, or remove the picture'
    )
    entries = [(path, masks[name], None) for name, path in images.items()]
  else:
    classes = _classes(folder)
    labels = _labels(folder, classes)
    entries = [(path, None, labels[name]) for name, inner in classes.items() for path in _by_stem(inner).values()]
  if not (folder / _LIST).exists():
    # Slices of two classes may have the same name.
    name = lambda path: path.stem if drawn else f'{path.parent.name}-{path.stem}'
    return [_case(name(one[0]), [one], named=False) for one in entries]
  patients = _patients(folder, [path for path, *_ in entries])
  grouped = defaultdict(list)
  for one in entries:
    grouped[patients[one[0]]].append(one)
  return [_case(patient, group, named=True) for patient, group in sorted(grouped.items())]


def _case(patient, group, named):
  paths, masks, labels = zip(*group, strict=True)
  if labels[0] is None:
    return Case(patient, paths, masks, intensity='grey', named=named)
  return Case(patient, paths, None, intensity='grey', named=named, labels=labels)


def _images_and_masks(folder):
  """The folders of images and masks (also image, Masks, ...); None if one is missing or has no images."""
  by_name = {path.name.lower().removesuffix('s'): path for path in folder.iterdir() if path.is_dir()}
  if not {'image', 'mask'} <= by_name.keys() or not _by_stem(by_name['image']):
    return None
  return by_name['image'], by_name['mask']


def _classes(folder):
  """The folders of pictures by class name; a class may have its pictures in an inner folder. {} if fewer than two."""
  inner = {path.name: only_folder(path) for path in sorted(folder.iterdir()) if path.is_dir()}
  classes = {name: path for name, path in inner.items() if _by_stem(path)}
  return classes if len(classes) > 1 else {}


def _labels(folder, classes):
  """The label of each class: 1 with lesion or 0 without. Logs the result."""
  odd = [name for name in classes if _NO_CLASS.search(name.lower())]
  if odd:
    raise UserError(
      f'{folder / odd[0]}: looks like a folder of masks, not a class of slices; rename it to masks and the folder of '
      'slices to images, or remove it'
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
      f'{folder}: cannot tell which folder ({", ".join(labels)}) is without lesion; '
      'only its name must begin with non, normal, healthy or negative'
    )
  return labels


def _by_stem(folder):
  """The pictures of a folder by their names without .png or .jpg, in natural order (2 before 10).

  Raises:
    UserError: two pictures have the same name.
  """
  by_stem = {}
  natural = lambda path: [int(part) if part.isdigit() else part for part in re.split(r'(\d+)', path.name)]
  for path in sorted(folder.iterdir(), key=natural):
    if pictures.is_picture_file(path):
      if path.stem in by_stem:
        raise UserError(f'{path}: a second picture with the name {path.stem}; remove one, or rename it')
      by_stem[path.stem] = path
  return by_stem


def _patients(folder, paths):
  """The patient of each path, from slices.csv. Its names are file names, with or without ending and class folder."""
  try:
    with (folder / _LIST).open(newline='', encoding='utf-8-sig') as file:
      reader = csv.DictReader(file)
      if not {'name', 'patient'} <= set(reader.fieldnames or ()):
        raise UserError(f'{folder / _LIST}: no columns name and patient; use commas, with name,patient as first line')
      rows = [(str(row['name']).strip(), str(row['patient'] or '').strip()) for row in reader]
  except (UnicodeDecodeError, csv.Error) as error:
    raise UserError(f'{folder / _LIST}: not a CSV file in UTF-8 ({error}); save it in UTF-8, with commas') from None
  known = defaultdict(list)
  for path in paths:
    for name in {path.name, path.stem, f'{path.parent.name}/{path.name}', f'{path.parent.name}/{path.stem}'}:
      known[name].append(path)
  patients, errors = {}, []
  for line, (name, patient) in enumerate(rows, start=2):
    where = f'{folder / _LIST}: line {line}: '
    if len(known[name]) != 1:
      count = 'no picture' if not known[name] else f'{len(known[name])} pictures'
      errors.append(f'{where}{count} with the name {name!r}; correct it, and add the folder if two pictures share it')
    elif not patient:
      errors.append(f'{where}{name!r} has no patient; add the patient, or remove the picture')
    elif patients.setdefault(known[name][0], patient) != patient:
      errors.append(f'{where}{name!r} has another patient in a line above; correct one of the two')
  errors += [
    f'{path}: is not in {_LIST}; add it with its patient, or remove it' for path in paths if path not in patients
  ]
  if errors:
    raise UserError('\n'.join(errors))
  return patients
