"""Pictures of slices in PNG or JPEG: `images/` with `masks/` of the same names, or one folder per class.

COVID-CT, SARS-CoV-2 CT and many others have this layout. If patients are known, `slices.csv` (name,patient) maps each
slice to its patient. The slices of a patient are sorted by name. Masks have the values 0 and 255, or 0 and 1. The name
of a class without lesion contains non, no, not, normal, healthy, negative or control, for example CT_NonCOVID.
"""

import logging
import pathlib
import re
from collections import defaultdict

from data.cohorts import Case, entries, entry, lists, name_of, only_folder, refuse
from fusa_jax.scans import pictures
from fusa_jax.system.errors import UserError

LIST = 'slices.csv'

_WITHOUT_LESION = re.compile(r'(?<![a-z])(non(?!specific)|not?(?![a-z])|normal|healthy|negative|control)')
_NO_CLASS = re.compile(r'mask|label|annot|segm')


def recognises(folder: pathlib.Path) -> bool:
  return bool(_images_and_masks(folder) or _classes(folder))


def find(folder: pathlib.Path) -> list[Case]:
  """One case per patient in slices.csv; without slices.csv, one case per slice.

  Raises:
    UserError: a picture has no mask or is not in slices.csv, or a mask or a name in slices.csv has no picture, one line
      each; all classes are with lesion, or all without.
  """
  drawn = _images_and_masks(folder)
  if drawn:
    images, masks = map(_by_stem, drawn)
    lines = _lonely(images, masks, drawn[1], 'mask', 'picture')
    refuse(lines + _lonely(masks, images, drawn[0], 'picture', 'mask'))
    found = [(path, masks[name], None) for name, path in images.items()]
  else:
    classes = _classes(folder)
    labels = _labels(folder, classes)
    found = [(path, None, labels[name]) for name, inner in classes.items() for path in _by_stem(inner).values()]
  if not entry(folder, LIST):
    # Slices of two classes may have the same name.
    name = lambda path: name_of(path.stem if drawn else f'{path.parent.name}-{path.stem}')
    return [_case(name(one[0]), [one], named=False) for one in found]
  patients = _patients(folder, [path for path, *_ in found])
  grouped = defaultdict(list)
  for one in found:
    grouped[patients[one[0]]].append(one)
  return [_case(patient, group, named=True) for patient, group in sorted(grouped.items())]


def has_masks(folder: pathlib.Path) -> bool:
  return bool(_images_and_masks(folder))


def is_without_lesion(name: str) -> bool:
  """Whether the name of a class says that it is without lesion, for example CT_NonCOVID or healthy."""
  words = re.sub(r'(?<=[A-Za-z])(?=[A-Z][a-z])|(?<=[a-z])(?=[A-Z])', ' ', name).lower()
  return bool(_WITHOUT_LESION.search(words))


def _lonely(paths, partners, folder, kind, own):
  """A line for each picture without a partner in a folder. It names a partner of a format that cannot be read."""
  others = {name_of(path.stem): path.name for path in entries(folder)}
  seen = {name: f' ({others[name]} has another format)' if name in others else '' for name in paths}
  return [
    f'{path}: the {kind} {folder.name}/{name}.png is missing{seen[name]}; add it, or remove the {own}'
    for name, path in paths.items()
    if name not in partners
  ]


def _case(patient, group, named):
  paths, masks, labels = zip(*group, strict=True)
  if labels[0] is None:
    return Case(patient, paths, masks, intensity='grey', named=named)
  return Case(patient, paths, None, intensity='grey', named=named, labels=labels)


def _images_and_masks(folder):
  """The folders of images and masks (also image, Masks, ...); None if one is missing or has no images."""
  folders = [
    [path for path in entries(folder) if _is_named(path, name) and path.is_dir()] for name in ('image', 'mask')
  ]
  if not all(folders) or not any(map(pictures.is_picture_file, entries(folders[0][0]))):
    return None
  refuse(
    [f'{path}: the same name as {first.name}; remove one of the two' for first, *others in folders for path in others]
  )
  return folders[0][0], folders[1][0]


def _is_named(path, name):
  return path.name.lower() in (name, f'{name}s')


def _classes(folder):
  """The folders of pictures by class name; a class may have its pictures in an inner folder. {} if fewer than two."""
  inner = {name_of(path.name): only_folder(path) for path in entries(folder) if path.is_dir()}
  classes = {name: path for name, path in inner.items() if any(map(pictures.is_picture_file, entries(path)))}
  return classes if len(classes) > 1 else {}


def _labels(folder, classes):
  """The label of each class: 1 with lesion or 0 without. Logs the result."""
  odd = [name for name in classes if _NO_CLASS.search(name.lower())]
  if odd:
    raise UserError(
      f'{folder / odd[0]}: looks like a folder of masks, not a class of slices; rename it to masks and the folder of '
      'slices to images, or remove it'
    )
  labels = {name: int(not is_without_lesion(name)) for name in classes}
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
    UserError: pictures have the same name, one line each.
  """
  by_stem, lines = {}, []
  natural = lambda path: [int(part) if part.isdecimal() else part for part in re.split(r'(\d+)', path.name)]
  for path in sorted(entries(folder), key=natural):
    if pictures.is_picture_file(path):
      name = name_of(path.stem)
      if name in by_stem:
        lines.append(f'{path}: a second picture with the name {name}; remove one, or rename it')
      by_stem[name] = path
  refuse(lines)
  return by_stem


def _patients(folder, paths):
  """The patient of each path, from slices.csv. Its names are file names, with or without ending and class folder."""
  rows = lists.read(entry(folder, LIST), ('name', 'patient'))
  known = defaultdict(list)
  for path in paths:
    name, stem, inside = name_of(path.name), name_of(path.stem), name_of(path.parent.name)
    for listed in {name, stem, f'{inside}/{name}', f'{inside}/{stem}'}:
      known[listed].append(path)
  patients, lines = {}, []
  for line, (name, patient) in rows:
    name = name.replace('\\', '/')
    where = f'{folder / LIST}: line {line}: '
    if len(known[name]) != 1:
      count = 'no picture' if not known[name] else f'{len(known[name])} pictures'
      lines.append(f'{where}{count} with the name {name!r}; correct it, and add the folder if two pictures share it')
    elif not patient:
      lines.append(f'{where}{name!r} has no patient; add the patient, or remove the picture')
    elif patients.setdefault(known[name][0], patient) != patient:
      lines.append(f'{where}{name!r} has another patient in a line above; correct one of the two')
  refuse(
    lines
    + [f'{path}: is not in {LIST}; add it with its patient, or remove it' for path in paths if path not in patients]
  )
  return patients
