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


class Source(abc.ABC):
  """A stored scan or picture that is not yet read. Error messages begin with its `str`.

  Attributes:
    endings: the endings of file names, for messages; '' if the format is recognised by content.
    is_picture: whether `read_image` returns a picture instead of a scan.
    name: the name in results.
    stem: the first part of the names of result files.
    title: the name in log lines.
  """

  endings: ClassVar[str] = ''
  is_picture: ClassVar[bool] = False
  name: str
  stem = title = property(lambda self: self.name)

  @classmethod
  @abc.abstractmethod
  def claims(cls, path: pathlib.Path) -> bool:
    """Whether a file has this format, even if it is damaged."""

  @classmethod
  @abc.abstractmethod
  def from_files(cls, paths: Iterable[pathlib.Path]) -> Sequence[Self]:
    """The sources in files of this format. Raises UserError if a file is too damaged to tell."""

  @abc.abstractmethod
  def read_image(self, intensity: str) -> Scan | np.ndarray:
    """Reads a scan (use `volumes.from_volume` to make it) or an 8-bit picture, uint8 [H, W].

    Args:
      intensity: one of volumes.VALUES.

    Raises:
      UserError: the source is damaged; the values of a scan do not have this intensity.
    """


@dataclasses.dataclass(frozen=True)
class FileSource(Source):
  """A source stored in one file."""

  path: pathlib.Path
  name = property(lambda self: self.path.name)
  stem = property(lambda self: self.path.stem)

  @classmethod
  def from_files(cls, paths: Iterable[pathlib.Path]) -> list[Self]:
    return [cls(path) for path in paths]

  def __str__(self) -> str:
    return str(self.path)
