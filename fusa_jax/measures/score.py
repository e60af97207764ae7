"""Masks against masks, whoever made them: predicted and true volumes in, a table of cases and their averages out."""

import logging
import os
import pathlib
from concurrent import futures

import numpy as np
import tqdm
from scipy import ndimage

from fusa_jax.measures import statistics, surface
from fusa_jax.scans import ct
from fusa_jax.system.errors import UserError
from fusa_jax.system.files import write_csv, write_json

# The measures of a volume, in the order of the columns of volumes.csv.
DEFINITIONS = {
  'dice': 'Twice the voxels of both masks over the sum of the voxels of each. Both empty: undefined; one empty: 0.',
  'hd95_mm': 'The larger of the 95th percentiles of the distances from the boundary voxels of each mask to the nearest '
  "of the other's. Both empty: undefined; one empty: the diagonal of the scan.",
  'surface_dice_1mm': "The share of both masks' boundary voxels within 1 mm of the other's boundary. "
  'Both empty: undefined; one empty: 0.',
  'surface_dice_2mm': "The share of both masks' boundary voxels within 2 mm of the other's boundary. "
  'Both empty: undefined; one empty: 0.',
  'predicted_ml': 'The volume of the predicted mask in millilitres. Empty: 0.',
  'true_ml': 'The volume of the true mask in millilitres. Empty: 0.',
  'error_ml': 'predicted_ml - true_ml. Both empty: 0.',
  'lesions': 'Connected components of the true mask, voxels that share a corner being connected. Empty: 0.',
  'lesions_found': 'Lesions with at least one predicted voxel in them. Either empty: 0.',
  'lesion_sensitivity': 'lesions_found / lesions. True mask empty: undefined; only the predicted one empty: 0.',
  'predicted_lesions': 'Connected components of the predicted mask. Empty: 0.',
  'false_positives': 'Predicted components without a true voxel in them. Predicted mask empty: 0; '
  'only the true one empty: all of predicted_lesions.',
}
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
    masks = [collecting(ct.read_labels, path) for path in pairs[case]]
    if all(masks):
      collecting(ct.check_same_grid, *masks, 'true mask')
    # With a problem nothing will be written: the others are only looked at.
    if problems:
      return None
    predicted, true = masks
    return {'case': case, **volume(predicted.mask, true.mask, true.spacing, true.voxel_ml)}

  with futures.ThreadPoolExecutor(_THREADS) as pool:
    measured = pool.map(measure, pairs)
    rows = list(tqdm.tqdm(measured, total=len(pairs), desc='Scoring', unit='volume', disable=len(pairs) == 1))
  if problems:
    raise UserError('\n'.join(sorted(problems)))
  result = {**summary(rows), 'source': str(source), 'truth': str(truth)}
  write_csv(output / 'volumes.csv', rows)
  # Last, so that a folder with scores.json is complete.
  write_json(output / 'scores.json', result)
  logging.info('%d volumes, means: %s', len(rows), _one_line(result['measures']))
  return result


def volume(
  predicted: np.ndarray, truth: np.ndarray, spacing: tuple[float, float, float], voxel_ml: float
) -> dict[str, float]:
  """The measures of one volume, as DEFINITIONS has them; NaN where undefined.

  Args:
    predicted, truth: masks [S, H, W], 0 or False outside of the lesions.
    spacing: mm between slices, rows and columns.
    voxel_ml: the volume of a voxel in mL.
  """
  diagonal = float(np.linalg.norm(np.multiply(truth.shape, spacing)))
  predicted, truth = predicted.astype(bool), truth.astype(bool)
  # Outside of the box around both masks there is nothing to measure.
  box = ndimage.find_objects((predicted | truth).view(np.uint8), max_label=1)[0] or np.s_[:0]
  predicted, truth = predicted[box], truth[box]
  distances = surface.distances(predicted, truth, spacing, diagonal)
  num_predicted, num_true, num_both = (int(np.count_nonzero(mask)) for mask in (predicted, truth, predicted & truth))
  lesions, found = _components_in(truth, predicted)
  predicted_lesions, true_positives = _components_in(predicted, truth)
  return {
    'dice': float(statistics.ratio(2 * num_both, num_predicted + num_true)),
    'hd95_mm': surface.hd95(distances),
    'surface_dice_1mm': surface.surface_dice(distances, 1),
    'surface_dice_2mm': surface.surface_dice(distances, 2),
    'predicted_ml': num_predicted * voxel_ml,
    'true_ml': num_true * voxel_ml,
    'error_ml': (num_predicted - num_true) * voxel_ml,
    'lesions': lesions,
    'lesions_found': found,
    'lesion_sensitivity': float(statistics.ratio(found, lesions)),
    'predicted_lesions': predicted_lesions,
    'false_positives': predicted_lesions - true_positives,
  }


def summary(rows: list[dict[str, float]]) -> dict:
  """The measures of volumes (each of another patient) -> their means and medians over those that define them.

  Gives num_volumes; measures: for each one mean, median, the interval of both, and how many volumes define it; how the
  intervals were made; definitions. None where undefined.
  """
  values = {name: np.array([row[name] for row in rows], np.float64) for name in DEFINITIONS}
  measures = {name: {'defined': int(np.isfinite(column).sum())} for name, column in values.items()}
  for kind, average in (('mean', statistics.mean), ('median', statistics.median)):
    averages = lambda weights, average=average: {name: average(values[name], weights) for name in values}
    estimates, intervals = (f(averages, len(rows)) for f in (statistics.estimates, statistics.intervals))
    for name, measure in measures.items():
      measure.update({kind: estimates[name], f'{kind}_interval': intervals[name]})
  return {
    'num_volumes': len(rows),
    'measures': measures,
    'intervals': statistics.method(),
    'definitions': DEFINITIONS,
  }


def components(mask: np.ndarray) -> tuple[np.ndarray, int]:
  """The number of the lesion at each voxel [S, H, W], from 1, 0 where there is none; and how many there are.

  Voxels that share a corner are of one lesion.
  """
  return ndimage.label(mask, np.ones((3, 3, 3)))


def _components_in(mask, other):
  """How many components a mask has, and how many of them hold a voxel of another mask."""
  labels, count = components(mask)
  return count, int(np.count_nonzero(np.unique(labels[other])))


def _pair(source, truth):
  """{case: [its prediction, its true mask]}, and what is wrong with other cases, a line each."""
  if source.is_file() and truth.is_file():
    return {_case(truth): [source, truth]}, []
  predicted, true = _masks(source, '--input'), _masks(truth, '--truth')
  # One file against a folder asks for its own case alone.
  asked = predicted if source.is_file() else true if truth.is_file() else predicted | true
  pairs, problems = {}, []
  for case in sorted(asked):
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
    if ct.is_nifti(path) and '_probability' not in path.name:
      found.setdefault(_case(path), []).append(path)
  if not found:
    raise UserError(f'{flag}: no .nii or .nii.gz mask in {folder}; give a mask, or a folder of masks')
  # What is named as a scan is the scan of its case, where there is another file that can be the mask.
  is_scan = lambda path: ct.stem(path).endswith(('_ct', '_0000'))
  return {case: [path for path in paths if not is_scan(path)] or paths for case, paths in found.items()}


def _case(path):
  """What names of one case's files have in common."""
  name = ct.stem(path)
  while name.endswith(_ENDINGS):
    name = name.rpartition('_')[0]
  return name


def _one_line(measures):
  """The means for a log, with their intervals."""
  shown = lambda measure: statistics.shown(measure['mean'], measure['mean_interval'], digits=2)
  return ', '.join(f'{name} {shown(measures[name])}' for name in _LOGGED)
