"""Pictures of a test: curves, calibration, patients, and overlays in the colours of the paper's Fig. 4.

Each chart is a matplotlib figure, written as PNG beside the numbers and set into the report as SVG.
"""

import io
import pathlib
import re
from collections.abc import Mapping

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from fusa_jax.measures import histogram, metrics
from fusa_jax.system.files import replacing

TRUE_POSITIVE, FALSE_POSITIVE, FALSE_NEGATIVE = (0.1, 0.35, 1.0), (0.1, 0.8, 0.2), (0.95, 0.1, 0.1)
_BLUE, _ORANGE, _GREY = '#3b78c2', '#d9822b', '#8a8f98'
# Stands for the colour of text, in SVG that is to be read on a light page and on a dark one.
_INK = '#010203'
_STYLE = {
  'svg.fonttype': 'none',
  'svg.hashsalt': 'fusa_jax',
  'font.size': 9,
  'axes.spines.top': False,
  'axes.spines.right': False,
  **dict.fromkeys(('text.color', 'axes.edgecolor', 'axes.labelcolor', 'xtick.color', 'ytick.color'), _INK),
}


def charts(table: dict[str, np.ndarray], result: dict) -> dict[str, Figure]:
  """The charts of a test, by name; those that are undefined (one kind of slice only) are left out.

  Args:
    table: of slices, as evaluation leaves it.
    result: what metrics.json holds.
  """
  with matplotlib.rc_context(_STYLE):
    found = {
      'confusion_matrix': _confusion_matrix(result),
      'roc': _roc(table, result),
      'precision_recall': _precision_recall(table, result),
      'calibration': _calibration(table, result),
      'patients': _patients(table),
    }
  return {name: figure for name, figure in found.items() if figure is not None}


def write_charts(folder: pathlib.Path, table: dict[str, np.ndarray], result: dict) -> None:
  """Each of `charts` as NAME.png."""
  for name, figure in charts(table, result).items():
    with replacing(folder / f'{name}.png') as partial:
      figure.savefig(partial, dpi=120, facecolor='white')


def svg(figure: Figure) -> str:
  """The figure as an SVG element that takes the colour of the text around it; the same bytes for the same figure."""
  out = io.StringIO()
  with matplotlib.rc_context(_STYLE):
    figure.savefig(out, format='svg', transparent=True, metadata={'Date': None, 'Creator': None})
  text = out.getvalue()
  return re.sub(r'<metadata>.*?</metadata>', '', text[text.index('<svg') :], flags=re.DOTALL).replace(
    _INK, 'currentColor'
  )


def learning_curves(logs: dict[str, list[dict]], selection: str) -> Figure:
  """Training loss, and the validation score by which the checkpoint was chosen, over steps; a line for each run."""
  with matplotlib.rc_context(_STYLE):
    figure, (left, right) = _figure(2)
    for name, log in logs.items():
      for axes, key, marker in ((left, 'train/loss', None), (right, f'validation/{selection}', 'o')):
        points = [(entry['step'], entry[key]) for entry in log if entry.get(key) is not None]
        axes.plot(*np.reshape(points, (-1, 2)).T, marker=marker, markersize=4, label=name)
    left.set(xlabel='step', ylabel='training loss')
    right.set(xlabel='step', ylabel=f'validation {selection}', xlim=left.get_xlim())
    if len(logs) > 1:
      left.legend(frameon=False)
  return figure


def threshold_curve(curve: dict, chosen: float) -> Figure:
  """Dice, sensitivity and precision on the validation fold at every threshold, and where the operating point lies."""
  with matplotlib.rc_context(_STYLE):
    figure, (axes,) = _figure(1)
    for name, colour in (('dice', _BLUE), ('sensitivity', _ORANGE), ('precision', _GREY)):
      axes.plot(curve['threshold'], [np.nan if v is None else v for v in curve[name]], color=colour, label=name)
    axes.axvline(chosen, color=_INK, linewidth=1, linestyle='--')
    axes.axvline(0.5, color=_INK, linewidth=0.6, linestyle=':')
    axes.set(xlabel='threshold (dashed: chosen)', ylabel='validation fold', xlim=(0, 1), ylim=(0, 1.02))
    axes.legend(frameon=False)
  return figure


def _figure(panels, width=4.0, height=3.6):
  figure = Figure(figsize=(width * panels, height), layout='constrained')
  return figure, np.atleast_1d(figure.subplots(1, panels))


def _confusion_matrix(result):
  counts = np.array([[result['tn'], result['fp']], [result['fn'], result['tp']]])
  figure, (axes,) = _figure(1)
  share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
  axes.imshow(share, cmap='Blues', vmin=0, vmax=1)
  for (row, column), count in np.ndenumerate(counts):
    colour = 'white' if share[row, column] > 0.5 else 'black'
    axes.text(column, row, f'{count:,}\n{share[row, column]:.1%}', ha='center', va='center', color=colour)
  names = ['no lesion', 'lesion']
  axes.set(xticks=[0, 1], xticklabels=names, yticks=[0, 1], yticklabels=names)
  axes.set(xlabel=f'predicted ({result["counted"]}, threshold 0.5)', ylabel='true')
  return figure


def _roc(table, result):
  label = np.asarray(table['label']) > 0
  if label.all() or not label.any():
    return None
  figure, (axes,) = _figure(1)
  axes.plot(*_thinned(*metrics.roc(label, table['logit'])), color=_BLUE)
  axes.plot([0, 1], [0, 1], color=_GREY, linestyle=':')
  found = result['operating_point']['slices']
  axes.plot(1 - found['specificity'], found['sensitivity'], 'o', color=_ORANGE, label='operating point')
  axes.set(xlabel='1 - specificity (slices)', ylabel='sensitivity (slices)', aspect='equal')
  axes.legend(frameon=False, loc='lower right')
  return figure


def _precision_recall(table, result):
  counts = {
    key: values.astype(float) for key, values in histogram.counts_from(table['histogram'].sum(0, dtype=int)).items()
  }
  if not counts['tp'][0]:
    return None
  called = counts['tp'] + counts['fp']
  recall = counts['tp'][called > 0] / counts['tp'][0]
  precision = counts['tp'][called > 0] / called[called > 0]
  figure, (axes,) = _figure(1)
  axes.plot(recall, precision, color=_BLUE)
  share = counts['tp'][0] / (counts['tp'][0] + counts['fp'][0])
  axes.axhline(share, color=_GREY, linestyle=':')
  for at, colour, name in ((result, _INK, '0.5'), (result['operating_point'], _ORANGE, 'operating point')):
    if at['precision'] is not None:
      axes.plot(at['recall'], at['precision'], 'o', color=colour, label=name)
  axes.set(xlabel=f'recall ({result["counted"]})', ylabel=f'precision ({result["counted"]})')
  axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect='equal')
  axes.legend(frameon=False, loc='lower left')
  return figure


def _calibration(table, result):
  """Reliability diagram, over the share of all that lies in each bin."""
  count, positive, probability = table['reliability'].sum(axis=0, dtype=np.float64)
  used = count > 0
  figure = Figure(figsize=(4, 3.6), layout='constrained')
  axes, below = figure.subplots(2, 1, height_ratios=(4, 1), sharex=True)
  axes.plot([0, 1], [0, 1], color=_GREY, linestyle=':')
  axes.plot(probability[used] / count[used], positive[used] / count[used], color=_BLUE, marker='o', markersize=4)
  axes.set(ylabel='share with lesion', ylim=(-0.02, 1.02))
  edges = np.linspace(0, 1, len(count) + 1)
  below.bar(edges[:-1], count / count.sum(), width=1 / len(count), align='edge', color=_BLUE)
  below.set(xlabel=f'probability of lesion ({result["counted"]})', ylabel='share', yscale='log', xlim=(-0.02, 1.02))
  return figure


def _patients(table):
  """A dot a patient: Dice (for slices: F1) at 0.5 and at the operating point, patients in order of the latter."""
  rows = [metrics.patient_rows(metrics.by_patient(table, suffix)) for suffix in ('', '_chosen')]
  half, chosen = (np.array([row['dice'] for row in each]) for each in rows)
  shown = np.isfinite(half) | np.isfinite(chosen)
  if not shown.any():
    return None
  order = np.argsort(chosen[shown])
  names = np.array([row['patient'] for row in rows[0]])[shown][order]
  figure, (axes,) = _figure(1, width=7, height=max(1.8, 0.8 + 0.16 * len(names)) if len(names) <= 60 else 3.6)
  axes.plot(half[shown][order], range(len(names)), 'o', color='none', markeredgecolor=_GREY, label='threshold 0.5')
  axes.plot(chosen[shown][order], range(len(names)), 'o', color=_BLUE, markersize=4, label='operating point')
  axes.set(xlabel='Dice of the patient', xlim=(-0.02, 1.02))
  if len(names) <= 60:
    axes.set_yticks(range(len(names)), names, fontsize=7, parse_math=False)
  else:
    axes.set(ylabel=f'{len(names)} patients', yticks=[])
  axes.legend(frameon=False, loc='lower right')
  return figure


def _thinned(x, y, most=500):
  """At most so many points of a curve, its ends among them: a report has no use for thousands."""
  at = np.unique(np.linspace(0, len(x) - 1, most).astype(int))
  return x[at], y[at]


def telling_slices(table: dict[str, np.ndarray], most: int) -> list[int]:
  """Rows worth a look: of each patient one slice, the worst patient first, then the best, the second worst, ...

  Patients are ordered by their Dice (of slices: F1) at the operating point. Shown is their slice with the most that is
  lesion or called so and, among equals, the one whose score is most wrong.
  """
  rows = metrics.patient_rows(metrics.by_patient(table, '_chosen'))
  ordered = [row['patient'] for row in sorted(rows, key=lambda row: (np.isnan(row['dice']), row['dice']))]
  seen = table['tp_chosen'] + table['fn_chosen'] + table['fp_chosen']
  error = np.abs(table['label'] - table['score'])
  best_of = {
    patient: max(np.flatnonzero(table['patient'] == patient), key=lambda row: (seen[row], error[row]))
    for patient in ordered
  }
  defined = [row['patient'] for row in rows if np.isfinite(row['dice'])]
  measured, rest = ordered[: len(defined)], ordered[len(defined) :]
  alternating = [measured[k // 2] if k % 2 == 0 else measured[-1 - k // 2] for k in range(len(measured))]
  return [int(best_of[patient]) for patient in [*alternating, *rest]][:most]


def write_overlay(
  path: pathlib.Path,
  values: np.ndarray,
  mask: np.ndarray | None,
  predictions: Mapping[str, np.ndarray],
  black_and_white: tuple[float, float],
  intensity: str,
  title: str,
) -> None:
  """The slice, then once for each prediction with true positives blue, false positives green, false negatives red.

  Every pixel of the slice is a square of whole pixels of the picture: nothing is interpolated.

  Args:
    path: of the PNG.
    values: [H, W], in HU or grey.
    mask: [H, W], the reference; None without a reference mask.
    predictions: bool [H, W] by the name of the run; {} of a model without masks: the reference is shown in red.
    black_and_white: the values that are shown black and white.
    intensity: of the values, one of volumes.VALUES.
    title: above the picture; what black and white are is added, and the names of several runs.
  """
  black, white = black_and_white
  grey = np.clip((values.astype(np.float32) - black) / (white - black), 0, 1)
  plain = np.repeat(grey[..., None], 3, axis=-1)
  mask = None if mask is None else np.asarray(mask, bool)
  parts = [_parts(mask, predicted) for predicted in (predictions.values() if predictions else [None])]
  pictures = [plain, *(_coloured(plain, one) for one in parts)]

  times = max(1, round(384 / values.shape[1]))
  height, width, above, below, gap = values.shape[0] * times, values.shape[1] * times, 44, 30, 8
  total = np.array([len(pictures) * (width + gap) - gap, height + above + below])
  figure = Figure(figsize=total / 100, dpi=100, facecolor='white')
  for k, picture in enumerate(pictures):
    axes = figure.add_axes((k * (width + gap) / total[0], below / total[1], width / total[0], height / total[1]))
    axes.imshow(picture.repeat(times, axis=0).repeat(times, axis=1), interpolation='none')
    axes.set_axis_off()
  patches = [matplotlib.patches.Patch(color=colour, label=name) for name, (_, colour) in parts[0].items()]
  figure.legend(handles=patches, loc='lower center', ncols=3, frameon=False, fontsize=8, borderaxespad=0.1)
  unit = {'hu': 'HU', 'grey': 'grey'}[intensity]
  text = f'{title}\n{unit} {black:g} (black) to {white:g} (white)'
  if len(predictions) > 1:
    text += f'; left to right: the slice, {", ".join(predictions)}'
  figure.text(0.5, 1 - above / 2 / total[1], text, ha='center', va='center', fontsize=8, parse_math=False)
  with replacing(path) as partial:
    figure.savefig(partial, dpi=100)


def _parts(mask, predicted):
  """By name, where a picture is coloured, and how."""
  if mask is None:
    return {}
  if predicted is None:
    return {'lesion (truth)': (mask, FALSE_NEGATIVE)}
  return {
    'true positive': (mask & predicted, TRUE_POSITIVE),
    'false positive': (~mask & predicted, FALSE_POSITIVE),
    'false negative': (mask & ~predicted, FALSE_NEGATIVE),
  }


def _coloured(plain, parts):
  picture = plain.copy()
  for where, colour in parts.values():
    picture[where] = 0.5 * picture[where] + 0.5 * np.asarray(colour)
  return picture
