"""Paths of folders on this machine (pathlib) and in a Google Cloud Storage bucket (etils.epath).

A bucket has no folders and no renames; an object appears when it is complete.
"""

import importlib.util
import os
import pathlib
import shutil

from fusa_jax.system.errors import UserError

_BUCKET = 'gs://'


def to_path(text: str | os.PathLike) -> pathlib.Path:
  """Turns the text of a folder into a path: an `epath.Path` for `gs://BUCKET/...`, a `pathlib.Path` for all others.

  Raises:
    UserError: the text is another address, or gcsfs is not installed.
  """
  if not in_bucket(text):
    check_local('workdir', text)
    return pathlib.Path(text)
  if importlib.util.find_spec('gcsfs') is None:
    raise UserError(f'{os.fspath(text)}: a bucket needs gcsfs; pip install -r requirements-gcs.txt')
  import fsspec
  from etils import epath

  # Listings must show what TensorStore and other processes have written.
  fsspec.config.conf.setdefault('gs', {})['use_listings_cache'] = False
  return epath.Path(text)


def in_bucket(path: str | os.PathLike) -> bool:
  """Whether a path is in a bucket, `gs://...`."""
  return os.fspath(path).startswith(_BUCKET)


def check_local(name: str, path: str | os.PathLike) -> None:
  """Refuses an address, for example `s3://BUCKET/RUN`. pathlib would turn it into a local folder named `s3:`.

  Args:
    name: the parameter or key that holds the path; the message begins with it.
    path: the path.

  Raises:
    UserError: the path is an address.
  """
  if '://' in os.fspath(path):
    raise UserError(
      f'{name}: {os.fspath(path)} is an address, not a path on this machine; mount the bucket as a folder '
      '(docs/pods.md), or copy the files here, and give that path'
    )


def exists(path: pathlib.Path) -> bool:
  """Whether a file, a folder or a link has this name; the target of the link may be missing."""
  return path.exists() if in_bucket(path) else os.path.lexists(path)


def files_under(folder: pathlib.Path) -> list[str]:
  """Returns the names of all files under a folder, relative to it, sorted."""
  if not in_bucket(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob('*') if path.is_file())
  files, root = _files(folder)
  return sorted(name.removeprefix(f'{root}/') for name in files.find(root))


def remove_folder(folder: pathlib.Path) -> None:
  """Removes a folder and all files in it; does nothing if it does not exist."""
  if in_bucket(folder):
    folder.rmtree(missing_ok=True)
  else:
    shutil.rmtree(folder, ignore_errors=True)


def remove_empty_folder(folder: pathlib.Path) -> None:
  """Removes a folder if nothing is in it; does nothing if it does not exist. A bucket has no empty folders."""
  if not in_bucket(folder) and folder.is_dir() and not any(folder.iterdir()):
    folder.rmdir()


def move_folder(folder: pathlib.Path, target: pathlib.Path) -> None:
  """Moves a folder to a new name. In a bucket it copies each file first."""
  if not in_bucket(folder):
    target.parent.mkdir(parents=True, exist_ok=True)
    folder.rename(target)
    return
  files, root = _files(folder)
  for name in files_under(folder):
    files.cp_file(f'{root}/{name}', f'{_files(target)[1]}/{name}')
  files.rm(root, recursive=True)


def _files(folder):
  """The file system of fsspec, and the path in it, of a folder in a bucket."""
  import fsspec

  return fsspec.core.url_to_fs(os.fspath(folder))
