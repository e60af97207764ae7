"""Folders at any depth with a scan and its mask: `s0001/ct.nii.gz` with `s0001/mask.nii.gz`, `siteA/P1_ct.nii.gz` ...

Names say what a file is. The name of a scan ends in ct, image, imaging, scan or volume. The name of a mask, or of its
folder, ends in mask, seg, segmentation, label, lesion or infection (`s0001/segmentations/lesion.nii.gz`). The rest of
the name is the patient. If nothing is left, the patient has the name of the folder.
"""

import pathlib
import re
from collections import defaultdict

from data.cohorts import Case, name_of, only_folder, refuse
from fusa_jax.scans import volume_files
from fusa_jax.scans.archives import in_folder

_SCAN = re.compile(r'(^|[_ -])(ct|image|imaging|scan|volume)$', re.IGNORECASE)
_MASK = re.compile(r'(^|[_ -])(mask|seg|segmentation|label|lesion|infection)s?$', re.IGNORECASE)


def recognises(folder: pathlib.Path) -> bool:
  # Of a folder that contains only one folder, the layout of the inner one counts.
  return only_folder(folder) == folder and any(scans and masks for scans, masks in _groups(folder).values())


def find(folder: pathlib.Path) -> list[Case]:
  """One case per scan.

  Raises:
    UserError: scans without a mask, masks without a scan, patients with several of one kind, one line each.
  """
  groups, cases, lines = _groups(folder), [], []
  named_by_folder = {place for place, name in groups if not name}
  for (place, name), (scans, masks) in groups.items():
    if len(scans) == len(masks) == 1:
      cases.append(Case(name or name_of(place.name), scans[0], masks[0]))
    elif len(scans) > 1 or (scans and len(masks) > 1):
      several = scans if len(scans) > 1 else masks
      kind = 'scans' if several is scans else 'masks'
      listed = ', '.join(path.relative_to(place).as_posix() for path in several)
      lines.append(f'{place}: {len(several)} {kind} of one patient ({listed}); keep one of them')
    elif masks:
      lines += [f'{path}: the scan is missing in {place}; add it, or remove the mask' for path in masks]
    elif _SCAN.search(volume_files.stem(scans[0])) or place not in named_by_folder:
      lines.append(f'{scans[0]}: the mask is missing in {place}; add it, or remove the scan')
  refuse(lines)
  return sorted(cases)


def without_ct(stem: str) -> str:
  """The name of a scan's file without an ending such as `_ct`; '' if nothing is left."""
  return _SCAN.sub('', stem)


def is_mask(path: pathlib.Path, folder: pathlib.Path) -> bool:
  """Whether the name of a volume, or of the folder below `folder` that it is in, is that of masks."""
  in_masks = path.parent != folder and _MASK.search(path.parent.name)
  return bool(in_masks or _MASK.search(name_of(volume_files.stem(path))))


def _groups(folder):
  """{(folder, patient): (scans, masks)}. In a folder of masks, the one named lesion counts if there is one."""
  groups = defaultdict(lambda: ([], []))
  for path in in_folder(folder):
    if not volume_files.is_volume(path):
      continue
    place, stem = path.parent, name_of(volume_files.stem(path))
    if place != folder and _MASK.search(place.name):
      place, name = place.parent, ''
    else:
      name = without_ct(_MASK.sub('', stem))
    groups[place, name][is_mask(path, folder)].append(path)
  for _, masks in groups.values():
    lesions = [path for path in masks if re.match('lesion|infection', volume_files.stem(path), re.IGNORECASE)]
    masks[:] = lesions if len(masks) > 1 and len(lesions) == 1 else masks
  return groups
