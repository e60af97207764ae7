"""Recognises files that this program wrote and that have not changed since. No mode replaces other files unasked.

A JSON file of this program, a record, states the digest of its own content and of the files that belong to it. A page
states the digest of its own text.
"""

import contextlib
import json
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from fusa_jax.system.errors import UserError
from fusa_jax.system.files import replacing, sha256, sha256_of
from fusa_jax.system.paths import exists, remove_empty_folder

_KEY = 'sha256_of_this_record'
_SEAL = re.compile(rb'<!-- fusa_jax sha256 ([0-9a-f]{64}) -->\n\Z')


def write_record(path: pathlib.Path, value: dict, files: Mapping[str, str]) -> None:
  """Writes a JSON object with the files that belong to it.

  Args:
    path: the JSON file.
    value: the object.
    files: the SHA-256 of each file that belongs to it, by its path from the folder of the record.

  Raises:
    UserError: the file cannot be written.
  """
  value = json.loads(json.dumps({**value, 'files': dict(files)}))
  with replacing(path) as partial:
    partial.write_text(json.dumps({**value, _KEY: _digest(value)}, indent=2) + '\n')


def write_together(
  record: pathlib.Path, value: dict, files: Mapping[pathlib.Path, Callable[[pathlib.Path], None]], remove: Sequence[str]
) -> None:
  """Writes a record and the files that belong to it.

  At any moment the record either fits its files, or some of them are missing. A killed process therefore leaves nothing
  that looks complete, and only files that the next one knows as its own.

  Args:
    record: the JSON file.
    value: the object to write.
    files: for each file, in the folder of the record or below, a function that writes it to a temporary path.
    remove: files of an earlier record, by their paths from that folder, in the order in which they are removed. Folders
      that this empties are removed as well.

  Raises:
    UserError: a file cannot be written.
  """
  with contextlib.ExitStack() as renaming:
    digests = {}
    for path, write in files.items():
      partial = renaming.enter_context(replacing(path))
      write(partial)
      digests[path.relative_to(record.parent).as_posix()] = sha256_of(partial)
    for name in dict.fromkeys([*digests, *remove]):
      (record.parent / name).unlink(missing_ok=True)
    write_record(record, value, digests)
  folders = {folder for name in remove for folder in pathlib.PurePosixPath(name).parents if folder.name}
  for folder in sorted(folders, reverse=True):  # inner folders first
    remove_empty_folder(record.parent / folder)


def read_record(path: pathlib.Path) -> dict[str, Any] | None:
  """Reads a JSON file of `write_record`; None if it is missing, or another program wrote or changed it."""
  try:
    value = json.loads(path.read_text())
    stated = value.pop(_KEY)
    names = value['files'].keys()
    return value if stated == _digest(value) and all(map(_is_below, names)) else None
  except (OSError, ValueError, AttributeError, KeyError, TypeError):
    return None


def files_of(path: pathlib.Path) -> list[str]:
  """Returns the files that belong to a record, by their paths from its folder; [] if it is not this program's own."""
  return list((read_record(path) or {'files': ()})['files'])


def _is_below(name):
  """Whether a path stays in its folder: a record only speaks of files beside it and below."""
  path = pathlib.PurePosixPath(name)
  return not path.is_absolute() and '..' not in path.parts and name not in ('', '.')


def sealed(page: str) -> str:
  """A page with the digest of its text as a comment in the last line."""
  page = page if page.endswith('\n') else page + '\n'
  return f'{page}<!-- fusa_jax sha256 {sha256(page.encode())} -->\n'


def has_changed(path: pathlib.Path, digest: str | None) -> bool:
  """Whether a file exists that has neither this SHA-256 nor, if the digest is None, a true seal of a page."""
  if not exists(path):
    return False
  try:
    if digest is not None:
      return sha256_of(path) != digest
    content = path.read_bytes() if path.suffix == '.html' else b''
  except OSError:
    return True
  seal = _SEAL.search(content)
  return not seal or seal[1].decode() != sha256(content[: seal.start()])


def is_complete(folder: pathlib.Path, record: dict) -> bool:
  """Whether all files of a record exist, unchanged."""
  return all(
    (folder / name).is_file() and not has_changed(folder / name, digest) for name, digest in record['files'].items()
  )


def changed(path: pathlib.Path, others: Iterable[pathlib.Path]) -> list[pathlib.Path]:
  """The files that are not this program's own, among a record, its files and files that would be written with it.

  Args:
    path: the record.
    others: the files that would be written.
  """
  record = read_record(path)
  foreign = [path] if record is None and exists(path) else []
  digests = {path.parent / name: digest for name, digest in (record or {}).get('files', {}).items()}
  return foreign + [other for other in dict.fromkeys([*others, *digests]) if has_changed(other, digests.get(other))]


def refuse(paths: Iterable[pathlib.Path]) -> None:
  """Raises a UserError with a line for each path, if there are any."""
  lines = [
    f'{path}: exists, and this program did not write it, or it was changed since; give another folder, or add '
    '--overwrite to replace it'
    for path in paths
  ]
  if lines:
    raise UserError('\n'.join(lines))


def _digest(value):
  return sha256(json.dumps(value, sort_keys=True).encode())
