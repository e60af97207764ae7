"""Cohorts with several classes: what the prepared dataset holds, and wrong cohorts."""

import json
import shutil

import numpy as np
import pytest
import tensorflow_datasets as tfds
from conftest import SIZE, tiny
from layouts import relabel

from configs import cls
from data import prepare
from data.cohorts import CohortOptions, phantom
from fusa_jax.system.errors import UserError
from fusa_jax.training import cross_validation, datasets

KINDS = {'ground glass': (1,), 'consolidation': (2,)}


@pytest.fixture(scope='module')
def kinds_dir(tmp_path_factory):
  """A cohort of phantoms whose masks have 1 for ground glass and 2 for consolidation."""
  folder = tmp_path_factory.mktemp('kinds')
  phantom.write_phantoms(folder, patients=6, size=SIZE, slices=16, kinds=True)
  return folder


@pytest.fixture(scope='module')
def prepared(kinds_dir, tmp_path_factory):
  out = tmp_path_factory.mktemp('prepared')
  return prepare.prepare(str(kinds_dir), str(out), SIZE, options=CohortOptions(classes=KINDS))


def test_the_dataset_holds_the_bits_of_each_class(prepared):
  builder = tfds.builder_from_directory(prepared)
  assert builder.info.metadata['classes'] == [['ground glass', [1]], ['consolidation', [2]], ['background', []]]
  dense = 0
  for k in range(5):
    patients = iter(builder.info.metadata['folds'][f'fold{k}'])
    for example in builder.as_data_source(split=f'fold{k}'):
      if example['slice'] == 0:
        entry = next(patients)
        number = int(entry['patient'][-4:])
        _, labels, _ = phantom.patient(0, number, size=SIZE, slices=16, kinds=True)
      own = labels[example['slice']]
      np.testing.assert_array_equal(example['mask'], (own == 1) * 1 + (own == 2) * 2)
      assert example['label'] == own.any()
      counts = [voxels[example['slice']] for voxels in entry['class_voxels']]
      assert counts == [(own == 1).sum(), (own == 2).sum()]
      dense += counts[1]
  assert dense > 50


def test_labels_per_class(prepared):
  dataset = datasets.load_dataset(prepared, 0, SIZE)
  one, other = dataset.train.class_labels
  np.testing.assert_array_equal(one | other, dataset.train.label)
  assert 0 < other.sum() < one.sum()


@pytest.mark.parametrize(
  ('options', 'reason'),
  [
    (
      {'classes': (('ground glass', (2,)), ('consolidation', (1,)))},
      r"data.classes: 'ground glass' is \(2,\), but .* was prepared with \(1,\); give the values of preparation",
    ),
    ({'classes': (('ground glass', (1,)), ('dense', (2,)))}, 'data.classes: ground glass, dense, but .* was prepared'),
    ({'classes': tuple(KINDS.items()), 'ignore_label': 9}, 'and other ignored values; set data.classes and data.ign'),
    ({}, 'data.classes: lesion, but .* was prepared with ground glass, consolidation; set data.classes'),
  ],
)
def test_a_dataset_of_other_classes_is_refused(prepared, options, reason):
  config = tiny()
  config.data.update(options)
  with pytest.raises(UserError, match=reason):
    datasets.load_dataset_for(config, prepared)


def test_one_class_of_other_values_is_refused(kinds_dir, data_dir, tmp_path):
  options = CohortOptions(lesion_labels=(1, 2))
  whole = prepare.prepare(str(kinds_dir), str(tmp_path / 'whole'), SIZE, options=options)
  named = lambda *values: {'classes': (('lesion', values),)}
  labels = lambda *values: {'lesion_labels': values}
  of_whole, of_any = r'was prepared with \(1, 2\); give the', 'was prepared with any value of a mask; leave the key out'
  for folder, given, reason in (
    (whole, named(2), f"data.classes: 'lesion' is \\(2,\\), but .* {of_whole}"),
    (whole, labels(1), f'data.lesion_labels: \\(1,\\), but .* {of_whole}'),
    (data_dir, named(1), f"data.classes: 'lesion' is \\(1,\\), but .* {of_any}"),
    (data_dir, labels(2), f'data.lesion_labels: \\(2,\\), but .* {of_any}'),
  ):
    config = tiny()
    config.data.update(given)
    with pytest.raises(UserError, match=reason):
      datasets.load_dataset_for(config, folder)
  for given in (named(1, 2), labels(1, 2), {}):
    config = tiny()
    config.data.update(given)
    datasets.load_dataset_for(config, whole)


@pytest.mark.parametrize('named', ['auto', tuple(KINDS.items())])
def test_a_classifier_of_slices_with_ignored_pixels_is_refused(prepared, tmp_path, named):
  """The advice must help: data.ignore_label comes from the preparation."""
  shutil.copytree(prepared, tmp_path / 'data')
  (info,) = (tmp_path / 'data').rglob('metadata.json')
  info.write_text(json.dumps(json.loads(info.read_text()) | {'ignore_label': [9]}))
  config = tiny(cls)
  config.data.classes = named
  with pytest.raises(UserError, match='was prepared with data.ignore_label=9, .* prepare the scans again without it'):
    datasets.load_dataset_for(config, tmp_path / 'data')


def test_a_class_that_training_lacks_is_named_before_anything_is_written(kinds_dir, tmp_path):
  """Also in a cross-validation, of which only one fold lacks it."""
  shutil.copytree(kinds_dir, tmp_path / 'in')
  path = min((tmp_path / 'in').glob('*_seg.nii.gz'))
  relabel(path, path, lambda values: np.where(np.arange(SIZE)[:, None, None] < 3, 3, values))
  classes = KINDS | {'rare': (3,)}
  prepared = prepare.prepare(str(tmp_path / 'in'), str(tmp_path / 'out'), SIZE, options=CohortOptions(classes=classes))
  lacking = {}
  for fold in range(5):
    config = tiny(**{'data.fold': fold})
    config.data.classes = tuple(classes.items())
    dataset = datasets.load_dataset_for(config, prepared)  # another model may be tested on it
    try:
      datasets.check_trainable(config, dataset)
    except UserError as error:
      lacking[fold] = str(error)
  assert len(lacking) == 2  # the test fold and the validation fold
  message = "no training patient of fold {} has the class 'rare'; give its values to 'background', or test another"
  assert all(message.format(fold) in text for fold, text in lacking.items())
  config.data.fold = 'all'
  with pytest.raises(UserError, match=rf"no training patient of fold {min(lacking)} has the class 'rare'"):
    cross_validation.cross_validate(config, tmp_path / 'run', prepared)
  assert not (tmp_path / 'run').exists()


def test_a_kind_is_not_another_phantom():
  """Without kinds, the same lesions are marked with 1."""
  values, marked, _ = phantom.patient(0, 1, size=SIZE, slices=16)
  same, kinds, _ = phantom.patient(0, 1, size=SIZE, slices=16, kinds=True)
  np.testing.assert_array_equal(values, same)
  np.testing.assert_array_equal(marked, kinds > 0)


def test_wrong_cohorts_are_refused(kinds_dir, prepared, tmp_path):
  make = lambda **options: prepare.prepare(str(kinds_dir), str(tmp_path), SIZE, options=CohortOptions(**options))
  for options, reason in (
    ({'classes': {'glass': (1,)}}, r'_seg.nii.gz: the mask value 2 belongs to no class of data.classes'),
    ({'classes': KINDS | {'effusion': (3,)}}, r'^data.classes: no mask has the value 3; the masks have 1 \(in \d'),
    ({'classes': KINDS, 'lesion_labels': (1, 2)}, 'data.classes and data.lesion_labels: both name mask values'),
    ({'ignore_label': 2}, 'data.ignore_label: needs data.classes'),
  ):
    with pytest.raises(UserError, match=reason):
      make(**options)
    assert not list(tmp_path.rglob('dataset_info.json'))
  with pytest.raises(UserError, match=r'was prepared with data.classes=\[\[.ground glass., \[1\]\], .*, now it is'):
    prepare.prepare(
      str(kinds_dir), str(prepared.parents[2]), SIZE, options=CohortOptions(classes={'a': (1,), 'b': (2,)})
    )
  with pytest.raises(UserError, match=r'was prepared with data.lesion_labels=\[\], now it is \[1, 2\]'):
    prepare.prepare(str(kinds_dir), str(prepared.parents[2]), SIZE, options=CohortOptions((1, 2)))
