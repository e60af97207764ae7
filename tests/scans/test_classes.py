"""Classes of lesions: chosen from a config, and as bits of masks from each kind of file."""

import numpy as np
import pytest
from nifti_files import chest, save
from PIL import Image

from fusa_jax.scans import classes, pictures, volume_files
from fusa_jax.system.errors import UserError

# Regions, as in nnU-Net: consolidation is a part of lesion. 4 belongs to nobody, 9 is unknown.
REGIONS = {'lesion': (1, 2, 3), 'consolidation': (2,), 'background': (4,)}


def labels_like(shape, values=(0, 1, 2, 3, 4, 9)):
  return np.random.default_rng(0).choice(values, shape).astype(np.uint8)


def expected_bits(labels):
  """The bits of REGIONS with 9 ignored, by hand."""
  bits = np.zeros(labels.shape, np.uint8)
  bits[np.logical_or.reduce([labels == 1, labels == 2, labels == 3])] += 1
  bits[labels == 2] += 2
  bits[labels == 9] = 128
  return bits


def test_bits_of_volumes_and_pictures(tmp_path):
  chosen = classes.chosen(REGIONS, 9)
  assert chosen.names == ('lesion', 'consolidation')
  values = chest()
  scan = volume_files.read_scan(save(tmp_path / 'a_ct.nii.gz', values))
  labels = labels_like(values.shape)
  mask, distinct = volume_files.read_mask_and_values(save(tmp_path / 'a_seg.nii.gz', labels), scan, chosen)
  np.testing.assert_array_equal(mask, expected_bits(labels).transpose(2, 1, 0))
  assert distinct == (0, 1, 2, 3, 4, 9)
  picture = labels_like((16, 24))
  Image.fromarray(picture).save(tmp_path / 'mask.png')
  np.testing.assert_array_equal(pictures.read_mask(tmp_path / 'mask.png', (16, 24), chosen), expected_bits(picture))


def test_parts_of_a_mask():
  bits = expected_bits(labels_like((5, 6)))
  np.testing.assert_array_equal(classes.of_class(bits, 1), bits == 3)
  np.testing.assert_array_equal(classes.of_any(bits), (bits == 1) | (bits == 3))
  np.testing.assert_array_equal(classes.is_ignored(bits), bits == 128)


def written_by_hand(chosen, bits):
  """The rule of `Classes.written` in plain Python, for one pixel."""
  here = {k for k in range(len(chosen.names)) if bits >> k & 1}
  if not here:
    return 0
  of_value = {value: {k for k, values in enumerate(chosen.values) if value in values} for value in range(1, 100)}
  exact = [value for value, numbers in of_value.items() if numbers == here]
  return exact[0] if exact else min(value for value, numbers in of_value.items() if max(here) in numbers)


@pytest.mark.parametrize(
  'named',
  [
    {'lesion': (7, 3)},
    {'ground glass': (1,), 'consolidation': (2,)},
    {'ground glass': (1, 3), 'consolidation': (2, 3)},  # 3 is both
    {'lesion': (1, 2, 3, 4), 'consolidation': (2, 4), 'effusion': (4,), 'background': (9,)},  # regions in regions
    {'effusion': (4,), 'consolidation': (2, 4), 'lesion': (1, 2, 3, 4)},
    {'a': (5, 6, 7), 'b': (6, 8), 'c': (7, 8, 9)},
  ],
)
def test_written_values(tmp_path, named):
  """Each set of classes of a pixel against the rule by hand; values come back where one is exactly these classes."""
  chosen = classes.chosen(named, 50)
  count = len(chosen.names)
  bits = np.arange(1 << count, dtype=np.uint8)
  expected = [written_by_hand(chosen, int(one)) for one in bits]
  assert chosen.written.tolist() == expected
  grid = np.random.default_rng(0).integers(0, 1 << count, (16, 24)).astype(np.uint8)
  labels = chosen.labels(grid)
  np.testing.assert_array_equal(labels, np.vectorize(lambda one: written_by_hand(chosen, int(one)))(grid))
  pictures.write_picture(tmp_path / 'mask.png', labels)
  again = pictures.read_mask(tmp_path / 'mask.png', (16, 24), chosen)
  assert chosen.shown(grid) == [int(((again >> k) & 1).sum()) for k in range(count)]
  exact = [one for one in bits if chosen.bits(np.array(expected[one])) == one]
  kept = np.isin(grid, exact)
  np.testing.assert_array_equal(again[kept], grid[kept])
  masks = [classes.of_class(grid, k) for k in range(count)]
  np.testing.assert_array_equal(classes.together(masks), grid)


def test_one_class_without_values_is_written_as_it_is():
  mask = np.array([[0, 1], [1, 0]], np.uint8)
  assert classes.LESION.labels(mask) is mask and not classes.LESION.are_given
  assert classes.chosen({'x': (70000,)}, None).labels(mask).max() == 70000


def test_label_file():
  text = classes.label_file(classes.chosen({'a "b"': (1, 2, 3), 'part': (2,), 'background': (9,)}, 8))
  shown = [line.split(None, 7) for line in text.splitlines() if not line.startswith('#')]
  assert [(int(line[0]), line[7]) for line in shown] == [
    (0, '"Clear Label"'),
    (1, '"a \'b\'"'),
    (2, '"a \'b\' + part"'),
    (3, '"a \'b\'"'),
  ]
  assert [tuple(map(int, line[1:4])) for line in shown[1:]] == [classes.COLOURS[k] for k in (0, 1, 0)]


# What a person without one kind of cones sees, in linear RGB (Machado, Oliveira and Fernandes 2009, severity 1).
SEEN = {
  'all cones': np.eye(3),
  'protanopia': [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
  'deuteranopia': [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
  'tritanopia': [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}


@pytest.mark.parametrize('name', SEEN)
def test_colours_differ_for_everybody(name):
  """CIELAB distances: about 2 can just be told apart."""
  assert len(set(classes.COLOURS)) == classes.MOST
  rgb = np.array(classes.COLOURS) / 255
  linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4) @ np.transpose(SEEN[name])
  to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
  xyz = linear.clip(0, 1) @ np.transpose(to_xyz) / (0.9505, 1, 1.089)
  f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
  lab = np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], axis=1)
  apart = np.linalg.norm(lab[:, None] - lab, axis=2) + 1000 * np.eye(len(lab))
  assert apart.min() > 10 and apart[:4, :4].min() > 15


def test_a_value_without_a_meaning_is_refused_with_its_file(tmp_path):
  scan = volume_files.read_scan(save(tmp_path / 'a_ct.nii.gz', chest()))
  path = save(tmp_path / 'a_seg.nii.gz', labels_like(chest().shape, (0, 1, 7)))
  with pytest.raises(
    UserError, match=rf'^{path}: the mask value 7 belongs to no class of data.classes; add it to a cl'
  ):
    volume_files.read_mask(path, scan, classes.chosen({'lesion': (1,)}, None))
  # With lesion labels, other values are background.
  assert set(np.unique(volume_files.read_mask(path, scan, classes.of_lesion((1,))))) == {0, 1}


@pytest.mark.parametrize(
  ('named', 'ignored', 'reason'),
  [
    ({}, None, 'there are 0 classes, but there must be 1 to 7'),
    ({'a': ()}, None, r"'a' has \(\), but needs a name and values"),
    ({'': (1,)}, None, "'' has"),
    ({'a': (0,)}, None, r"'a' has \(0,\)"),
    ({'a': (1.5,)}, None, "'a' has"),
    ({'a': 'x'}, None, "'a' has"),
    ('lesion', None, "'lesion' are not mask values by name"),
    ((('a', (1,)), ('a', (2,))), None, "'a' is given twice"),
    ({'a': (1, 2), 'b': (2, 1)}, None, "'a' and 'b' have the same mask values"),
    ({'a': (1,), 'background': (1, 2)}, None, "'a' and background share mask values"),
    ({'a': (1, 2)}, 2, "data.ignore_label: 2 belongs to the class 'a'"),
    ({'a': (1,), 'background': (2,)}, 2, 'data.ignore_label: 2 must be a whole number above 0 that is not background'),
    ({str(k): (k,) for k in range(1, 9)}, None, 'there are 8 classes, but there must be 1 to 7'),
  ],
)
def test_wrong_classes_are_refused(named, ignored, reason):
  with pytest.raises(UserError, match=reason):
    classes.chosen(named, ignored)


@pytest.mark.parametrize('name', ['Figures', 'against-x'])
def test_a_class_is_not_named_as_another_file_of_a_test(name):
  with pytest.raises(UserError, match='is the name of another folder of a test'):
    classes.chosen({name: (1,)}, None)
  with pytest.raises(UserError, match='is the name of another folder of a test'):
    classes.of_slices(['normal', name])


@pytest.mark.parametrize('value', [float('inf'), 1e30, float('nan'), 0, -1, 1.5, True, '1'])
def test_mask_values_are_whole_numbers(value):
  with pytest.raises(UserError, match='but needs a name and values'):
    classes.chosen({'a': (value,)}, None)


def test_names_of_files_have_no_dots():
  """A dot would end the name of a class in the name of a file."""
  assert classes.file_name('Grade 1.5') == 'grade_1_5'
