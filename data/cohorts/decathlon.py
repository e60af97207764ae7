"""Folders with a `dataset.json` that lists training cases: the Medical Segmentation Decathlon, MONAI, nnU-Net 1.

`"training": [{"image": "./imagesTr/X.nii.gz", "label": "./labelsTr/X.nii.gz"}, ...]`, paths relative to the folder.
"""

import json
import pathlib

from data.cohorts import Case
from fusa_jax.scans import nifti
from fusa_jax.system.errors import UserError


def recognises(folder: pathlib.Path) -> bool:
  return bool(_listed(folder))


def find(folder: pathlib.Path) -> list[Case]:
  """The cases of the list.

  Raises:
    UserError: entries that are no pair of one image and one label, and files that are not there, a line each.
  """
  cases, errors = [], []
  for number, entry in enumerate(_listed(folder)):
    names = [entry.get(key) for key in ('image', 'label')] if isinstance(entry, dict) else [None]
    if not all(isinstance(name, str) for name in names):
      errors.append(f'{folder / "dataset.json"}: entry {number} of "training" is no pair of one image and one label')
      continue
    image, label = (folder / name for name in names)
    errors += [
      f'{path}: in the list of dataset.json, but not there; add it, or take it out of the list'
      for path in (image, label)
      if not path.is_file()
    ]
    cases.append(Case(nifti.stem(image).removesuffix('_0000'), image, label))
  if errors:
    raise UserError('\n'.join(errors))
  return sorted(cases)


def _listed(folder):
  try:
    listed = json.loads((folder / 'dataset.json').read_text())['training']
  except (OSError, ValueError, KeyError, TypeError):
    return []
  return listed if isinstance(listed, list) else []
