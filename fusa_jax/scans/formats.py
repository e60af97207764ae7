"""The interface of a file format. A new format is a module like nifti.py, and its class a line in `sources.FORMATS`.

Results are written by what a source is, not by its format: NIfTI for scans, PNG for pictures.
"""

import abc
import dataclasses
import pathlib
from collections.abc import Iterable, Sequence
from typing import ClassVar, Self

import numpy as np

from fusa_jax.scans.volumes import Scan


class Source(abc.ABC):
  """A scan or picture as it is stored, unread. Error messages begin with its `str`.

  Attributes:
    endings: of its files' names, for messages; '' where the content of a file tells the format.
    is_picture: whether `read_image` gives a picture, not a scan.
    name: what results call it.
    stem: what the names of result files begin with.
    title: what log lines call it.
  """

  endings: ClassVar[str] = ''
  is_picture: ClassVar[bool] = False
  name: str
  stem = title = property(lambda self: self.name)

  @classmethod
  @abc.abstractmethod
  def claims(cls, path: pathlib.Path) -> bool:
    """Whether a file is of this format, be it damaged."""

  @classmethod
  @abc.abstractmethod
  def from_files(cls, paths: Iterable[pathlib.Path]) -> Sequence[Self]:
    """The sources that some files of this format hold; raises UserError where damage hides that."""

  @abc.abstractmethod
  def read_image(self, intensity: str) -> Scan | np.ndarray:
    """A scan (`volumes.from_volume` makes one), or a picture of grey values: uint8 [H, W].

    Raises:
      UserError: it is damaged; a scan's values are not of that intensity, one of volumes.VALUES.
    """


@dataclasses.dataclass(frozen=True)
class FileSource(Source):
  """A source that is one file."""

  path: pathlib.Path
  name = property(lambda self: self.path.name)
  stem = property(lambda self: self.path.stem)

  @classmethod
  def from_files(cls, paths: Iterable[pathlib.Path]) -> list[Self]:
    return [cls(path) for path in paths]

  def __str__(self) -> str:
    return str(self.path)
