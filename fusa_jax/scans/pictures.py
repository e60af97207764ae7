"""Reads slices in pictures, which are windowed 8-bit images, and their masks: as a viewer shows them, or not at all.

Needs only NumPy and Pillow.
"""

import pathlib

import numpy as np
from PIL import Image, ImageOps

from fusa_jax.scans import formats
from fusa_jax.scans.classes import LESION, Classes
from fusa_jax.system.errors import UserError, one_line
from fusa_jax.system.files import replacing

_ENDINGS = ('.png', '.jpg', '.jpeg', '.tif', '.tiff', '.bmp', '.gif', '.webp', '.jp2')
# Grey levels between the highest and the lowest colour channel. A tinted slice, or one of a scanned film, has up to
# _TINT in 99% of its pixels. Arrows and letters have more than _COLOUR, in few pixels. JPEG leaves some pixels between.
_TINT, _COLOUR = 40, 70
_BITS_PER_SAMPLE = 258  # a tag of TIFF
# Pixels above _COLOUR that do not make a picture coloured.
_STRAY = 4


class ColouredError(UserError):
  """A picture is in colour."""


def is_picture_file(path: pathlib.Path) -> bool:
  return path.suffix.lower() in _ENDINGS and not path.name.startswith('.')


class PictureFile(formats.FileSource):
  """A slice in one picture file."""

  endings = '.png, .jpg, .tif, .bmp, .gif, .webp, .jp2'
  is_picture = True
  claims = staticmethod(is_picture_file)

  def read_image(self, intensity: str) -> np.ndarray:
    return read_picture(self.path)


def read_picture(path: pathlib.Path) -> np.ndarray:
  """Reads a slice as uint8 [H, W].

  Raises:
    UserError: the picture is unreadable, in colour, transparent, or has more than 8 bits per pixel or several pages.
  """
  return _grey(_open(path), path)


def read_mask(path: pathlib.Path, shape: tuple[int, int] | None, classes: Classes = LESION) -> np.ndarray:
  """Reads the mask of a slice: bits of classes, uint8 [H, W] (`scans.classes`).

  Args:
    path: the mask's picture.
    shape: the shape of the slice; None if it is unknown.
    classes: the classes and their values. A binary mask has the values 0 and 255, or 0 and 1.

  Raises:
    UserError: as `read_picture`; the mask has another shape or other values.
  """
  return read_mask_and_values(path, shape, classes)[0]


def read_mask_and_values(
  path: pathlib.Path, shape: tuple[int, int] | None, classes: Classes = LESION
) -> tuple[np.ndarray, tuple[int, ...]]:
  """As `read_mask`; also returns the distinct values of the picture, in ascending order."""
  image = _open(path)
  # In a palette with colours, or with labels, the palette's indices are the labels. In a grey palette, without labels,
  # the grey values count.
  if image.mode == 'P' and (not classes.is_binary or _spread(image).max() > _TINT):
    values = np.asarray(image)
  elif (opacity := _opacity(image)).min() < 255:
    values = _drawn(image, opacity, path)
    if classes.is_binary:  # then any colour will do
      values = np.where(values, 255, 0)
  else:
    values = _grey(image, path)
  if shape is not None and values.shape != tuple(shape):
    raise UserError(f'{path}: the mask has {values.shape} pixels, its slice {tuple(shape)}; save it in that size')
  distinct = tuple(np.unique(values).tolist())
  if not classes.is_binary:
    classes.check(path, distinct)
    return classes.bits(values), distinct
  if not (set(distinct) <= {0, 255} or set(distinct) <= {0, 1}):
    shown = ', '.join(map(str, distinct[:6])) + (', ...' if len(distinct) > 6 else '')
    raise UserError(
      f'{path}: mask values must be 0 and 255, or 0 and 1, but are {shown}; save the mask as PNG (JPEG changes '
      'values), or name the lesion labels, for example --config.data.lesion_labels="(3,)"'
    )
  return (values > 0).astype(np.uint8), distinct


def write_picture(path: pathlib.Path, values: np.ndarray) -> None:
  """Writes uint8 [H, W] as a grey PNG."""
  with replacing(path) as partial:
    Image.fromarray(values).save(partial, 'PNG')


def _grey(image, path):
  """The grey values of a picture, uint8 [H, W]; refuses what a viewer shows otherwise."""
  transparent = np.mean(_opacity(image) < 255)
  if transparent:
    raise UserError(f'{path}: {transparent:.1%} of the pixels are transparent; save the picture without transparency')
  if image.mode in ('1', 'L'):
    return np.asarray(image.convert('L'))
  spread = _spread(image)
  if np.quantile(spread, 0.99) > _TINT or np.count_nonzero(spread > _COLOUR) > _STRAY:
    raise ColouredError(
      f'{path}: the picture is in colour ({np.mean(spread > _TINT):.2%} of the pixels); '
      'give the slice in grey, without annotations'
    )
  return np.asarray(image.convert('RGB').convert('L'))


def _drawn(image, opacity, path):
  """The values of a mask that is drawn in one colour on a transparent ground, which is background."""
  colours = np.asarray(image.convert('RGBA')).reshape(-1, 4)
  drawn = colours[opacity.ravel() > 0] if opacity.any() else colours
  if np.ptp(drawn, axis=0).any() or 0 < drawn[0, 3] < 255:
    raise UserError(
      f'{path}: the mask has transparent pixels, but the others are not of one opaque colour; save it in black and '
      'white, without transparency'
    )
  grey = np.asarray(image.convert('RGB').convert('L')).ravel()[opacity.ravel().argmax()]
  return np.where(opacity, grey or 255, 0).astype(np.uint8)


def _opacity(image):
  """The alpha channel [H, W]; 255 where there is none."""
  if not image.has_transparency_data:
    return np.full(image.size[::-1], 255, np.uint8)
  return np.asarray(image.convert('RGBA'))[..., 3]


def _spread(image):
  """The grey levels between the highest and the lowest colour channel of each pixel, [H, W]."""
  return np.ptp(np.asarray(image.convert('RGB')).astype(np.int16), axis=-1)


def _open(path):
  """Opens a picture, turned as its EXIF data say."""
  formats.check_file(path)
  try:
    # Opened by its path, Pillow 13 maps an uncompressed TIFF into memory, and scrambles it if its EXIF data turn it.
    with path.open('rb') as file, Image.open(file) as image:
      # A photograph in MPO format holds a preview of the same picture.
      pages = 1 if image.format == 'MPO' else getattr(image, 'n_frames', 1)
      bits = _bits(image)
      image.load()
      upright = ImageOps.exif_transpose(image)
  except Exception as error:  # Pillow's decoders raise errors of many types
    raise UserError(f'{path}: the picture cannot be read ({one_line(error)}); copy it again from its source') from None
  if pages > 1:
    raise UserError(f'{path}: {pages} pages or frames; save each slice as a picture')
  if bits > 8:
    raise UserError(f'{path}: more than 8 bits per pixel; export the scan as .nii.gz in HU, or as 8-bit grey picture')
  return upright


def _bits(image):
  """Bits per channel of a picture that is not yet loaded. Pillow reduces colours of 16 bits to 8."""
  if image.format == 'TIFF':
    return max(np.ravel(image.tag_v2.get(_BITS_PER_SAMPLE, 1)))
  is_deep = image.mode.startswith(('I', 'F')) or (
    image.format == 'PNG' and any('16' in str(tile[3]) for tile in image.tile)
  )
  return 16 if is_deep else 8
