"""The interface of a file format. To add one, write a module like nifti.py and list its class in `sources.FORMATS`.

Results do not have the format of their source: scans give NIfTI, pictures give PNG.
"""

import abc
import dataclasses
import pathlib
from collections.abc import Iterable, Sequence
from typing import ClassVar, Self

import numpy as np

from fusa_jax.scans.volumes import Scan
from fusa_jax.system.errors import UserError, one_line
from fusa_jax.system.files import printable, sha256, sha256_of


def check_file(path: pathlib.Path) -> None:
  """Raises a UserError if a file is missing, may not be read, or is empty."""
  try:
    with path.open('rb') as file:
      if file.read(1):
        return
  except FileNotFoundError:
    if path.is_symlink():
      raise UserError(f'{path}: a link to a file that is missing; restore that file, or remove the link') from None
    raise UserError(f'{path}: file not found; check the path') from None
  except PermissionError:
    raise UserError(f'{path}: you have no permission to read the file; change its permissions') from None
  except OSError as error:
    raise UserError(f'{path}: unreadable ({one_line(error)}); copy it again from its source') from None
  raise UserError(f'{path}: the file is empty; copy it again from its source')


class Source(abc.ABC):
  """A stored scan or picture that is not yet read. Error messages begin with its `str`.

  Attributes:
    endings: the endings of file names, for messages; '' if the format is recognised by content.
    is_picture: whether `read_image` returns a picture instead of a scan.
    name: the name in results.
    stem: the first part of the names of result files.
    title: the name in log lines.
    place: the path of a file within the input, or the name of a series: unique within an input.
    hides_paths: whether messages must not show paths, because exports name folders by patient.
  """

  endings: ClassVar[str] = ''
  is_picture: ClassVar[bool] = False
  hides_paths: ClassVar[bool] = False
  name: str
  stem = title = place = property(lambda self: self.name)

  @classmethod
  @abc.abstractmethod
  def claims(cls, path: pathlib.Path) -> bool:
    """Whether a file has this format, even if it is damaged."""

  @classmethod
  @abc.abstractmethod
  def from_files(cls, paths: Iterable[pathlib.Path]) -> 'Sequence[Source]':
    """The sources in files of this format. A file that is too damaged to tell becomes a `Refused`."""

  @abc.abstractmethod
  def read_image(self, intensity: str) -> Scan | np.ndarray:
    """Reads a scan (use `volumes.from_volume` to make it) or an 8-bit picture, uint8 [H, W].

    Args:
      intensity: one of volumes.VALUES.

    Raises:
      UserError: the source is damaged; the values of a scan do not have this intensity.
    """

  @abc.abstractmethod
  def files(self) -> Sequence[pathlib.Path]:
    """All files of the source."""

  def sha256(self) -> str:
    """The digest of the stored bytes. The names of the files do not matter, nor their order.

    Raises:
      OSError: a file cannot be read.
    """
    digests = [sha256_of(path) for path in self.files()]
    return digests[0] if len(digests) == 1 else sha256(''.join(sorted(digests)).encode())


@dataclasses.dataclass(frozen=True)
class FileSource(Source):
  """A source stored in one file.

  Attributes:
    path: the file.
    stem: see Source; '' is the file name without its ending.
    place: see Source; '' is the file name.
  """

  path: pathlib.Path
  stem: str = ''
  place: str = ''
  name = property(lambda self: self.path.name)
  title = property(lambda self: self.place)

  def __post_init__(self):
    object.__setattr__(self, 'stem', self.stem or self.stem_of(self.path))
    object.__setattr__(self, 'place', printable(self.place or self.path.name))

  @staticmethod
  def stem_of(path: pathlib.Path) -> str:
    """The file name without the ending of this format."""
    return path.stem

  @classmethod
  def from_files(cls, paths: Iterable[pathlib.Path]) -> list[Self]:
    return [cls(path) for path in paths]

  def files(self) -> list[pathlib.Path]:
    return [self.path]

  def __str__(self) -> str:
    return str(self.path)


@dataclasses.dataclass(frozen=True)
class Refused(Source):
  """A source that was found but cannot be read: `read_image` raises its error.

  Attributes:
    name: see Source.
    message: the text of the error, one line.
    paths: its files, as far as they are known.
  """

  name: str
  message: str
  paths: tuple[pathlib.Path, ...] = ()

  @classmethod
  def claims(cls, path: pathlib.Path) -> bool:
    return False

  @classmethod
  def from_files(cls, paths: Iterable[pathlib.Path]) -> list[Self]:
    return []

  def files(self) -> tuple[pathlib.Path, ...]:
    return self.paths

  def read_image(self, intensity: str) -> Scan:
    raise UserError(self.message)

  def __str__(self) -> str:
    return self.name
