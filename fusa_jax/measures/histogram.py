"""Logits and truth of each slice, counted on the device: all that thresholds and calibration need of the pixels.

A histogram of a slice is a few kilobytes where its probabilities are a megabyte; counts at every threshold follow from
it exactly. A slice that has one logit (classification) is counted as one pixel.
"""

import jax
import jax.numpy as jnp
import numpy as np

# Logits from -16 to 16, a sixteenth apart; the outer bins take what lies beyond. As probabilities the edges are 1/64
# apart around 0.5, which is one of them, and dense towards 0 and 1, where most pixels are.
_PER_UNIT, _REACH = 16, 16
BINS = 2 * _REACH * _PER_UNIT
HALF = BINS // 2  # the bin that begins at a probability of 0.5
RELIABILITY_BINS = 20  # of equal width in probability


def count(logits: jax.Array, truth: jax.Array, temperature: jax.Array) -> dict[str, jax.Array]:
  """Counts of each slice, for logits [B, ...] in float32 and truth [B, ...] {0, 1}.

  Returns:
    histogram: int32 [B, 2, BINS], pixels by truth and by their logit's bin. The temperature plays no part.
    reliability: float32 [B, 3, RELIABILITY_BINS], by the probability's bin: pixels, lesion pixels, sum of probability;
      probability is sigmoid(logit / temperature).
    squared_error: float32 [B], sum of (probability - truth)^2.
  """
  logits, truth = (array.reshape(len(array), -1) for array in (logits.astype(jnp.float32), truth > 0))
  fine = jnp.clip(jnp.floor(logits * _PER_UNIT) + HALF, 0, BINS - 1).astype(jnp.int32)
  probability = jax.nn.sigmoid(logits / temperature)
  coarse = jnp.clip((probability * RELIABILITY_BINS).astype(jnp.int32), 0, RELIABILITY_BINS - 1)
  values = jnp.stack([jnp.ones_like(probability), truth.astype(jnp.float32), probability], axis=-1)
  return {
    'histogram': _sums(fine + BINS * truth, jnp.ones_like(fine), 2 * BINS).reshape(-1, 2, BINS),
    'reliability': _sums(coarse, values, RELIABILITY_BINS).transpose(0, 2, 1),
    'squared_error': jnp.sum((probability - truth) ** 2, axis=1),
  }


def _sums(index, values, bins):
  """Values [B, N, ...] summed by their index [B, N]: [B, bins, ...]."""
  return jax.vmap(lambda at, v: jnp.zeros((bins, *v.shape[1:]), v.dtype).at[at].add(v))(index, values)


def edges() -> np.ndarray:
  """The logit at which each bin begins [BINS]; minus infinity for the first, which has no lower end."""
  start = (np.arange(BINS) - HALF) / _PER_UNIT
  start[0] = -np.inf
  return start


def centres() -> np.ndarray:
  """The logit in the middle of each bin [BINS]."""
  return (np.arange(BINS) - HALF + 0.5) / _PER_UNIT


def counts_from(histogram: np.ndarray) -> dict[str, np.ndarray]:
  """tp, fp, fn, tn [..., BINS] of histograms [..., 2, BINS], with every logit from the bin's edge up called lesion."""
  above = np.cumsum(np.asarray(histogram, np.int64)[..., ::-1], axis=-1)[..., ::-1]
  fp, tp = above[..., 0, :], above[..., 1, :]
  return {'tp': tp, 'fp': fp, 'fn': tp[..., :1] - tp, 'tn': fp[..., :1] - fp}


def counts_at(histogram: np.ndarray, bin: int) -> dict[str, np.ndarray]:
  """The same at one bin [...], without the other 511."""
  above = histogram[..., bin:].sum(axis=-1, dtype=np.int64)
  below = histogram[..., :bin].sum(axis=-1, dtype=np.int64)
  return {'tp': above[..., 1], 'fp': above[..., 0], 'fn': below[..., 1], 'tn': below[..., 0]}
