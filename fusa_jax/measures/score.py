"""Scores predicted masks from any program against reference masks: writes a table of cases and their averages."""

import logging
import os
import pathlib
import unicodedata
from concurrent import futures

import numpy as np

from fusa_jax.measures import masks, statistics
from fusa_jax.scans import sources, volume_files, volumes
from fusa_jax.scans.archives import is_leftover
from fusa_jax.scans.classes import LESION, Classes, is_ignored, of_class
from fusa_jax.system import own_files, progress
from fusa_jax.system.errors import UserError
from fusa_jax.system.files import printable, write_csv

_LOGGED = ('dice', 'hd95_mm', 'surface_dice_2mm', 'error_ml', 'lesion_sensitivity', 'false_positives')
# Endings of names of masks and scans, as COVID-19-20, nnU-Net, MONAI and this project use them, in any capitals. The
# rest is the case.
_ENDINGS = ('_mask', '_seg', '_ct', '_pred', '_label', '_gt', '_0000')
_ADVICE = 'save one lesion label as 1, or name the values of each class with --classes'
_IGNORED = 'voxels with this value in the reference mask count as background in both masks, for all measures'
_OVER_CLASSES = (
  'average of the means (or medians) of the classes that have one (mean_over); its intervals draw cases, each with all '
  'classes'
)
# Threads are enough: nibabel, NumPy and scipy release the lock. Each holds one case, 0.4 GB for 512 x 512 x 291.
_THREADS = min(os.cpu_count() or 1, 16)


def score(
  source: pathlib.Path, truth: pathlib.Path, output: pathlib.Path, overwrite: bool = False, classes: Classes = LESION
) -> dict:
  """Scores predicted masks against reference masks, case by case; returns the contents of scores.json.

  Writes `volumes.csv`, one row per case; an empty cell is undefined. Writes `scores.json`: averages over the cases with
  their intervals, and the definition of each measure. With several classes, `volumes.csv` has a row per case and class,
  and `scores.json` has the averages of each class, and their averages over the classes.

  Args:
    source: the predictions: a folder of masks, or one file. Other files in a folder are counted in the log.
    truth: the reference masks: a folder or file as `source`, or a folder with `Train` inside, as in COVID-19-20.
    output: the folder to write to; created if missing.
    overwrite: replace files that this program did not write, or that were changed since.
    classes: the classes of both masks and their values. Voxels that the reference mask leaves out count as background
      in both masks.

  Raises:
    UserError: no masks; a case has only one of its two masks, or too many; a mask is refused; a mask is not on the grid
      of its reference mask; a prediction leaves out voxels that its reference mask does not; files of others would be
      replaced. All problems are reported, one line each, before anything is written.
  """
  table, record = output / 'volumes.csv', output / 'scores.json'
  if not overwrite:
    own_files.refuse(own_files.changed(record, [table]))
  pairs, problems = _pair(source, truth)

  def collect_error(function, *arguments):
    try:
      return function(*arguments)
    except UserError as error:
      problems.append(str(error))

  def measure(case):
    """Returns the measures of each class."""
    both = [collect_error(volume_files.read_labels, path, classes, _ADVICE) for path in pairs[case]]
    if all(both):
      collect_error(volumes.check_same_grid, *both, 'reference mask')
    # After a problem nothing will be written, so the other cases are only checked.
    if problems:
      return None
    predicted, true = (each.mask for each in both)
    if classes.ignored:
      left_out = is_ignored(true)
      if (is_ignored(predicted) & ~left_out).any():
        problems.append(
          f'{pairs[case][0]}: the prediction has the value {classes.ignored[0]} of {classes.keys.ignored} where its '
          'reference mask has another value; only a reference mask can leave voxels out'
        )
        return None
      predicted, true = (np.where(left_out, np.uint8(0), mask) for mask in (predicted, true))
    return [
      masks.volume(of_class(predicted, number), of_class(true, number), both[1]) for number in range(len(classes.names))
    ]

  with futures.ThreadPoolExecutor(_THREADS) as pool:
    measured = pool.map(measure, pairs)
    of_cases = list(progress.bar(measured, total=len(pairs), desc='Scoring', unit='volumes', show=len(pairs) > 1))
  if problems:
    raise UserError('\n'.join(sorted(problems)))
  by_class = {name: [each[number] for each in of_cases] for number, name in enumerate(classes.names)}
  result = {
    **(_summary(by_class, classes) if len(by_class) > 1 else masks.summary(*by_class.values())),
    **({'ignore_label': classes.ignored[0], 'ignored': _IGNORED} if classes.ignored else {}),
    'source': printable(str(source)),
    'truth': printable(str(truth)),
  }
  rows = [
    {'case': case, **({'class': name} if len(by_class) > 1 else {}), **values}
    for case, of_case in zip(pairs, of_cases, strict=True)
    for name, values in zip(classes.names, of_case, strict=True)
  ]
  own_files.write_together(record, result, {table: lambda partial: write_csv(partial, rows)}, ())
  for name, each in result.get('classes', {}).items():
    logging.info('%s: %d volumes, means: %s', name, len(pairs), _one_line(each['measures']))
    if not any(row['true_ml'] for row in by_class[name]):
      logging.warning('%s: no reference mask has this class', name)
  over = f', over {len(by_class)} classes' if len(by_class) > 1 else ''
  logging.info('%d volumes, means%s: %s', len(pairs), over, _one_line(result['measures']))
  return result


def _summary(by_class, classes):
  """Averages over cases for each class, and their averages over the classes."""
  summaries = {name: masks.summary(rows) for name, rows in by_class.items()}
  values = dict(zip(classes.names, classes.values, strict=True))
  shared = next(iter(summaries.values()))
  return {
    **shared,
    'measures': masks.over_classes(by_class),
    'classes': {name: {'values': list(values[name]), 'measures': one['measures']} for name, one in summaries.items()},
    'intervals': {**shared['intervals'], 'over_classes': _OVER_CLASSES},
  }


def _pair(source, truth):
  """Returns {case: [prediction, reference mask]}, and the problems of other cases, one line each."""
  if source.is_file() and truth.is_file():
    return {_case(truth): [source, truth]}, []
  predicted, true = _masks(source, 'input'), _masks(truth, 'truth')
  # One file against a folder: only the case of the file is scored.
  cases = predicted if source.is_file() else true if truth.is_file() else predicted | true
  pairs, problems = {}, []
  for case in sorted(cases):
    paths = [predicted.get(case, []), true.get(case, [])]
    for first, *others in filter(None, paths):
      problems += [f'{path}: same case as {first.name} ({case}); keep one of the two' for path in others]
    if all(paths):
      pairs[case] = [each[0] for each in paths]
    elif paths[0]:
      problems.append(f'{paths[0][0]}: no reference mask for case {case} in {truth}; add it, or remove the prediction')
    else:
      problems.append(f'{paths[1][0]}: no prediction for case {case} in {source}; add it, or remove the reference mask')
  return pairs, problems


def _masks(source, flag):
  """Returns {case: its masks} for a folder or a single file. Each case should have one mask. Logs what is left out."""
  if source.is_file():
    return {_case(source): [source]}
  if not source.is_dir():
    raise UserError(
      f'{flag}: {source} does not exist; give a mask ({volume_files.VolumeFile.endings}), or a folder of masks'
    )
  folders = [path for path in source.iterdir() if path.name.lower() == 'train' and path.is_dir()]
  folder = folders[0] if len(folders) == 1 else source
  by_case, others = {}, []
  for path in sorted(folder.iterdir()):
    if is_leftover(path.name):
      continue
    if volume_files.is_volume(path) and '_probability' not in path.name.lower():
      by_case.setdefault(_case(path), []).append(path)
    else:
      others.append(path)
  if not by_case:
    seen = f' (but {sources.counted(path.name for path in others)})' if others else ''
    raise UserError(
      f'{flag}: no mask ({volume_files.VolumeFile.endings}) in {folder}{seen}; give a mask, or a folder of masks'
    )
  # A file that is named like a scan is the mask only if the case has no other file.
  is_scan = lambda path: volume_files.stem(path).lower().endswith(('_ct', '_0000'))
  found = {case: [path for path in paths if not is_scan(path)] or paths for case, paths in by_case.items()}
  others += [path for case, paths in by_case.items() for path in paths if path not in found[case]]
  of_headers = {file for paths in found.values() for path in paths for file in volume_files.data_files(path)}
  others = [path for path in others if path not in of_headers]
  if others:
    logging.info('left out of %s: %s', flag, sources.counted(path.name for path in others))
  return found


def _case(path):
  """The name of a file's case: the file name without the endings of masks and scans, in one form of ü (NFC)."""
  name = unicodedata.normalize('NFC', printable(volume_files.stem(path)))
  while name.lower().endswith(_ENDINGS):
    name = name.rpartition('_')[0]
  return name


def _one_line(measures):
  """The means with their intervals, for the log."""
  shown = lambda measure: statistics.shown(measure['mean'], measure['mean_interval'], digits=2)
  return ', '.join(f'{name} {shown(measures[name])}' for name in _LOGGED)
