"""Each cohort layout with several classes: what is prepared, and values that no class has."""

import collections
import json
import shutil
from typing import NamedTuple

import highdicom
import nibabel as nib
import numpy as np
import pydicom
import pytest
from conftest import SIZE, tiny
from layouts import LAYOUTS, files, relabel
from PIL import Image
from pydicom import uid
from pydicom.sr.codedict import codes

from data import prepare
from data.cohorts import CohortOptions
from data.find import find
from fusa_jax.scans import dicom, volume_files, volumes
from fusa_jax.scans.classes import chosen, of_class
from fusa_jax.system.errors import UserError
from fusa_jax.training import datasets, evaluate, train

KINDS = {'ground glass': (1,), 'consolidation': (2,)}
# The classes of the masks of each layout; docs/data.md lists those that releases have.
CLASSES = {
  **dict.fromkeys(LAYOUTS, KINDS),
  'zenodo_20': {'left lung': (1,), 'right lung': (2,), 'infection': (3,)},
  'medseg': KINDS | {'pleural effusion': (3,)},
}

# highdicom warns about the made headers.
pytestmark = pytest.mark.filterwarnings('ignore')


class Layout(NamedTuple):
  """A made cohort.

  Attributes:
    name: its layout.
    folder: its files, and `options` to read them.
    classes: its classes.
    prepared: the prepared dataset.
  """

  name: str
  folder: object
  options: CohortOptions
  classes: dict
  prepared: object


def sides(mask):
  """Lesions on one side have the value 1, those on the other have 2."""
  return np.minimum(mask, 1) * (1 + (np.arange(SIZE)[:, None, None] >= SIZE // 2))


def lay(name, raw_dir, folder):
  """Writes a cohort of the layout, in which masks have the values of CLASSES."""
  LAYOUTS[name](raw_dir, folder)
  if name == 'slices':
    for path in (folder / 'masks').iterdir():
      mask = np.asarray(Image.open(path))
      Image.fromarray(sides(mask.T[..., None])[..., 0].T.astype(np.uint8)).save(path)
  elif name == 'zenodo_20':
    for path in (folder / 'Lung_and_Infection_Mask').iterdir():
      relabel(path, folder / 'Infection_Mask' / path.name, lambda values: values == 3)
  else:
    effusion = np.zeros((SIZE, SIZE, 1), int)
    effusion[:2, :2] = 3 if name == 'medseg' else 0
    of_masks = lambda path: path.parent.name in ('rp_msk', 'labelsTr') or '_seg' in path.name or '_mask' in path.name
    for path in folder.rglob('*.nii.gz'):
      if of_masks(path) and path.name != 'tr_mask.nii.gz':
        relabel(path, path, lambda values: np.where(effusion, effusion, sides(values)))
  if name == 'dicom_pairs':  # one patient has a SEG in place of a NIfTI file
    mask = folder / 'volume-phantom-A-0001_mask.nii.gz'
    write_seg(folder / 'volume-phantom-A-0001', mask)
    mask.unlink()
  return folder


def write_seg(folder, mask):
  """Writes a NIfTI mask with the values 1 and 2 as a DICOM SEG with two segments, into the folder of its series."""
  (series,) = dicom.find_series([path for path in folder.rglob('*') if path.is_file()])
  scan = dicom.read_series(series)
  bits = volumes.to_own_axes(volume_files.read_mask(mask, scan, chosen(KINDS, None)), scan).transpose(2, 1, 0)
  sources = [pydicom.dcmread(header.filename, stop_before_pixels=True) for header in series.grid[0]]
  for source in sources:
    source.PatientSex = source.AccessionNumber = ''
  types = (codes.DCM.GroundGlassOpacity, codes.SCT.Nodule)
  highdicom.seg.Segmentation(
    source_images=sources,
    pixel_array=np.stack([of_class(bits, number) for number in (0, 1)], axis=3),
    segmentation_type='BINARY',
    segment_descriptions=[
      highdicom.seg.SegmentDescription(number, 'Segment', codes.SCT.Tissue, code, 'MANUAL')
      for number, code in enumerate(types, 1)
    ],
    series_instance_uid=uid.generate_uid(),
    series_number=9,
    sop_instance_uid=uid.generate_uid(),
    instance_number=1,
    manufacturer='ACME',
    manufacturer_model_name='Viewer',
    software_versions='1',
    device_serial_number='1',
  ).save_as(folder / 'SEG')


@pytest.fixture(scope='module', params=CLASSES)
def layout(request, raw_dir, tmp_path_factory):
  """Each layout with its classes, prepared. Further tests of a layout with classes start here."""
  name = request.param
  folder = lay(name, raw_dir, tmp_path_factory.mktemp(name))
  options = CohortOptions(
    intensity='grey' if name == 'slices' else 'hu',
    patients='each_slice' if name == 'medseg' else 'named',
    classes=CLASSES[name],
  )
  prepared = prepare.prepare(str(folder), str(tmp_path_factory.mktemp('prepared')), SIZE, options=options)
  return Layout(name, folder, options, CLASSES[name], prepared)


def test_prepared_with_each_class(layout, raw_dir):
  assert find(layout.folder, layout.options)[0] == layout.name
  patients = [patient for fold in datasets.folds(layout.prepared) for patient in fold]
  counts = [tuple(sum(each) for each in patient['class_voxels']) for patient in patients]
  lesions = [np.asarray(nib.load(mask).dataobj) for _, mask in files(raw_dir)]
  by_side = [sides(mask) for mask in lesions]
  expected = [((values == 1).sum(), (values == 2).sum()) for values in by_side]
  if layout.name == 'slices':  # turned as they are shown, so that sides differ from those of the files
    own = collections.defaultdict(list)
    for line in (layout.folder / 'slices.csv').read_text().splitlines()[1:]:
      name, patient = line.split(',')
      own[patient].append(np.asarray(Image.open(layout.folder / 'masks' / f'{name}.png')))
    expected = [tuple((np.stack(each) == value).sum() for value in (1, 2)) for each in own.values()]
  if layout.name == 'zenodo_20':  # lungs are everywhere else
    halves = [1 + (np.arange(SIZE)[:, None, None] >= SIZE // 2) * (mask >= 0) for mask in lesions]
    expected = [
      tuple(((half == value) & (mask == 0)).sum() for value in (1, 2)) + (mask.sum(),)
      for half, mask in zip(halves, lesions, strict=True)
    ]
  if layout.name == 'medseg':
    counts = [count for count, one in zip(counts, patients, strict=True) if one['patient'].startswith('rp_')]
    own = [np.where(np.add.outer(np.arange(SIZE) >= 2, np.arange(SIZE) >= 2)[..., None], v, 3) for v in by_side]
    expected = [tuple((values == value).sum() for value in (1, 2, 3)) for values in own]
  assert sorted(counts) == sorted(tuple(map(int, each)) for each in expected)
  dataset = datasets.load_dataset(layout.prepared, 0, SIZE)
  assert [name for name, _ in dataset.classes] == [*layout.classes, 'background']
  assert all(label.any() for label in dataset.train.class_labels)


# The value of another class; the source of the masks says what it means, except for files of anybody.
MEANINGS = {
  'zenodo_20': '2 (right lung)',
  'medseg': '2 (consolidation)',
  'nnunet': '2 (dense and all)',
  'decathlon': '2 (dense)',
  'dicom_pairs': '2 (Nodule)',
  'pairs': '2',
  'slices': '2',
}


@pytest.mark.parametrize('name', MEANINGS)
def test_a_value_of_no_class_is_named_with_its_file_and_meaning(name, raw_dir, tmp_path):
  (tmp_path / 'in').mkdir()
  folder = lay(name, raw_dir, tmp_path / 'in')
  path = folder / 'dataset.json'
  if name == 'nnunet':  # version 2, with a region
    path.write_text(json.dumps({'labels': {'background': 0, 'glass': 1, 'dense': 2, 'all': [1, 2]}}))
  if name == 'decathlon':
    path.write_text(json.dumps(json.loads(path.read_text()) | {'labels': {'0': 'background', '1': 'x', '2': 'dense'}}))
  named = {key: values for key, values in CLASSES[name].items() if values != (2,)}
  options = CohortOptions(intensity='grey' if name == 'slices' else 'hu', classes=named)
  with pytest.raises(UserError) as caught:
    prepare.prepare(str(folder), str(tmp_path / 'out'), SIZE, options=options)
  lines = str(caught.value).splitlines()
  expected = f': the mask value {MEANINGS[name]} belongs to no class of data.classes; add it to a class, to '
  named = lines[:1] if name == 'dicom_pairs' else lines  # the others are NIfTI files, which say nothing
  assert named and all(expected in line and line.startswith(str(folder)) for line in named)
  assert not list((tmp_path / 'out').rglob('dataset_info.json'))


def test_masks_of_0_and_1_name_the_labels_of_the_dataset(raw_dir, tmp_path):
  """Without data.classes, the error about other values says what they mean."""
  (tmp_path / 'in').mkdir()
  folder = lay('nnunet', raw_dir, tmp_path / 'in')
  (folder / 'dataset.json').write_text('{"labels": {"background": 0, "glass": 1, "dense": 2, "ignore": 3, "odd": "x"}}')
  with pytest.raises(UserError, match=r'are 0, 1, 2; name the lesion labels \(1 glass, 2 dense, 3 ignore\), for exa'):
    prepare.prepare(str(folder), str(tmp_path / 'out'), SIZE)
  for content in ('{"labels": ["a"]}', '[]', 'x'):
    (folder / 'dataset.json').write_text(content)
    assert find(folder)[1][0].classes.meanings == ()


def test_lungs_need_classes(raw_dir, tmp_path):
  """With one class, the masks of infection are read; with classes, those that also have the lungs."""
  folder = lay('zenodo_20', raw_dir, tmp_path)
  of_masks = lambda options: {case.mask.parent.name for case in find(folder, options)[1]}
  assert of_masks(CohortOptions()) == {'Infection_Mask'}
  assert of_masks(CohortOptions(classes=CLASSES['zenodo_20'])) == {'Lung_and_Infection_Mask'}
  shutil.rmtree(folder / 'Lung_and_Infection_Mask')
  assert of_masks(CohortOptions(classes={'infection': (1,)})) == {'Infection_Mask'}


@pytest.mark.slow
def test_trained_one_step_and_evaluated(layout, tmp_path):
  """Each class is counted on its own. Lungs are in all slices, so that none is without a class to balance with."""
  config = tiny(**{'train.steps': 1, 'train.evaluate_every': 1, 'data.balanced': False, 'evaluate.num_overlays': 1})
  config.data.intensity, config.data.classes = layout.options.intensity, tuple(layout.classes.items())
  train.train(config, tmp_path, layout.prepared)
  scans = prepare.scans(layout.folder, layout.options)
  result = evaluate.evaluate(config, tmp_path, layout.prepared, scans)
  tested = datasets.load_dataset(layout.prepared, 0, SIZE).test
  assert list(result['classes']) == list(layout.classes)
  for number, one in enumerate(result['classes'].values()):
    pixels = sum(int(of_class(tested.source[index]['mask'], number).sum()) for index in range(len(tested)))
    assert one['tp'] + one['fn'] == pixels
    of_scans = [patient for patient in set(tested.patient.tolist()) if patient in scans]
    assert one.get('volumes', {}).get('num_volumes', 0) == len(of_scans)
