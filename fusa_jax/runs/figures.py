"""Pictures of a test: curves, calibration, patients, and overlays in the colours of the paper's Fig. 4.

Each chart is a matplotlib figure. It is a PNG file in test/figures/ and an SVG element in the report.
"""

import functools
import io
import pathlib
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from fusa_jax.measures import histogram, metrics
from fusa_jax.system.files import replacing

TRUE_POSITIVE, FALSE_POSITIVE, FALSE_NEGATIVE = (0.1, 0.35, 1.0), (0.1, 0.8, 0.2), (0.95, 0.1, 0.1)
_OF_MAPS = 'plasma'
_BLUE, _ORANGE, _GREY = '#3b78c2', '#d9822b', '#8a8f98'
# Replaced by the colour of the text in SVG, so that a chart is readable on a light and on a dark page.
_INK = '#010203'
_STYLE = {
  'svg.fonttype': 'none',
  'svg.hashsalt': 'fusa_jax',
  'font.size': 9,
  'axes.spines.top': False,
  'axes.spines.right': False,
  **dict.fromkeys(('text.color', 'axes.edgecolor', 'axes.labelcolor', 'xtick.color', 'ytick.color'), _INK),
}


def charts(
  table: dict[str, np.ndarray], result: dict, of_patients: dict[str, np.ndarray] | None = None
) -> dict[str, Figure]:
  """Returns the charts of a test by name, without those that are undefined (if all slices have the same label).

  Args:
    table: of slices, from the evaluation.
    result: the contents of metrics.json.
    of_patients: the table of patients; None draws no ROC curve of patients.
  """
  with matplotlib.rc_context(_STYLE):
    figures = {'roc_of_patients': _roc_of_patients(of_patients, result)}
    if 'labels' not in result:  # else labels are of patients, and slices are not scored
      figures |= {
        'confusion_matrix': _confusion_matrix(result),
        'roc': _roc(table['label'], table['logit'], result['operating_point']['slices'], 'slices'),
        'precision_recall': _precision_recall(table, result),
        'calibration': _calibration(table, result),
        'patients': _patients(table, 'F1' if result['counted'] == 'slices' else 'Dice'),
      }
  return {name: figure for name, figure in figures.items() if figure is not None}


def chart_writers(
  table: dict[str, np.ndarray], result: dict, of_patients: dict[str, np.ndarray] | None = None
) -> dict[str, Callable[[pathlib.Path], None]]:
  """Returns a function for each of `charts`, by the name of its file, that writes it to a path."""
  return {f'{name}.png': writer(figure) for name, figure in charts(table, result, of_patients).items()}


def writer(figure: Figure) -> Callable[[pathlib.Path], None]:
  """Returns a function that writes a chart to a path, as PNG."""
  return functools.partial(figure.savefig, dpi=120, facecolor='white')


def svg(figure: Figure, label: str) -> str:
  """Returns the figure as an SVG element in the colour of the surrounding text; equal figures give equal bytes.

  Args:
    figure: the chart.
    label: what a screen reader says in place of the chart.
  """
  out = io.StringIO()
  with matplotlib.rc_context(_STYLE):
    figure.savefig(out, format='svg', transparent=True, metadata={'Date': None, 'Creator': None})
  text = out.getvalue()
  text = re.sub(r'<metadata>.*?</metadata>', '', text[text.index('<svg') :], flags=re.DOTALL)
  return text.replace('<svg', f'<svg role="img" aria-label="{label}"', 1).replace(_INK, 'currentColor')


def learning_curves(logs: dict[str, list[dict]], selection: str) -> Figure:
  """Draws the training loss and the validation score that selects the checkpoint, by step; one line per run."""
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


def threshold_curve(curve: dict, chosen: float, overlap: str) -> Figure:
  """Draws Dice (or F1, as `overlap` says), sensitivity and precision by threshold, and marks the operating point."""
  with matplotlib.rc_context(_STYLE):
    figure, (axes,) = _figure(1)
    for name, label, colour in (
      ('dice', overlap, _BLUE),
      ('sensitivity', 'sensitivity', _ORANGE),
      ('precision', 'precision', _GREY),
    ):
      axes.plot(curve['threshold'], [np.nan if v is None else v for v in curve[name]], color=colour, label=label)
    axes.axvline(chosen, color=_INK, linewidth=1, linestyle='--')
    axes.axvline(0.5, color=_INK, linewidth=0.6, linestyle=':')
    axes.set(xlabel='threshold (dashed: chosen)', ylabel='score on the validation fold', xlim=(0, 1), ylim=(0, 1.02))
    axes.legend(frameon=False)
  return figure


def _figure(panels, width=4.0, height=3.6):
  figure = Figure(figsize=(width * panels, height), layout='constrained')
  return figure, np.atleast_1d(figure.subplots(1, panels))


def confusion_matrix(counts: np.ndarray, names: Sequence[str], called: str) -> Figure:
  """Draws a confusion matrix: each count with its share of its row, which the colour shows.

  Args:
    counts: [K, K], by true class (row) and predicted class (column).
    names: of the classes [K].
    called: what is counted and how a class was predicted, for example 'slices, threshold 0.5'.
  """
  counts = np.asarray(counts)
  side = max(1.0, len(names) / 4)
  with matplotlib.rc_context(_STYLE):
    figure, (axes,) = _figure(1, 4.0 * side, 3.6 * side)
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    axes.imshow(share, cmap='Blues', vmin=0, vmax=1)
    for (row, column), count in np.ndenumerate(counts):
      colour = 'white' if share[row, column] > 0.5 else 'black'
      axes.text(column, row, f'{count:,}\n{share[row, column]:.1%}', ha='center', va='center', color=colour)
    turned = {'rotation': 30, 'ha': 'right', 'rotation_mode': 'anchor'} if len(names) > 2 else {}
    axes.set_xticks(range(len(names)), names, parse_math=False, **turned)
    axes.set_yticks(range(len(names)), names, parse_math=False)
    axes.set(xlabel=f'predicted ({called})', ylabel='true')
  return figure


def _confusion_matrix(result):
  counts = np.array([[result['tn'], result['fp']], [result['fn'], result['tp']]])
  return confusion_matrix(counts, ['no lesion', 'lesion'], f'{result["counted"]}, threshold 0.5')


def _roc(label, score, point, counted):
  """The ROC curve, with the operating point if it has a specificity and a sensitivity."""
  label = np.asarray(label) > 0
  if label.all() or not label.any():
    return None
  figure, (axes,) = _figure(1)
  axes.plot(*_thinned(*metrics.roc(label, score)), color=_BLUE)
  axes.plot([0, 1], [0, 1], color=_GREY, linestyle=':')
  if point['specificity'] is not None:
    axes.plot(1 - point['specificity'], point['sensitivity'], 'o', color=_ORANGE, label='operating point')
    axes.legend(frameon=False, loc='lower right')
  axes.set(xlabel=f'1 - specificity ({counted})', ylabel=f'sensitivity ({counted})', aspect='equal')
  return figure


def _roc_of_patients(of_patients, result):
  if of_patients is None:
    return None
  known = np.isfinite(of_patients['score'])
  return _roc(of_patients['label'][known], of_patients['score'][known], result['patient'], 'patients')


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
  if axes.get_legend_handles_labels()[0]:
    axes.legend(frameon=False, loc='lower left')
  return figure


def _calibration(table, result):
  """Draws a reliability diagram above the share of pixels or slices in each bin."""
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


def _patients(table, overlap):
  """Dice (for slices: F1) of each patient with lesion, at 0.5 and at the operating point, sorted by the latter.

  Dice does not measure a patient without lesion. The report gives the falsely marked volume of these patients instead.
  """
  rows = [metrics.patient_rows(metrics.by_patient(table, suffix)) for suffix in ('', '_chosen')]
  half, chosen = (np.array([row['dice'] for row in each]) for each in rows)
  shown = np.array([row['tp'] + row['fn'] > 0 for row in rows[0]])
  if not shown.any():
    return None
  order = np.argsort(chosen[shown])
  names = np.array([row['patient'] for row in rows[0]])[shown][order]
  figure, (axes,) = _figure(1, width=7, height=max(1.8, 0.8 + 0.16 * len(names)) if len(names) <= 60 else 3.6)
  axes.plot(half[shown][order], range(len(names)), 'o', color='none', markeredgecolor=_GREY, label='threshold 0.5')
  axes.plot(chosen[shown][order], range(len(names)), 'o', color=_BLUE, markersize=4, label='operating point')
  axes.set(xlabel=f'{overlap} of the patient', xlim=(-0.02, 1.02))
  if len(names) <= 60:
    axes.set_yticks(range(len(names)), names, fontsize=7, parse_math=False)
  else:
    axes.set(ylabel=f'{len(names)} patients', yticks=[])
  axes.legend(frameon=False, loc='lower right')
  return figure


def _thinned(x, y, most=500):
  """Keeps at most `most` points of a curve, with both ends: more would only enlarge the report."""
  at = np.unique(np.linspace(0, len(x) - 1, most).astype(int))
  return x[at], y[at]


def telling_slices(table: dict[str, np.ndarray], most: int) -> list[int]:
  """Returns the row of one slice per patient: the worst patient first, then the best, the second worst, and so on.

  The order is by Dice (of slices: F1) at the operating point. The slice of a patient is the one with the most lesion or
  marks and, among equals, the one with the largest error of the score.
  """
  rows = _rows_of_owners(table)
  ordered = sorted(rows, key=lambda owner: (np.isnan(rows[owner]['dice']), rows[owner]['dice']))
  defined = [owner for owner in rows if np.isfinite(rows[owner]['dice'])]
  measured, rest = ordered[: len(defined)], ordered[len(defined) :]
  alternating = [measured[k // 2] if k % 2 == 0 else measured[-1 - k // 2] for k in range(len(measured))]
  return [_telling_slice(table, owner) for owner in [*alternating, *rest]][:most]


def _rows_of_owners(table):
  """The row of patients.csv of each person, at the operating point."""
  patients = metrics.by_patient(table, '_chosen')
  return dict(zip(patients.owners, metrics.patient_rows(patients), strict=True))


def _telling_slice(table, owner):
  extent = table['tp_chosen'] + table['fn_chosen'] + table['fp_chosen']
  error = np.abs(table['label'] - table['score'])
  return int(max(np.flatnonzero(table['owner'] == owner), key=lambda row: (extent[row], error[row])))


def typical_slices(table: dict[str, np.ndarray]) -> dict[str, int]:
  """Returns one row of a slice, as `telling_slices`, per title: of the best, the median and the worst patient.

  Patients without lesion are left out: Dice does not measure them.
  """
  rows = [(owner, row) for owner, row in _rows_of_owners(table).items() if row['tp'] + row['fn']]
  rows = sorted(rows, key=lambda pair: -pair[1]['dice'])
  places = {'best': 0, 'median': len(rows) // 2, 'worst': len(rows) - 1} if rows else {}
  return {
    f'{name} of {len(rows)} patients with lesion, Dice {rows[place][1]["dice"]:.2f}': _telling_slice(
      table, rows[place][0]
    )
    for name, place in places.items()
  }


def write_overlay(
  path: pathlib.Path,
  values: np.ndarray,
  mask: np.ndarray | None,
  predictions: Mapping[str, np.ndarray],
  black_and_white: tuple[float, float],
  intensity: str,
  title: str,
) -> None:
  """Draws a slice, then the slice per prediction: true positives blue, false positives green, false negatives red.

  Every pixel of the slice is a square of whole pixels of the picture; nothing is interpolated.

  Args:
    path: the PNG file.
    values: [H, W], HU or 8-bit values.
    mask: [H, W], the reference; None without a reference mask.
    predictions: bool [H, W] by the name of the run. With {} (a model without masks) the reference is red.
    black_and_white: the values that are drawn black and white.
    intensity: of the values, one of volumes.VALUES.
    title: text above the picture. The values of black and white, and the names of several runs, are added to it.
  """
  black, white = black_and_white
  pictures, parts = _pictures(values, mask, predictions, black_and_white)

  times = max(1, round(384 / values.shape[1]))
  height, width, above, below, gap = values.shape[0] * times, values.shape[1] * times, 44, 30, 8
  total = np.array([len(pictures) * (width + gap) - gap, height + above + below])
  figure = Figure(figsize=total / 100, dpi=100, facecolor='white')
  for k, picture in enumerate(pictures):
    axes = figure.add_axes((k * (width + gap) / total[0], below / total[1], width / total[0], height / total[1]))
    axes.imshow(picture.repeat(times, axis=0).repeat(times, axis=1), interpolation='none')
    axes.set_axis_off()
  _colour_legend(figure, parts)
  unit = {'hu': 'HU', 'grey': 'grey'}[intensity]
  text = f'{title}\n{unit} {black:g} (black) to {white:g} (white)'
  if len(predictions) > 1:
    text += f'; left to right: the slice, {", ".join(predictions)}'
  figure.text(0.5, 1 - above / 2 / total[1], text, ha='center', va='center', fontsize=8, parse_math=False)
  with replacing(path) as partial:
    figure.savefig(partial, dpi=100)


def write_overview(
  path: pathlib.Path,
  rows: Sequence[tuple[str, np.ndarray, np.ndarray | None, Mapping[str, np.ndarray]]],
  black_and_white: tuple[float, float],
) -> None:
  """Draws the slices of some patients below each other, as `write_overlay` draws one.

  Args:
    path: the PNG file.
    rows: per slice: title, then values, mask and at most one prediction, as in `write_overlay`.
    black_and_white: the values that are drawn black and white.
  """
  figure = Figure(figsize=(6.4, 3.45 * len(rows) + 0.35), layout='constrained', facecolor='white')
  for axes, (title, values, mask, predictions) in zip(figure.subplots(len(rows), 2, squeeze=False), rows, strict=True):
    pictures, parts = _pictures(values, mask, predictions, black_and_white)
    for one, picture in zip(axes, pictures, strict=True):
      one.imshow(picture, interpolation='none')
      one.set_axis_off()
    axes[0].set_title(title, loc='left', fontsize=9, parse_math=False)
  _colour_legend(figure, parts)
  with replacing(path) as partial:
    figure.savefig(partial, dpi=110)


def write_explanation(
  path: pathlib.Path,
  title: str,
  rows: Sequence[tuple[str, np.ndarray, Sequence[np.ndarray]]],
  scales: Sequence[tuple[str, tuple[float, float]]],
  black_and_white: tuple[float, float],
) -> None:
  """Draws slices below each other, each beside itself with a map laid over it, in the colours of one scale per map.

  The colours are none of those of masks. At the lower end of its scale a map is transparent.

  Args:
    path: the PNG file.
    title: text above the picture, and in its metadata.
    rows: per slice: title, values [H, W], and its maps [H, W], in the order of `scales`; no maps: the slice alone.
    scales: per map: its title, and the values at the ends of its colours.
    black_and_white: the values that are drawn black and white.
  """
  figure = Figure(figsize=(3.2 * (1 + len(scales)), 3.45 * len(rows) + 1), layout='constrained', facecolor='white')
  *panels, bars = figure.subplots(
    len(rows) + 1, 1 + len(scales), squeeze=False, height_ratios=[*(1 for _ in rows), 0.04]
  )
  for axes, (of_slice, values, maps) in zip(panels, rows, strict=True):
    plain = _grey(values, black_and_white)
    axes[0].imshow(plain)
    axes[0].set_title(of_slice, loc='left', fontsize=9, parse_math=False)
    for one, values_of_map, (_, limits) in zip(axes[1:], maps, scales, strict=False):
      one.imshow(_under_map(plain, values_of_map, limits))
      one.set_title(f'{values_of_map.min():.3g} to {values_of_map.max():.3g}', loc='left', fontsize=9)
    for one in axes:
      one.set_axis_off()
  bars[0].set_axis_off()
  for bar, (name, limits) in zip(bars[1:], scales, strict=True):
    colours = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(*limits), _OF_MAPS)
    figure.colorbar(colours, cax=bar, orientation='horizontal').set_label(name, fontsize=8)
    bar.tick_params(labelsize=8)
    bar.locator_params(axis='x', nbins=5)  # long numbers would touch each other
  per_line = int(13 * figure.get_figwidth())  # characters
  lines = [part for line in title.splitlines() for part in textwrap.wrap(line, per_line)]
  figure.suptitle('\n'.join(lines), fontsize=9, parse_math=False)
  with replacing(path) as partial:
    figure.savefig(partial, dpi=110, metadata={'Title': title})


def _under_map(plain, values, limits):
  """Returns a grey slice [H, W, 3] in the colours of a map, which covers the more of it, the higher its value."""
  low, high = limits
  share = np.clip((values - low) / (high - low), 0, 1)
  opacity = 0.6 * share[..., None]
  return (1 - opacity) * plain + opacity * matplotlib.colormaps[_OF_MAPS](share)[..., :3]


def _grey(values, black_and_white):
  black, white = black_and_white
  grey = np.clip((values.astype(np.float32) - black) / (white - black), 0, 1)
  return np.repeat(grey[..., None], 3, axis=-1)


def _pictures(values, mask, predictions, black_and_white):
  """Returns the slice in grey and once per prediction in colour, and the coloured parts by name."""
  plain = _grey(values, black_and_white)
  mask = None if mask is None else np.asarray(mask, bool)
  parts = [_parts(mask, predicted) for predicted in (predictions.values() if predictions else [None])]
  return [plain, *(_coloured(plain, one) for one in parts)], parts[0]


def _colour_legend(figure, parts):
  patches = [matplotlib.patches.Patch(color=colour, label=name) for name, (_, colour) in parts.items()]
  where = 'outside lower center' if figure.get_layout_engine() else 'lower center'
  figure.legend(handles=patches, loc=where, ncols=3, frameon=False, fontsize=8, borderaxespad=0.1)


def _parts(mask, predicted):
  """Returns where a picture is coloured, and the colour, by name."""
  if mask is None:
    return {}
  if predicted is None:
    return {'lesion in the reference': (mask, FALSE_NEGATIVE)}
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
