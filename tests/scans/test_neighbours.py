"""Which slices are the channels of an input, compared with a walk from each slice outwards."""

import numpy as np
import pytest

from fusa_jax.scans.neighbours import SLICE_ALONE, Context, middle, stacked


def walked(count, spacing, context, mm):
  """The channels of each slice: from the slice one step at a time, up to the edge of the scan or the limit in mm."""
  rows = []
  for place in range(count):
    row = [place]
    for side in (-1, 1):
      reached = place
      for step in range(1, context + 1):
        nearer_than_limit = np.isnan(spacing) or step * spacing <= mm
        if 0 <= place + side * step < count and nearer_than_limit:
          reached = place + side * step
        row.insert(0 if side < 0 else len(row), reached)
    rows.append(row)
  return rows


@pytest.mark.parametrize(
  ('count', 'spacing', 'context', 'mm'),
  [
    (5, 5.0, 1, 10.0),
    (5, 5.0, 2, 10.0),
    (6, 5.0, 3, 10.0),  # the third neighbour is too far away
    (4, 8.0, 2, 10.0),  # so is the second
    (4, 12.0, 2, 10.0),  # all are
    (3, float('nan'), 2, 10.0),  # of pictures, the distance is unknown
    (1, 5.0, 2, 10.0),
    (2, 0.7, 4, 1.4),
  ],
)
def test_channels_of_each_slice(count, spacing, context, mm):
  np.testing.assert_array_equal(Context(context, mm).indices(count, spacing), walked(count, spacing, context, mm))


def test_a_limit_allows_for_rounded_headers():
  for spacing in (5.000002, np.float32(5.0), np.float32(0.1) * 50):
    assert Context(2, 10.0).indices(5, spacing)[2].tolist() == [0, 1, 2, 3, 4]
  assert Context(2, 10.0).indices(5, 5.02)[2].tolist() == [1, 1, 2, 3, 3]


def test_channels_are_stacked_last_with_the_slice_in_the_middle():
  slices = np.arange(4)[:, None, None] * np.ones((1, 2, 3), np.int16)
  inputs = stacked(slices, Context(1, 10.0).indices(4, 5.0)[1:3])
  assert inputs.shape == (2, 2, 3, 3) and inputs[:, 1, 2].tolist() == [[0, 1, 2], [1, 2, 3]]
  np.testing.assert_array_equal(middle(inputs[0]), slices[1])
  np.testing.assert_array_equal(middle(slices[1]), slices[1])
  assert SLICE_ALONE.channels == 1 and Context(2, 1.0).channels == 5
