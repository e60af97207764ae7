"""Folders with a `dataset.json` that lists the training cases: Medical Segmentation Decathlon, MONAI, nnU-Net 1.

It contains `"training": [{"image": "./imagesTr/X.nii.gz", "label": "./labelsTr/X.nii.gz"}, ...]`. Paths are relative to
the folder. `"labels"` says what mask values mean.
"""

import json
import pathlib
import unicodedata

from data.cohorts import Case, entry, name_of, refuse
from fusa_jax.scans import volume_files
from fusa_jax.scans.classes import LESION
from fusa_jax.system.files import printable

LIST = 'dataset.json'


def recognises(folder: pathlib.Path) -> bool:
  return bool(_listed(folder))


def find(folder: pathlib.Path) -> list[Case]:
  """The training cases in dataset.json.

  Raises:
    UserError: entries without one image and one label, and missing files, one line each.
  """
  cases, lines, of_masks = [], [], LESION._replace(meanings=meanings(folder))
  for number, listed in enumerate(_listed(folder)):
    names = [listed.get(key) for key in ('image', 'label')] if isinstance(listed, dict) else [None]
    if not all(isinstance(name, str) for name in names):
      lines.append(f'{folder / LIST}: entry {number} of "training" must have an image and a label; add them')
      continue
    image, label = (_path(folder, name) for name in names)
    lines += [
      f'{path}: listed in dataset.json, but missing; add it, or remove it from the list'
      for path in (image, label)
      if not path.is_file()
    ]
    cases.append(Case(name_of(volume_files.stem(image)).removesuffix('_0000'), image, label, of_masks))
  refuse(lines)
  return sorted(cases)


def _path(folder, name):
  """The file of a listed name: also with the other form of its umlauts, or with nnU-Net's _0000."""
  path = folder / name
  stem = volume_files.stem(path)
  names = [path.name, f'{stem}_0000{path.name[len(stem) :]}']
  forms = [path.parent / unicodedata.normalize(form, one) for one in names for form in ('NFC', 'NFD')]
  return next((one for one in (path, *forms) if one.is_file()), path)


def _listed(folder):
  listed = _content(folder).get('training')
  return listed if isinstance(listed, list) else []


def meanings(folder: pathlib.Path) -> tuple[tuple[int, str], ...]:
  """What dataset.json calls each mask value besides 0; () if it does not say so.

  Decathlon and nnU-Net 1 write {"1": "lesion"}; nnU-Net 2 writes {"lesion": 1}, or {"lesion": [1, 2]} for regions.
  """
  labels, found = _content(folder).get('labels'), {}
  for name, value in labels.items() if isinstance(labels, dict) else ():
    if isinstance(value, str):
      name, value = value, int(name) if name.isdecimal() else None
    for number in value if isinstance(value, list) else [value]:
      if isinstance(number, int) and not isinstance(number, bool) and number:
        found.setdefault(number, []).append(printable(name))
  return tuple((number, ' and '.join(names)) for number, names in sorted(found.items()))


def _content(folder):
  path = entry(folder, LIST)
  try:
    content = json.loads(path.read_text(encoding='utf-8-sig')) if path else None
  except (OSError, ValueError):
    return {}
  return content if isinstance(content, dict) else {}
