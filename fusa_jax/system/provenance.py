"""The version and commit of the code, for files that must record them."""

import importlib.metadata
import pathlib
import subprocess


def version(package: str = 'fusa_jax') -> str | None:
  """Version of an installed package; None if it is not installed. A checkout of fusa_jax need not be installed."""
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return None


def commit() -> str | None:
  """The commit of this code's checkout; None if the code is not in its repository, for example if installed."""
  file = pathlib.Path(__file__)
  # The first command fails if the code is installed in an environment inside another repository.
  commands = [['git', 'ls-files', '--error-unmatch', file.name], ['git', 'rev-parse', 'HEAD']]
  try:
    *_, head = [subprocess.run(c, cwd=file.parent, capture_output=True, text=True, check=True) for c in commands]
  except (OSError, subprocess.CalledProcessError):
    return None
  return head.stdout.strip()
