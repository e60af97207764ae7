"""Losses compared with their formulas in float64 NumPy, and with MONAI."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import cls, seg
from fusa_jax import tasks
from fusa_jax.system.errors import UserError
from fusa_jax.tasks import losses


@pytest.fixture
def batch():
  rng = np.random.default_rng(0)
  mask = (rng.random((3, 8, 8)) < 0.2).astype(np.uint8)
  mask[2] = 0
  return {'mask': jnp.asarray(mask), 'label': jnp.asarray(mask.any(axis=(1, 2)), jnp.int32)}


def cross_entropy(logits, truth):
  p = 1 / (1 + np.exp(-logits))
  return -(truth * np.log(p) + (1 - truth) * np.log(1 - p)).mean()


def dice(logits, truth):
  p = 1 / (1 + np.exp(-logits))
  return 1 - (2 * (p * truth).sum() + 2) / (p.sum() + truth.sum() + 2)


def focal(logits, truth):
  p = 1 / (1 + np.exp(-logits))
  return -(truth * (1 - p) ** 2 * np.log(p) + (1 - truth) * p**2 * np.log(1 - p)).mean()


def tversky(logits, truth):
  p = 1 / (1 + np.exp(-logits))
  tp, fp, fn = (p * truth).sum(), (p * (1 - truth)).sum(), ((1 - p) * truth).sum()
  return 1 - (tp + 1) / (tp + 0.3 * fp + 0.7 * fn + 1)


def test_segmentation_loss_is_cross_entropy_plus_dice_of_the_batch(batch):
  logits = np.random.default_rng(1).normal(size=(3, 8, 8, 1))
  truth = np.asarray(batch['mask'], float)[..., None]
  task = tasks.create(seg.get_config())
  got = task.loss(jnp.asarray(logits, jnp.float32), task.type.truth(batch))
  assert got.shape == ()
  np.testing.assert_allclose(got, cross_entropy(logits, truth) + dice(logits, truth), rtol=1e-5)


def test_classification_loss_is_cross_entropy(batch):
  logits = np.random.default_rng(1).normal(size=(3, 1))
  task = tasks.create(cls.get_config())
  got = task.loss(jnp.asarray(logits, jnp.float32), task.type.truth(batch))
  np.testing.assert_allclose(got, cross_entropy(logits[:, 0], np.asarray(batch['label'], float)), rtol=1e-5)


@pytest.mark.parametrize('truth', ['mask', 'label'])
@pytest.mark.parametrize('name', losses.LOSSES)
def test_each_loss_equals_its_formula_for_masks_and_labels(batch, name, truth):
  formula = {
    'cross_entropy': cross_entropy,
    'cross_entropy_dice': lambda logits, truth: cross_entropy(logits, truth) + dice(logits, truth),
    'dice': dice,
    'focal': focal,
    'focal_dice': lambda logits, truth: focal(logits, truth) + dice(logits, truth),
    'tversky': tversky,
    'focal_tversky': lambda logits, truth: tversky(logits, truth) ** (3 / 4),
  }[name]
  logits = np.random.default_rng(1).normal(scale=3, size=(*batch[truth].shape, 1))
  got = losses.get_loss(name)(jnp.asarray(logits, jnp.float32), batch[truth])
  assert got.shape == () and got.dtype == jnp.float32
  np.testing.assert_allclose(got, formula(logits, np.asarray(batch[truth], float)[..., None]), rtol=1e-5)


@pytest.mark.parametrize('name', losses.LOSSES)
def test_several_classes_and_unknown_pixels(name):
  """The mean over the classes of the loss of one class, without the pixels of unknown truth."""
  rng = np.random.default_rng(2)
  bits = rng.choice(np.array([0, 1, 2, 3, 128], np.uint8), (3, 8, 8))
  logits = jnp.asarray(rng.normal(scale=3, size=(3, 8, 8, 2)), jnp.float32)
  known = bits < 128
  one = losses.get_loss(name)
  expected = [one(logits[..., k][known][:, None], jnp.asarray(bits[known] >> k & 1)) for k in (0, 1)]
  loss = losses.get_loss(name, has_ignored=True)
  np.testing.assert_allclose(loss(logits, jnp.asarray(bits)), np.mean(expected), rtol=1e-5)
  gradient = jax.grad(loss)(logits, jnp.asarray(bits))
  assert np.isfinite(gradient).all() and not gradient[~known].any() and gradient[known].all()
  assert not np.isnan(loss(logits, jnp.full_like(bits, 128)))


@pytest.mark.parametrize('name', losses.LOSSES)
def test_each_loss_equals_monais(batch, name):
  """MONAI adds `smooth` to sums that are twice those of optax, and its arrays have channels second."""
  torch, monai = pytest.importorskip('torch'), pytest.importorskip('monai.losses')
  of_batch = monai.DiceLoss(sigmoid=True, batch=True, smooth_nr=2.0, smooth_dr=2.0)
  tversky = monai.TverskyLoss(sigmoid=True, alpha=0.3, beta=0.7, smooth_nr=1.0, smooth_dr=1.0, batch=True)
  theirs = {
    'cross_entropy': torch.nn.BCEWithLogitsLoss(),
    'cross_entropy_dice': lambda logits, truth: torch.nn.BCEWithLogitsLoss()(logits, truth) + of_batch(logits, truth),
    'dice': of_batch,
    'focal': monai.FocalLoss(gamma=2.0),
    'focal_dice': lambda logits, truth: monai.FocalLoss(gamma=2.0)(logits, truth) + of_batch(logits, truth),
    'tversky': tversky,
    'focal_tversky': lambda logits, truth: tversky(logits, truth) ** (3 / 4),
  }[name]
  logits = np.random.default_rng(1).normal(scale=3, size=(3, 8, 8, 1))
  arrays = logits, np.asarray(batch['mask'], float)[..., None]
  expected = float(theirs(*(torch.from_numpy(np.moveaxis(array, -1, 1).copy()) for array in arrays)))
  got = losses.get_loss(name)(jnp.asarray(logits, jnp.float32), batch['mask'])
  np.testing.assert_allclose(got, expected, rtol=1e-5)


@pytest.mark.parametrize('name', losses.LOSSES)
def test_losses_of_extreme_logits_are_finite_and_ordered(batch, name):
  """A confident correct prediction costs less than an undecided one, which costs less than a confident wrong one."""
  sure = 200.0 * (2 * jnp.asarray(batch['mask'], jnp.float32) - 1)[..., None]
  right, undecided, wrong = (float(losses.get_loss(name)(logits, batch['mask'])) for logits in (sure, 0 * sure, -sure))
  assert np.isfinite([right, undecided, wrong]).all()
  assert -1e-6 < right < 1e-6 < undecided < wrong


@pytest.mark.parametrize('name', losses.LOSSES)
def test_gradients_of_perfect_predictions_are_finite(batch, name):
  sure = 200.0 * (2 * jnp.asarray(batch['mask'], jnp.float32) - 1)[..., None]
  assert np.isfinite(jax.grad(losses.get_loss(name))(sure, batch['mask'])).all()


def test_an_unknown_loss_is_refused_with_the_list():
  with pytest.raises(
    UserError, match=r"^train\.loss: 'x' is unknown; give one of cross_entropy, cross_entropy_dice, dice, focal, "
  ):
    losses.get_loss('x')
