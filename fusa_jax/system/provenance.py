"""The version and commit of the code, for files that must record them."""

import functools
import hashlib
import importlib.metadata
import pathlib
import subprocess


def version(package: str = 'fusa_jax') -> str | None:
  """Version of an installed package; None if it is not installed. A checkout of fusa_jax need not be installed."""
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return None


@functools.cache
def commit() -> str | None:
  """The commit of this code's checkout, at the first call.

  It is None if the code is not in its repository, for example if it is installed.
  """
  file = pathlib.Path(__file__)
  # The first command fails if the code is installed in an environment inside another repository.
  commands = [['git', 'ls-files', '--error-unmatch', file.name], ['git', 'rev-parse', 'HEAD']]
  try:
    *_, head = [subprocess.run(c, cwd=file.parent, capture_output=True, text=True, check=True) for c in commands]
  except (OSError, subprocess.CalledProcessError):
    return None
  return head.stdout.strip()


def code() -> dict:
  """Returns the code that computes a run: {'sha256': of this package, 'libraries': {name: version}}."""
  libraries = ('jax', 'jaxlib', 'flax', 'optax', 'numpy', 'grain')
  return {'sha256': code_sha256(), 'libraries': {name: version(name) for name in libraries}}


@functools.cache
def code_sha256() -> str:
  """The digest of the package's source files, by their names, at the first call.

  A program that runs does not follow later changes of its files: a test after hours of training is of the old code.
  """
  package, digest = pathlib.Path(__file__).parents[1], hashlib.sha256()
  for path in sorted(package.rglob('*.py')):
    digest.update(f'{path.relative_to(package)} {hashlib.sha256(path.read_bytes()).hexdigest()}\n'.encode())
  return digest.hexdigest()
