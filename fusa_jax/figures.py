"""Pictures of an evaluation: confusion matrix, ROC curve, and overlays in the colours of the paper's Fig. 4."""

import pathlib

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from fusa_jax import metrics
from fusa_jax.files import replacing

TRUE_POSITIVE, FALSE_POSITIVE, FALSE_NEGATIVE = (0.1, 0.35, 1.0), (0.1, 0.8, 0.2), (0.95, 0.1, 0.1)


def write_scores(folder: pathlib.Path, table: dict[str, np.ndarray]) -> None:
  """confusion_matrix.png (slices or pixels, as the table counts) and roc.png (slices; left out where undefined)."""
  n = metrics.confusion(table)
  counts = np.array([[n['tn'], n['fp']], [n['fn'], n['tp']]])
  figure = Figure(figsize=(4, 4), layout='constrained')
  axes = figure.subplots()
  share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
  axes.imshow(share, cmap='Blues', vmin=0, vmax=1)
  for (row, column), count in np.ndenumerate(counts):
    colour = 'white' if share[row, column] > 0.5 else 'black'
    axes.text(column, row, f'{count:,}\n{share[row, column]:.1%}', ha='center', va='center', color=colour)
  names = ['no lesion', 'lesion']
  axes.set(xticks=[0, 1], xticklabels=names, yticks=[0, 1], yticklabels=names, xlabel='predicted', ylabel='true')
  _save(figure, folder / 'confusion_matrix.png')

  area = metrics.auc(table['label'], table['score'])
  if area is None:
    return
  figure = Figure(figsize=(4, 4), layout='constrained')
  axes = figure.subplots()
  axes.plot(*metrics.roc(table['label'], table['score']), label=f'AUC {area:.3f}')
  axes.plot([0, 1], [0, 1], color='grey', linestyle=':')
  axes.set(xlabel='false positive rate (slices)', ylabel='true positive rate (slices)', aspect='equal')
  axes.legend(loc='lower right')
  _save(figure, folder / 'roc.png')


def telling_slices(table: dict[str, np.ndarray], most: int) -> list[int]:
  """Rows worth a look: of each patient in turn the slice with the most lesion, then those with the most error."""
  lesion, error = table['tp'] + table['fn'], table['fp'] + table['fn']
  first = [max(np.flatnonzero(table['patient'] == p), key=lesion.__getitem__) for p in np.unique(table['patient'])]
  worst = [row for row in np.argsort(-error, kind='stable') if error[row]]
  return list(dict.fromkeys(int(row) for row in [*first, *worst]))[:most]


def write_overlay(
  path: pathlib.Path, hu: np.ndarray, mask: np.ndarray, predicted: np.ndarray, window: tuple[float, float]
) -> None:
  """The slice, and beside it the same with true positives blue, false positives green, false negatives red.

  Args:
    path: of the PNG.
    hu: [H, W].
    mask: [H, W], what is true.
    predicted: bool [H, W].
    window: HU shown as black and white.
  """
  mask = np.asarray(mask, bool)
  grey = np.clip((hu.astype(np.float32) - window[0]) / (window[1] - window[0]), 0, 1)
  plain = np.repeat(grey[..., None], 3, axis=-1)
  coloured = plain.copy()
  parts = {
    'true positive': (mask & predicted, TRUE_POSITIVE),
    'false positive': (~mask & predicted, FALSE_POSITIVE),
    'false negative': (mask & ~predicted, FALSE_NEGATIVE),
  }
  for where, colour in parts.values():
    coloured[where] = 0.5 * coloured[where] + 0.5 * np.asarray(colour)
  figure = Figure(figsize=(8, 4.3), layout='constrained')
  for axes, picture in zip(figure.subplots(1, 2), (plain, coloured), strict=True):
    axes.imshow(picture, interpolation='nearest')
    axes.set_axis_off()
  patches = [matplotlib.patches.Patch(color=colour, label=name) for name, (_, colour) in parts.items()]
  figure.legend(handles=patches, loc='outside lower center', ncols=3, frameon=False)
  figure.suptitle(path.stem, fontsize='medium')
  _save(figure, path)


def _save(figure, path):
  with replacing(path) as partial:
    figure.savefig(partial, dpi=120)
