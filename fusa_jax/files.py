"""Files that are either whole or absent."""

import contextlib
import os
import pathlib
from collections.abc import Iterator


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """Gives a name to write to; on leaving, that file becomes `path` in one step. On an error nothing is left.

  The name ends as `path` does (libraries choose a format by it) and lies in the same folder (a rename is atomic only
  within a file system).
  """
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_name(f'.{os.getpid()}.{path.name}')
  try:
    yield partial
    os.replace(partial, path)
  finally:
    partial.unlink(missing_ok=True)
