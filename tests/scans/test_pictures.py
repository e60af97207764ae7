"""Slices as PNG and JPEG: read as by Pillow, predicted as in evaluation; grey values and HU are never mixed."""

import csv
import json
import shutil

import nibabel as nib
import numpy as np
import pytest
from conftest import SIZE, tiny
from layouts import pictures_of
from PIL import Image

from configs import seg
from data import prepare
from data.cohorts import CohortOptions
from fusa_jax.inference import predict, predictor
from fusa_jax.scans import nifti, pictures, volume_files
from fusa_jax.system import own_files
from fusa_jax.system.errors import UserError
from fusa_jax.training import evaluate, train


@pytest.fixture(scope='module')
def folder(raw_dir, tmp_path_factory):
  """The slices of the phantoms in a lung window as pictures, in another size than the network's images."""
  out = tmp_path_factory.mktemp('slices')
  (out / 'images').mkdir(), (out / 'masks').mkdir()
  lines = ['name,patient']
  for patient, index, grey, mask in pictures_of(raw_dir):
    name, size = f'00{patient[1:]}_{index:02d}', (SIZE * 2, SIZE + 8)
    Image.fromarray(grey).resize(size).save(out / 'images' / f'{name}.png')
    Image.fromarray(mask).resize(size, Image.Resampling.NEAREST).save(out / 'masks' / f'{name}.png')
    lines.append(f'{name}.png,{name[:4]}')
  (out / 'slices.csv').write_text('\n'.join(lines))
  return out


@pytest.fixture(scope='module')
def run(folder, tmp_path_factory):
  """A run of two steps on these pictures."""
  data_dir = prepare.prepare(
    str(folder), str(tmp_path_factory.mktemp('data')), SIZE, options=CohortOptions(intensity='grey')
  )
  config = tiny(seg, **{'train.steps': 2})
  config.data.intensity = 'grey'
  workdir = tmp_path_factory.mktemp('runs') / 'grey'
  train.train(config, workdir, data_dir)
  evaluate.evaluate(config, workdir, data_dir)
  return workdir


def test_predictions_equal_those_of_evaluation(folder, run, tmp_path):
  images = tmp_path / 'images'
  shutil.copytree(folder / 'images', images)
  predict.predict(predictor.load_predictor(run), images, images, probabilities=True)
  with (run / 'test' / 'slices.csv').open() as file:
    rows = list(csv.DictReader(file))
  point = json.loads((run / 'operating_point.json').read_text())
  assert len(rows) == 2 * 16
  for row in rows:
    name = f'{row["patient"]}_{int(row["slice"]):02d}'
    result = json.loads((images / f'{name}.json').read_text())
    assert result['picture'] == f'{name}.png' and result['threshold'] == point['threshold']
    # The highest probability of the slice, here after resizing to the size of the picture.
    assert result['score'] == pytest.approx(float(row['score']), abs=0.02)
    mask, probability = (np.asarray(Image.open(images / f'{name}_{kind}.png')) for kind in ('mask', 'probability'))
    assert (
      mask.shape == probability.shape == np.asarray(Image.open(images / f'{name}.png')).shape == (SIZE + 8, SIZE * 2)
    )
    assert set(np.unique(mask)) <= {0, 255} and result['lesion_pixels'] == (mask == 255).sum()
    assert result['positive'] == (mask > 0).any()
    clear = np.abs(probability / 255 - point['threshold']) > 1 / 255
    np.testing.assert_array_equal((mask > 0)[clear], (probability / 255 >= point['threshold'])[clear])
  # In a second prediction, the masks and probabilities beside the pictures are ignored.
  before = sorted(path.name for path in images.iterdir())
  predict.predict(predictor.load_predictor(run), images / '0001_00.png', tmp_path / 'one')
  assert sorted(p.name for p in (tmp_path / 'one').glob('0*')) == ['0001_00.json', '0001_00_mask.png']
  alone, together = (own_files.read_record(place / '0001_00.json') for place in (tmp_path / 'one', images))
  assert alone | {'files': together['files']} == together
  predict.predict(predictor.load_predictor(run), images, images, probabilities=True)
  assert sorted(path.name for path in images.iterdir()) == before


def test_a_picture_in_code_is_predicted_as_its_file(folder, run, tmp_path):
  path, function = folder / 'images' / '0001_00.png', predictor.load_predictor(run, threshold=0.3, smallest_ml=1)
  predict.predict(function, path, tmp_path)
  expected = np.asarray(Image.open(tmp_path / '0001_00_mask.png')) == 255
  assert expected.any()
  for image in (path, str(path), np.asarray(Image.open(path))):
    prediction = function(image)
    np.testing.assert_array_equal(prediction.mask, expected)
    written = own_files.read_record(tmp_path / '0001_00.json')
    assert {'picture': path.name, **prediction.numbers}.items() <= written.items()
    assert 'smallest_ml' not in prediction.numbers  # smallest_ml applies to volumes only
  for wrong, reason in (
    (np.zeros((4, 4)), r'array: values 0 to 0 are a mask, but data.intensity=grey needs'),
    (np.zeros((1, 2, 3, 4)), r'array: has 4 dimensions; give slices \[S, H, W\], or a picture'),
    (folder / 'images', r'images: holds \d+ scans or pictures; give one'),
  ):
    with pytest.raises(UserError, match=reason):
      function(wrong)


def test_a_grey_scan_gives_a_mask_on_its_own_grid(run, raw_dir, tmp_path):
  scan = volume_files.read_scan(raw_dir / 'volume-phantom-A-0001_ct.nii.gz')
  grey = np.rint(np.clip((scan.values + 1000) / 1300, 0, 1) * 255).astype(np.uint8)
  nifti.write_volume(tmp_path / 'in' / 'a.nii.gz', grey, scan)
  predict.predict(predictor.load_predictor(run), tmp_path / 'in', tmp_path / 'out')
  mask = nib.load(tmp_path / 'out' / 'a_mask.nii.gz')
  assert mask.shape == nib.load(scan.path).shape
  np.testing.assert_array_equal(mask.affine, nib.load(scan.path).affine)


def test_grey_and_hu_are_never_mixed(folder, run, runs, raw_dir, tmp_path):
  scan = raw_dir / 'volume-phantom-A-0001_ct.nii.gz'
  stored = np.asarray(nib.load(scan).dataobj)
  for workdir, source, line in (
    (
      run,
      scan,
      f'{scan.name}: values {stored.min()} to {stored.max()} are Hounsfield units or similar, but data.intensity=grey needs '
      '8-bit images (0 to 255); give 8-bit images, or train on HU without data.intensity=grey',
    ),
    *(
      (
        runs['seg'],
        source,
        f'input: {folder / "images" / "0001_00.png"} is an 8-bit picture, but this run was trained on HU; '
        'give scans in HU, or a run trained with data.intensity=grey',
      )
      for source in (folder / 'images', folder / 'images' / '0001_00.png')
    ),
  ):
    with pytest.raises(UserError) as caught:
      predict.predict(predictor.load_predictor(workdir), source, tmp_path / 'out')
    assert str(caught.value) == line
    assert not (tmp_path / 'out').exists()
  # A run and a cohort in HU refuse an 8-bit scan.
  image = volume_files.read_scan(scan)
  grey = np.clip((image.values + 1000) / 1300, 0, 1) * 255
  nifti.write_volume(tmp_path / 'grey' / 'a.nii.gz', grey.astype(np.uint8), image)
  shutil.copy(scan.with_name('volume-phantom-A-0001_seg.nii.gz'), tmp_path / 'grey' / 'a_mask.nii.gz')
  for attempt in (
    lambda: predict.predict(predictor.load_predictor(runs['seg']), tmp_path / 'grey' / 'a.nii.gz', tmp_path / 'out'),
    lambda: prepare.prepare(str(tmp_path / 'grey'), str(tmp_path / 'data'), SIZE),
  ):
    with pytest.raises(UserError) as caught:
      attempt()
    assert str(caught.value) == (
      f'{tmp_path / "grey" / "a.nii.gz"}: values 0 to 255 are an 8-bit image, not HU (air is -1000); export the '
      'original Hounsfield units, neither windowed nor rescaled; or train and predict on 8-bit images with '
      '--config.data.intensity=grey'
    )
  # In a folder of both, a grey run refuses the HU scan; equal names are refused as well.
  shutil.copy(scan, tmp_path / 'grey' / 'b.nii.gz')
  with pytest.raises(UserError, match=r'b.nii.gz: values .* are Hounsfield units or similar'):
    predict.predict(predictor.load_predictor(run), tmp_path / 'grey', tmp_path / 'out')
  shutil.copy(folder / 'images' / '0001_00.png', tmp_path / 'grey' / 'b.png')
  with pytest.raises(UserError, match=r'b.png: its results would have the same name as those of b.nii.gz; rename one'):
    predict.predict(predictor.load_predictor(run), tmp_path / 'grey', tmp_path / 'out')


def test_pictures_are_read_as_shown(tmp_path):
  ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
  grey = Image.fromarray(ramp)
  for name, image in {
    'grey.png': grey,
    'colourless.png': grey.convert('RGB'),
    'alpha.png': grey.convert('RGBA'),
    'grey_alpha.png': grey.convert('LA'),
    'palette.png': grey.convert('P'),
  }.items():
    image.save(tmp_path / name)
    np.testing.assert_array_equal(pictures.read_picture(tmp_path / name), ramp, name)
  grey.resize((64, 64)).convert('RGB').save(tmp_path / 'a.JPG', 'JPEG', quality=70)
  assert pictures.is_picture_file(tmp_path / 'a.JPG')
  assert np.abs(pictures.read_picture(tmp_path / 'a.JPG') - np.asarray(grey.resize((64, 64)), int)).mean() < 3
  # In a palette of colours, the indices are the labels.
  labels = Image.fromarray((ramp % 4).astype(np.uint8), 'L').convert('P')
  labels.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0, 0, 0, 255])
  labels.save(tmp_path / 'labels.png')
  found = pictures.read_mask(tmp_path / 'labels.png', (16, 16), (1, 3))
  np.testing.assert_array_equal(found, np.isin(np.asarray(Image.open(tmp_path / 'labels.png')), (1, 3)))
  mask, distinct = pictures.read_mask_and_values(tmp_path / 'labels.png', (16, 16), (1, 3))
  np.testing.assert_array_equal(mask, found)
  assert distinct == (0, 1, 2, 3)
  # A palette of greys gives grey values for any order of its indices; here white comes first.
  square = np.zeros((16, 16), np.uint8)
  square[4:8, 4:8] = 1
  indices = Image.fromarray(1 - square, 'L').convert('P')
  indices.putdata(list((1 - square).ravel()))
  indices.putpalette([255, 255, 255, 0, 0, 0])
  indices.save(tmp_path / 'inverted.png')
  np.testing.assert_array_equal(pictures.read_mask(tmp_path / 'inverted.png', (16, 16)), square)
  assert pictures.read_mask_and_values(tmp_path / 'inverted.png', (16, 16))[1] == (0, 255)
  pictures.write_picture(tmp_path / 'out' / 'mask.png', found * 255)
  np.testing.assert_array_equal(pictures.read_mask(tmp_path / 'out' / 'mask.png', (16, 16)), found)
