"""Compares predicted and reference masks: overlap, distances, volumes and lesions of a scan, averages over scans."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import ndimage

from fusa_jax.measures import statistics, surface
from fusa_jax.scans.volumes import Grid

# The measures of a volume, in the order of the columns of volumes.csv; scores.json and the report show the definitions.
DEFINITIONS = {
  'dice': 'Dice of voxels: 2 TP / (2 TP + FP + FN). Both masks empty: undefined; one empty: 0.',
  'hd95_mm': '95th percentile Hausdorff distance in mm: the larger of the 95th percentiles of boundary distances, '
  'predicted to reference and back. Both masks empty: undefined; one empty: diagonal of the scan.',
  'surface_dice_1mm': 'Surface Dice at 1 mm: boundary voxels of both masks within 1 mm of the other boundary / all '
  'boundary voxels. Both masks empty: undefined; one empty: 0.',
  'surface_dice_2mm': 'Surface Dice at 2 mm: boundary voxels of both masks within 2 mm of the other boundary / all '
  'boundary voxels. Both masks empty: undefined; one empty: 0.',
  'predicted_ml': 'Volume of the predicted mask in mL. Empty mask: 0.',
  'true_ml': 'Volume of the reference mask in mL. Empty mask: 0.',
  'error_ml': 'Volume error in mL: predicted volume - reference volume. Both masks empty: 0.',
  'lesions': 'Number of lesions: connected components of the reference mask (3D, 26 neighbours). Empty mask: 0.',
  'lesions_found': 'Number of lesions with at least one predicted voxel. Either mask empty: 0.',
  'lesion_sensitivity': 'Lesion sensitivity: lesions found / lesions. Reference mask empty: undefined; only the '
  'predicted mask empty: 0.',
  'predicted_lesions': 'Number of connected components of the predicted mask (3D, 26 neighbours). Empty mask: 0.',
  'false_positives': 'Number of predicted lesions without any voxel of the reference mask. Predicted mask empty: 0; '
  'only the reference mask empty: all predicted lesions.',
}

# What the report calls each measure.
LABELS = {
  'dice': 'Dice',
  'hd95_mm': 'Hausdorff distance, 95th percentile, mm',
  'surface_dice_1mm': 'Surface Dice at 1 mm',
  'surface_dice_2mm': 'Surface Dice at 2 mm',
  'predicted_ml': 'Predicted volume, mL',
  'true_ml': 'Reference volume, mL',
  'error_ml': 'Volume error, mL',
  'lesions': 'Lesions in the reference',
  'lesions_found': 'Lesions found',
  'lesion_sensitivity': 'Lesion sensitivity',
  'predicted_lesions': 'Predicted lesions',
  'false_positives': 'False positive lesions',
}

# The lowest and the highest value that each measure can have. It decides how the interval of a mean is computed.
SUPPORT = {
  **dict.fromkeys(DEFINITIONS, (0, math.inf)),
  **dict.fromkeys(('dice', 'surface_dice_1mm', 'surface_dice_2mm', 'lesion_sensitivity'), (0, 1)),
  'error_ml': (-math.inf, math.inf),
}


def volume(predicted: np.ndarray, truth: np.ndarray, grid: Grid) -> dict[str, float]:
  """Computes the measures of one volume (see DEFINITIONS); NaN means undefined.

  Args:
    predicted, truth: masks [S, H, W], 0 or False outside the lesions.
    grid: where their voxels lie.
  """
  signs = np.array([(1, 1, 1), (1, 1, -1), (1, -1, 1), (1, -1, -1)])
  diagonal = float(np.linalg.norm(signs * truth.shape @ grid.steps, axis=1).max())
  predicted, truth = predicted.astype(bool), truth.astype(bool)
  # Crop to the box around both masks: there is nothing to measure outside.
  box = ndimage.find_objects((predicted | truth).view(np.uint8), max_label=1)[0] or np.s_[:0]
  predicted, truth = predicted[box], truth[box]
  distances = surface.distances(predicted, truth, grid.steps, diagonal)
  num_predicted, num_true, num_both = (int(np.count_nonzero(mask)) for mask in (predicted, truth, predicted & truth))
  lesions, lesions_found = _components_in(truth, predicted)
  predicted_lesions, true_positives = _components_in(predicted, truth)
  return {
    'dice': float(statistics.ratio(2 * num_both, num_predicted + num_true)),
    'hd95_mm': surface.hd95(distances),
    'surface_dice_1mm': surface.surface_dice(distances, 1),
    'surface_dice_2mm': surface.surface_dice(distances, 2),
    'predicted_ml': num_predicted * grid.voxel_ml,
    'true_ml': num_true * grid.voxel_ml,
    'error_ml': (num_predicted - num_true) * grid.voxel_ml,
    'lesions': lesions,
    'lesions_found': lesions_found,
    'lesion_sensitivity': float(statistics.ratio(lesions_found, lesions)),
    'predicted_lesions': predicted_lesions,
    'false_positives': predicted_lesions - true_positives,
  }


def summary(rows: list[dict[str, float]], owners: Sequence[str] | None = None) -> dict:
  """Averages the measures over volumes. Undefined values are left out.

  Every volume counts once in a mean, because distances of several scans cannot be pooled as their voxels can. The
  intervals draw persons, each with all scans, because scans of one person are alike. If each volume is of a different
  person, the intervals of means are those of `statistics.mean_interval`; otherwise those of `statistics.intervals`.

  Args:
    rows: the measures of each volume.
    owners: the person of each volume; None if each is of a different person.

  Returns num_volumes; measures, each with mean, median, their intervals and the number of volumes that define it; the
  method of the intervals; definitions. None means undefined.
  """
  values, persons = _columns(rows), _persons(len(rows), owners)
  count = persons.max() + 1
  means, medians = (_statistic(average, values, persons) for average in (statistics.mean, statistics.median))
  mean_intervals = (
    {name: statistics.mean_interval(column, SUPPORT[name]) for name, column in values.items()}
    if count == len(rows)
    else statistics.intervals(means, count)  # scans of one person are drawn together
  )
  median_intervals = statistics.intervals(medians, count)
  means, medians = (statistics.estimates(each, count) for each in (means, medians))
  measures = {
    name: {
      'defined': int(np.isfinite(column).sum()),
      'mean': means[name],
      'mean_interval': mean_intervals[name],
      'median': medians[name],
      'median_interval': median_intervals[name],
    }
    for name, column in values.items()
  }
  return {
    'num_volumes': len(rows),
    'measures': measures,
    'intervals': statistics.method(),
    'definitions': DEFINITIONS,
  }


def over_classes(rows: Mapping[str, list[dict[str, float]]], owners: Sequence[str] | None = None) -> dict:
  """Averages the means, and the medians, over the classes that a volume defines a measure for.

  The intervals are those of `summary`, of the averages: a person is drawn with all scans and all classes.

  Args:
    rows: the measures of each volume by class. All classes have the same volumes in the same order.
    owners: the person of each volume; None if each is of a different person.

  Returns:
    For each measure: mean and median, with their intervals, and `mean_over`, the classes of the average. None means
    undefined.
  """
  columns = {name: _columns(each) for name, each in rows.items()}
  num_volumes = len(next(iter(rows.values())))
  persons = _persons(num_volumes, owners)
  count = persons.max() + 1
  means, medians = (
    statistics.average_of_defined([_statistic(average, values, persons) for values in columns.values()], count)
    for average in (statistics.mean, statistics.median)
  )
  mean_over = {
    name: [one for one, values in columns.items() if np.isfinite(values[name]).any()] for name in DEFINITIONS
  }
  of_persons = lambda name: statistics.average_of_means([columns[one][name] for one in mean_over[name]])
  mean_intervals = (
    {
      name: statistics.mean_interval(of_persons(name), SUPPORT[name]) if mean_over[name] else None
      for name in DEFINITIONS
    }
    if count == num_volumes
    else statistics.intervals(means, count)
  )
  median_intervals = statistics.intervals(medians, count)
  means, medians = (statistics.estimates(each, count) for each in (means, medians))
  return {
    name: {
      'mean': means[name],
      'mean_interval': mean_intervals[name],
      'median': medians[name],
      'median_interval': median_intervals[name],
      'mean_over': mean_over[name],
    }
    for name in DEFINITIONS
  }


def _columns(rows):
  """The values of each measure [volumes]."""
  return {name: np.array([row[name] for row in rows], np.float64) for name in DEFINITIONS}


def _persons(count, owners):
  """The number of the person of each volume."""
  return np.arange(count) if owners is None else np.unique(np.asarray(owners), return_inverse=True)[1]


def _statistic(average, values, persons):
  """The average of each measure for weights of persons; each volume has the weight of its person."""
  return lambda weights: {name: average(column, weights[:, persons]) for name, column in values.items()}


def components(mask: np.ndarray) -> tuple[np.ndarray, int]:
  """Numbers the lesions of a mask: returns the number at each voxel [S, H, W], from 1 (0 is background), and the count.

  Voxels that share a corner belong to the same lesion.
  """
  return ndimage.label(mask, np.ones((3, 3, 3)))


def _components_in(mask, other):
  """Counts the components of a mask, and those among them that contain a voxel of another mask."""
  labels, count = components(mask)
  return count, int(np.count_nonzero(np.unique(labels[other])))
