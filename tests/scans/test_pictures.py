"""Slices as PNG and JPEG: read as by Pillow, predicted as in evaluation; grey values and HU are never mixed."""

import csv
import json
import pathlib
import shutil
import struct
import zlib

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
from fusa_jax.scans.classes import of_lesion
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
      f'{scan}: values {stored.min()} to {stored.max()} are Hounsfield units or similar, but data.intensity=grey needs '
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
  # In a folder of both, a grey run refuses the HU scan; two inputs of one name are refused as well.
  shutil.copy(scan, tmp_path / 'grey' / 'b.nii.gz')
  function = predictor.load_predictor(run)
  assert predict.predict(function, tmp_path / 'grey', tmp_path / 'out') == (1, 1, 0)
  assert 'b.nii.gz: values -1024 to 472 are Hounsfield units or' in (tmp_path / 'out' / 'predictions.csv').read_text()
  shutil.copy(folder / 'images' / '0001_00.png', tmp_path / 'grey' / 'b.png')
  assert predict.predict(function, tmp_path / 'grey', tmp_path / 'out') == (1, 2, 0)
  table = (tmp_path / 'out' / 'predictions.csv').read_text()
  assert 'b.png: its results would have the same name as those of b.nii.gz; rename one' in table


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
  found = pictures.read_mask(tmp_path / 'labels.png', (16, 16), of_lesion((1, 3)))
  np.testing.assert_array_equal(found, np.isin(np.asarray(Image.open(tmp_path / 'labels.png')), (1, 3)))
  mask, distinct = pictures.read_mask_and_values(tmp_path / 'labels.png', (16, 16), of_lesion((1, 3)))
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


RAMP = np.arange(16 * 24, dtype=np.uint16).reshape(16, 24) * 2 // 3


def grey_ramp():
  return Image.fromarray(RAMP.astype(np.uint8))


@pytest.mark.parametrize('orientation', range(1, 9))
@pytest.mark.parametrize('name', ['a.png', 'a.jpg', 'a.tif', 'a.webp'])
def test_orientation_in_exif_data_is_applied(tmp_path, name, orientation):
  """Images and masks alike, once: as Pillow's exif_transpose of the pixels shows them."""
  exif = Image.Exif()
  exif[0x0112] = orientation
  lossless = {'lossless': True} if name == 'a.webp' else {}
  half = Image.fromarray(np.where(RAMP < 100, 0, 255).astype(np.uint8))
  upright = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
  }
  for image, read in (
    (grey_ramp(), pictures.read_picture),
    (half, lambda path: pictures.read_mask(path, (16, 24) if orientation < 5 else (24, 16)) * 255),
  ):
    image.save(tmp_path / name, exif=exif, **lossless)
    image.save(tmp_path / f'plain{name}', **lossless)
    expected = Image.open(tmp_path / f'plain{name}').convert('L')
    expected = np.asarray(expected.transpose(upright[orientation]) if orientation > 1 else expected)
    if name == 'a.jpg' and image is half:
      expected = np.where(expected > 127, 255, 0)
      with pytest.raises(UserError, match='mask values must be 0 and 255, or 0 and 1'):
        read(tmp_path / name)
    else:
      np.testing.assert_array_equal(read(tmp_path / name), expected)


@pytest.mark.parametrize('name', ['a.tif', 'a.TIFF', 'a.bmp', 'a.gif', 'a.webp', 'a.jp2', 'a.png'])
def test_formats_without_loss(tmp_path, name):
  options = {'.webp': {'lossless': True}, '.tif': {'compression': 'tiff_lzw'}}.get(pathlib.Path(name).suffix, {})
  mask = np.where(RAMP < 100, 0, 255).astype(np.uint8)
  for values, mode in ((RAMP.astype(np.uint8), 'L'), (mask, 'L'), (mask, '1')):
    if mode == '1' and name.endswith('jp2'):
      continue
    Image.fromarray(values).convert(mode).save(tmp_path / name, **options)
    assert pictures.is_picture_file(tmp_path / name)
    np.testing.assert_array_equal(pictures.read_picture(tmp_path / name), values)
  np.testing.assert_array_equal(pictures.read_mask(tmp_path / name, (16, 24)), mask > 0)


def test_white_is_zero_in_some_tiffs(tmp_path):
  grey_ramp().save(tmp_path / 'a.tif')
  raw, entry = (tmp_path / 'a.tif').read_bytes(), struct.pack('<HHI', 262, 3, 1)  # PhotometricInterpretation
  assert raw.count(entry + b'\1') == 1
  (tmp_path / 'a.tif').write_bytes(raw.replace(entry + b'\1', entry + b'\0'))
  np.testing.assert_array_equal(pictures.read_picture(tmp_path / 'a.tif'), 255 - RAMP)


@pytest.mark.parametrize(
  ('name', 'write', 'reason'),
  [
    ('a.png', lambda path: Image.fromarray(RAMP * 100).save(path), 'more than 8 bits per pixel'),
    ('a.tif', lambda path: Image.fromarray(RAMP * 100).save(path), 'more than 8 bits per pixel'),
    ('a.tif', lambda path: Image.fromarray(RAMP.astype(np.float32)).save(path), 'more than 8 bits per pixel'),
    ('a.jp2', lambda path: Image.fromarray(RAMP * 100).save(path), 'more than 8 bits per pixel'),
    ('a.png', lambda path: path.write_bytes(deep_png()), 'more than 8 bits per pixel'),
    ('a.tif', lambda path: several(path), '3 pages or frames; save each slice as a picture'),
    ('a.gif', lambda path: several(path), '3 pages or frames'),
    ('a.webp', lambda path: several(path), '3 pages or frames'),
    ('a.png', lambda path: several(path), '3 pages or frames'),
    ('a.png', lambda path: path.write_bytes(b''), 'the file is empty'),
    ('a.tif', lambda path: path.write_bytes(b'II*\0'), 'cannot be read'),
    ('a.png', lambda path: transparent((128, 255)).save(path), '25.0% of the pixels are transparent'),
    ('a.png', lambda path: transparent((0, 255)).convert('LA').save(path), '25.0% of the pixels are transparent'),
    ('a.gif', lambda path: grey_ramp().save(path, transparency=9), r'0\.\d% of the pixels are transparent'),
  ],
)
def test_what_a_viewer_would_show_otherwise_is_refused(tmp_path, name, write, reason):
  path = tmp_path / name
  write(path)
  for read in (pictures.read_picture, lambda path: pictures.read_mask(path, (16, 24))):
    if 'transparent' in reason and read is not pictures.read_picture:
      reason = 'the mask has transparent pixels, but the others are not of one opaque colour'
    with pytest.raises(UserError, match=f'^{path}: .*{reason}') as caught:
      read(path)
    assert '\n' not in str(caught.value)


def several(path):
  frames = [grey_ramp(), grey_ramp().transpose(Image.Transpose.FLIP_LEFT_RIGHT), grey_ramp().point(lambda v: 255 - v)]
  frames[0].save(
    path, save_all=True, append_images=frames[1:], **({'lossless': True} if path.suffix == '.webp' else {})
  )


def transparent(opacities):
  """The ramp with other opacities in its first quarter of rows than below."""
  image = grey_ramp().convert('RGBA')
  image.putalpha(
    Image.fromarray(np.repeat([opacities[0]] * 4 + [opacities[1]] * 12, 24).reshape(16, 24).astype(np.uint8))
  )
  return image


def deep_png():
  """A PNG with 16 bits in each of three channels, which Pillow would reduce to 8."""
  rows = b''.join(b'\0' + np.repeat(row * 100, 3).astype('>u2').tobytes() for row in RAMP)
  chunk = lambda kind, data: struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
  header = struct.pack('>IIBBBBB', 24, 16, 16, 2, 0, 0, 0)
  return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + chunk(b'IDAT', zlib.compress(rows)) + chunk(b'IEND', b'')


def on_transparent(colour, hidden=(0, 0, 0)):
  """A mask drawn in one colour; transparent elsewhere."""
  rgba = np.zeros((16, 24, 4), np.uint8)
  rgba[..., :3] = hidden
  rgba[SQUARE > 0] = (*colour, 255)
  return Image.fromarray(rgba)


SQUARE = np.zeros((16, 24), np.uint8)
SQUARE[3:9, 5:20] = 1


@pytest.mark.parametrize(
  'image',
  [
    on_transparent((255, 255, 255)),
    on_transparent((0, 0, 0)),
    on_transparent((255, 0, 0)),
    on_transparent((255, 255, 255), hidden=(255, 255, 255)),
    on_transparent((255, 255, 255)).convert('LA'),
  ],
)
def test_masks_drawn_on_a_transparent_ground(tmp_path, image):
  image.save(tmp_path / 'a.png')
  mask, values = pictures.read_mask_and_values(tmp_path / 'a.png', (16, 24))
  np.testing.assert_array_equal(mask, SQUARE)
  assert len(values) == 2
  # Nothing is drawn: no lesion.
  Image.new('RGBA', (24, 16)).save(tmp_path / 'b.png')
  assert not pictures.read_mask(tmp_path / 'b.png', (16, 24)).any()


def test_labels_drawn_on_a_transparent_ground(tmp_path):
  on_transparent((3, 3, 3)).save(tmp_path / 'a.png')
  mask, values = pictures.read_mask_and_values(tmp_path / 'a.png', (16, 24), of_lesion((3,)))
  np.testing.assert_array_equal(mask, SQUARE)
  assert values == (0, 3)
  # Indices of a palette stay the labels if one of them is transparent.
  labels = Image.fromarray(SQUARE * 2).convert('P')
  labels.putdata(list((SQUARE * 2).ravel()))
  labels.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
  labels.save(tmp_path / 'b.png', transparency=0)
  assert pictures.read_mask_and_values(tmp_path / 'b.png', (16, 24), of_lesion((2,)))[1] == (0, 2)


def slice_of(size=128):
  """A smooth slice with noise, float [H, W]."""
  y, x = np.mgrid[:size, :size] / size
  return 120 + 90 * np.sin(7 * x) * np.cos(5 * y) + np.random.default_rng(0).normal(0, 6, (size, size))


@pytest.mark.parametrize('tint', [(1, 1, 1), (1, 0.93, 0.86), (0.87, 0.95, 1), (1.05, 1, 0.92)])
@pytest.mark.parametrize('name', ['a.png', 'a.jpg'])
def test_a_tint_is_grey(tmp_path, tint, name):
  """The grey value is that of Pillow: of the luminance."""
  image = Image.fromarray(np.clip(slice_of()[..., None] * tint, 0, 255).astype(np.uint8))
  image.save(tmp_path / name)
  np.testing.assert_array_equal(
    pictures.read_picture(tmp_path / name), np.asarray(Image.open(tmp_path / name).convert('L'))
  )


@pytest.mark.parametrize('colour', [(255, 0, 0), (255, 255, 0), (0, 255, 0), (90, 160, 255)])
@pytest.mark.parametrize('name', ['a.png', 'a.jpg'])
@pytest.mark.parametrize(
  'drawn', [np.s_[60:64, 20:50], np.s_[30:40, 90:92], np.s_[3:7, 3:7]], ids=['arrow', 'letter', 'dot']
)
def test_coloured_annotations_are_refused(tmp_path, drawn, name, colour):
  rgb = np.repeat(np.clip(slice_of()[..., None], 0, 255).astype(np.uint8), 3, -1)
  rgb[drawn] = colour
  Image.fromarray(rgb).save(tmp_path / name, quality=85)
  with pytest.raises(UserError, match=r'a\.(png|jpg): the picture is in colour \(\d+\.\d+% of the pixels\)'):
    pictures.read_picture(tmp_path / name)


def test_a_strong_tint_is_a_colour(tmp_path):
  """No film has it; the colours may be a map of values."""
  Image.fromarray((np.clip(slice_of()[..., None], 0, 255) * (1, 0.6, 0.3)).astype(np.uint8)).save(tmp_path / 'a.png')
  with pytest.raises(UserError, match='the picture is in colour'):
    pictures.read_picture(tmp_path / 'a.png')
