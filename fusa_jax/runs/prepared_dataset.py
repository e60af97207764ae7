"""Opens a prepared dataset, and takes the classes of a config from it."""

import pathlib
from collections.abc import Sequence

import ml_collections
import tensorflow_datasets as tfds

from fusa_jax import tasks
from fusa_jax.scans.classes import AUTO
from fusa_jax.system.errors import UserError


def open_dataset(data_dir: str | pathlib.Path) -> tfds.core.DatasetBuilder:
  """Opens the prepared dataset in a folder.

  Raises:
    UserError: the folder holds no prepared dataset, or more than one.
  """
  data_dir = pathlib.Path(data_dir)
  if not data_dir.is_dir():
    raise UserError(f'data.dir: {data_dir} is not a folder; prepare the dataset with --mode=prepare')
  infos = [path for path in data_dir.rglob('dataset_info.json') if 'incomplete' not in path.parent.name]
  if len(infos) != 1:
    count = 'no prepared dataset' if not infos else f'{len(infos)} prepared datasets'
    raise UserError(f'data.dir: {count} in {data_dir}; name the folder of one, or prepare it with --mode=prepare')
  return tfds.builder_from_directory(infos[0].parent)


def fill_classes(config: ml_collections.ConfigDict, data_dir: str | pathlib.Path) -> None:
  """Replaces data.classes='auto' in a config by the classes of a prepared dataset; () is one class.

  Raises:
    UserError: as `open_dataset` and `check_ignored`.
  """
  if config.data.classes != AUTO:
    return
  metadata = open_dataset(data_dir).info.metadata
  named = metadata.get('classes', [])
  with config.ignore_type():  # the config of a fold has no reference of any type
    if metadata.get('exclusive'):
      config.data.classes = tuple(name for name, _ in named)
      return
    config.data.classes = tuple((name, tuple(values)) for name, values in named if values)
    check_ignored(config, metadata.get('ignore_label'), data_dir)
    if metadata.get('ignore_label'):
      (config.data.ignore_label,) = metadata['ignore_label']


def check_ignored(
  config: ml_collections.ConfigDict, ignored: Sequence[int] | None, data_dir: str | pathlib.Path
) -> None:
  """Raises a UserError if a task that scores whole slices has a dataset in which pixels are left out."""
  if ignored and not tasks.type_of(config.task).has_masks:
    raise UserError(
      f'data.dir: {data_dir} was prepared with data.ignore_label={ignored[0]}, which leaves out pixels, but '
      f'{config.task} scores whole slices; prepare the scans again without it, in another folder'
    )
