"""Losses against their formulas in float64 NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest

from fusa_jax.tasks import classification, segmentation


@pytest.fixture
def batch():
  rng = np.random.default_rng(0)
  mask = (rng.random((3, 8, 8)) < 0.2).astype(np.uint8)
  mask[2] = 0
  return {'mask': jnp.asarray(mask), 'label': jnp.asarray(mask.any(axis=(1, 2)), jnp.int32)}


def cross_entropy(logits, truth):
  p = 1 / (1 + np.exp(-logits))
  return -(truth * np.log(p) + (1 - truth) * np.log(1 - p)).mean()


def test_segmentation_loss_is_cross_entropy_plus_dice_of_the_batch(batch):
  logits = np.random.default_rng(1).normal(size=(3, 8, 8, 1))
  truth, p = np.asarray(batch['mask'], float)[..., None], 1 / (1 + np.exp(-logits))
  dice = (2 * (p * truth).sum() + 2) / (p.sum() + truth.sum() + 2)
  got = segmentation.loss(jnp.asarray(logits, jnp.float32), batch)
  assert got.shape == ()
  np.testing.assert_allclose(got, cross_entropy(logits, truth) + 1 - dice, rtol=1e-5)


def test_classification_loss_is_cross_entropy(batch):
  logits = np.random.default_rng(1).normal(size=(3, 1))
  got = classification.loss(jnp.asarray(logits, jnp.float32), batch)
  np.testing.assert_allclose(got, cross_entropy(logits[:, 0], np.asarray(batch['label'], float)), rtol=1e-5)
