"""What a predicted mask is beside the true one: overlap, distances, volumes and lesions of a scan, and their means."""

import numpy as np
from scipy import ndimage

from fusa_jax.measures import statistics, surface

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
