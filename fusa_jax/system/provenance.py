"""Which code it was that made something."""

import importlib.metadata
import pathlib
import subprocess


def version(package: str = 'fusa_jax') -> str | None:
  """Of an installed package; None where it is not, as where this one is run as it was checked out."""
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return None


def commit() -> str | None:
  """The commit that this code was checked out at; None outside of its repository, as where it was installed."""
  file = pathlib.Path(__file__)
  # An environment may lie in the repository of something else.
  commands = [['git', 'ls-files', '--error-unmatch', file.name], ['git', 'rev-parse', 'HEAD']]
  try:
    *_, found = [subprocess.run(c, cwd=file.parent, capture_output=True, text=True, check=True) for c in commands]
  except (OSError, subprocess.CalledProcessError):
    return None
  return found.stdout.strip()
