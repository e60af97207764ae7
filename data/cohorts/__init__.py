"""A file per public release: how its scans and masks are named. `find(raw_dir)` gives a list of cases."""

import pathlib
from typing import NamedTuple


class Case(NamedTuple):
  """A scan and its lesion mask."""

  patient: str
  ct: pathlib.Path
  mask: pathlib.Path
