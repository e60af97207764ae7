"""SHA-256 of files and folders. Files that have not changed since the last time are not read again."""

import contextlib
import functools
import json
import os
import pathlib
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent import futures

from data.workers import silent
from fusa_jax.scans.archives import in_folder
from fusa_jax.system.errors import UserError, one_line
from fusa_jax.system.files import replacing, sha256, sha256_of

# hashlib and reading release the lock.
_THREADS = min(os.cpu_count() or 1, 16)
# Files that changed in the last seconds may change again within one tick of the file system's clock.
_SETTLED_NS = 5 * 10**9
# Number of digests that are kept.
_KEPT = 100_000


def of(
  paths: Sequence[pathlib.Path], cache: pathlib.Path | None = None, progress: Callable[..., Iterable] = silent
) -> list[str]:
  """The digest of the bytes of each file; of a folder, that of the digests of its files, whatever their names.

  Args:
    paths: files, and folders of files at any depth.
    cache: a JSON file that keeps digests with size, times and inode of each file. A changed file changes the time of
      its inode, which programs cannot set. None keeps none. A file that cannot be written is not an error.
    progress: wraps an iterable and shows its progress.

  Raises:
    UserError: a file cannot be read.
  """
  known = _read(cache)
  with futures.ThreadPoolExecutor(_THREADS) as pool:
    states = list(pool.map(_state, paths))
    keys = [str(path.absolute()) for path in paths]
    results = {
      key: known[key][1] for key, state in zip(keys, states, strict=True) if known.get(key, [0])[0] == state[0]
    }
    new = [number for number, key in enumerate(keys) if key not in results]
    if new:
      hashed = pool.map(_digest, [paths[number] for number in new])
      for number, digest in zip(new, progress(hashed, total=len(new), desc='Hashing files', unit='files'), strict=True):
        results[keys[number]] = digest
      now = time.time_ns()
      settled = [
        number for number in new if states[number][1] < now - _SETTLED_NS and _state(paths[number]) == states[number]
      ]
      _write(cache, known | {keys[number]: [states[number][0], results[keys[number]]] for number in settled})
  return [results[key] for key in keys]


def _readable(function):
  @functools.wraps(function)
  def wrapped(path):
    try:
      return function(path)
    except OSError as error:
      raise UserError(f'{path}: cannot be read ({one_line(error)}); copy it again, or check its permissions') from None

  return wrapped


@_readable
def _state(path):
  """What changes when the content of a file or folder does, and the latest time of a change."""
  stats = [(file.relative_to(path).as_posix(), file.stat()) for file in _files(path)]
  described = [[name, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino] for name, s in stats]
  latest = max((max(s.st_mtime_ns, s.st_ctime_ns) for _, s in stats), default=0)
  return sha256(json.dumps(described).encode()), latest


@_readable
def _digest(path):
  digests = [sha256_of(file) for file in _files(path)]
  return sha256(''.join(sorted(digests)).encode()) if path.is_dir() else digests[0]


def _files(path):
  return in_folder(path) if path.is_dir() else [path]


def _read(cache):
  try:
    known = json.loads(cache.read_text()) if cache else {}
  except (OSError, ValueError):
    return {}
  return known if isinstance(known, dict) else {}


def _write(cache, known):
  if cache:
    with contextlib.suppress(UserError), replacing(cache) as partial:
      partial.write_text(json.dumps(dict(list(known.items())[-_KEPT:])))
