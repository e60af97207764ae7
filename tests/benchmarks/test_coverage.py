"""The intervals that benchmarks/coverage.py compares with ours."""

import numpy as np
import pytest
from scipy import stats

from benchmarks import coverage


def test_other_methods():
  """For values of 0 and 1, Gaffke's bounds are Clopper and Pearson's; Anderson's contain them."""
  values = (np.arange(12) < 9).astype(float)
  exact = stats.binomtest(9, 12).proportion_ci(0.95, 'exact')
  gaffke, anderson = coverage.gaffke(values, (0, 1)), coverage.anderson(values, (0, 1))
  assert gaffke == pytest.approx([exact.low, exact.high], abs=0.03)
  assert 0 <= anderson[0] < exact.low < exact.high < anderson[1] <= 1


def test_the_table_has_a_row_per_shape_and_method():
  lines = coverage.table(3, [5]).splitlines()
  assert len(lines) == 2 + sum(6 if support == coverage.SCORE else 4 for support, _ in coverage.SHAPES.values())
  share, width = map(float, lines[2].split('|')[3].split(','))
  assert 0 <= share <= 1 and width > 0
