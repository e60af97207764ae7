"""Every model computes the same as its PyTorch original: torchvision's, smp's, or the paper's text in PyTorch.

Evaluation is compared in float32, training in float64. On small test images, norms in the last stages average few
values; they would amplify float32 rounding errors to 1e-2 in some gradients.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fusa_jax import models
from fusa_jax.torch_weights import from_torch

torch = pytest.importorskip('torch')
from originals import CHANNELS, CLASSES, as_torch, original  # noqa: E402 (needs torch)

DROPOUT = ('vgg16', 'mobilenet_v2', 'pspnet', 'deeplabv3', 'fusa_pspnet', 'fusa_deeplabv3')
# These take 5 to 10 s each.
LARGE = ('densenet121', 'fusa_deeplabv3', 'fusa_resnet50')


def images(height, width, dtype=np.float32):
  return np.random.default_rng(0).normal(size=(2, height, width, CHANNELS)).astype(dtype)


def distance(ours, theirs, floor=0.0):
  # Subtracted with NumPy: outside of x64 mode JAX would subtract in float32.
  return np.linalg.norm(np.asarray(ours) - theirs) / max(np.linalg.norm(theirs), floor)


@pytest.mark.parametrize(
  'name', [pytest.param(name, marks=pytest.mark.slow if name in LARGE else ()) for name in models.NAMES]
)
def test_logits(name):
  theirs, module = original(name).eval(), models.create(name, num_classes=CLASSES)
  variables = from_torch(name, theirs.state_dict())
  apply = jax.jit(lambda variables, x: module.apply(variables, x, train=False))
  for shape in ((64, 64), (64, 96)):
    x = images(*shape)
    with torch.no_grad():
      expected = theirs(as_torch(x)).numpy()
    expected = np.moveaxis(expected, 1, -1)
    got = np.asarray(apply(variables, x))
    assert got.shape == expected.shape
    assert np.ptp(expected) > 0
    assert distance(got, expected) < 1e-4


@pytest.mark.parametrize(
  ('name', 'encoder'), [('linknet', 'resnet50'), ('pspnet', 'resnet34'), ('deeplabv3', 'resnet18')]
)
def test_logits_over_another_encoder(name, encoder):
  theirs = original(name, encoder=encoder).eval()
  x = images(64, 64)
  with torch.no_grad():
    expected = np.moveaxis(theirs(as_torch(x)).numpy(), 1, -1)
  module = models.create(name, num_classes=CLASSES, encoder=encoder)
  got = module.apply(from_torch(name, theirs.state_dict(), encoder=encoder), x, train=False)
  assert distance(got, expected) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize('name', models.NAMES)
def test_a_training_step(name):
  """Compares the loss, the gradient of every parameter and the new statistics of the norms."""
  theirs = original(name, dropout=0.0).double().train()
  before = from_torch(name, theirs.state_dict())
  x = images(64, 64, np.float64)
  out = theirs(as_torch(x))
  weights = np.random.default_rng(1).normal(size=np.moveaxis(out.detach().numpy(), 1, -1).shape)
  loss = (out * as_torch(weights)).mean() + (out**2).mean()
  loss.backward()
  # The original has parameters that it does not use (smp's PSPNet). They have no gradient, and our model lacks them.
  gradients = {key: p.grad if p.grad is not None else p for key, p in theirs.named_parameters()}
  after = from_torch(name, {**gradients, **dict(theirs.named_buffers())})

  module = models.create(name, num_classes=CLASSES, dtype=jnp.float64, **({'dropout': 0.0} if name in DROPOUT else {}))

  def loss_of(params):
    logits, updates = module.apply({**before, 'params': params}, x, train=True, mutable=['batch_stats'])
    return (logits * weights).mean() + (logits**2).mean(), updates['batch_stats']

  with jax.enable_x64(True):
    (got, batch_stats), gradient = jax.jit(jax.value_and_grad(loss_of, has_aux=True))(before['params'])
    assert got.dtype == np.float64
  assert abs(float(got) - loss.item()) < 1e-9 * abs(loss.item())
  largest = max(np.linalg.norm(leaf) for leaf in jax.tree.leaves(after['params']))
  for name, tree in (('params', gradient), ('batch_stats', batch_stats)):
    assert jax.tree.structure(tree) == jax.tree.structure(after[name])
    for (path, leaf), expected in zip(jax.tree.leaves_with_path(tree), jax.tree.leaves(after[name]), strict=True):
      # The gradient of a bias before a norm is only rounding error: it is compared relative to the largest gradient.
      assert distance(leaf, expected, floor=1e-6 * largest) < 1e-7, jax.tree_util.keystr(path)
