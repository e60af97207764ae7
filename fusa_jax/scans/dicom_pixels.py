"""Decodes the pixels of one DICOM file, and makes Hounsfield units of them."""

import numpy as np
from scipy import ndimage

from fusa_jax.scans import dicom_files, dicom_headers, volumes
from fusa_jax.system.errors import UserError, one_line

# The defaults of the elements that make HU of stored values.
RESCALE = {'RescaleSlope': 1.0, 'RescaleIntercept': 0.0}
# The highest HU of a scanner with 12 bits.
_HIGHEST = 3071
# The elements that decoding needs.
_PIXELS = ('PixelData', 'SamplesPerPixel', 'BitsAllocated', 'BitsStored', 'PixelRepresentation')
# The groups of overlays.
_OVERLAYS = range(0x6000, 0x6020, 2)


def decoded(path: str, size: tuple[int, int]) -> np.ndarray:
  """Decodes the slice in a file and applies its slope and intercept: int16 [H, W].

  Padding has the lowest value of int16. It is far below air, so that it can be told from air until `volumes.to_scan`
  raises it to AIR.

  Raises:
    UserError: the slice cannot be decoded, has another size or has values that cannot be HU. The message does not name
      the series.
  """
  bounds = np.iinfo(np.int16)
  try:
    image = dicom_files.read_dataset(path)
    stored, padding = _stored(image)
    if stored.shape != size:
      raise ValueError(f'{stored.shape} pixels')
    slope, intercept = (_rescale(image, key) for key in RESCALE)
    hu = np.rint(stored * slope + intercept)
    # A value of padding that tissue may have, too, is padding only from the border inwards.
    if ((hu[padding] > volumes.AIR) & (hu[padding] <= _HIGHEST)).any():
      border = np.ones(size, bool)
      border[1:-1, 1:-1] = False
      padding = ndimage.binary_propagation(padding & border, mask=padding)
    hu[padding] = bounds.min
    if hu.max() > bounds.max:
      raise UserError(
        f'values up to {hu.max():.0f} are not HU (PixelRepresentation or the rescale is wrong, or padding is not '
        'named in PixelPaddingValue); export it again'
      )
    return hu.clip(bounds.min).astype(np.int16)
  except UserError:
    raise
  except Exception as error:  # pydicom and the decoders raise errors of many types
    raise UserError(f'cannot be decoded ({one_line(error)}); copy it again from its source') from None


def _stored(image):
  """The stored values of an image, and where they are padding: two arrays [H, W]."""
  lacking = [key for key in _PIXELS if image.get(key) is None]
  if lacking:
    raise ValueError(f'no {", ".join(lacking)}')
  syntax = image.file_meta.TransferSyntaxUID
  if syntax.is_encapsulated and not _has_decoder(syntax):
    raise UserError(
      f'compressed as {syntax.name}, but no decoder is installed; {dicom_files.INSTALL}, or decompress it'
    )
  if not syntax.is_encapsulated and image['PixelData'].is_undefined_length:
    raise UserError('compressed, but its header does not say how (TransferSyntaxUID); export it again')
  if 'ModalityLUTSequence' in image:
    raise UserError('its values are not HU, but numbers of a lookup table (ModalityLUTSequence); export it in HU')
  if image.get('HighBit') not in (None, image.BitsStored - 1):
    raise UserError(f'HighBit is {image.HighBit}, but must be BitsStored - 1; export it again')
  if syntax.is_encapsulated:  # decoders return only the bits that are stored
    stored = image.pixel_array
    return stored, _padding(stored, image, image.BitsStored)
  image.pixel_array_options(correct_unused_bits=False)
  words = image.pixel_array
  padding = _padding(words, image, image.BitsAllocated)
  unused = image.BitsAllocated - image.BitsStored
  stored = words << unused >> unused
  # Old files have an overlay in the unused bits. Without one, the values are cut off or BitsStored is wrong.
  positions = [image[group, 0x0102].value for group in _OVERLAYS if (group, 0x0102) in image]
  if not any(positions) and (stored != words)[~padding].any():
    raise UserError(f'values need more than the {image.BitsStored} bits of BitsStored; export it again')
  return stored, padding


def _padding(stored, image, bits):
  """Where stored values lie from PixelPaddingValue to PixelPaddingRangeLimit.

  Their sign may be written wrongly, so values count as equal if their last `bits` bits are equal.
  """
  value = dicom_headers.numbers(image, 'PixelPaddingValue', 1)
  if value is None:
    return np.zeros(stored.shape, bool)
  limit = dicom_headers.numbers(image, 'PixelPaddingRangeLimit', 1)
  lowest = -(1 << bits - 1) if image.PixelRepresentation else 0
  ends = [(int(end) - lowest) % (1 << bits) + lowest for end in (*value, *(value if limit is None else limit))]
  return (stored >= min(ends)) & (stored <= max(ends))


def _rescale(image, key):
  """RescaleSlope or RescaleIntercept. Some converters omit slope 1 and intercept 0; to_scan refuses other values."""
  if image.get(key) is None:
    return RESCALE[key]
  value = dicom_headers.numbers(image, key, 1)
  if value is None or (key == 'RescaleSlope' and value == 0):
    raise UserError(f'{key} is not valid; export it again')
  return value[0]


def _has_decoder(syntax):
  try:
    return dicom_files.load_pydicom().pixels.get_decoder(syntax).is_available
  except NotImplementedError:
    return False
