"""Reads slices in PNG or JPEG, which are windowed 8-bit images, and their masks. Needs only NumPy and Pillow."""

import pathlib

import numpy as np
from PIL import Image

from fusa_jax.scans import formats
from fusa_jax.system.errors import UserError, one_line
from fusa_jax.system.files import replacing

# The largest difference between colour channels in a grey picture. JPEG rounds each of the three channels differently.
_COLOURLESS = 24


class ColouredError(UserError):
  """A picture is in colour."""


def is_picture_file(path: pathlib.Path) -> bool:
  return path.suffix.lower() in ('.png', '.jpg', '.jpeg') and not path.name.startswith('.')


class PictureFile(formats.FileSource):
  """A slice in one picture file."""

  endings = '.png, .jpg'
  is_picture = True
  claims = staticmethod(is_picture_file)

  def read_image(self, intensity: str) -> np.ndarray:
    return read_picture(self.path)


def read_picture(path: pathlib.Path) -> np.ndarray:
  """Reads a slice as uint8 [H, W].

  Raises:
    UserError: the picture is unreadable, 16-bit or in colour.
  """
  image = _open(path)
  if image.mode.startswith(('I', 'F')):
    raise UserError(f'{path}: more than 8 bits per pixel; export the scan as .nii.gz in HU, or as 8-bit grey picture')
  if image.mode in ('1', 'L'):
    return np.asarray(image.convert('L'))
  if _is_coloured(image):
    raise ColouredError(f'{path}: the picture is in colour; give the slice in grey, without annotations')
  return np.asarray(image.convert('RGB').convert('L'))


def read_mask(path: pathlib.Path, shape: tuple[int, int] | None, lesion_labels: tuple[int, ...] = ()) -> np.ndarray:
  """Reads the mask of a slice: uint8 {0, 1} [H, W].

  Args:
    path: the mask's picture.
    shape: the shape of the slice; None if it is unknown.
    lesion_labels: the values that are lesion; () if the mask holds only 0 and 255, or only 0 and 1.

  Raises:
    UserError: as `read_picture`; the mask has another shape or other values.
  """
  return read_mask_and_values(path, shape, lesion_labels)[0]


def read_mask_and_values(
  path: pathlib.Path, shape: tuple[int, int] | None, lesion_labels: tuple[int, ...] = ()
) -> tuple[np.ndarray, tuple[int, ...]]:
  """As `read_mask`; also returns the distinct values of the picture, in ascending order."""
  image = _open(path)
  # In a palette with colours, or with labels, the palette's indices are the labels. In a grey palette, without labels,
  # the grey values count.
  indexed = image.mode == 'P' and (lesion_labels or _is_coloured(image))
  values = np.asarray(image) if indexed else read_picture(path)
  if shape is not None and values.shape != tuple(shape):
    raise UserError(f'{path}: the mask has {values.shape} pixels, its slice {tuple(shape)}; save it in that size')
  distinct = tuple(np.unique(values).tolist())
  if lesion_labels:
    return np.isin(values, lesion_labels).astype(np.uint8), distinct
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


def _is_coloured(image):
  channels = np.asarray(image.convert('RGB')).astype(np.int16)
  return np.ptp(channels, axis=-1).max() > _COLOURLESS


def _open(path):
  try:
    with Image.open(path) as image:
      image.load()
      return image
  except FileNotFoundError:
    raise UserError(f'{path}: file not found; check the path') from None
  except Exception as error:  # Pillow's decoders raise errors of many types
    raise UserError(f'{path}: the picture cannot be read ({one_line(error)}); copy it again from its source') from None
