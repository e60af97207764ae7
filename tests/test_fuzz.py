"""Damaged input is read cleanly or refused in one line. fuzz.py as a script tries more of it."""

import fuzz
import pytest


@pytest.mark.parametrize('kind', fuzz.KINDS)
def test_damaged_files_are_read_or_refused_and_nothing_else(tmp_path, kind):
  found = fuzz.outcomes(kind, 500 if kind == 'nifti' else 100, tmp_path)
  assert found.keys() <= {'read', 'refused'} and found['refused'] > 10
  # Those with a checksum over all of their data leave little to read.
  assert found['read'] > 10 or kind in ('nifti.gz', 'zip', 'png')
