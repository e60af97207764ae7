"""The settings that several benchmarks share.

This module imports no other package. benchmarks/accelerator.py must start even if packages are missing, to name them.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Settings:
  """The size of the work and the number of repetitions.

  Attributes:
    image_size: side of the slices, in pixels.
    batch_size: slices per batch.
    rounds: turns of each contestant; the median over the rounds counts.
    steps: steps per turn.
    width: channels of a model's first level; None: each model's own.
  """

  image_size: int = 512
  batch_size: int = 8
  rounds: int = 5
  steps: int = 3
  width: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(Settings):
  """The settings of benchmarks/accelerator.py.

  Attributes:
    models: names of models.
    memory_limit: memory for the largest batch, in bytes; None: the device's memory.
    folder: a folder in which a part may write files.
  """

  models: tuple[str, ...]
  memory_limit: int | None = None
  folder: str
