"""Recomputes the numbers that the documents state about the code and the paper."""

import itertools
import pathlib
import re

import numpy as np
import pytest

from benchmarks import model_table
from fusa_jax.measures import metrics

# Tables I and II as printed, in percent: accuracy, precision, recall, F1; Dice, precision, recall.
TABLE_I = {
  'VGG-Net': (81.80, 89.16, 62.42, 73.43),
  'DenseNet': (84.78, 89.30, 70.19, 78.80),
  'MobileNet': (86.75, 86.97, 78.95, 82.77),
  'ResNet-18': (86.89, 89.69, 76.24, 82.42),
  'FUSAResNet18': (87.59, 88.00, 80.13, 83.88),
  'ResNet-50': (86.75, 90.34, 75.16, 82.05),
  'FUSAResNet50': (88.17, 89.66, 79.86, 84.47),
}
TABLE_II = {
  'LinkNet': (87.41, 88.01, 63.95),
  'ResUNet': (87.83, 84.27, 67.66),
  'PSPNet': (88.67, 86.47, 70.25),
  'DeepLabV3': (89.29, 83.11, 75.08),
  'FUSA-ResUnet': (89.76, 88.82, 77.38),
}
LESION_AREA = 0.0114
# Totals that do not affect the macro Dice.
SLICES = (
  'slices',
  'slice_dice',
  'slice_dice_defined',
  'patient_dice',
  'patient_dice_defined',
  'lesion_dice',
  'lesion_slices',
  'squared_error',
)


def rows_of(document, header):
  """Returns the rows below a header of a Markdown table as {first cell: other cells}."""
  lines = pathlib.Path(document).read_text().splitlines()
  start = lines.index(header) + 2
  table = itertools.takewhile(lambda line: line.startswith('|'), lines[start:])
  cells = [[cell.strip() for cell in line.strip('|').split('|')] for line in table]
  return {first: rest for first, *rest in cells}


def harmonic(p, r):
  return 2 * p * r / (p + r)


@pytest.mark.slow
def test_model_table_is_up_to_date():
  assert model_table.table() in pathlib.Path('docs/models.md').read_text()


def test_table_1_of_the_paper():
  """For all rows but DenseNet, precision and recall give the printed F1 and the same share of positive slices."""
  printed = rows_of('docs/paper.md', '| model | printed P | printed R | F1 computed | F1 printed |')
  assert printed.keys() == TABLE_I.keys()
  for name, (accuracy, p, r, f1) in TABLE_I.items():
    assert printed[name] == [f'{value:.2f}' for value in (p, r, harmonic(p, r), f1)]
    assert abs(harmonic(p, r) - f1) < (0.015 if name != 'DenseNet' else 0.3)
    a, p, r = accuracy / 100, p / 100, r / 100
    share = (1 - a) / ((1 - r) + r * (1 - p) / p)
    assert share == pytest.approx(0.403 if name != 'DenseNet' else 0.398, abs=5e-4)
  assert f'{harmonic(89.30, 70.19):.2f}' == '78.60'


def test_one_test_set_explains_table_1():
  """Between 100 and 4999 slices, only 2747 slices with 1107 positives fit all rows."""
  rows = [row for name, row in TABLE_I.items() if name != 'DenseNet']

  def fits(total, positive, accuracy, p, r, _):
    for tp in {int(r / 100 * positive), int(r / 100 * positive) + 1}:
      predicted = tp / (p / 100)
      for fp in {int(predicted - tp), int(predicted - tp) + 1}:
        found = (1 - (fp + positive - tp) / total, tp / (tp + fp), tp / positive)
        if all(abs(100 * f - printed) <= 0.005 + 1e-9 for f, printed in zip(found, (accuracy, p, r), strict=True)):
          return True
    return False

  found = [
    (total, positive)
    for total in range(100, 5000)
    for positive in range(int(0.400 * total), int(0.406 * total) + 2)
    if all(fits(total, positive, *row) for row in rows)
  ]
  assert found == [(2747, 1107)]


def test_table_2_of_the_paper():
  """The printed Dice is not the foreground Dice. The mean with the background Dice is close, except in the last row."""
  printed = rows_of('docs/paper.md', '| model | P | R | Dice printed | 2PR / (P + R) | (P + R) / 2 | macro |')
  assert printed.keys() == TABLE_II.keys()
  for name, (dice, p, r) in TABLE_II.items():
    tp = LESION_AREA * r / 100
    fn, fp = LESION_AREA - tp, tp * (100 - p) / p
    tn = 1 - tp - fn - fp
    background = 2 * tn / (2 * tn + fp + fn)
    macro = (harmonic(p, r) + 100 * background) / 2
    computed = (p, r, dice, harmonic(p, r), (p + r) / 2, macro)
    assert [float(cell) for cell in printed[name]] == pytest.approx(computed, abs=0.00501)
    assert dice > (p + r) / 2
    if name == 'FUSA-ResUnet':
      assert macro - dice == pytest.approx(1.5, abs=0.05)
    else:
      assert abs(macro - dice) < 0.505  # the largest is 0.501, for LinkNet
  # The evaluation code gives the same value for whole pixels.
  scale = 10**9
  counts = [round(scale * n) for n in (tp, fp, fn, tn)]
  totals = {key: np.array(n, float) for key, n in zip(metrics.COUNTS, counts, strict=True)}
  totals |= dict.fromkeys(SLICES, np.array(1.0)) | {'reliability': np.ones((3, 20))}
  assert metrics.segmentation(totals)['dice_macro'] == pytest.approx(macro / 100, abs=1e-6)


def test_every_dice_definition_is_documented():
  table = rows_of('docs/evaluation.md', '| key | definition | used by |')
  assert [key.strip('`') for key in table] == [key for key in metrics.DEFINITIONS if key.startswith('dice')]
  assert all(definition.strip() and users.strip() for definition, users in table.values())


def test_markdown_is_wrapped_and_the_readme_is_short():
  documents = [*pathlib.Path('.').glob('*.md'), *pathlib.Path('docs').glob('*.md')]
  long = [
    (path.name, line)
    for path in documents
    for line in path.read_text().splitlines()
    if len(line) > 120 and line[0] != '|'
  ]
  assert not long
  assert len(pathlib.Path('README.md').read_text().splitlines()) <= 170


def test_links_have_targets():
  for document in [*pathlib.Path().glob('*.md'), *pathlib.Path('docs').glob('*.md')]:
    for target in re.findall(r'\]\(([^)#:]+)(?:#[^)]*)?\)', document.read_text()):
      assert (document.parent / target).exists(), f'{document}: {target}'
