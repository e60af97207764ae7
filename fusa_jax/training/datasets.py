"""A prepared dataset on disk: its folds dealt into training, validation and test, and what is known of each slice."""

import dataclasses
import pathlib
from collections.abc import Sequence

import ml_collections
import numpy as np
import tensorflow_datasets as tfds

from fusa_jax import tasks
from fusa_jax.system.errors import UserError


@dataclasses.dataclass(frozen=True)
class Split:
  """Some folds of a prepared dataset, as Grain reads them, and what is known of each slice without reading it.

  Attributes:
    source: random access to slices: {'image': int16, 'mask': uint8, 'label', 'patient', 'slice', 'spacing'}.
    label: bool [N], whether a slice has a lesion.
    patient: str [N].
    slice: int [N], the slice's place in its scan, 0 the most inferior.
  """

  source: Sequence[dict]
  label: np.ndarray
  patient: np.ndarray
  slice: np.ndarray

  def __len__(self) -> int:
    return len(self.label)


@dataclasses.dataclass(frozen=True)
class Dataset:
  """A prepared dataset, its folds dealt into training, validation and test.

  Attributes:
    name: TFDS's, with config and version.
    image_size: of its square slices.
    intensity: 'hu' or 'grey'.
    by_patient: whether folds are of patients; False where nobody knows whose some of the slices are.
    masks: whether it has masks; False for labels of slices only.
  """

  name: str
  image_size: int
  intensity: str
  by_patient: bool
  masks: bool
  train: Split
  validation: Split | None
  test: Split

  def patients(self) -> dict[str, list[str]]:
    """Those of each part, sorted."""
    parts = {'train': self.train, 'validation': self.validation, 'test': self.test}
    return {name: [] if part is None else np.unique(part.patient).tolist() for name, part in parts.items()}


def load_dataset_for(config: ml_collections.ConfigDict, data_dir: str | pathlib.Path) -> Dataset:
  """The dataset that a config's task is trained and tested on.

  Raises:
    UserError: as `load_dataset`; values of another kind than the config's; labels only, and a task that needs masks.
  """
  dataset = load_dataset(data_dir, config.data.fold, config.data.image_size)
  if dataset.intensity != config.data.intensity:
    raise UserError(
      f'data.intensity: {config.data.intensity}, but {data_dir} holds {dataset.intensity}: a network of one cannot '
      'read the other; set one to the other'
    )
  if tasks.type_of(config.task).has_masks and not dataset.masks:
    raise UserError(f'data: {data_dir} has labels of slices and no masks; train a classifier, --config=configs/cls.py')
  return dataset


def load_dataset(data_dir: str | pathlib.Path, fold: int, image_size: int) -> Dataset:
  """Opens a prepared dataset: test = fold k, validation = fold k + 1, the rest is trained on.

  A cohort of two patients has two folds and nothing left to validate on: `validation` is None (`parts`).

  Raises:
    UserError: nothing prepared there, prepared at another size, or no such fold.
  """
  builder = _open(pathlib.Path(data_dir))
  metadata = builder.info.metadata
  missing = {'folds', 'size', 'intensity', 'patients', 'masks'} - metadata.keys()
  if missing:
    raise UserError(
      f'data.dir: {data_dir} was not prepared by this version (its metadata lack {", ".join(sorted(missing))}); '
      'prepare the scans again, in another folder, with --mode=prepare'
    )
  folds, size = metadata['folds'], metadata['size']
  if size != image_size:
    raise UserError(f'data.image_size: {image_size}, but {data_dir} was prepared at {size}; set one to the other')
  if fold not in range(len(folds)):
    raise UserError(
      f"data.fold: {fold!r}, but the folds of {data_dir} are 0 to {len(folds) - 1}; or 'all' of them in turn"
    )
  split = {part: _split(builder, folds, chosen) if chosen else None for part, chosen in parts(fold, len(folds)).items()}
  return Dataset(
    name=builder.info.full_name,
    image_size=size,
    intensity=metadata['intensity'],
    by_patient=metadata['patients'] == 'named',
    masks=metadata['masks'],
    **split,
  )


def parts(fold: int, num_folds: int) -> dict[str, list[int]]:
  """The folds that are trained on, validated on (none of fewer than three) and tested on, where `fold` is tested."""
  validation = [(fold + 1) % num_folds] if num_folds > 2 else []
  train = [k for k in range(num_folds) if k not in (fold, *validation)]
  return {'train': train, 'validation': validation, 'test': [fold]}


def folds(data_dir: str | pathlib.Path) -> list[list[dict]]:
  """The patients of each fold of a prepared dataset: {'patient', 'lesion_voxels' of each slice, 'lesion_ml' or None}.

  Raises:
    UserError: nothing prepared there.
  """
  found = _open(pathlib.Path(data_dir)).info.metadata['folds']
  return [found[f'fold{k}'] for k in range(len(found))]


def card(data_dir: str | pathlib.Path, tested: int | str) -> dict:
  """What a report says of a dataset in which the fold `tested` ('all': each in turn) is tested on.

  Returns:
    folds: a row for each: what it was used for, patients, slices, and lesion volumes where they are known.
    validated: whether there are folds enough to validate on one.
  """
  of_folds = folds(data_dir)
  roles = dict.fromkeys(range(len(of_folds)), 'tested once')
  if tested != 'all':
    dealt = parts(tested, len(of_folds))
    roles = {k: {'train': 'training'}.get(part, part) for part, chosen in dealt.items() for k in chosen}
  rows = []
  for k, patients in enumerate(of_folds):
    slices = np.concatenate([patient['lesion_voxels'] for patient in patients])
    row = {
      'fold': k,
      'role': roles[k],
      'patients': len(patients),
      'without_lesion': sum(not any(patient['lesion_voxels']) for patient in patients),
      'slices': len(slices),
      'positive': int((slices > 0).sum()),
    }
    volumes = [patient['lesion_ml'] for patient in patients]
    if None not in volumes:  # as of pictures
      row |= {
        'lesion_ml': float(np.sum(volumes)),
        'median_ml': float(np.median(volumes)),
        'largest_ml': float(np.max(volumes)),
      }
    rows.append(row)
  return {'folds': rows, 'validated': bool(parts(0, len(of_folds))['validation'])}


def _open(data_dir):
  if not data_dir.is_dir():
    raise UserError(f'data.dir: {data_dir} is no folder; prepare the dataset with --mode=prepare')
  found = [path for path in data_dir.rglob('dataset_info.json') if 'incomplete' not in path.parent.name]
  if len(found) != 1:
    what = 'no prepared dataset' if not found else f'{len(found)} prepared datasets'
    raise UserError(f'data.dir: {what} in {data_dir}; name the folder of one, or prepare it with --mode=prepare')
  return tfds.builder_from_directory(found[0].parent)


def _split(builder, folds, chosen):
  entries = [entry for k in chosen for entry in folds[f'fold{k}']]
  slices = [len(entry['lesion_voxels']) for entry in entries]
  return Split(
    source=builder.as_data_source(split='+'.join(f'fold{k}' for k in chosen)),
    label=np.concatenate([np.asarray(entry['lesion_voxels']) > 0 for entry in entries]),
    patient=np.repeat([entry['patient'] for entry in entries], slices),
    slice=np.concatenate([np.arange(n) for n in slices]),
  )
