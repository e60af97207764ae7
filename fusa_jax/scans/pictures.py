"""Slices as PNG or JPEG: grey values of 0 to 255 that somebody windowed, and masks. NumPy and Pillow only."""

import pathlib

import numpy as np
from PIL import Image

from fusa_jax.scans import formats
from fusa_jax.system.errors import UserError, one_line
from fusa_jax.system.files import replacing

# JPEG rounds the three channels of a grey picture each in its own way.
_COLOURLESS = 24


def is_picture_file(path: pathlib.Path) -> bool:
  return path.suffix.lower() in ('.png', '.jpg', '.jpeg') and not path.name.startswith('.')


class PictureFile(formats.FileSource):
  """A slice in one file."""

  endings = '.png, .jpg'
  is_picture = True
  claims = staticmethod(is_picture_file)

  def read_image(self, intensity: str) -> np.ndarray:
    return read_picture(self.path)


def read_picture(path: pathlib.Path) -> np.ndarray:
  """A slice as uint8 [H, W].

  Raises:
    UserError: unreadable; 16-bit; in colour.
  """
  image = _open(path)
  if image.mode.startswith(('I', 'F')):
    raise UserError(f'{path}: more than 8 bits a pixel; export the scan as .nii.gz in HU, or the picture in 8-bit grey')
  if image.mode in ('1', 'L'):
    return np.asarray(image.convert('L'))
  if _is_coloured(image):
    raise UserError(f'{path}: a picture in colour; give the slice in grey, without anything drawn on it')
  return np.asarray(image.convert('RGB').convert('L'))


def read_mask(path: pathlib.Path, shape: tuple[int, int], lesion_labels: tuple[int, ...] = ()) -> np.ndarray:
  """The mask of a slice: uint8 {0, 1} [H, W].

  Args:
    path: of the picture.
    shape: of the slice.
    lesion_labels: its values that are lesion; () where it holds 0 and 255, or 0 and 1, only.

  Raises:
    UserError: as `read_picture`; also of another shape, or with other values.
  """
  image = _open(path)
  # Colours of a palette stand for labels, whose numbers are its indices; of a grey palette, the grey is meant.
  indexed = image.mode == 'P' and (lesion_labels or _is_coloured(image))
  values = np.asarray(image) if indexed else read_picture(path)
  if values.shape != tuple(shape):
    raise UserError(f'{path}: the mask has {values.shape} pixels and its slice {tuple(shape)}; save it in that size')
  if lesion_labels:
    return np.isin(values, lesion_labels).astype(np.uint8)
  found = np.unique(values)
  if not (set(found.tolist()) <= {0, 255} or set(found.tolist()) <= {0, 1}):
    shown = ', '.join(map(str, found[:6])) + (', ...' if found.size > 6 else '')
    raise UserError(
      f'{path}: a mask holds 0 and 255, or 0 and 1, only, this one has {shown}; save it as PNG (JPEG blurs it), or '
      'name those that are lesion, as in --config.data.lesion_labels="(3,)"'
    )
  return (values > 0).astype(np.uint8)


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
    raise UserError(f'{path}: no such file; check the path') from None
  except Exception as error:  # Pillow lets errors of its decoders through, of many types
    raise UserError(f'{path}: no picture that can be read ({one_line(error)}); copy it again from its source') from None
