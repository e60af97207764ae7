"""Pictures of slices: `images/` with `masks/` of the same names, or a folder for each class; PNG or JPEG.

That is how COVID-CT, SARS-CoV-2 CT and many others come. Whose each slice is stands in `slices.csv` (name,patient),
where anybody knows. Masks hold 0 and 255, or 0 and 1. Of the classes, the one without lesion is told by its name:
`non...`, `no...`, `normal...`, `healthy...`, `negative...`, at its start or after what is no letter, as in CT_NonCOVID.
"""

import csv
import pathlib
import re
from collections import defaultdict

from data.cohorts import Case, refuse_lonely
from fusa_jax import pictures
from fusa_jax.errors import UserError

_WITHOUT_LESION = re.compile(r'(?<![a-z])(non|no(?![a-z])|normal|healthy|negative)')
_LIST = 'slices.csv'


def recognises(folder: pathlib.Path) -> bool:
  return bool(_has_masks(folder) or _classes(folder))


def find(folder: pathlib.Path) -> list[Case]:
  """A case for each patient of slices.csv; without it, for each slice.

  Raises:
    UserError: pictures without a mask or not in slices.csv, and names in it that are no picture, a line each; classes
      of which none, or all, are without lesion.
  """
  if _has_masks(folder):
    images, masks = _by_stem(folder / 'images'), _by_stem(folder / 'masks')
    refuse_lonely(images, masks, lambda name: f'its mask masks/{name}.png is missing; add it, or take the picture out')
    found = [(path, masks[name], None) for name, path in images.items()]
  else:
    labels = _labels(folder)
    found = [(path, None, label) for name, label in labels.items() for path in _by_stem(folder / name).values()]
  if not (folder / _LIST).exists():
    return [_case(_slice_name(folder, one[0]), [one], named=False) for one in found]
  patients = _patients(folder, [path for path, *_ in found])
  grouped = defaultdict(list)
  for one in found:
    grouped[patients[one[0]]].append(one)
  return [_case(patient, group, named=True) for patient, group in sorted(grouped.items())]


def _case(patient, group, named):
  paths, masks, labels = zip(*group, strict=True)
  if labels[0] is None:
    return Case(patient, paths, masks, values='grey', named=named)
  return Case(patient, paths, None, values='grey', named=named, labels=labels)


def _slice_name(folder, path):
  """Of the file where all lie in one folder; classes have names of their own, and may share their slices'."""
  return path.stem if path.parent == folder / 'images' else f'{path.parent.name}-{path.stem}'


def _has_masks(folder):
  return (folder / 'masks').is_dir() and (folder / 'images').is_dir() and _by_stem(folder / 'images')


def _classes(folder):
  """The names of the folders that hold pictures; there are two or more, or they are no classes."""
  names = [path.name for path in sorted(folder.iterdir()) if path.is_dir() and _by_stem(path)]
  return names if len(names) > 1 else []


def _labels(folder):
  """By name of a class, 1 with lesion or 0 without."""
  labels = {name: int(not _WITHOUT_LESION.search(name.lower())) for name in _classes(folder)}
  if len(set(labels.values())) != 2:
    raise UserError(
      f'{folder}: which of its folders ({", ".join(labels)}) is without lesion is not clear; '
      'give that one a name that begins with non, normal, healthy or negative'
    )
  return labels


def _by_stem(folder):
  """The pictures of a folder by their names without .png or .jpg, sorted.

  Raises:
    UserError: two of one name.
  """
  found = {}
  for path in sorted(folder.iterdir()):
    if pictures.is_picture(path):
      if path.stem in found:
        raise UserError(f'{path}: a second picture of the name {path.stem}; remove one, or rename it')
      found[path.stem] = path
  return found


def _patients(folder, paths):
  """The patient of each path, by slices.csv: its names are file names, with or without ending and class."""
  with (folder / _LIST).open(newline='', encoding='utf-8-sig') as file:
    reader = csv.DictReader(file)
    if not {'name', 'patient'} <= set(reader.fieldnames or ()):
      raise UserError(f'{folder / _LIST}: it has no columns name and patient; give it this first line: name,patient')
    rows = [(str(row['name']).strip(), str(row['patient'] or '').strip()) for row in reader]
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
