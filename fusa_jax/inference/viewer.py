"""Scans and the masks that were predicted for them, as pages for a browser: NiiVue, scan and mask are in the page.

NiiVue lies in system/templates/niivue/, beside its licence; nothing is fetched, by us or by the page.
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
import tqdm

from fusa_jax.scans import nifti, volumes
from fusa_jax.scans.archives import unpacking
from fusa_jax.scans.sources import find_sources
from fusa_jax.system import pages
from fusa_jax.system.errors import UserError, one_line

# Of all pages where there are several.
_INDEX = 'view.html'
# By kind of values: (name, centre, width), the first of which a page begins with; what a value is called.
_WINDOWS = {'hu': [('Lung', -600, 1500), ('Mediastinum', 40, 400)], 'grey': [('Black to white', 127.5, 255)]}
_UNITS = {'hu': 'HU', 'grey': ''}
# Of none of the three of figures.write_overlay, which tell right from wrong: what is true is not known here.
_COLOUR = (255, 176, 0)
_NIIVUE = pages.TEMPLATES / 'niivue'
_PREDICT = 'run --mode=predict with this --input and --output'


def view(source: pathlib.Path, masks: pathlib.Path) -> list[pathlib.Path]:
  """Writes a page for each scan, `NAME.html` beside its mask, and of several `view.html`, which links to them.

  A page holds scan and mask in full resolution on canonical axes, and of the scan's header the affine alone. It is a
  third larger than the two as .nii.gz.

  Args:
    source: what was predicted: a .nii or .nii.gz, or a folder or .zip of them and of DICOM series. Pictures beside
      scans are left out.
    masks: where `predict` wrote to.

  Returns:
    The pages, that of all scans first.

  Raises:
    UserError: no scan; scans without a result, or with one that is damaged (all of them named before the first page is
      written); a scan that is refused, or whose mask is or lies on another grid (after the pages of those before it).
  """
  with unpacking() as unpacked:
    scans = find_sources(source, None, unpacked)
    results, problems = {}, []
    for scan in scans:
      try:
        results[scan.stem] = _result(masks, scan.stem)
      except UserError as error:
        problems.append(str(error))
    if problems:
      raise UserError('\n'.join(problems))
    if len(scans) > 1 and pathlib.Path(_INDEX).stem in results:
      raise UserError(f'input: the page of {_INDEX} would be that of all scans; rename the scan, or give it alone')
    written = []
    for scan in tqdm.tqdm(scans, desc='Writing pages', disable=len(scans) == 1):
      written.append(_write_page(masks, scan, results[scan.stem]))
  if len(scans) > 1:
    pages.write_page(masks / _INDEX, 'viewer_index.html', results=dict(sorted(results.items())))
    written.insert(0, masks / _INDEX)
  logging.info('%s: open it in a browser', written[0])
  return written


def _result(masks, name) -> dict[str, Any]:
  """What `predict` wrote of a scan, with the keys that a page needs; raises UserError where that is not all there."""
  path, mask = masks / f'{name}.json', _mask(masks, name)
  try:
    result = json.loads(path.read_text())
    scores, positive = result['slice_scores'], result['positive_slices']
    is_number = lambda value: type(value) in (int, float) and math.isfinite(value)
    if not (
      len(scores) == result['num_slices'] > 0
      and all(is_number(score) and 0 <= score <= 1 for score in scores)
      and all(type(index) is int and 0 <= index < len(scores) for index in positive)
      and result['values'] in volumes.VALUES
      and is_number(result['threshold'])
      and isinstance(result['model'], str)
      and isinstance(result['step'], int | list)  # of several runs, a list
      and is_number(result.get('lesion_ml', 0))
    ):
      raise ValueError('its numbers do not fit each other')
  except FileNotFoundError:
    raise UserError(f'{path}: missing; {_PREDICT} first') from None
  except (OSError, ValueError, TypeError, LookupError) as error:
    reason = f'no {error}' if isinstance(error, KeyError) else one_line(error)
    raise UserError(f'{path}: damaged, or not written by this version ({reason}); {_PREDICT} again') from None
  if 'lesion_ml' in result and not mask.exists():
    raise UserError(f'{mask}: missing; {_PREDICT} again')
  return result


def _mask(masks, name):
  return masks / f'{name}_mask.nii.gz'


def _write_page(masks, source, result):
  name, scan = source.stem, volumes.on_canonical_axes(source.read_image(result['values']))
  if len(scan.values) != result['num_slices']:
    raise UserError(
      f'{masks / name}.json: of {result["num_slices"]} slices, and the scan {scan.path.name} has {len(scan.values)}; '
      f'{_PREDICT} again'
    )
  mask = None
  if 'lesion_ml' in result:  # a classification has none
    read = nifti.read_labels(_mask(masks, name))
    volumes.check_same_grid(read, scan, 'scan')
    mask = read.mask
  page = masks / f'{name}.html'
  pages.write_page(
    page,
    'viewer.html',
    name=name,
    result=result,
    positive=set(result['positive_slices']),
    colour=_COLOUR,
    windows=_WINDOWS[result['values']],
    unit=_UNITS[result['values']],
    start=_start(result['slice_scores'], mask, scan.shape),
    scan=_embedded(scan.values, scan),
    mask=None if mask is None else _embedded(mask, scan),
    niivue=gzip.decompress((_NIIVUE / 'niivue.umd.js.gz').read_bytes()).decode(),
    licence=(_NIIVUE / 'LICENSE.txt').read_text(),
  )
  return page


def _embedded(volume, scan):
  """A volume on canonical axes as base64 of a .nii.gz."""
  file = io.BytesIO()
  nifti.write_volume_to(file, volume, scan, compressed=True)
  return base64.b64encode(file.getbuffer()).decode()


def _start(scores, mask, shape):
  """Where the crosshair is at first: of the slice with the highest score the middle of the lesion, or of the slice.

  Gives fractions of the volume from right to left, posterior to anterior and inferior to superior, as NiiVue has them
  whatever the order of the voxels.
  """
  _, height, width = shape
  best = int(np.argmax(scores))
  row, column = height // 2, width // 2
  if mask is not None and mask[best].any():
    voxels = np.argwhere(mask[best])
    row, column = voxels[np.argmin(((voxels - voxels.mean(axis=0)) ** 2).sum(axis=1))]
  return [1 - (column + 0.5) / width, 1 - (row + 0.5) / height, (best + 0.5) / len(scores)]
