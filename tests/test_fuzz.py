"""Damaged input is read or refused with a one-line error. The script fuzz.py tries more files."""

import fuzz
import pytest


@pytest.mark.parametrize('kind', fuzz.KINDS)
def test_damaged_files_are_read_or_refused(tmp_path, kind):
  counts = fuzz.outcomes(kind, 500 if kind == 'nifti' else 100, tmp_path)
  assert counts.keys() <= {'read', 'refused'} and counts['refused'] > 10
  # Formats with a checksum over all data are almost always refused.
  assert counts['read'] > 5 or kind in ('nifti.gz', 'nrrd, gzip', 'zip', 'png')
