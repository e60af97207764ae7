"""What breaks the process of the decoder breaks neither this one nor the next file."""

import os

import pytest

from fusa_jax.scans import decoder, dicom
from fusa_jax.system.errors import UserError


def test_a_process_that_ends_is_one_line_and_the_next_file_has_another(tmp_path):
  first = decoder.apart(os.getpid)
  assert decoder.apart(os.getpid) == first != os.getpid()
  with pytest.raises(UserError, match=r'^a slice cannot be decoded \(its decoder broke down\); copy it again'):
    decoder.apart(os.abort)
  assert decoder.apart(os.getpid) not in (first, os.getpid())
  # An answer that was not waited for is not the next one's.
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(decoder.pickle, 'load', _interrupted)
    with pytest.raises(KeyboardInterrupt):
      decoder.apart(os.getpgid, 0)
  assert decoder.apart(os.path.basename, 'a/b') == 'b'
  with pytest.raises(UserError, match=r'^a slice cannot be decoded \(No such file or directory\); copy it again'):
    decoder.apart(dicom.decoded, str(tmp_path / 'none'), (4, 4))


def _interrupted(_):
  raise KeyboardInterrupt
