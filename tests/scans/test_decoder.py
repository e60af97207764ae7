"""A crash of the decoder's process affects neither the main process nor the next file."""

import os

import pytest

from fusa_jax.scans import decoder, dicom_pixels
from fusa_jax.system.errors import UserError


def test_a_crashed_process_gives_one_line_and_is_replaced(tmp_path):
  first = decoder.apart(os.getpid)
  assert decoder.apart(os.getpid) == first != os.getpid()
  with pytest.raises(UserError, match=r'^cannot be decoded \(the decoder crashed\); copy it again'):
    decoder.apart(os.abort)
  assert decoder.apart(os.getpid) not in (first, os.getpid())
  # A reply that arrives after an interruption is not taken for the reply to the next call.
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(decoder.pickle, 'load', _interrupted)
    with pytest.raises(KeyboardInterrupt):
      decoder.apart(os.getpgid, 0)
  assert decoder.apart(os.path.basename, 'a/b') == 'b'
  with pytest.raises(UserError, match=r'^cannot be decoded \(No such file or directory\); copy it again'):
    decoder.apart(dicom_pixels.decoded, str(tmp_path / 'none'), (4, 4))


def _interrupted(_):
  raise KeyboardInterrupt
