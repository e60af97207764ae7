"""Every form of the CPU convolutions gives the same values and gradients as PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from fusa_jax.models.cpu import convolution

torch = pytest.importorskip('torch')

# Shapes of image and kernel (kh, kw, C / groups, O), and options of the window. Together they use every form.
CASES = {
  'a product': ((2, 9, 6, 7), (1, 1, 7, 5), {}),
  'a product, strided': ((2, 9, 6, 7), (1, 1, 7, 5), {'stride': 2}),
  'dense, few channels': ((2, 9, 6, 3), (3, 3, 3, 5), {'padding': 1}),
  'dense, all rows at once': ((2, 12, 6, 16), (3, 3, 16, 17), {'padding': 1}),
  'dense, by rows': ((2, 128, 96, 32), (3, 3, 32, 16), {'padding': 1}),
  'dense, by rows, strided': ((2, 127, 96, 32), (3, 3, 32, 16), {'padding': 1, 'stride': 2}),
  'dense, strided, of odd sides': ((2, 11, 7, 16), (3, 3, 16, 16), {'padding': 1, 'stride': 2}),
  'dense, wide, strided': ((2, 16, 14, 16), (7, 7, 16, 16), {'padding': 3, 'stride': 2}),
  'dense, unpadded': ((2, 8, 9, 16), (3, 2, 16, 16), {}),
  'patches both ways': ((2, 2, 3, 40), (3, 3, 40, 50), {'padding': 1}),
  'patches, then taps': ((2, 4, 4, 20), (3, 3, 20, 70), {'padding': 1}),
  'dilated': ((2, 9, 8, 6), (3, 3, 6, 5), {'padding': 2, 'dilation': 2}),
  'dilated beyond the image': ((2, 5, 4, 6), (3, 3, 6, 5), {'padding': 7, 'dilation': 7}),
  'in each channel': ((2, 9, 8, 6), (3, 3, 1, 6), {'padding': 1, 'groups': 6}),
  'in each channel, strided': ((2, 9, 8, 6), (3, 3, 1, 6), {'padding': 1, 'groups': 6, 'stride': 2}),
  'in groups': ((2, 9, 8, 6), (3, 3, 3, 4), {'padding': 1, 'groups': 2}),
}


def ours(x, kernel, *, stride=1, padding=0, dilation=1, groups=1):
  return convolution.convolve(
    x,
    kernel,
    (stride, stride),
    ((padding, padding),) * 2,
    lhs_dilation=(1, 1),
    rhs_dilation=(dilation, dilation),
    dimension_numbers=lax.conv_dimension_numbers(x.shape, kernel.shape, ('NHWC', 'HWIO', 'NHWC')),
    feature_group_count=groups,
    precision=None,
  )


@pytest.mark.parametrize('case', CASES)
def test_values_and_gradients_equal_pytorchs(case):
  image, kernel, window = CASES[case]
  rng = np.random.default_rng(0)
  x, k = (rng.normal(size=shape).astype(np.float32) for shape in (image, kernel))
  theirs_x, theirs_k = (torch.tensor(a, dtype=torch.float64, requires_grad=True) for a in (x, k))
  out = torch.conv2d(theirs_x.permute(0, 3, 1, 2), theirs_k.permute(3, 2, 0, 1), **window).permute(0, 2, 3, 1)
  g = rng.normal(size=tuple(out.shape)).astype(np.float32)
  out.backward(torch.tensor(g, dtype=torch.float64))
  value, pull = jax.vjp(lambda x, k: ours(x, k, **window), x, k)
  for found, expected in zip((value, *pull(jnp.asarray(g))), (out, theirs_x.grad, theirs_k.grad), strict=True):
    expected = expected.detach().numpy()
    assert found.shape == expected.shape and found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())


def test_every_form_is_used():
  window = lambda stride=1, padding=0, dilation=1, groups=1: convolution._Window(
    (stride,) * 2, ((padding,) * 2,) * 2, (dilation,) * 2, groups, None
  )
  forms = {case: convolution._form(image, kernel, window(**more)) for case, (image, kernel, more) in CASES.items()}
  assert len({function for form in forms.values() for function in form}) == 8
  assert forms['patches, then taps'][:2] == (convolution._patches, convolution._taps)


@pytest.mark.parametrize('case', ['a product', 'dense, by rows', 'patches both ways', 'in each channel'])
def test_bfloat16_is_summed_in_float32(case):
  image, kernel, window = CASES[case]
  rng = np.random.default_rng(0)
  x, k = (jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in (image, kernel))
  wide = lambda tree: jax.tree.map(lambda a: a.astype(jnp.float32), tree)
  value, pull = jax.vjp(lambda x, k: ours(x, k, **window), x, k)
  g = jnp.asarray(rng.normal(size=value.shape), jnp.bfloat16)
  exact, exact_pull = jax.vjp(lambda x, k: ours(x, k, **window), *wide((x, k)))
  for found, expected in zip((value, *pull(g)), (exact, *exact_pull(wide(g))), strict=True):
    assert found.dtype == jnp.bfloat16
    # Sums in float32, rounded once to 8 significant bits.
    np.testing.assert_allclose(wide(found), expected, rtol=2**-8, atol=2**-8 * float(jnp.abs(expected).max()) / 100)


def test_accelerators_use_convolutions_of_lax():
  image, kernel, window = CASES['dilated']
  step = jax.jit(jax.grad(lambda x, k: ours(x, k, **window).sum(), argnums=(0, 1)))
  shapes = [jax.ShapeDtypeStruct(shape, np.float32) for shape in (image, kernel)]
  lowered = {
    platform: step.trace(*shapes).lower(lowering_platforms=(platform,)).as_text() for platform in ('cpu', 'cuda', 'tpu')
  }
  count = {platform: text.count('stablehlo.convolution') for platform, text in lowered.items()}
  assert count['cuda'] == count['tpu'] >= 2 and not count['cpu']
