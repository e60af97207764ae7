"""Counts the pixels of each slice by logit and truth, on the device. Thresholds and calibration need only these counts.

The histogram of a slice takes 4 kB, its probabilities take a megabyte. Counts at every threshold follow exactly from
the histogram. Only the sum over all slices leaves the device, with the counts of each slice at one or two thresholds:
4 kB for each of 3 million slices would be 12 GB. In classification a slice has one logit and counts as one pixel.
"""

import jax
import jax.numpy as jnp
import numpy as np

# Bins of logits from -16 to 16, 1/16 wide; the outer bins also count everything beyond. As probabilities, the edges are
# 1/64 apart around 0.5, which is an edge. They are denser towards 0 and 1, where most pixels are.
_PER_UNIT, _REACH = 16, 16
BINS = 2 * _REACH * _PER_UNIT
HALF = BINS // 2  # the bin that begins at a probability of 0.5
RELIABILITY_BINS = 20  # of equal width in probability
_PART = 512  # pixels that are summed one after the other


def count(
  logits: jax.Array, truth: jax.Array, temperature: jax.Array, known: jax.Array | None = None
) -> dict[str, jax.Array]:
  """Counts the pixels of each slice, for logits [B, ...] in float32 and truth [B, ...] {0, 1}.

  The probability of a pixel is sigmoid(logit / temperature). Only pixels where `known`, bool [B, ...], is true are
  counted; None: all.

  Returns:
    histogram: int32 [B, 2, BINS], number of pixels by truth and bin of logit, without the temperature.
    reliability: float32 [B, 3, RELIABILITY_BINS], by bin of probability: number of pixels, number of lesion pixels, sum
      of probabilities.
    squared_error: float32 [B], sum of (probability - truth)^2.
  """
  logits, truth = (array.reshape(len(array), -1) for array in (logits.astype(jnp.float32), truth > 0))
  fine = jnp.clip(jnp.floor(logits * _PER_UNIT) + HALF, 0, BINS - 1).astype(jnp.int32)
  probability = jax.nn.sigmoid(logits / temperature)
  coarse = jnp.clip((probability * RELIABILITY_BINS).astype(jnp.int32), 0, RELIABILITY_BINS - 1)
  values = jnp.stack([jnp.ones_like(probability), truth.astype(jnp.float32), probability], axis=-1)
  squared, fine = (probability - truth) ** 2, fine + BINS * truth
  if known is not None:
    known = known.reshape(len(known), -1)
    squared = jnp.where(known, squared, 0)
    # Outside of the bins: not added.
    fine, coarse = jnp.where(known, fine, 2 * BINS), jnp.where(known, coarse, RELIABILITY_BINS)
  return {
    'histogram': _sums(fine, jnp.ones_like(fine), 2 * BINS).reshape(-1, 2, BINS),
    'reliability': _sums(coarse, values, RELIABILITY_BINS).transpose(0, 2, 1),
    'squared_error': jnp.sum(squared, axis=1),
  }


def _sums(index, values, bins):
  """Sums values [B, N, ...] by their index [B, N]: [B, bins, ...].

  Sums parts of N first. A float32 sum of a whole slice, one pixel after the other, would lose most digits of the small
  probabilities of the background.
  """
  batch, count = index.shape
  part = min(_PART, count)
  padding = -count % part
  index = jnp.pad(index, ((0, 0), (0, padding)), constant_values=bins)  # outside of the bins: not added
  values = jnp.pad(values, ((0, 0), (0, padding), *((0, 0),) * (values.ndim - 2)))
  of_part = lambda at, v: jnp.zeros((bins, *v.shape[1:]), v.dtype).at[at].add(v, mode='drop')
  parts = jax.vmap(of_part)(index.reshape(-1, part), values.reshape(-1, part, *values.shape[2:]))
  return parts.reshape(batch, -1, *parts.shape[1:]).sum(axis=1)


def edges() -> np.ndarray:
  """The lower edge of each bin, as a logit [BINS]; minus infinity for the first bin."""
  start = (np.arange(BINS) - HALF) / _PER_UNIT
  start[0] = -np.inf
  return start


def centres() -> np.ndarray:
  """The logit in the middle of each bin [BINS]."""
  return (np.arange(BINS) - HALF + 0.5) / _PER_UNIT


def counts_from(histogram: np.ndarray) -> dict[str, np.ndarray]:
  """tp, fp, fn, tn [..., BINS] from histograms [..., 2, BINS]. Logits >= the bin's lower edge count as lesion."""
  above = np.cumsum(np.asarray(histogram, np.int64)[..., ::-1], axis=-1)[..., ::-1]
  fp, tp = above[..., 0, :], above[..., 1, :]
  return {'tp': tp, 'fp': fp, 'fn': tp[..., :1] - tp, 'tn': fp[..., :1] - fp}


def counts_at(histogram: jax.Array, bin: jax.Array) -> dict[str, jax.Array]:
  """tp, fp, fn, tn [...] as `counts_from`, at one bin only; on the device."""
  is_above = jnp.arange(BINS) >= bin
  above, below = (jnp.where(side, histogram, 0).sum(axis=-1) for side in (is_above, ~is_above))
  return {'tp': above[..., 1], 'fp': above[..., 0], 'fn': below[..., 1], 'tn': below[..., 0]}
