"""Pictures of slices in PNG or JPEG: `images/` with `masks/` of the same names, or one folder per class.

COVID-CT, SARS-CoV-2 CT and many others have this layout. In place of folders, `labels.csv` (name,class) may give the
class of each picture. If patients are known, `slices.csv` (name,patient) maps each slice to its patient. The slices of
a patient are sorted by name. Masks have the values 0 and 255, or 0 and 1. The name of a class without lesion contains
non, no, not, normal, healthy, negative or control, for example CT_NonCOVID.
"""

import pathlib
import re
from collections import defaultdict
from collections.abc import Sequence

from data.cohorts import Case, entries, entry, labels, lists, name_of, only_folder, refuse
from fusa_jax.scans import pictures
from fusa_jax.system.errors import UserError

LIST = 'slices.csv'
LABELS = 'labels.csv'
_COLUMNS = ('name', 'class')

_NO_CLASS = re.compile(r'mask|label|annot|segm')
_PARTS = re.compile(r'train(ing)?|test(ing)?|val(id|idation)?')


def recognises(folder: pathlib.Path) -> bool:
  return bool(_images_and_masks(folder) or _classes(folder) or _listed(folder))


def find(folder: pathlib.Path, named: Sequence | str = ()) -> list[Case]:
  """One case per patient in slices.csv; without slices.csv, one case per slice.

  Args:
    folder: the folder of the cohort.
    named: the value of data.classes, for classes of slices (`labels.meaning`).

  Raises:
    UserError: a picture has no mask or is not in a list, or a mask or a name in a list has no picture, or two classes,
      one line each; as `labels.meaning`.
  """
  drawn, folders, classes = _images_and_masks(folder), {}, None
  if drawn:
    images, masks = map(_by_stem, drawn)
    lines = _lonely(images, masks, drawn[1], 'mask', 'picture')
    refuse(lines + _lonely(masks, images, drawn[0], 'picture', 'mask'))
    found = [(path, masks[name], None) for name, path in images.items()]
  else:
    folders = _classes(folder)
    names = _names_of_folders(folder, folders) if folders else _listed_names(folder)
    where, kind = (folder, 'folder') if folders else (entry(folder, LABELS), 'class')
    advice = (
      f'{kind} ({", ".join(dict.fromkeys(names.values()))}) is without lesion; only its name must begin with non, '
      'normal, healthy or negative'
    )
    classes, label = labels.meaning(names.values(), named, where, 'slices', advice)
    found = [(path, None, label[name]) for path, name in names.items()]
  if entry(folder, LIST):
    cases = [_case(patient, group, named=True) for patient, group in _by_patient(folder, found)]
  else:
    # Slices of two folders may have the same name.
    name = lambda path: name_of(f'{path.parent.name}-{path.stem}' if folders else path.stem)
    cases = [_case(name(one[0]), [one], named=False) for one in found]
  return [case._replace(classes=classes) for case in cases] if classes else cases


def has_masks(folder: pathlib.Path) -> bool:
  return bool(_images_and_masks(folder))


def has_pictures(folder: pathlib.Path) -> bool:
  """Whether there are pictures without masks and without folders of classes."""
  return bool(_places(folder)) and not _images_and_masks(folder) and not _classes(folder)


def of_patients(folder: pathlib.Path) -> list[Case]:
  """One case per patient in slices.csv, without labels: `patient_labels` adds those of the patients.

  Raises:
    UserError: slices.csv is missing. Or, one line each: it lacks a picture, or names one that does not exist.
  """
  if entry(folder, LIST) is None:
    raise UserError(
      f'{folder / LABELS}: has classes of patients; add {LIST} (name,patient) with the patient of each picture'
    )
  groups = _by_patient(folder, [(path,) for path in _beside_list(folder).values()])
  return [Case(patient, tuple(path for (path,) in group), None, intensity='grey') for patient, group in groups]


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


def _names_of_folders(folder, classes):
  """The name of the class of each picture, by its path, for the result of `_classes`."""
  odd = [name for name in classes if _NO_CLASS.search(name.lower())]
  if odd:
    raise UserError(
      f'{folder / odd[0]}: looks like a folder of masks, not a class of slices; rename it to masks and the folder of '
      'slices to images, or remove it'
    )
  parts = [name for name in classes if _PARTS.fullmatch(name.lower())]
  if parts:
    raise UserError(
      f'{folder / parts[0]}: looks like a part of a split, not a class of slices; put the slices of all parts into one '
      'folder per class'
    )
  return {path: name for name, inner in classes.items() for path in _by_stem(inner).values()}


def _listed(folder):
  """The pictures beside `labels.csv`, or in the folder `images` beside it, by name; {} if the list has other columns.

  Folders of classes, and masks, are tested before.
  """
  path = entry(folder, LABELS)
  if path is None or not path.is_file() or not _places(folder) or not lists.has_columns(path, _COLUMNS):
    return {}
  return _beside_list(folder)


def _places(folder):
  """The folders that may hold the pictures of a list, and do: its own, and the folder `images` in it."""
  inner = [one for one in entries(folder) if one.is_dir() and _is_named(one, 'image')]
  return [place for place in (folder, *inner) if any(map(pictures.is_picture_file, entries(place)))]


def _beside_list(folder):
  """The pictures of a list, by name."""
  places = _places(folder)
  if len(places) > 1:
    raise UserError(f'{folder}: has pictures, and so has {places[1].name}; put all of them into one of the two')
  return _by_stem(places[0])


def _listed_names(folder):
  """The name of the class of each picture in `labels.csv`, by its path."""
  path, classes, lines = entry(folder, LABELS), {}, []
  found = list(_listed(folder).values())
  known = {listed: one for one in found for listed in (name_of(one.name), name_of(one.stem))}
  for line, (name, of_name) in lists.read(path, _COLUMNS):
    where, picture = f'{path}: line {line}: ', known.get(name.replace('\\', '/').removeprefix('images/'))
    if picture is None:
      lines.append(f'{where}no picture with the name {name!r}; correct the name, or remove the line')
    elif not of_name:
      lines.append(f'{where}{name!r} has no class; add it, or remove the picture')
    elif classes.setdefault(picture, of_name) != of_name:
      lines.append(
        f'{where}{name!r} has the class {of_name!r}, but {classes[picture]!r} in a line above; correct one of the two'
      )
  refuse(
    lines
    + [f'{one}: is not in {path.name}; add it with its class, or remove it' for one in found if one not in classes]
  )
  return {one: classes[one] for one in found}


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


def _by_patient(folder, found):
  """The patients in slices.csv, sorted, each with its items of `found`, which begin with the path of a picture."""
  patients, grouped = _patients(folder, [path for path, *_ in found]), defaultdict(list)
  for one in found:
    grouped[patients[one[0]]].append(one)
  return sorted(grouped.items())


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
