"""CT slices with lesion masks as a TFDS dataset: one split per fold of patients, each with at most 40 shards."""

import dataclasses
import logging
import os
import pathlib

import numpy as np
import tensorflow_datasets as tfds

from data import earlier, read, shards, survey
from data.find import COHORTS
from data.workers import pool, silent
from fusa_jax.scans import volumes
from fusa_jax.scans.classes import IGNORED


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
        shape=(size, size),
        dtype=np.uint8,
        encoding='zlib',
        doc='bit k is class k; 128 is unknown',
      ),
      'label': tfds.features.ClassLabel(names=['no lesion', 'lesion']),  # of any class; the metadata have each
      'patient': tfds.features.Text(),
      'slice': tfds.features.Scalar(np.int32, doc='0 is the most inferior slice of a scan'),
      'spacing': tfds.features.Tensor(
        shape=(3,), dtype=np.float32, doc='mm between slices, rows, columns in the scan, or NaN'
      ),
    }
  )


class Builder(tfds.core.ShardBasedBuilder):
  """Prepares the `cases` of a cohort.

  The splits are fold0 .. fold4, each a set of patients. A shard has the slices of some patients (data.shards).
  For each fold, the metadata lists the patients in this order with the lesion voxels of each slice. This is the index
  that training samples from, without opening a shard. Each patient has digests (`survey.Patient`,
  `survey.case_digests`) and the values of its masks. The metadata also contains how the files were read
  (`survey.taken`), their digests, whether there are masks or only labels, whether these are of patients, and the
  classes: with several, `class_voxels` of a patient has the voxels of each class per slice (`read.Slices`).
  `thumbnails.npy` has the thumbnails of all scans, in the order of their names.
  If the cohort grows, its survey reads them instead of the scans.
  """

  VERSION = tfds.core.Version('1.6.0')
  BUILDER_CONFIGS = [  # noqa: RUF012 (TFDS's own declaration)
    *(Config(name=name, description=module.__doc__) for name, module in COHORTS.items()),
    Config(name='phantom', description='Synthetic chests in HU, in the naming of COVID-19-20.'),
  ]

  # Set these before `download_and_prepare`: the cases to prepare, their fingerprint, the datasets that were prepared
  # from earlier states of the cohort (the newest first), and the progress bar.
  cases = ()
  files = ()
  earlier_datasets = ()
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

  def _download_and_prepare(self, dl_manager, download_config=None):
    """As the base class, but all cores write shards, because reading and compressing are most of the work."""
    size, keys = self.builder_config.size, survey.case_digests(self.cases, self.files)
    base, known = self._base(keys)
    thumbnails = pathlib.Path(self.data_dir) / earlier.THUMBNAILS
    patients = survey.survey(self.cases, self.progress, known, thumbnails)
    dealt = survey.deal(patients, self._fold_of) if self.earlier_datasets else survey.deal(patients)
    plans = []
    for k, fold in enumerate(dealt):
      items = [shards.Item(patient, len(patient.lesion_voxels)) for patient in fold], []
      plans.append(shards.plan(*(base.plan(k, fold, known) if base else items), size))
    self._describe(plans, keys)
    jobs, counts = [], {}
    for k, plan in enumerate(plans):
      template = self._get_filename_template(split_name=f'fold{k}')
      for index, shard in enumerate(plan):
        path = template.sharded_filepath(shard_index=index, num_shards=len(plan))
        if shard.linked:
          shards.link_or_copy(shard.linked, pathlib.Path(path))
          counts[str(path)] = shard.slices, os.path.getsize(path)
        else:
          jobs.append((str(path), [item.stored or item.patient.case for item in shard.items], size))
    new = [item.patient.case for plan in plans for shard in plan for item in shard.items if item.stored is None]
    if base:
      logging.info('%d of %d scans are prepared; %s has the others', len(new), len(patients), base.path)
    with pool(len(jobs), read.largest(new)) as run:
      written = self.progress(run(_write_shard, jobs), total=len(jobs), desc='Writing slices', unit='shards')
      counts |= dict(zip((path for path, *_ in jobs), written, strict=True))
    splits = []
    for k, plan in enumerate(plans):
      template = self._get_filename_template(split_name=f'fold{k}')
      paths = [str(template.sharded_filepath(shard_index=i, num_shards=len(plan))) for i in range(len(plan))]
      splits.append(
        tfds.core.SplitInfo(
          name=f'fold{k}',
          shard_lengths=[counts[path][0] for path in paths],
          num_bytes=sum(counts[path][1] for path in paths),
          filename_template=template,
        )
      )
    self.info.set_splits(tfds.core.SplitDict(splits))

  def _base(self, keys):
    """Returns the earlier dataset with most unchanged cases, and what its survey found for them; or (None, {}).

    It must have the same image size, version and reading options.
    """
    taken, best = survey.taken(self.cases), (None, {})
    for one in self.earlier_datasets:
      same = one.metadata.get('size') == self.builder_config.size and one.path.name == str(self.VERSION)
      if same and all(one.metadata.get(key) == value for key, value in taken.items()):
        known = one.known(self.cases, keys)
        best = max(best, (one, known), key=lambda pair: len(pair[1]))
    return best

  def _fold_of(self, patient):
    """Returns the fold of a patient in the newest earlier dataset that contains the patient; or None."""
    return next((k for k in (one.fold(patient) for one in self.earlier_datasets) if k is not None), None)

  def _describe(self, plans, keys):
    self.info.metadata['size'] = self.builder_config.size
    self.info.metadata['files'] = list(self.files)
    self.info.metadata.update(survey.taken(self.cases))
    of_patients = any(case.patient_label is not None for case in self.cases)
    self.info.metadata['masks'] = not any(case.has_labels for case in self.cases)
    if of_patients:  # only then: the content of other datasets stays as it was
      self.info.metadata['patient_labels'] = True
      if all(isinstance(case.ct, tuple) for case in self.cases):
        self.info.metadata['pictures'] = True
    self.info.metadata['folds'] = {
      f'fold{k}': [
        {
          'patient': p.case.patient,
          'owner': p.owner,
          'lesion_voxels': p.lesion_voxels,
          'lesion_ml': p.lesion_ml,
          'images': p.images,
          'truth': p.truth,
          'key': keys[p.case.patient],
          'values': p.values,
          **({'class_voxels': p.class_voxels} if len(p.class_voxels) > 1 else {}),
        }
        for p in (item.patient for shard in plan for item in shard.items)
      ]
      for k, plan in enumerate(plans)
    }

  def _shard_iterators_per_split(self, dl_manager):
    raise NotImplementedError('_download_and_prepare writes the shards')


def _write_shard(job) -> tuple[int, int]:
  """Writes the slices of some cases; returns the number of slices and of bytes."""
  path, parts, size = job
  slice_features = features(size)
  serializer = tfds.core.ExampleSerializer(slice_features.get_serialized_info())
  encode = lambda example: serializer.serialize_example(slice_features.encode_example(example))
  return shards.write_shard(path, parts, lambda case: map(encode, _examples(case, size)))


def _resized(masks, size):
  """Resizes masks of bits. A pixel has a class if at least half of it had; it is ignored if any of it was."""
  resized = np.zeros((len(masks), size, size), np.uint8)
  for bit in np.uint8(1) << np.arange(8, dtype=np.uint8):
    parts = [(mask & bit > 0).astype(np.uint8) for mask in masks]
    if any(part.any() for part in parts):
      shares = volumes.resize(parts, (size, size))
      resized[shares > 0 if bit == IGNORED else shares >= 0.5] |= bit
  resized[resized >= IGNORED] = IGNORED
  return resized


def _examples(case, size):
  slices = read.slices(case)
  images = volumes.network_slices(slices.images, size)
  masks = _resized(slices.masks, size)
  for index, lesion_voxels in enumerate(slices.lesion_voxels):
    yield {
      'image': images[index],
      'mask': masks[index],
      'label': int(lesion_voxels > 0),
      'patient': case.patient,
      'slice': index,
      'spacing': np.asarray(slices.spacing, np.float32),
    }
