"""Pictures of slices as a cohort: classes, patients and masks from file names; and reported problems."""

import pathlib
import shutil

import numpy as np
import pytest
from conftest import SIZE, tiny
from layouts import copy, pictures_of, write_all
from PIL import Image

from configs import seg
from data import prepare, survey
from data.cohorts import CohortOptions, slices
from data.find import find
from fusa_jax.system.errors import UserError
from fusa_jax.training import datasets, train


@pytest.fixture(scope='module')
def laid(raw_dir, tmp_path_factory):
  return write_all(raw_dir, tmp_path_factory)


def test_pictures_are_prepared_unchanged(laid, raw_dir, tmp_path):
  prepared = prepare.prepare(str(laid['slices']), str(tmp_path), SIZE, options=CohortOptions(intensity='grey'))
  split = datasets.load_dataset(prepared, 0, SIZE).test
  truth = {(patient, index): (grey, mask) for patient, index, grey, mask in pictures_of(raw_dir)}
  for index in range(len(split)):
    example = split.source[index]
    grey, mask = truth[example['patient'].decode(), int(example['slice'])]
    np.testing.assert_array_equal(example['mask'], mask)
    assert np.abs(example['image'] - grey.astype(int)).mean() < 4  # JPEG
    assert np.isnan(example['spacing']).all()


def test_classes_are_recognised_by_folder_names(laid, raw_dir, tmp_path):
  name, cases = find(laid['classes'], CohortOptions(intensity='grey', patients='each_slice'))
  assert name == 'slices'
  assert sum(case.labels[0] for case in cases) == sum(mask.any() for *_, mask in pictures_of(raw_dir))
  assert {case.patient.rpartition('-')[0]: case.labels[0] for case in cases} == {'CT_COVID': 1, 'CT_NonCOVID': 0}
  for names, positive in (
    (('COVID', 'non-COVID'), {'COVID'}),
    (('Covid', 'CAP', 'Normal'), {'Covid', 'CAP'}),
    (('nodule', 'healthy_controls'), {'nodule'}),
    (('COVIDPositive', 'COVIDNegative'), {'COVIDPositive'}),
    (('nonspecific_pneumonia', 'PneumoniaNormal'), {'nonspecific_pneumonia'}),
  ):
    folder = tmp_path / names[0]
    for each in names:
      copy(laid['classes'] / 'CT_COVID' / '0.png', folder / each / 'a.png')
    labels = {case.patient: case.labels[0] for case in slices.find(folder)}
    assert labels == {f'{each}-a': int(each in positive) for each in names}
  for names in (('a', 'b'), ('no_lesion', 'normal')):
    folder = tmp_path / names[1]
    for each in names:
      copy(laid['classes'] / 'CT_COVID' / '0.png', folder / each / 'a.png')
    with pytest.raises(
      UserError, match=rf'cannot tell which folder \({names[0]}, {names[1]}\) is without lesion; only its name'
    ):
      find(folder, CohortOptions(intensity='grey'))


def test_problems_of_pictures_are_named(laid, tmp_path):
  def refused(name, options, change=lambda folder: None):
    folder = tmp_path / str(len(list(tmp_path.iterdir())))
    shutil.copytree(laid[name], folder)
    change(folder)
    with pytest.raises(UserError) as caught:
      prepare.prepare(str(folder), str(tmp_path / 'out'), SIZE, options=options)
    assert not (tmp_path / 'out').exists() or not list((tmp_path / 'out').rglob('*array_record*'))
    return str(caught.value).replace(f'{folder}', 'X')

  grey = CohortOptions(intensity='grey')
  assert refused('slices', CohortOptions()) == ('X: contains 8-bit images, not HU; add --config.data.intensity=grey')
  assert (
    refused('mosmed', grey)
    .splitlines()[0]
    .endswith(
      'are Hounsfield units or similar, but data.intensity=grey needs 8-bit images (0 to 255); give 8-bit images, '
      'or train on HU without data.intensity=grey'
    )
  )
  assert refused('classes', grey) == (
    'X: slices without patient IDs, so one patient may be in both training and test; add slices.csv '
    '(name,patient), or use --config.data.patients=each_slice (scores will not be patient-level)'
  )
  assert refused('slices', grey._replace(intensity='gray')) == "data.intensity: 'gray' is unknown; give one of hu, grey"
  assert refused('slices', grey._replace(patients='each')) == (
    "data.patients: 'each' is unknown; give one of named, each_slice"
  )
  assert refused('slices', grey, lambda f: (f / 'masks' / '0003.png').unlink()) == (
    'X/images/0003.jpg: the mask masks/0003.png is missing; add it, or remove the picture'
  )
  assert refused('slices', grey, lambda f: copy(f / 'images' / '0003.jpg', f / 'images' / '0003.jpeg')) == (
    'X/images/0003.jpg: a second picture with the name 0003; remove one, or rename it'
  )

  def change_list(folder):
    lines = (folder / 'slices.csv').read_text().splitlines()
    lines[1:5] = ['0000,p01', '0000,p02', 'nothing,p01', '0002,']
    (folder / 'slices.csv').write_text('\n'.join(lines))

  assert refused('slices', grey, change_list).splitlines() == [
    "X/slices.csv: line 3: '0000' has another patient in a line above; correct one of the two",
    "X/slices.csv: line 4: no picture with the name 'nothing'; correct it, and add the folder if two pictures share it",
    "X/slices.csv: line 5: '0002' has no patient; add the patient, or remove the picture",
    *(f'X/images/000{number}.jpg: is not in slices.csv; add it with its patient, or remove it' for number in (1, 2, 3)),
  ]
  for text in ('file,id\n0000,1\n', 'name patient\n0000 1\n', ''):
    assert refused('slices', grey, lambda f, text=text: (f / 'slices.csv').write_text(text)) == (
      'X/slices.csv: no columns name and patient; use commas, with name,patient as first line'
    )
  latin = 'name,patient\n0000,Müller\n'.encode('latin-1')
  assert refused('slices', grey, lambda f: (f / 'slices.csv').write_bytes(latin)).startswith(
    "X/slices.csv: not a CSV file in UTF-8 ('utf-8' codec can't decode byte 0xfc"
  )
  # The same slice as a slice of another patient.
  assert refused('slices', grey, lambda f: copy(f / 'images' / '0003.jpg', f / 'images' / '0100.jpg')) == (
    'X/images/0100.jpg: the same image as 0003.jpg, so it could be in both training and test, or count twice; remove '
    'one of the two, with its mask'
  )

  def spoil(folder):
    mask = np.zeros((SIZE, SIZE), np.uint8)
    Image.fromarray(mask + 3).save(folder / 'masks' / '0000.png')
    Image.fromarray(mask[:-1]).save(folder / 'masks' / '0001.png')
    (folder / 'images' / '0016.jpg').write_bytes(b'nothing')
    Image.fromarray(np.stack([mask, mask + 200, mask], -1)).save(folder / 'images' / '0032.jpg')
    (folder / 'images' / '0048.jpg').unlink()
    Image.fromarray(mask.astype(np.uint16) + 1000).save(folder / 'images' / '0048.png')

  lines = refused('slices', grey, spoil).splitlines()
  assert lines[0] == (
    'X/masks/0000.png: mask values must be 0 and 255, or 0 and 1, but are 3; save the mask as PNG (JPEG changes '
    'values), or name the lesion labels, for example --config.data.lesion_labels="(3,)"'
  )
  assert [line.split(' (')[0].split(';')[0] for line in lines[1:]] == [
    'X/masks/0001.png: the mask has',
    'X/images/0016.jpg: the picture cannot be read',
    'X/images/0032.jpg: the picture is in colour',
    'X/images/0048.png: more than 8 bits per pixel',
  ]
  only_size = lambda f: Image.fromarray(np.zeros((SIZE - 1, SIZE), np.uint8)).save(f / 'masks' / '0001.png')
  assert refused('slices', grey, only_size) == (
    'X/masks/0001.png: the mask has (31, 32) pixels, its slice (32, 32); save it in that size'
  )


def test_segmentation_needs_masks(laid, tmp_path):
  options = CohortOptions(intensity='grey', patients='each_slice')
  data_dir = prepare.prepare(str(laid['classes']), str(tmp_path / 'data'), SIZE, options=options)
  shards = list(pathlib.Path(data_dir).glob('*.array_record*'))
  assert len(shards) <= 5 * 12  # readers keep all of them open
  config = tiny(seg)
  with pytest.raises(UserError, match=r'data.intensity: hu, but .* holds grey; set data.intensity to grey'):
    train.train(config, tmp_path / 'run', data_dir)
  config.data.intensity = 'grey'
  with pytest.raises(UserError, match=r'has labels of slices but no masks; train a classifier'):
    train.train(config, tmp_path / 'run', data_dir)
  assert not (tmp_path / 'run').exists()


def test_patients_and_classes_are_part_of_the_fingerprint(laid, tmp_path):
  """A corrected patient list, or a slice moved to the other class, changes the fingerprint of the cohort."""
  folder, options = tmp_path / 'raw', CohortOptions(intensity='grey')
  shutil.copytree(laid['slices'], folder)
  before = survey.fingerprint(find(folder, options)[1])
  prepare.prepare(str(folder), str(tmp_path / 'data'), SIZE, options=options)
  text = (folder / 'slices.csv').read_text()
  (folder / 'slices.csv').write_text(text.replace('0159,p10', '0159,p09'))
  assert survey.fingerprint(find(folder, options)[1]) != before
  with pytest.raises(UserError, match=r'was prepared from other files than .* contains now'):
    prepare.prepare(str(folder), str(tmp_path / 'data'), SIZE, options=options)
  folder, options = tmp_path / 'classes', CohortOptions(intensity='grey', patients='each_slice')
  shutil.copytree(laid['classes'], folder)
  names = sorted(path.name for path in (folder / 'CT_COVID').iterdir())
  lines = [f'{"CT_COVID/" if (folder / "CT_NonCOVID" / name).exists() else ""}{name},p{name[0]}' for name in names]
  lines += [f'CT_NonCOVID/{path.name},p{path.name[0]}' for path in (folder / 'CT_NonCOVID').iterdir()]
  (folder / 'slices.csv').write_text('\n'.join(['name,patient', *lines]))
  moved = next(path for path in (folder / 'CT_NonCOVID').iterdir() if path.name not in names)
  before = find(folder, options)[1]
  fingerprint = survey.fingerprint(before)
  moved.rename(folder / 'CT_COVID' / moved.name)
  (folder / 'slices.csv').write_text(
    (folder / 'slices.csv').read_text().replace(f'CT_NonCOVID/{moved.name}', f'CT_COVID/{moved.name}')
  )
  after = find(folder, options)[1]
  assert sum(sum(case.labels) for case in after) == sum(sum(case.labels) for case in before) + 1
  assert survey.fingerprint(after) != fingerprint


def test_equal_pictures_within_a_patient_are_accepted(tmp_path):
  """Copies within one patient are no leak. Pictures of one value, as beyond the ends of a scan, are ignored."""
  rng, black = np.random.default_rng(0), np.zeros((8, 8), np.uint8)
  (tmp_path / 'images').mkdir(), (tmp_path / 'masks').mkdir()
  lines = ['name,patient']
  for patient in 'ab':
    one = rng.integers(0, 256, (8, 8)).astype(np.uint8)
    for number, image in enumerate([black, one, one, rng.integers(0, 256, (8, 8)).astype(np.uint8)], start=8):
      name = f'{patient}{number}'
      Image.fromarray(image).save(tmp_path / 'images' / f'{name}.png')
      Image.fromarray(black).save(tmp_path / 'masks' / f'{name}.png')
      lines.append(f'{name},{patient}')
  (tmp_path / 'slices.csv').write_text('\n'.join(lines))
  cases = find(tmp_path, CohortOptions(intensity='grey'))[1]
  assert [path.stem for path in cases[0].ct] == ['a8', 'a9', 'a10', 'a11']
  assert [patient.case.patient for patient in survey.survey(cases)] == ['a', 'b']
