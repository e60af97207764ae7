"""Counts on the device compared with counts of the pixels."""

import jax
import numpy as np
import pytest
from scipy import special
from sklearn import metrics as sk

from fusa_jax.measures import histogram
from fusa_jax.system import meshes


def pixels(shape, seed=0):
  rng = np.random.default_rng(seed)
  truth = rng.random(shape) < 0.2
  return (rng.normal(-3, 5, shape) + 4 * truth).astype(np.float32), truth.astype(np.uint8)


@pytest.mark.parametrize(('data', 'space'), [(1, 1), (4, 2)])
def test_counts_at_every_threshold(data, space):
  """Compares with counts of logits above each edge; on one device, and on eight with images shared between two."""
  logits, truth = pixels((8, 16, 16))
  mesh = meshes.create_mesh(data, space, jax.devices()[: data * space])
  put = [jax.device_put(array, meshes.batched(mesh, 3)) for array in (logits, truth)]
  got = jax.device_get(jax.jit(histogram.count)(*put, 1.0))
  counts = histogram.counts_from(got['histogram'])
  for k in (0, 1, 200, 256, 257, 400, histogram.BINS - 1):
    called = logits >= histogram.edges()[k]
    for row in range(8):
      expected = sk.confusion_matrix(truth[row].ravel(), called[row].ravel(), labels=[0, 1]).ravel()
      assert [counts[key][row, k] for key in ('tn', 'fp', 'fn', 'tp')] == expected.tolist()
  assert histogram.edges()[histogram.BINS // 2] == 0  # a probability of 0.5


@pytest.mark.parametrize('temperature', [1.0, 2.5])
def test_calibration_sums(temperature):
  logits, truth = pixels((3, 900))
  got = jax.device_get(jax.jit(histogram.count)(logits, truth, temperature))
  probability = special.expit(logits.astype(np.float64) / temperature)
  for row in range(3):
    index = np.minimum((probability[row] * 20).astype(int), 19)
    expected = [np.bincount(index, weights, 20) for weights in (np.ones(900), truth[row], probability[row])]
    np.testing.assert_allclose(got['reliability'][row], expected, rtol=1e-4, atol=1e-4)
    brier = sk.brier_score_loss(truth[row], probability[row])
    assert got['squared_error'][row] / 900 == pytest.approx(brier, rel=1e-4)


def test_sums_of_a_slice_of_background_are_exact_to_float32():
  """512 x 512 pixels of equal small probabilities, against float64: added one by one, all are rounded the same way."""
  logits = np.full((1, 512, 512), -12.3, np.float32)
  got = jax.device_get(jax.jit(histogram.count)(logits, np.zeros_like(logits, np.uint8), 1.0))
  probability = special.expit(logits.astype(np.float64))
  assert got['reliability'][0, 2].sum() == pytest.approx(probability.sum(), rel=1e-5)
  one_by_one = np.cumsum(probability.ravel().astype(np.float32), dtype=np.float32)[-1]
  assert abs(one_by_one / probability.sum() - 1) > 1e-3
  assert got['reliability'][0, 0].sum() == got['histogram'].sum() == 512 * 512


def test_a_slice_with_one_logit_counts_as_one_pixel():
  logits = np.array([-1e9, -0.01, 0.0, 1e9], np.float32)
  got = jax.device_get(histogram.count(logits, np.array([0, 1, 1, 0]), 1.0))
  assert got['histogram'].sum(axis=(1, 2)).tolist() == [1] * 4
  where = [tuple(map(int, np.argwhere(rows)[0])) for rows in got['histogram']]
  middle = histogram.BINS // 2
  assert where == [(0, 0), (1, middle - 1), (1, middle), (0, histogram.BINS - 1)]
