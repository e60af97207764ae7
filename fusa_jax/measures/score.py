"""Masks against masks, whoever made them: predicted and true volumes in, a table of cases and their averages out."""

import logging
import os
import pathlib
from concurrent import futures

import tqdm

from fusa_jax.measures import masks, statistics
from fusa_jax.scans import nifti, volumes
from fusa_jax.system.errors import UserError
from fusa_jax.system.files import write_csv, write_json

_LOGGED = ('dice', 'hd95_mm', 'surface_dice_2mm', 'error_ml', 'lesion_sensitivity', 'false_positives')
# What the names of masks and scans of one case may end in: COVID-19-20's, nnU-Net's, MONAI's and our own.
_ENDINGS = ('_mask', '_seg', '_ct', '_pred', '_label', '_gt', '_0000')
# nibabel, NumPy and scipy release the lock. Each thread holds one case: 0.4 GB where that is 512 x 512 x 291.
_THREADS = min(os.cpu_count() or 1, 16)


def score(source: pathlib.Path, truth: pathlib.Path, output: pathlib.Path) -> dict:
  """Scores predicted masks against true ones, case by case; gives what scores.json holds.

  Writes `volumes.csv`, a row for each case (an empty cell is undefined), and `scores.json`: averages over the cases
  with their intervals, and what each number means.

  Args:
    source: the predictions, a folder of .nii or .nii.gz, or a file.
    truth: the true masks, likewise; or a folder with `Train` in it, as in COVID-19-20.
    output: a folder; made where it is missing.

  Raises:
    UserError: nothing there; cases of which there is only one mask, or several; masks that are refused, or that do not
      lie on the grid of the true one. All are named, a line each, before anything is written.
  """
  pairs, problems = _pair(source, truth)

  def collecting(function, *arguments):
    try:
      return function(*arguments)
    except UserError as error:
      problems.append(str(error))

  def measure(case):
    both = [collecting(nifti.read_labels, path) for path in pairs[case]]
    if all(both):
      collecting(volumes.check_same_grid, *both, 'true mask')
    # With a problem nothing will be written: the others are only looked at.
    if problems:
      return None
    predicted, true = both
    return {'case': case, **masks.volume(predicted.mask, true.mask, true.spacing, true.voxel_ml)}

  with futures.ThreadPoolExecutor(_THREADS) as pool:
    measured = pool.map(measure, pairs)
    rows = list(tqdm.tqdm(measured, total=len(pairs), desc='Scoring', unit='volume', disable=len(pairs) == 1))
  if problems:
    raise UserError('\n'.join(sorted(problems)))
  result = {**masks.summary(rows), 'source': str(source), 'truth': str(truth)}
  write_csv(output / 'volumes.csv', rows)
  # Last, so that a folder with scores.json is complete.
  write_json(output / 'scores.json', result)
  logging.info('%d volumes, means: %s', len(rows), _one_line(result['measures']))
  return result


def _pair(source, truth):
  """{case: [its prediction, its true mask]}, and what is wrong with other cases, a line each."""
  if source.is_file() and truth.is_file():
    return {_case(truth): [source, truth]}, []
  predicted, true = _masks(source, 'input'), _masks(truth, 'truth')
  # One file against a folder asks for its own case alone.
  cases = predicted if source.is_file() else true if truth.is_file() else predicted | true
  pairs, problems = {}, []
  for case in sorted(cases):
    paths = [predicted.get(case, []), true.get(case, [])]
    for first, *others in filter(None, paths):
      problems += [f'{path}: of the same case as {first.name}, {case}; keep one of the two' for path in others]
    if all(paths):
      pairs[case] = [each[0] for each in paths]
    elif paths[0]:
      problems.append(f'{paths[0][0]}: no true mask of {case} in {truth}; add it, or take the prediction out')
    else:
      problems.append(f'{paths[1][0]}: no prediction of {case} in {source}; add it, or take the true mask out')
  return pairs, problems


def _masks(source, flag):
  """{case: its masks} of a folder, or of a single file; one mask each, if all is well."""
  if source.is_file():
    return {_case(source): [source]}
  if not source.is_dir():
    raise UserError(f'{flag}: {source} does not exist; give a mask (.nii, .nii.gz), or a folder of masks')
  folder = source / 'Train' if (source / 'Train').is_dir() else source
  found = {}
  for path in sorted(folder.iterdir()):
    if nifti.is_nifti(path) and '_probability' not in path.name:
      found.setdefault(_case(path), []).append(path)
  if not found:
    raise UserError(f'{flag}: no .nii or .nii.gz mask in {folder}; give a mask, or a folder of masks')
  # What is named as a scan is the scan of its case, where there is another file that can be the mask.
  is_scan = lambda path: nifti.stem(path).endswith(('_ct', '_0000'))
  return {case: [path for path in paths if not is_scan(path)] or paths for case, paths in found.items()}


def _case(path):
  """What names of one case's files have in common."""
  name = nifti.stem(path)
  while name.endswith(_ENDINGS):
    name = name.rpartition('_')[0]
  return name


def _one_line(measures):
  """The means for a log, with their intervals."""
  shown = lambda measure: statistics.shown(measure['mean'], measure['mean_interval'], digits=2)
  return ', '.join(f'{name} {shown(measures[name])}' for name in _LOGGED)
