"""The settings that several benchmarks share, and their flags."""

import dataclasses

from absl import flags


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

  @classmethod
  def from_flags(cls) -> 'Settings':
    """Returns the settings that the flags give."""
    return cls(**{field.name: getattr(flags.FLAGS, field.name) for field in dataclasses.fields(cls)})


def define_size_flags(models: list[str]) -> None:
  """Defines --models and the flags of Settings. Importing a benchmark does not define them: others have the same."""
  default = Settings()
  flags.DEFINE_list('models', models, 'names of models')
  number = lambda name, text: flags.DEFINE_integer(name, getattr(default, name), text, lower_bound=1)
  number('image_size', 'side of the slices in pixels')
  number('batch_size', 'slices per batch')
  number('rounds', 'turns of each contestant; the median counts')
  number('steps', 'steps per turn')
  number('width', "channels of the first level; default: the model's own")
