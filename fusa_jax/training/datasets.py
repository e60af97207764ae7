"""Reads a prepared dataset and divides its folds into training, validation and test."""

import dataclasses
import functools
import json
import logging
import pathlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import ml_collections
import numpy as np

from fusa_jax import tasks
from fusa_jax.runs.prepared_dataset import check_ignored, fill_classes, open_dataset
from fusa_jax.runs.split import PARTS
from fusa_jax.scans.classes import BACKGROUND, LESION
from fusa_jax.scans.neighbours import SLICE_ALONE, Context
from fusa_jax.system.errors import UserError
from fusa_jax.system.files import sha256
from fusa_jax.training.stacks import Stacks

# The metadata that decide about the slices, of the dataset and of each patient. Digests of files do not: names and
# formats of files do not change the slices.
_OF_CONTENT = ('size', 'intensity', 'patients', 'masks')
_OF_PATIENT = ('patient', 'owner', 'images', 'truth')


class Identity(NamedTuple):
  """What a patient's data are, whatever the names of the files.

  Attributes:
    owner: the person.
    images: the SHA-256 of the values of the scan, or of each picture; '' for a picture with only one value.
    truth: the SHA-256 of the lesion mask, or of the labels of the slices.
  """

  owner: str
  images: list[str]
  truth: str


@dataclasses.dataclass(frozen=True)
class Split:
  """The slices of some folds of a prepared dataset. All attributes except `source` come from its metadata.

  Attributes:
    source: reads slices by index, each {'image': int16, 'mask': uint8, 'label', 'patient', 'slice', 'spacing'}. With
      data.context, the image has the neighbours of the slice as channels (`Stacks`).
    label: bool [N], whether each slice has a lesion of any class.
    class_labels: for each class, bool [N], whether each slice has it.
    patient: str [N], the scan or patient of each slice.
    slice: int [N], the position of each slice in its scan; 0 is the most inferior slice.
    owner: str [N], the person of each slice; several scans can have the same.
    patients: the identity of each patient, by name.
    exclusive: whether each slice has exactly one class.
  """

  source: Sequence[dict]
  label: np.ndarray
  class_labels: tuple[np.ndarray, ...]
  patient: np.ndarray
  slice: np.ndarray
  owner: np.ndarray
  patients: dict[str, Identity]
  exclusive: bool = False

  def __len__(self) -> int:
    return len(self.label)

  @functools.cached_property
  def bits(self) -> np.ndarray:
    """int32 [N], the classes of each slice: bit k is class k (`scans.classes`)."""
    numbers = range(len(self.class_labels))
    return sum(self.class_labels[number].astype(np.int32) << number for number in numbers)

  @property
  def groups(self) -> dict[str, np.ndarray]:
    """The groups that balanced training draws from equally often, by name: bool [N], whether each slice belongs."""
    if self.exclusive:
      return {f'of class {number}': label for number, label in enumerate(self.class_labels)}
    return {'with lesion': self.label, 'without lesion': ~self.label}


@dataclasses.dataclass(frozen=True)
class Dataset:
  """A prepared dataset with its folds divided into training, validation and test.

  Attributes:
    name: its name in TFDS, with config and version, and the start of its digest.
    image_size: the side of its square slices, in pixels.
    intensity: 'hu' or 'grey'.
    by_patient: whether patients are divided into folds; False if the patients of some slices are unknown.
    masks: whether it has masks; False if it has only labels.
    patient_labels: whether the labels are of patients; each slice then inherits the label of its patient.
    classes: the names and the mask values of its classes, as in data.classes; [] if there is one class.
    lesion_labels: the mask values of that one class; [] if the cohort has no masks, or with `classes`.
    exclusive: whether these are exclusive classes of slices. They have no mask values.
    ignored: the mask values of pixels that are left out.
    sha256: the digest of its content: size, intensity, classes, and the folds with the scans and lesion masks of their
      patients.
    train: the training folds.
    validation: the validation fold, or None.
    test: the test fold.
  """

  name: str
  image_size: int
  intensity: str
  by_patient: bool
  masks: bool
  patient_labels: bool
  classes: list
  lesion_labels: list[int]
  exclusive: bool
  ignored: list[int]
  sha256: str
  train: Split
  validation: Split | None
  test: Split

  def description(self) -> dict:
    """Describes the data for split.json (see `fusa_jax.runs.split`)."""
    parts = {'train': self.train, 'validation': self.validation, 'test': self.test}
    parts = {name: part for name, part in parts.items() if part is not None}
    names = {name: sorted(part.patients) for name, part in parts.items()}
    patients = {name: one._asdict() for part in parts.values() for name, one in part.patients.items()}
    return {'dataset': self.name, 'sha256': self.sha256, **{part: [] for part in PARTS}, **names, 'patients': patients}


def load_dataset_for(config: ml_collections.ConfigDict, data_dir: str | pathlib.Path) -> Dataset:
  """Opens a prepared dataset and checks that it fits the config.

  In the config, data.classes='auto' becomes the classes of the dataset.

  Raises:
    UserError: as `load_dataset`; the dataset has another intensity or other classes than the config, or no masks
      although the task needs them; no training patient has one of several classes.
  """
  fill_classes(config, data_dir)
  dataset = load_dataset(data_dir, config.data.fold, config.data.image_size, tasks.context_of(config))
  if dataset.intensity != config.data.intensity:
    raise UserError(
      f'data.intensity: {config.data.intensity}, but {data_dir} holds {dataset.intensity}; set data.intensity to '
      f'{dataset.intensity}, or name another dataset'
    )
  if tasks.type_of(config.task).has_masks and not dataset.masks:
    unit = 'patients' if dataset.patient_labels else 'slices'
    raise UserError(
      f'data: {data_dir} has labels of {unit} but no masks; train a classifier with --config=configs/cls.py'
    )
  _check_classes(config, dataset, data_dir)
  return dataset


def check_labels(config: ml_collections.ConfigDict, dataset: Dataset) -> None:
  """Raises a UserError if a key of the config does not fit the labels: those of patients, or exclusive classes."""
  if dataset.exclusive and config.evaluate.fit_temperature:
    raise UserError(
      'evaluate.fit_temperature: calibrates each class alone, so that the probabilities of exclusive classes would not '
      'add up to 1; leave it out'
    )
  if dataset.patient_labels and config.evaluate.fit_temperature:
    raise UserError('evaluate.fit_temperature: needs labels of slices, but these are of patients; leave it out')


def _check_classes(config, dataset, data_dir):
  """Checks that the classes of a config are those of the dataset."""
  own = tasks.classes_of(config)
  names = own.names
  theirs = tuple(name for name, _ in dataset.classes if dataset.exclusive or name != BACKGROUND) or LESION.names
  if own.exclusive != dataset.exclusive:
    kind = {True: 'exclusive classes of slices', False: 'a yes-or-no question per class'}
    raise UserError(
      f'data.classes: {", ".join(names)} ({kind[own.exclusive]}), but {data_dir} has {", ".join(theirs)} '
      f'({kind[dataset.exclusive]}); leave data.classes out, or prepare the scans again in another folder'
    )
  check_ignored(config, dataset.ignored, data_dir)
  if names != theirs or (config.data.ignore_label is not None) != bool(dataset.ignored):
    shown = lambda each: ', '.join(each)
    raise UserError(
      f'data.classes: {shown(names)}, but {data_dir} was prepared with {shown(theirs)}'
      f'{" and other ignored values" if names == theirs else ""}; set data.classes and data.ignore_label as in '
      'preparation, or prepare the scans again in another folder'
    )
  stored = {name: tuple(values) for name, values in dataset.classes} or {names[0]: tuple(dataset.lesion_labels)}
  given = [(f'data.classes: {name!r} is', values, stored[name]) for name, values in zip(names, own.values, strict=True)]
  if own.background is None:  # data.classes gives no mask values
    labels = tuple(config.data.lesion_labels)
    given = [('data.lesion_labels:', labels, stored[names[0]])] if labels else []
  given += [('data.ignore_label:', *each) for each in zip(own.ignored, dataset.ignored, strict=True)]
  for key, values, prepared in given:
    if values != prepared:
      reason = f'{prepared}; give the values of preparation' if prepared else 'any value of a mask; leave the key out'
      raise UserError(
        f'{key} {values}, but {data_dir} was prepared with {reason}, or prepare the scans again in another folder'
      )


def check_trainable(config: ml_collections.ConfigDict, dataset: Dataset) -> None:
  """Raises a UserError if no training patient has one of several classes."""
  own = tasks.classes_of(config)
  if len(own.names) == 1:
    return
  absent = [name for name, label in zip(own.names, dataset.train.class_labels, strict=True) if not label.any()]
  if absent:
    raise UserError(
      f'data.classes: no training patient of fold {config.data.fold} has the class {absent[0]!r}; '
      + ("give its values to 'background', or " if not own.exclusive else 'add patients who have it, or ')
      + 'test another fold'
    )


def load_dataset(data_dir: str | pathlib.Path, fold: int, image_size: int, context: Context = SLICE_ALONE) -> Dataset:
  """Opens a prepared dataset: the test fold is k, the validation fold is k + 1, the others are for training.

  With only two folds (a cohort of two patients), `validation` is None (see `parts`).

  Args:
    data_dir: the folder of the prepared dataset.
    fold: the test fold k.
    image_size: the expected size of the slices.
    context: the neighbours that are read with each slice.

  Raises:
    UserError: the folder holds no prepared dataset of this version, or more than one; the slices have another size; the
      fold does not exist; or slices have no neighbours, but `context` asks for them.
  """
  builder = open_dataset(data_dir)
  metadata = builder.info.metadata
  missing = {'folds', 'lesion_labels', *_OF_CONTENT} - metadata.keys()
  if not missing:
    missing = set(Identity._fields) - metadata['folds']['fold0'][0].keys()
  if missing:
    raise UserError(
      f'data.dir: {data_dir} was prepared by another version (the metadata lack {", ".join(sorted(missing))}); prepare '
      'the scans again in another folder with --mode=prepare'
    )
  folds, size = metadata['folds'], metadata['size']
  if size != image_size:
    raise UserError(f'data.image_size: {image_size}, but {data_dir} was prepared at {size}; set data.image_size={size}')
  if fold not in range(len(folds)):
    raise UserError(
      f"data.fold: {fold!r} is not a fold of {data_dir}; give 0 to {len(folds) - 1}, or 'all' for cross-validation"
    )
  if context.slices:
    _check_order(data_dir, metadata)
  exclusive = metadata.get('exclusive', False)
  split = {
    part: _split(builder, folds, chosen, context, exclusive) if chosen else None
    for part, chosen in parts(fold, len(folds)).items()
  }
  content = [builder.info.full_name, *(metadata[key] for key in _OF_CONTENT)]
  patient_labels = metadata.get('patient_labels', False)
  if patient_labels:
    content.append('patient_labels')
  content += [[name, *(patient[key] for key in _OF_PATIENT)] for name, fold in folds.items() for patient in fold]
  classes = metadata.get('classes', [])
  if classes:
    content += [classes, metadata['ignore_label']]
  digest = sha256(json.dumps(content, sort_keys=True).encode())
  return Dataset(
    name=f'{builder.info.full_name}-{digest[:12]}',
    image_size=size,
    intensity=metadata['intensity'],
    by_patient=metadata['patients'] == 'named',
    masks=metadata['masks'],
    patient_labels=patient_labels,
    classes=classes,
    lesion_labels=metadata['lesion_labels'],
    exclusive=exclusive,
    ignored=metadata.get('ignore_label', []),
    sha256=digest,
    **split,
  )


def _check_order(data_dir, metadata):
  """Checks that the slices of a dataset have neighbours, for data.context."""
  patients = [patient for fold in metadata['folds'].values() for patient in fold]
  reason = None
  if metadata['patients'] != 'named':
    reason = 'the patients of slices are unknown'
  elif not metadata['masks'] and not metadata.get('patient_labels'):
    reason = 'pictures in a folder per class have no order'
  elif all(len(patient['lesion_voxels']) == 1 for patient in patients):
    reason = 'each patient has a single slice'
  if reason:
    raise UserError(f'data.context: {data_dir} has no neighbouring slices, because {reason}; leave data.context out')
  # Pictures, of which the size is not known; scans with labels of patients have no lesion volumes either.
  if not metadata.get('patient_labels') and any(patient['lesion_ml'] is None for patient in patients):
    _say_distances_are_unknown(str(data_dir))


def say_which_are_near(split: Split, context: Context) -> None:
  """Logs how many of some scans have no neighbours near enough; a warning if none has. The metadata do not say it."""
  spacings = split.source.spacings(most=32)
  spacings = spacings[~np.isnan(spacings)]
  if not len(spacings):
    return
  alone = sum(context.indices(3, spacing)[1, context.slices - 1] == 1 for spacing in spacings)
  level = logging.WARNING if alone == len(spacings) else logging.INFO
  logging.log(
    level,
    'data.context: of %d training scans, %d have no neighbouring slice within %g mm; slices are %.1f to %.1f mm apart',
    *(len(spacings), alone, context.mm, spacings.min(), spacings.max()),
  )


@functools.cache
def _say_distances_are_unknown(data_dir):
  logging.info(
    '%s: the distances between the pictures of a patient are unknown, so that data.context takes the next ones in the '
    'order of their names as neighbours',
    data_dir,
  )


def truth_sha256(truth: Mapping[str, str]) -> str:
  """Returns a digest of the lesion masks or labels of some patients, given `Identity.truth` by name."""
  return sha256(json.dumps(sorted(truth.items())).encode())


def parts(fold: int, num_folds: int) -> dict[str, list[int]]:
  """Returns the folds of each part if `fold` is the test fold; with fewer than three folds, none is for validation."""
  validation = [(fold + 1) % num_folds] if num_folds > 2 else []
  train = [k for k in range(num_folds) if k not in (fold, *validation)]
  return {'train': train, 'validation': validation, 'test': [fold]}


def folds(data_dir: str | pathlib.Path) -> list[list[dict]]:
  """Returns the patients of each fold, as the builder of data/covid_ct describes them.

  Raises:
    UserError: the folder holds no prepared dataset, or more than one.
  """
  return _folds(open_dataset(data_dir).info.metadata)


def _folds(metadata):
  return [metadata['folds'][f'fold{k}'] for k in range(len(metadata['folds']))]


def card(data_dir: str | pathlib.Path, tested: int | str, number: int = 0) -> dict:
  """Describes a dataset, as far as it concerns one class, for the report.

  Args:
    data_dir: the folder of the prepared dataset.
    tested: the test fold, or 'all' for a cross-validation.
    number: the number of the class.

  Returns:
    folds: a row per fold: its role, its patients (persons) and slices, and their lesion volumes if known. The volumes
      of single classes are not in the dataset.
    validated: whether there are enough folds for a validation fold.
  """
  metadata = open_dataset(data_dir).info.metadata
  of_folds = _folds(metadata)
  roles = dict.fromkeys(range(len(of_folds)), 'tested once')
  if tested != 'all':
    folds_of = parts(tested, len(of_folds))
    roles = {k: {'train': 'training'}.get(part, part) for part, chosen in folds_of.items() for k in chosen}
  rows = []
  for k, patients in enumerate(of_folds):
    voxels = [_class_voxels(patient)[number] for patient in patients]
    slices = np.concatenate(voxels)
    owners, owner = np.unique([patient['owner'] for patient in patients], return_inverse=True)
    has_lesion = np.bincount(owner, [any(each) for each in voxels])
    row = {
      'fold': k,
      'role': roles[k],
      'patients': len(owners),
      'without_lesion': int((has_lesion == 0).sum()),
      'slices': len(slices),
      'positive': int((slices > 0).sum()),
    }
    volumes = [patient['lesion_ml'] for patient in patients]
    if None not in volumes and len(_class_voxels(patients[0])) == 1:  # pictures have no volumes
      volumes = np.bincount(owner, volumes)
      row |= {
        'lesion_ml': float(np.sum(volumes)),
        'median_ml': float(np.median(volumes)),
        'largest_ml': float(np.max(volumes)),
      }
    rows.append(row)
  return {'folds': rows, 'validated': bool(parts(0, len(of_folds))['validation'])}


def _split(builder, folds, chosen, context, exclusive):
  entries = [entry for k in chosen for entry in folds[f'fold{k}']]
  slices = [len(entry['lesion_voxels']) for entry in entries]
  label = np.concatenate([np.asarray(entry['lesion_voxels']) > 0 for entry in entries])
  of_classes = [_class_voxels(entry) for entry in entries]
  source = builder.as_data_source(split='+'.join(f'fold{k}' for k in chosen))
  return Split(
    source=Stacks(source, slices, context) if context.slices else source,
    label=label,
    class_labels=tuple(np.concatenate(each) > 0 for each in zip(*of_classes, strict=True)),
    patient=np.repeat([entry['patient'] for entry in entries], slices),
    slice=np.concatenate([np.arange(n) for n in slices]),
    owner=np.repeat([entry['owner'] for entry in entries], slices),
    patients={entry['patient']: Identity(*(entry[key] for key in Identity._fields)) for entry in entries},
    exclusive=exclusive,
  )


def _class_voxels(entry):
  """Returns the number of lesion voxels per slice of each class, from the metadata of a patient."""
  return entry.get('class_voxels', [entry['lesion_voxels']])
