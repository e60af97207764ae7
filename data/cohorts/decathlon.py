"""Folders with a `dataset.json` that lists the training cases: Medical Segmentation Decathlon, MONAI, nnU-Net 1.

It contains `"training": [{"image": "./imagesTr/X.nii.gz", "label": "./labelsTr/X.nii.gz"}, ...]`. Paths are relative to
the folder.
"""

import json
import pathlib

from data.cohorts import Case
from fusa_jax.scans import volume_files
from fusa_jax.system.errors import UserError


def recognises(folder: pathlib.Path) -> bool:
  return bool(_listed(folder))


def find(folder: pathlib.Path) -> list[Case]:
  """The training cases in dataset.json.

  Raises:
    UserError: entries without one image and one label, and missing files, one line each.
  """
  cases, errors = [], []
  for number, entry in enumerate(_listed(folder)):
    names = [entry.get(key) for key in ('image', 'label')] if isinstance(entry, dict) else [None]
    if not all(isinstance(name, str) for name in names):
      errors.append(f'{folder / "dataset.json"}: entry {number} of "training" must have an image and a label; add them')
      continue
    image, label = (folder / name for name in names)
    errors += [
      f'{path}: listed in dataset.json, but missing; add it, or remove it from the list'
      for path in (image, label)
      if not path.is_file()
    ]
    cases.append(Case(volume_files.stem(image).removesuffix('_0000'), image, label))
  if errors:
    raise UserError('\n'.join(errors))
  return sorted(cases)


def _listed(folder):
  try:
    listed = json.loads((folder / 'dataset.json').read_text())['training']
  except (OSError, ValueError, KeyError, TypeError):
    return []
  return listed if isinstance(listed, list) else []
