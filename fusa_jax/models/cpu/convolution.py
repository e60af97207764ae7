"""Two-dimensional convolutions that are fast on CPUs; `layers.Conv` calls `convolve`.

On accelerators, `convolve` is `lax.conv_general_dilated` with its own gradients. XLA's CPU backend is fast for a dense
convolution and for its gradient by the input, but slow for most other cases. For these cases this module uses
operations that the backend does well. The table gives milliseconds on two cores with AVX-512, float32, batch 4, jax
0.10.2, and PyTorch 2.13 for comparison. Each number is the minimum of several runs. docs/benchmarks.md lists other
attempts.

| convolution                                       | lax  | here | by       | PyTorch |
| ------------------------------------------------- | ---: | ---: | -------- | ------: |
| 3x3, 64 to 64, 128 x 128, gradient by kernel      | 49   | 20   | rows     | 14      |
| 3x3, 128 to 128, 64 x 64, gradient by kernel      | 26   | 14   | rows     | 11      |
| 3x3, 1024 to 1024, 8 x 8, forward                 | 31   | 12   | patches  | 24      |
| 3x3, 1024 to 1024, 8 x 8, gradient by input       | 65   | 12   | patches  | 23      |
| 3x3, 512 to 512, 16 x 16, gradient by input       | 14   | 11   | taps     | 10      |
| 1x1, 128 to 64, 128 x 128, forward                | 24   | 3.4  | taps     | 2.6     |
| 1x1, 128 to 64, 128 x 128, gradient by kernel     | 62   | 6.5  | taps     | 5.9     |
| 3x3 dilated by 24, 2048 to 256, 16 x 16, forward  | 175  | 3.0  | taps     | 3.8     |
| 3x3 of each of 144 channels, 32 x 32, forward     | 12   | 0.25 | shifts   | 0.09    |
| 3x3 of each of 144 channels, gradient by kernel   | 12   | 0.67 | shifts   | 0.09    |
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_NUMBERS = ('NHWC', 'HWIO', 'NHWC')
# Bytes that one chunk of rows reads in a dense kernel's gradient: about the size of a core's second-level cache.
_CHUNK_BYTES = 1_500_000


@dataclasses.dataclass(frozen=True)
class _Window:
  """The positions of a kernel on an image. Pairs are (height, width)."""

  strides: tuple[int, int]
  padding: tuple[tuple[int, int], tuple[int, int]]
  dilation: tuple[int, int]
  groups: int
  precision: lax.PrecisionLike  # of accelerators; a CPU always multiplies float32 numbers in float32

  def side(self, axis: int, length: int, kernel: int) -> int:
    """Length of the output along an axis."""
    return (length + sum(self.padding[axis]) - self.dilation[axis] * (kernel - 1) - 1) // self.strides[axis] + 1

  def sides(self, image: tuple[int, ...], kernel: tuple[int, ...]) -> tuple[int, int]:
    """Height and width of the output, given the shapes of the image [B, H, W, C] and of the kernel [kh, kw, ...]."""
    return tuple(self.side(axis, image[axis + 1], kernel[axis]) for axis in range(2))

  def meeting(self, axis: int, length: int, kernel: int, tap: int) -> tuple[slice, slice]:
    """The output pixels and the input pixels that a tap of the kernel connects along an axis, without padding."""
    stride, first = self.strides[axis], self.dilation[axis] * tap - self.padding[axis][0]
    start = max(-(first // stride), 0)
    count = max(min((length - 1 - first) // stride + 1, self.side(axis, length, kernel)) - start, 0)
    begin = start * stride + first
    return slice(start, start + count), slice(begin, begin + (count - 1) * stride + 1 if count else begin, stride)


def convolve(
  x: jax.Array,
  kernel: jax.Array,
  strides: Sequence[int],
  padding: str | Sequence[tuple[int, int]],
  *,
  lhs_dilation: Sequence[int] = (1, 1),
  rhs_dilation: Sequence[int] = (1, 1),
  dimension_numbers: lax.ConvDimensionNumbers = None,
  feature_group_count: int = 1,
  precision: lax.PrecisionLike = None,
) -> jax.Array:
  """x [B, H, W, C] and kernel [kh, kw, C / groups, O] -> [B, h, w, O], the result of `lax.conv_general_dilated`.

  The arguments are those that nn.Conv passes. The form depends on the shapes of one image and of the kernel, not on the
  batch size. Therefore an image gets the same prediction in every batch. Only reverse-mode differentiation works.
  """
  assert x.ndim == 4 and set(lhs_dilation) == {1}, 'the layers of this package need no more'
  if isinstance(padding, str):
    sides = [dilation * (side - 1) + 1 for side, dilation in zip(kernel.shape[:2], rhs_dilation, strict=True)]
    padding = lax.padtype_to_pads(x.shape[1:3], sides, strides, padding)
  window = _Window(tuple(strides), tuple(map(tuple, padding)), tuple(rhs_dilation), feature_group_count, precision)
  return _convolve(x, kernel, window)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _convolve(x, kernel, window):
  form = _form(x.shape, kernel.shape, window)
  on = lambda forward: lambda x, kernel: forward(x, kernel, window)
  return lax.platform_dependent(x, kernel, cpu=_widely(on(form.forward)), default=on(_lax))


def _convolve_forward(x, kernel, window):
  return _convolve(x, kernel, window), (x, kernel)


def _convolve_backward(window, residuals, g):
  x, kernel = residuals
  form = _form(x.shape, kernel.shape, window)

  def by_input(forward):
    of = lambda g: jax.ShapeDtypeStruct(x.shape, g.dtype)
    return lambda kernel, g: jax.linear_transpose(lambda x: forward(x, kernel, window), of(g))(g)[0]

  def by_kernel(gradient):
    return lambda x, g: gradient(x, g, kernel.shape, window)

  d_x = lax.platform_dependent(kernel, g, cpu=_widely(by_input(form.by_input)), default=by_input(_lax))
  d_kernel = lax.platform_dependent(x, g, cpu=_widely(by_kernel(form.by_kernel)), default=by_kernel(_lax_by_kernel))
  return d_x, d_kernel


_convolve.defvjp(_convolve_forward, _convolve_backward)


def _widely(function):
  """Makes a function compute in at least float32 and round once, to avoid the errors of bfloat16 sums on CPUs."""

  def run(a, b):
    dtype = jnp.promote_types(a.dtype, jnp.float32)
    return function(a.astype(dtype), b.astype(dtype)).astype(a.dtype)

  return run


def _lax(x, kernel, window):
  return lax.conv_general_dilated(
    x,
    kernel,
    window.strides,
    window.padding,
    rhs_dilation=window.dilation,
    feature_group_count=window.groups,
    dimension_numbers=_NUMBERS,
    precision=window.precision,
  )


def _lax_by_kernel(x, g, kernel_shape, window):
  kernel = jax.ShapeDtypeStruct(kernel_shape, x.dtype)
  return jax.linear_transpose(lambda kernel: _lax(x, kernel, window), kernel)(g)[0]


def _joined(x, kernel_shape, window):
  """Yields (tap, output pixels, input pixels) for each tap of a kernel that touches the image."""
  for tap in np.ndindex(kernel_shape[:2]):
    rows, columns = (window.meeting(axis, x.shape[axis + 1], kernel_shape[axis], tap[axis]) for axis in range(2))
    if rows[0].stop > rows[0].start and columns[0].stop > columns[0].start:
      yield tap, (rows[0], columns[0]), (rows[1], columns[1])


def _taps(x, kernel, window):
  """One matrix product per tap, of the pixels that it touches; skips the products with padding."""
  height, width = window.sides(x.shape, kernel.shape)
  out = jnp.zeros((x.shape[0], height, width, kernel.shape[-1]), x.dtype)
  for tap, (rows, columns), (from_rows, from_columns) in _joined(x, kernel.shape, window):
    part = jnp.einsum('bhwc,co->bhwo', x[:, from_rows, from_columns], kernel[tap])
    around = ((0, 0, 0), (rows.start, height - rows.stop, 0), (columns.start, width - columns.stop, 0), (0, 0, 0))
    out += lax.pad(part, jnp.zeros((), out.dtype), around)
  return out


def _taps_by_kernel(x, g, kernel_shape, window):
  parts = dict.fromkeys(np.ndindex(kernel_shape[:2]), jnp.zeros(kernel_shape[2:], x.dtype))
  for tap, of_output, of_input in _joined(x, kernel_shape, window):
    # The order (x, g) is twice as fast as the transposed one, which autodiff would use. Both arrays are flattened to
    # matrices: with four axes, XLA would copy x, and the arrays that x is computed from, into another layout.
    parts[tap] = lax.dot_general(_flat(x[:, *of_input]), _flat(g[:, *of_output]), (((0,), (0,)), ((), ())))
  return jnp.stack(list(parts.values())).reshape(kernel_shape)


def _flat(x):
  return x.reshape(-1, x.shape[-1])


def _padded(x, window, axes=(0, 1)):
  return jnp.pad(x, [(0, 0), *(window.padding[axis] if axis in axes else (0, 0) for axis in range(2)), (0, 0)])


def _views(x, kernel_shape, window):
  """Yields, tap by tap, the part [B, h, w, C] of the padded image that the tap of a kernel reads."""
  (along, across), (dilated_along, dilated_across) = window.strides, window.dilation
  height, width = window.sides(x.shape, kernel_shape)
  padded = _padded(x, window)
  for i, j in np.ndindex(kernel_shape[:2]):
    top, left = i * dilated_along, j * dilated_across
    yield padded[:, top : top + along * (height - 1) + 1 : along, left : left + across * (width - 1) + 1 : across]


def _patches(x, kernel, window):
  """One matrix product of the views of all taps with the kernel, which keeps its layout."""
  patches = jnp.concatenate(list(_views(x, kernel.shape, window)), axis=-1)
  flat = kernel.reshape(-1, kernel.shape[-1])
  return jnp.einsum('bhwp,po->bhwo', patches, flat)


def _shifts(x, kernel, window):
  """A depthwise convolution (one kernel per channel): the sum of shifted images, each times its kernel value."""
  views = _views(x, kernel.shape, window)
  multiples = kernel.reshape(-1, kernel.shape[-1])
  return sum(view * multiple for view, multiple in zip(views, multiples, strict=True))


def _shifts_by_kernel(x, g, kernel_shape, window):
  """Adds up row by row, so the sums stay in the cache."""
  batch, height, width, channels = g.shape
  (along, across), taps = window.strides, list(np.ndindex(kernel_shape[:2]))
  padded = _padded(x, window)

  def add_row(sums, row):
    images = lax.dynamic_slice_in_dim(padded, row * along, kernel_shape[0], 1)
    by_output = lax.dynamic_index_in_dim(g, row, 1, keepdims=False)
    return [
      total + images[:, i, j : j + across * (width - 1) + 1 : across] * by_output
      for total, (i, j) in zip(sums, taps, strict=True)
    ], None

  sums, _ = lax.scan(add_row, [jnp.zeros((batch, width, channels), x.dtype)] * len(taps), jnp.arange(height))
  return jnp.stack([total.sum((0, 1)) for total in sums]).reshape(kernel_shape)


def _rows_by_kernel(x, g, kernel_shape, window):
  """The kernel's gradient as a convolution of x with g, in chunks of rows, with x as an image [H, W * C].

  Autodiff writes this gradient as a convolution with the channels as batch, a 3 x 3 output, and a kernel as large as
  the image. Three neighbours per row are too few for the registers, and each tap reads all of x and g again.
  With columns and channels on one axis, [H, W * C], and the kernel's columns C apart, an output row has kw * C
  neighbours. With chunks of rows, the repeated reads come from the cache.
  """
  batch, _, width, channels = x.shape
  _, height, _, outputs = g.shape
  (along, across), (kh, kw) = window.strides, kernel_shape[:2]
  # In an exported function the batch size is symbolic.
  row_bytes = (batch if isinstance(batch, int) else 1) * width * (along * channels + outputs) * x.dtype.itemsize
  chunk = max(n for n in range(1, height + 1) if height % n == 0 and (n == 1 or n * row_bytes <= _CHUNK_BYTES))
  padded = _padded(x, window, axes=(0,))
  sides = [channels * padding for padding in window.padding[1]]

  def part(row):
    rows = lax.dynamic_slice_in_dim(padded, row * along, (chunk - 1) * along + kh, 1)
    by_output = lax.dynamic_slice_in_dim(g, row, chunk, 1)
    image = rows.transpose(1, 2, 3, 0).reshape(1, rows.shape[1], width * channels, batch)
    out = lax.conv_general_dilated(
      image,
      by_output.transpose(1, 2, 0, 3),
      (1, 1),
      ((0, 0), sides),
      rhs_dilation=(along, across * channels),
      dimension_numbers=_NUMBERS,
    )
    return out[0, :kh, : kw * channels]

  if chunk == height:
    return part(0).reshape(kernel_shape)
  nothing = jnp.zeros((kh, kw * channels, outputs), x.dtype)
  total, _ = lax.scan(lambda total, row: (total + part(row), None), nothing, jnp.arange(0, height, chunk))
  return total.reshape(kernel_shape)


class _Form(NamedTuple):
  """How a convolution is computed on a CPU."""

  forward: Callable  # (x, kernel, window)
  by_input: Callable  # (x, kernel, window) as in forward; its transpose is the gradient by x
  by_kernel: Callable  # (x, g, the kernel's shape, window) -> the gradient by the kernel


def _form(image, kernel, window):
  """Chooses the form, given the shapes of the image [B, H, W, C] and of the kernel [kh, kw, C / groups, O]."""
  _, height, width, channels = image
  kh, kw, inputs, outputs = kernel
  if window.groups > 1:
    each_alone = window.groups == channels == outputs and max(window.dilation) == 1
    return _Form(_shifts, _shifts, _shifts_by_kernel) if each_alone else _Form(_lax, _lax, _lax_by_kernel)
  if kh == kw == 1 or max(window.dilation) > 1:
    return _Form(_taps, _taps, _taps_by_kernel)
  # For a large kernel on a small image, lax would spend most time on changing the kernel's layout.
  small = 4 * height * width
  forward = _patches if small <= outputs else _lax
  by_input = _patches if small <= inputs else _taps if small <= 4 * inputs else _lax
  # With fewer than 16 channels, lax's own form is not much slower.
  return _Form(forward, by_input, _rows_by_kernel if min(inputs, outputs) >= 16 else _lax_by_kernel)
