"""Writes browser pages that show scans with their predicted masks. NiiVue, scan and mask are inside the page.

NiiVue and its licence are in system/templates/niivue/. Neither this module nor the page downloads anything.
"""

import base64
import gzip
import io
import json
import logging
import math
import pathlib
from typing import Any

import numpy as np

from fusa_jax.inference import manifest
from fusa_jax.inference.class_numbers import by_class, classes_of, with_numbers
from fusa_jax.scans import nifti, volume_files, volumes
from fusa_jax.scans.archives import unpacking
from fusa_jax.scans.classes import COLOURS, of_class
from fusa_jax.scans.sources import counted, find_sources
from fusa_jax.system import own_files, pages, progress
from fusa_jax.system.errors import PartlyRefused, UserError, one_line
from fusa_jax.system.files import sha256_of

# The page that links to all others if there are several.
_INDEX = 'view.html'
# For each of volumes.VALUES: the windows (name, centre, width), with the page's first window first; and the unit.
_WINDOWS = {'hu': [('Lung', -600, 1500), ('Mediastinum', 40, 400)], 'grey': [('Black to white', 127.5, 255)]}
_UNITS = {'hu': 'HU', 'grey': ''}
_NIIVUE = pages.TEMPLATES / 'niivue'
_PREDICT = 'run --mode=predict with this --input and --output'


def view(source: pathlib.Path, masks: pathlib.Path, overwrite: bool = False) -> list[pathlib.Path]:
  """Writes one page per scan, `NAME.html` next to its mask. For several scans it also writes `view.html` with links.

  A page holds the scan and the mask of each class in full resolution on canonical axes. From the scan's header it holds
  only the affine. A page is a third larger than the two files as .nii.gz.

  Args:
    source: the input of `predict`: a .nii or .nii.gz file, or a folder or .zip of these and of DICOM series. Pictures
      next to scans are left out.
    masks: the output folder of `predict`.
    overwrite: replace pages that this program did not write, or that were changed since.

  Returns:
    The pages; `view.html` comes first.

  Raises:
    UserError: the source holds no scan. Or results are missing or damaged, or pages exist that this program did not
      write: the message lists all, and no page is written. Or all scans or masks are refused.
    PartlyRefused: a scan or its mask is refused, or the result was made from other bytes: the other pages are written.
  """
  with unpacking() as unpacked:
    scans = find_sources(source, None, unpacked)
    refused = manifest.refused(masks)
    left_out = [scan.place for scan in scans if scan.place in refused]
    scans = [scan for scan in scans if scan.place not in refused]
    if not scans:
      raise UserError(f'input: the prediction refused all scans in {source}; {masks / manifest.NAME} has the reasons')
    results, problems = {}, []
    for scan in scans:
      try:
        results[scan.stem] = _result(masks, scan.stem)
      except UserError as error:
        problems.append(str(error))
    if problems:
      raise UserError('\n'.join(problems))
    if len(scans) > 1 and pathlib.Path(_INDEX).stem in results:
      raise UserError(f'input: a scan has the same page name as the index, {_INDEX}; rename the scan, or give it alone')
    if left_out:
      logging.warning('left out: %s, which the prediction refused', counted(left_out))
    if not overwrite:
      paths = [masks / f'{name}.html' for name in results] + [masks / _INDEX] * (len(scans) > 1)
      own_files.refuse(path for path in paths if own_files.has_changed(path, None))
    written = []
    for scan in progress.bar(scans, desc='Writing pages', unit='pages', show=len(scans) > 1):
      try:
        results[scan.stem] = _write_page(masks, scan, results[scan.stem])
        written.append(masks / f'{scan.stem}.html')
      except UserError as error:
        problems.append(str(error))
        del results[scan.stem]
  if not written:
    raise UserError('\n'.join(problems))
  if len(scans) > 1:
    listed = {name: (result, _classes(result)) for name, result in sorted(results.items())}
    pages.write_page(masks / _INDEX, 'viewer_index.html', results=listed)
    written.insert(0, masks / _INDEX)
  logging.info('%s: open it in a browser', written[0])
  if problems:
    raise PartlyRefused('\n'.join(problems))
  return written


def _result(masks, name) -> dict[str, Any]:
  """Reads the results that `predict` wrote for a scan, with the keys that a page needs.

  Raises:
    UserError: a file or a key is missing, or the results are damaged.
  """
  path, mask = masks / f'{name}.json', _mask(masks, name)
  try:
    result = json.loads(path.read_text())
    of_each = by_class(result)
    has_mask = {'lesion_ml' in numbers for numbers in of_each.values()}
    if not (
      len(has_mask) == 1
      and all(_is_consistent(numbers, result['num_slices']) for numbers in of_each.values())
      and result['values'] in volumes.VALUES
      and isinstance(result['model'], str)
      and isinstance(result['step'], int | list)  # a list if several runs made the prediction
    ):
      raise ValueError('the numbers are inconsistent')
    if has_mask == {True}:
      classes_of(result)  # raises an error if they are damaged
  except FileNotFoundError:
    raise UserError(f'{path}: missing; {_PREDICT} first') from None
  except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
    reason = f'no {error}' if isinstance(error, KeyError) else one_line(error)
    raise UserError(f'{path}: damaged, or from another version ({reason}); {_PREDICT} again') from None
  if has_mask == {True} and not mask.exists():
    raise UserError(f'{mask}: missing; {_PREDICT} again')
  return result


def _is_consistent(numbers, num_slices):
  """Whether the numbers of a class can be shown."""
  scores, positive = numbers['slice_scores'], numbers['positive_slices']
  is_number = lambda value: type(value) in (int, float) and math.isfinite(value)
  colour = numbers.get('colour', COLOURS[0])
  return (
    len(scores) == num_slices > 0
    and all(is_number(score) and 0 <= score <= 1 for score in scores)
    and all(type(index) is int and 0 <= index < len(scores) for index in positive)
    and is_number(numbers['threshold'])
    and is_number(numbers.get('lesion_ml', 0))
    and is_number(numbers.get('file_ml', 0))
    and len(colour) == 3
    and all(type(part) is int and 0 <= part <= 255 for part in colour)
  )


def _classes(result):
  """Returns what a page shows of each class: its numbers, name and colour."""
  return [
    {'colour': COLOURS[number % len(COLOURS)], **numbers, 'name': name}
    for number, (name, numbers) in enumerate(by_class(result).items())
  ]


def _mask(masks, name):
  return masks / f'{name}_mask.nii.gz'


def _write_page(masks, source, result) -> dict[str, Any]:
  """Writes the page of a scan; returns its result, with the volumes of a mask that was corrected by hand."""
  if 'made_of' in result and result['made_of']['input_sha256'] != source.sha256():
    raise UserError(f'{masks / source.stem}.json: was made from another {source.name}; {_PREDICT} again')
  name, scan = source.stem, volumes.on_canonical_axes(source.read_image(result['values']))
  if len(scan.values) != result['num_slices']:
    raise UserError(
      f'{masks / name}.json: has {result["num_slices"]} slices, but the scan {scan.path.name} has {len(scan.values)}; '
      f'{_PREDICT} again'
    )
  bits, of_each = None, by_class(result)
  if any('lesion_ml' in numbers for numbers in of_each.values()):  # a classification has no mask
    labels = volume_files.read_labels(_mask(masks, name), classes_of(result))
    volumes.check_same_grid(labels, scan, 'scan')
    bits = labels.mask
    stated = result.get('files', {}).get(labels.path.name)
    if stated and stated != sha256_of(labels.path):
      logging.warning('%s: changed since the prediction; the page shows its own volume', labels.path)
      result = with_numbers(
        result,
        {
          name: _measured(of_class(bits, number), labels.voxel_ml, numbers)
          for number, (name, numbers) in enumerate(of_each.items())
        },
      )
  classes = _classes(result)
  scores = np.max([one['slice_scores'] for one in classes], axis=0)
  pages.write_page(
    masks / f'{name}.html',
    'viewer.html',
    name=name,
    result=result,
    classes=classes,
    positive=sorted({index for one in classes for index in one['positive_slices']}),
    windows=_WINDOWS[result['values']],
    unit=_UNITS[result['values']],
    start=_start(scores, None if bits is None else bits > 0, scan.shape),
    scan=_embedded(scan.values, scan),
    masks=[] if bits is None else [_embedded(of_class(bits, number), scan) for number in range(len(classes))],
    niivue=gzip.decompress((_NIIVUE / 'niivue.umd.js.gz').read_bytes()).decode(),
    licence=(_NIIVUE / 'LICENSE.txt').read_text(),
  )
  return result


def _measured(mask, voxel_ml, numbers):
  """The numbers of a class for another mask [S, H, W]."""
  volume = float(mask.sum(dtype=np.int64) * voxel_ml)
  of_file = {'file_ml': volume} if 'file_ml' in numbers else {}
  return {'lesion_ml': volume, **of_file, 'positive_slices': np.flatnonzero(mask.any(axis=(1, 2))).tolist()}


def _embedded(volume, scan):
  """Encodes a volume on canonical axes as .nii.gz in base64."""
  file = io.BytesIO()
  nifti.write_volume_to(file, volume, scan, compressed=True)
  return base64.b64encode(file.getbuffer()).decode()


def _start(scores, mask, shape):
  """Start position of the crosshair: on the slice with the highest score, the middle of the lesion or of the slice.

  Returns fractions of the volume from right to left, posterior to anterior, and inferior to superior. NiiVue uses these
  directions for any order of the voxels.
  """
  _, height, width = shape
  best = int(np.argmax(scores))
  row, column = height // 2, width // 2
  if mask is not None and mask[best].any():
    voxels = np.argwhere(mask[best])
    row, column = voxels[np.argmin(((voxels - voxels.mean(axis=0)) ** 2).sum(axis=1))]
  return [1 - (column + 0.5) / width, 1 - (row + 0.5) / height, (best + 0.5) / len(scores)]
