"""CT slices with lesion masks as a TFDS dataset: one split per fold of patients, one shard per one or few patients."""

import dataclasses

import numpy as np
import tensorflow_datasets as tfds

from data import read, survey
from data.find import COHORTS
from data.workers import pool, silent
from fusa_jax.scans import volumes

# A shard with at least this many slices is full.
_SHARD = 32


@dataclasses.dataclass
class Config(tfds.core.BuilderConfig):
  """A cohort at one image size.

  Attributes:
    size: side of the square slices in pixels; slices of another size are resized (paper, section III-A).
  """

  size: int = 512


def features(size: int) -> tfds.features.FeaturesDict:
  """The stored form of a slice. It uses Tensor, because `features.Image` needs TensorFlow to encode."""
  return tfds.features.FeaturesDict(
    {
      'image': tfds.features.Tensor(
        shape=(size, size), dtype=np.int16, encoding='zlib', doc='HU, or grey values (0 to 255)'
      ),
      'mask': tfds.features.Tensor(
        shape=(size, size), dtype=np.uint8, encoding='zlib', doc='1 is lesion, 0 is background'
      ),
      'label': tfds.features.ClassLabel(names=['no lesion', 'lesion']),
      'patient': tfds.features.Text(),
      'slice': tfds.features.Scalar(np.int32, doc='0 is the most inferior slice of a scan'),
      'spacing': tfds.features.Tensor(
        shape=(3,), dtype=np.float32, doc='mm between slices, rows, columns in the scan, or NaN'
      ),
    }
  )


class Builder(tfds.core.ShardBasedBuilder):
  """Prepares the `cases` of a cohort.

  The splits are fold0 .. fold4, each a set of patients. A shard has the slices of one patient, or of several with few
  slices, in order. For each fold, the metadata lists the patients in this order with the lesion voxels of each slice.
  This is the index that training samples from, without opening a shard. With each patient are the digests of images and
  truth (`survey.Patient`). The metadata also contains how the files were read (`survey.taken`), their digests, and
  whether there are masks or only labels.
  """

  VERSION = tfds.core.Version('1.5.0')
  BUILDER_CONFIGS = [  # noqa: RUF012 (TFDS's own declaration)
    *(Config(name=name, description=module.__doc__) for name, module in COHORTS.items()),
    Config(name='phantom', description='Synthetic chests in HU, in the naming of COVID-19-20.'),
  ]

  # Set these before `download_and_prepare`: the cases to prepare, their fingerprint, and the progress bar.
  cases = ()
  files = ()
  progress = staticmethod(silent)

  def _info(self) -> tfds.core.DatasetInfo:
    info = self.dataset_info_from_configs(
      features=features(self.builder_config.size),
      supervised_keys=('image', 'mask'),
      disable_shuffling=True,
      metadata=tfds.core.MetadataDict(),
    )
    # Do not query TFDS's servers: they do not have this dataset, and each query leaves an empty temporary folder.
    info.initialize_from_bucket = lambda: None
    return info

  def _shard_iterators_per_split(self, dl_manager):
    folds = survey.deal(survey.survey(self.cases, self.progress))
    self.info.metadata['size'] = self.builder_config.size
    self.info.metadata['files'] = list(self.files)
    self.info.metadata.update(survey.taken(self.cases))
    self.info.metadata['masks'] = all(case.labels is None for case in self.cases)
    self.info.metadata['folds'] = {
      f'fold{k}': [
        {
          'patient': p.case.patient,
          'owner': p.owner,
          'lesion_voxels': p.lesion_voxels,
          'lesion_ml': p.lesion_ml,
          'images': p.images,
          'truth': p.truth,
        }
        for p in fold
      ]
      for k, fold in enumerate(folds)
    }
    return {f'fold{k}': fold for k, fold in enumerate(folds)}

  def _download_and_prepare(self, dl_manager, download_config=None):
    """As the base class, but all cores write shards, because reading and compressing are most of the work."""
    folds = self._shard_iterators_per_split(dl_manager)
    jobs, splits, shards_of = [], [], {}
    for split, fold in folds.items():
      template = self._get_filename_template(split_name=split)
      shards = list(_shards(fold))
      shards_of[split] = len(shards)
      for index, cases in enumerate(shards):
        path = template.sharded_filepath(shard_index=index, num_shards=len(shards))
        jobs.append((cases, self.builder_config.size, str(path)))
    with pool(len(jobs)) as run:
      written = iter(
        list(self.progress(run(_write_shard, jobs), total=len(jobs), desc='Writing slices', unit='shards'))
      )
    for split in folds:
      shards = [next(written) for _ in range(shards_of[split])]
      splits.append(
        tfds.core.SplitInfo(
          name=split,
          shard_lengths=[count for count, _ in shards],
          num_bytes=sum(size for _, size in shards),
          filename_template=self._get_filename_template(split_name=split),
        )
      )
    self.info.set_splits(tfds.core.SplitDict(splits))


def _shards(fold):
  """The cases of each shard of a fold: one or more, until it is full. Few shards are better: readers keep all open."""
  cases, slices = [], 0
  for patient in fold:
    cases.append(patient.case)
    slices += len(patient.lesion_voxels)
    if slices >= _SHARD:
      yield cases
      cases, slices = [], 0
  if cases:
    yield cases


def _write_shard(job) -> tuple[int, int]:
  """Writes the slices of some cases; returns the number of slices and of bytes."""
  cases, size, path = job
  slice_features = features(size)
  serializer = tfds.core.ExampleSerializer(slice_features.get_serialized_info())
  sizes = []

  def examples():
    for case in cases:
      for example in _examples(case, size):
        serialized = serializer.serialize_example(slice_features.encode_example(example))
        sizes.append(len(serialized))
        yield len(sizes) - 1, serialized

  tfds.core.ExampleWriter(tfds.core.FileFormat.ARRAY_RECORD).write(path, examples())
  return len(sizes), sum(sizes)


def _examples(case, size):
  slices = read.slices(case)
  images = volumes.network_slices(slices.images, size)
  # A pixel of a resized mask is lesion if at least half of it was lesion.
  masks = (volumes.resize(slices.masks, (size, size)) >= 0.5).astype(np.uint8)
  for index, lesion_voxels in enumerate(slices.lesion_voxels):
    yield {
      'image': images[index],
      'mask': masks[index],
      'label': int(lesion_voxels > 0),
      'patient': case.patient,
      'slice': index,
      'spacing': np.asarray(slices.spacing, np.float32),
    }
