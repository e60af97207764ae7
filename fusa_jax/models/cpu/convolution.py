"""Two-dimensional convolutions in the forms that are fast where they run; `convolve` is what nn.Conv calls here.

Accelerators get `lax.conv_general_dilated` and its own gradients. XLA's CPU backend has a fast form of a dense
convolution and of its gradient by the input, and of little else; there, each other case is written as what the backend
does well. Milliseconds on two cores with AVX-512, float32, batch 4, jax 0.10.2, beside PyTorch 2.13 (the least of some;
docs/benchmarks.md has what else was tried):

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
| the same, gradient by kernel                      | 12   | 0.67 | shifts   | 0.09    |
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
# What a chunk of rows reads in a dense kernel's gradient: about a core's second-level cache.
_CHUNK_BYTES = 1_500_000


@dataclasses.dataclass(frozen=True)
class _Window:
  """Where a kernel is laid on an image; pairs are of height and width."""

  strides: tuple[int, int]
  padding: tuple[tuple[int, int], tuple[int, int]]
  dilation: tuple[int, int]
  groups: int

  def side(self, axis: int, length: int, kernel: int) -> int:
    """Of the output."""
    return (length + sum(self.padding[axis]) - self.dilation[axis] * (kernel - 1) - 1) // self.strides[axis] + 1

  def sides(self, image: tuple[int, ...], kernel: tuple[int, ...]) -> tuple[int, int]:
    """Height and width of the output, for an image [B, H, W, C] and a kernel [kh, kw, ...], given as shapes."""
    return tuple(self.side(axis, image[axis + 1], kernel[axis]) for axis in range(2))

  def meeting(self, axis: int, length: int, kernel: int, tap: int) -> tuple[slice, slice]:
    """The pixels of the output and of the input, along an axis, that a tap of the kernel joins; none are of padding."""
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
  lhs_dilation: Sequence[int],
  rhs_dilation: Sequence[int],
  dimension_numbers: lax.ConvDimensionNumbers,
  feature_group_count: int,
  precision: lax.PrecisionLike,
) -> jax.Array:
  """x [B, H, W, C] and kernel [kh, kw, C / groups, O] -> [B, h, w, O]: all of `lax.conv_general_dilated` but its speed.

  The arguments are those that nn.Conv gives. Which form is taken depends on the shapes of one image and of the kernel,
  not on the batch, so that a prediction does not change with what it is batched with. Differentiable in reverse only.
  """
  assert x.ndim == 4 and set(lhs_dilation) == {1} and precision is None, 'no layer of ours asks for more'
  if isinstance(padding, str):
    sides = [dilation * (side - 1) + 1 for side, dilation in zip(kernel.shape[:2], rhs_dilation, strict=True)]
    padding = lax.padtype_to_pads(x.shape[1:3], sides, strides, padding)
  window = _Window(tuple(strides), tuple(map(tuple, padding)), tuple(rhs_dilation), feature_group_count)
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
  """Computed in at least float32 and rounded once: a CPU's bfloat16 is not worth the errors of its sums."""

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
  )


def _lax_by_kernel(x, g, kernel_shape, window):
  kernel = jax.ShapeDtypeStruct(kernel_shape, x.dtype)
  return jax.linear_transpose(lambda kernel: _lax(x, kernel, window), kernel)(g)[0]


def _joined(x, kernel_shape, window):
  """Of each tap of a kernel that meets the image at all: its place, and the pixels of output and input it joins."""
  for tap in np.ndindex(kernel_shape[:2]):
    rows, columns = (window.meeting(axis, x.shape[axis + 1], kernel_shape[axis], tap[axis]) for axis in range(2))
    if rows[0].stop > rows[0].start and columns[0].stop > columns[0].start:
      yield tap, (rows[0], columns[0]), (rows[1], columns[1])


def _taps(x, kernel, window):
  """A matrix product for each tap, of the pixels that it meets; what would be products with padding is not computed."""
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
    # In this order: as its transpose, which autodiff would take, it is half as fast. As a product of matrices: with all
    # four axes, XLA would copy x into the other order, and what x is computed from with it.
    parts[tap] = lax.dot_general(_flat(x[:, *of_input]), _flat(g[:, *of_output]), (((0,), (0,)), ((), ())))
  return jnp.stack(list(parts.values())).reshape(kernel_shape)


def _flat(x):
  return x.reshape(-1, x.shape[-1])


def _padded(x, window, axes=(0, 1)):
  return jnp.pad(x, [(0, 0), *(window.padding[axis] if axis in axes else (0, 0) for axis in range(2)), (0, 0)])


def _views(x, kernel_shape, window):
  """What each tap of a kernel sees of an image, padding included, tap after tap: [B, h, w, C] each."""
  (along, across), (dilated_along, dilated_across) = window.strides, window.dilation
  height, width = window.sides(x.shape, kernel_shape)
  padded = _padded(x, window)
  for i, j in np.ndindex(kernel_shape[:2]):
    top, left = i * dilated_along, j * dilated_across
    yield padded[:, top : top + along * (height - 1) + 1 : along, left : left + across * (width - 1) + 1 : across]


def _patches(x, kernel, window):
  """One matrix product, of all that the taps see with the kernel as it lies in memory."""
  patches = jnp.concatenate(list(_views(x, kernel.shape, window)), axis=-1)
  flat = kernel.reshape(-1, kernel.shape[-1])
  return jnp.einsum('bhwp,po->bhwo', patches, flat)


def _shifts(x, kernel, window):
  """A kernel for each channel by itself: the sum of the image's multiples, shifted."""
  views = _views(x, kernel.shape, window)
  multiples = kernel.reshape(-1, kernel.shape[-1])
  return sum(view * multiple for view, multiple in zip(views, multiples, strict=True))


def _shifts_by_kernel(x, g, kernel_shape, window):
  """Row after row, so that what is added up stays in the cache."""
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
  """A convolution of x with g, chunks of rows at a time, the columns and channels of x being one axis of its space.

  As autodiff writes it, this convolution's image has the input's channels as batch and an output of 3 x 3, and its
  kernel is as large as the image: three neighbours in a row are too few for the registers, and all of x and g is read
  anew for each tap. With pixels and channels in a row, [H, W * C], and the kernel's columns C apart, a row of the
  output is kw * C neighbours long; by chunks of rows, what is read anew lies in the cache.
  """
  batch, _, width, channels = x.shape
  _, height, _, outputs = g.shape
  (along, across), (kh, kw) = window.strides, kernel_shape[:2]
  # An exported function may have any batch.
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
  by_input: Callable  # the same, as the function whose transpose is the gradient by x
  by_kernel: Callable  # (x, g, the kernel's shape, window)


def _form(image, kernel, window):
  """The form for an image [B, H, W, C] and a kernel [kh, kw, C / groups, O], given as shapes."""
  _, height, width, channels = image
  kh, kw, inputs, outputs = kernel
  if window.groups > 1:
    each_alone = window.groups == channels == outputs and max(window.dilation) == 1
    return _Form(_shifts, _shifts, _shifts_by_kernel) if each_alone else _Form(_lax, _lax, _lax_by_kernel)
  if kh == kw == 1 or max(window.dilation) > 1:
    return _Form(_taps, _taps, _taps_by_kernel)
  # A large kernel on a small image: lax would spend its time on laying the kernel out anew.
  small = 4 * height * width
  forward = _patches if small <= outputs else _lax
  by_input = _patches if small <= inputs else _taps if small <= 4 * inputs else _lax
  # Below so many channels, lax's own form has little to lose.
  return _Form(forward, by_input, _rows_by_kernel if min(inputs, outputs) >= 16 else _lax_by_kernel)
