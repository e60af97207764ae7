"""Finding cohorts: every file is used, refused, or counted in the log; pairs are checked both ways."""

import logging
import os
import pathlib
import shutil

import nibabel as nib
import numpy as np
import pytest
from layouts import files
from nifti_files import chest, save
from PIL import Image

from data import prepare, survey
from data.cohorts import AS_RELEASED, CohortOptions
from data.find import find
from fusa_jax.system.errors import UserError
from fusa_jax.system.files import sha256
from fusa_jax.training import datasets

GREY = CohortOptions(intensity='grey')


def pair(folder, scan, mask, seed=0):
  """Saves a scan and a mask under these names."""
  save(folder / scan, chest(seed=seed))
  save(folder / mask, (chest(seed=seed) > 300).astype(np.uint8))


def picture(path, seed=0):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(np.random.default_rng(seed).integers(0, 255, (8, 8)).astype(np.uint8)).save(path)


def patients(folder, options=AS_RELEASED):
  return [case.patient for case in find(folder, options)[1]]


def refused(folder, options=AS_RELEASED):
  with pytest.raises(UserError) as caught:
    find(folder, options)
  return str(caught.value).replace(f'{folder}/', '').splitlines()


@pytest.fixture
def left_out(caplog):
  """Returns a function that finds a cohort and returns the lines about files that are left out."""
  caplog.set_level(logging.INFO)

  def lines(folder, options=AS_RELEASED):
    caplog.clear()
    find(folder, options)
    return [message for message in caplog.messages if message.startswith('left out')]

  return lines


NAMES = {
  'covid19_20': ('P{}_ct.nii.gz', 'P{}_seg.nii.gz'),
  'pairs': ('P{}.nii.gz', 'P{}_mask.nii.gz'),
  'nnunet': ('imagesTr/P{}_0000.nii.gz', 'labelsTr/P{}.nii.gz'),
  'zenodo_20': ('COVID-19-CT-Seg_20cases/P{}.nii.gz', 'Infection_Mask/P{}.nii.gz'),
  'medseg': ('rp_im/P{}.nii.gz', 'rp_msk/P{}.nii.gz'),
  'folders': ('P{}/ct.nii.gz', 'P{}/mask.nii.gz'),
}


@pytest.mark.parametrize('name', NAMES)
def test_pairs_are_checked_both_ways(tmp_path, name):
  scan, mask = NAMES[name]
  for number in range(4):
    pair(tmp_path, scan.format(number), mask.format(number), number)
  assert find(tmp_path)[0] == name and len(find(tmp_path)[1]) == 4
  (tmp_path / scan.format(1)).unlink()
  (tmp_path / mask.format(2)).unlink()
  lines = sorted(refused(tmp_path))
  assert len(lines) == 2
  of_mask, of_scan = (next(line for line in lines if line.startswith(one)) for one in (mask.format(1), scan.format(2)))
  assert 'the scan' in of_mask and of_mask.endswith('add it, or remove the mask')
  assert 'the mask' in of_scan and of_scan.endswith('add it, or remove the scan')


def test_masks_of_missing_pictures_are_refused(tmp_path):
  for number in range(3):
    picture(tmp_path / 'images' / f'{number}.png', number), picture(tmp_path / 'masks' / f'{number}.png')
  (tmp_path / 'images' / '1.png').unlink()
  assert refused(tmp_path, GREY) == ['masks/1.png: the picture images/1.png is missing; add it, or remove the mask']
  (tmp_path / 'images' / '1.heic').write_bytes(b'x')
  (tmp_path / 'masks' / '2.png').rename(tmp_path / 'masks' / '2.npy')
  assert refused(tmp_path, GREY) == [
    'images/2.png: the mask masks/2.png is missing (2.npy has another format); add it, or remove the picture',
    'masks/1.png: the picture images/1.png is missing (1.heic has another format); add it, or remove the mask',
  ]


@pytest.mark.parametrize('name', NAMES)
def test_capitals_of_names_and_endings_do_not_matter(tmp_path, name):
  scan, mask = NAMES[name]
  for number, change in enumerate((str, str.upper, str.lower)):
    for one in (scan, mask):
      path = save(tmp_path / 'new' / 'file.nii.gz', chest(seed=number))
      folder, _, file = one.format(number).rpartition('/')
      folder = folder.upper() if name != 'folders' else folder
      wanted = 'P' + change(file[1:]) if name != 'folders' else change(file)
      (tmp_path / 'raw' / folder).mkdir(parents=True, exist_ok=True)
      path.rename(tmp_path / 'raw' / folder / wanted)
  assert find(tmp_path / 'raw')[0] == name
  assert [name[-1] for name in patients(tmp_path / 'raw')] == ['0', '1', '2']


def test_leftovers_of_operating_systems_are_passed_over(tmp_path, left_out):
  for name, (scan, mask) in NAMES.items():
    for number in range(2):
      pair(tmp_path / name, scan.format(number), mask.format(number), number)
    for path in [path for path in (tmp_path / name).rglob('*') if path.is_file()]:
      path.with_name(f'._{path.name}').write_bytes(b'\0\5\x16\7')
      path.with_name('Thumbs.db').write_bytes(b'x')
    (tmp_path / name / '__MACOSX').mkdir()
    shutil.copy(path, tmp_path / name / '__MACOSX' / f'._{path.name}')
    assert find(tmp_path / name)[0] == name and len(find(tmp_path / name)[1]) == 2
    assert left_out(tmp_path / name) == []
  # An archive unpacked by a Mac: the folder of the cohort beside __MACOSX.
  for name in ('covid19_20', 'pairs'):
    (tmp_path / 'unpacked' / name / '__MACOSX').mkdir(parents=True)
    shutil.copytree(tmp_path / name, tmp_path / 'unpacked' / name / 'release')
    assert find(tmp_path / 'unpacked' / name)[0] == name
  for label in ('COVID', 'Normal'):
    for number in range(2):
      picture(tmp_path / 'classes' / label / label / f'{number}.png', number)
    (tmp_path / 'classes' / label / '__MACOSX').mkdir()
  (tmp_path / 'classes' / '__MACOSX').mkdir()
  picture(tmp_path / 'classes' / '__MACOSX' / '._0.png')
  assert len(find(tmp_path / 'classes', GREY._replace(patients='each_slice'))[1]) == 4


def test_other_files_are_counted_and_named(tmp_path, left_out):
  for number in range(3):
    pair(tmp_path, f'P{number}_ct.nii.gz', f'P{number}_seg.nii.gz', number)
  assert left_out(tmp_path) == []
  for name in ('b.txt', 'a.tar.gz', 'more/c.tif'):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b'x')
  assert left_out(tmp_path) == ['left out: 3 files (a.tar.gz, b.txt, c.tif)']
  save(tmp_path / 'Validation' / 'P9_ct.nii.gz', chest(seed=9))
  assert left_out(tmp_path) == ['left out: 4 files (P9_ct.nii.gz, a.tar.gz, b.txt, c.tif)']


def test_data_files_belong_to_their_headers(tmp_path, left_out):
  """The voxels of .hdr and .mhd are in files of their own: they are used, and a change in them is noticed."""
  for number in range(2):
    for name, data in (('ct', chest(seed=number)), ('seg', (chest(seed=number) > 300).astype(np.uint8))):
      save(tmp_path / f'P{number}_{name}.hdr', data, image_class=nib.Nifti1Pair)
  header = (
    'ObjectType = Image\nNDims = 3\nDimSize = 7 6 5\nElementSpacing = 1 1 1\nTransformMatrix = 1 0 0 0 1 0 0 0 1\n'
  )
  (tmp_path / 'P2_ct.mhd').write_text(f'{header}ElementType = MET_SHORT\nElementDataFile = P2.raw\n')
  (tmp_path / 'P2.raw').write_bytes(chest().tobytes('F'))
  save(tmp_path / 'P2_seg.nii.gz', np.zeros((7, 6, 5), np.uint8))
  (tmp_path / 'P1.img').write_bytes(b'x')
  assert left_out(tmp_path) == ['left out: 1 file (P1.img)']
  before = survey.fingerprint(find(tmp_path)[1])
  for name in ('P1_seg.img', 'P2.raw'):
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    after = survey.fingerprint(find(tmp_path)[1])
    assert [one for one in after if one not in before] == [[name, sha256((tmp_path / name).read_bytes())]]
    before = after
  (tmp_path / 'P2.raw').unlink()
  assert refused(tmp_path) == ['P2.raw: file not found; check the path']


def test_lists_and_dicom_files_are_not_left_out(tmp_path, left_out):
  for number in range(2):
    picture(tmp_path / 'a' / 'images' / f'{number}.png', number), picture(tmp_path / 'a' / 'masks' / f'{number}.png')
  (tmp_path / 'a' / 'slices.csv').write_text('name,patient\n0,p0\n1,p1\n')
  (tmp_path / 'a' / 'images' / '2.heic').write_bytes(b'x')
  assert left_out(tmp_path / 'a', GREY) == ['left out: 1 file (2.heic)']
  for number in range(2):
    (tmp_path / 'b' / f'P{number}').mkdir(parents=True)
    (tmp_path / 'b' / f'P{number}' / 'IM1').write_bytes(bytes(128) + b'DICM')
    save(tmp_path / 'b' / f'P{number}_mask.nii.gz', chest())
  save(tmp_path / 'b' / 'other.nii.gz', chest())
  assert left_out(tmp_path / 'b') == ['left out: 1 file (other.nii.gz)']


def test_patients_that_are_not_used_are_counted(raw_dir, tmp_path, left_out):
  (scan, mask), *_ = files(raw_dir)
  for number, severity in enumerate(('CT-0', 'CT-1', 'CT-1', 'CT-2')):
    (tmp_path / 'mosmed' / 'studies' / severity).mkdir(parents=True, exist_ok=True)
    shutil.copy(scan, tmp_path / 'mosmed' / 'studies' / severity / f'study_{number}.nii.gz')
  (tmp_path / 'mosmed' / 'masks').mkdir()
  shutil.copy(mask, tmp_path / 'mosmed' / 'masks' / 'study_1_mask.nii.gz')
  assert left_out(tmp_path / 'mosmed') == ['left out (no mask): 2 files (study_2.nii.gz, study_3.nii.gz)']
  for name in ('coronacases_1', 'radiopaedia_1_1_0'):
    for folder in ('COVID-19-CT-Seg_20cases', 'Infection_Mask'):
      (tmp_path / 'zenodo' / folder).mkdir(parents=True, exist_ok=True)
      shutil.copy(mask, tmp_path / 'zenodo' / folder / f'{name}.nii.gz')
  names = 'radiopaedia_1_1_0.nii.gz, radiopaedia_1_1_0.nii.gz'
  assert left_out(tmp_path / 'zenodo') == [f'left out (8-bit values, not HU): 2 files ({names})']
  names = 'coronacases_1.nii.gz, coronacases_1.nii.gz'
  assert left_out(tmp_path / 'zenodo', GREY) == [f'left out (HU, not 8-bit values): 2 files ({names})']


def test_links_are_followed_and_broken_ones_are_named(tmp_path):
  store, raw = tmp_path / 'store', tmp_path / 'raw'
  (raw / 'images').mkdir(parents=True)
  for number in range(2):
    pair(store, f'P{number}_ct.nii.gz', f'P{number}_seg.nii.gz', number)
  (tmp_path / 'linked').symlink_to(store)
  assert patients(tmp_path / 'linked') == ['P0', 'P1']
  for path in store.iterdir():
    (raw / path.name).symlink_to(path)
  assert patients(raw) == ['P0', 'P1']
  (store / 'P1_seg.nii.gz').unlink()
  gone = f'a broken link to {store}/P1_seg.nii.gz; restore what it points to, or remove it'
  assert refused(raw) == [f'P1_seg.nii.gz: {gone}']
  # A picture, and a patient's folder.
  for number in range(2):
    picture(tmp_path / 'pictures' / 'images' / f'{number}.png', number)
    picture(tmp_path / 'pictures' / 'masks' / f'{number}.png')
  (tmp_path / 'pictures' / 'images' / '1.png').unlink()
  (tmp_path / 'pictures' / 'images' / '1.png').symlink_to('.git/annex/1.png')
  assert refused(tmp_path / 'pictures', GREY) == [
    'images/1.png: a broken link to .git/annex/1.png; restore what it points to, or remove it'
  ]
  (tmp_path / 'dicom' / 'P0').mkdir(parents=True)
  (tmp_path / 'dicom' / 'P0' / 'IM1').write_bytes(bytes(128) + b'DICM')
  (tmp_path / 'dicom' / 'P1').symlink_to(tmp_path / 'nothing')
  assert refused(tmp_path / 'dicom') == [
    'P1: a broken link, perhaps to a patient; restore what it points to, or remove it'
  ]


def test_second_files_of_a_patient_are_refused(tmp_path):
  """Nobody can tell which of two masks, or of two scans, is the right one."""
  for number in range(3):
    pair(tmp_path, f'P{number}_ct.nii.gz', f'P{number}_seg.nii.gz', number)
  for name, other in (
    ('P1_seg.nii', 'P1_seg.nii.gz'),
    ('P1_mask.nii.gz', 'P1_seg.nii.gz'),
    ('P1_ct_mask.nii.gz', 'P1_seg.nii.gz'),  # as --mode=predict writes it
    ('P1_SEG.nii.gz', 'P1_seg.nii.gz'),
    ('P1_ct.nii', 'P1_ct.nii.gz'),
  ):
    nib.save(nib.load(tmp_path / other), tmp_path / 'new.nii')
    (tmp_path / 'new.nii').rename(tmp_path / name)
    (line,) = refused(tmp_path)
    assert {line.split(': ')[0], line.split('same patient as ')[1].split(';')[0]} == {name, other}
    assert line.endswith('; remove one of the two')
    (tmp_path / name).unlink()
  for number in range(3):
    pair(tmp_path / 'pairs', f'P{number}.nii.gz', f'P{number}_mask.nii.gz', number)
  pair(tmp_path / 'pairs', 'P2.nii', 'P0_seg.nii.gz')
  assert refused(tmp_path / 'pairs') == ['P0_seg.nii.gz: same patient as P0_mask.nii.gz; remove one of the two']
  (tmp_path / 'pairs' / 'P0_seg.nii.gz').unlink()
  assert refused(tmp_path / 'pairs') == ['P2.nii.gz: same patient as P2.nii; remove one of the two']
  for name in ('masks', 'Masks'):
    picture(tmp_path / 'pictures' / name / '0.png')
  picture(tmp_path / 'pictures' / 'images' / '0.png')
  if len(list((tmp_path / 'pictures').iterdir())) == 3:  # not on file systems without capitals
    assert refused(tmp_path / 'pictures', GREY)[0].endswith('masks: the same name as Masks; remove one of the two')


def test_nnunet_with_and_without_channel(tmp_path):
  """Scans may all lack _0000, as in the Decathlon; a mixture is refused with the name that is wanted."""
  for number in range(3):
    pair(tmp_path / 'plain', f'imagesTr/P{number}.nii.gz', f'labelsTr/P{number}.nii.gz', number)
    pair(tmp_path / 'four', f'imagesTr/P_{number:04d}.nii.gz', f'labelsTr/P_{number:04d}.nii.gz', number)
    ending = '' if number == 1 else '_0000'
    pair(tmp_path / 'mixed', f'imagesTr/P{number}{ending}.nii.gz', f'labelsTr/P{number}.nii.gz', number)
  # The list of nnU-Net 2 has no cases.
  (tmp_path / 'plain' / 'dataset.json').write_text('{"numTraining": 3, "file_ending": ".nii.gz"}')
  assert find(tmp_path / 'plain')[0] == 'nnunet' and patients(tmp_path / 'plain') == ['P0', 'P1', 'P2']
  assert patients(tmp_path / 'four') == ['P_0000', 'P_0001', 'P_0002']
  assert refused(tmp_path / 'mixed') == [
    'imagesTr/P1.nii.gz: the ending _0000 is missing, which other scans have; rename it to P1_0000.nii.gz'
  ]
  save(tmp_path / 'mixed' / 'imagesTr' / 'P1_0000.nii.gz', chest(seed=1))
  assert refused(tmp_path / 'mixed') == ['imagesTr/P1.nii.gz: same patient as P1_0000.nii.gz; remove one of the two']


def test_lists_of_nnunet_1_leave_out_the_channel(tmp_path):
  pair(tmp_path, 'imagesTr/P0_0000.nii.gz', 'labelsTr/P0.nii.gz')
  pair(tmp_path, 'imagesTr/Mu\u0308_0000.nii.gz', 'labelsTr/Mu\u0308.nii.gz')
  listed = [f'{{"image": "./imagesTr/{name}.nii.gz", "label": "./labelsTr/{name}.nii.gz"}}' for name in ('P0', 'M\xfc')]
  (tmp_path / 'dataset.json').write_text(f'{{"training": [{", ".join(listed)}]}}', encoding='utf-8')
  assert find(tmp_path)[0] == 'decathlon' and patients(tmp_path) == ['M\xfc', 'P0']
  (tmp_path / 'imagesTr' / 'P0_0000.nii.gz').unlink()
  assert refused(tmp_path) == [
    'imagesTr/P0.nii.gz: listed in dataset.json, but missing; add it, or remove it from the list'
  ]


@pytest.mark.parametrize('labels', [('lesion',), ('1', '2'), 'lesion', 3, (0, 1), (1.5,), (True,), (None,)])
def test_labels_that_are_no_mask_values_are_refused(tmp_path, labels):
  pair(tmp_path, 'P0.nii.gz', 'P0_mask.nii.gz')
  with pytest.raises(UserError, match=r'data.lesion_labels: .* are not mask values .*--config.data.lesion_labels="\('):
    find(tmp_path, CohortOptions(lesion_labels=labels))
  if labels == ('1', '2'):
    with pytest.raises(UserError, match=r'for example --config.data.lesion_labels="\(1,2\)"$'):
      find(tmp_path, CohortOptions(lesion_labels=labels))


def test_the_home_folder(tmp_path, monkeypatch):
  pair(tmp_path / 'raw', 'P0.nii.gz', 'P0_mask.nii.gz')
  monkeypatch.setenv('HOME', str(tmp_path))
  assert patients('~/raw') == patients(pathlib.Path('~/raw')) == ['P0']


def test_names_that_are_not_utf8(tmp_path):
  """As unzip on Linux leaves the names of an archive from Windows: each patient keeps a name of its own."""
  for number, name in enumerate((b'M\xfcller', b'M\xe4ller', 'Müller'.encode())):
    pair(tmp_path, 'a_ct.nii.gz', 'a_seg.nii.gz', number)
    for ending in ('_ct.nii.gz', '_seg.nii.gz'):
      (tmp_path / f'a{ending}').rename(tmp_path / os.fsdecode(name + ending.encode()))
  assert patients(tmp_path) == [r'M\xe4ller', r'M\xfcller', 'Müller']


def test_names_of_the_greatest_length(raw_dir, tmp_path):
  for number, (scan, mask) in enumerate(files(raw_dir)[:2]):
    for path, ending in ((scan, '_ct.nii.gz'), (mask, '_seg.nii.gz')):
      shutil.copy(path, tmp_path / f'{number}{"x" * (255 - 1 - len("_seg.nii.gz"))}{ending}')
  prepared = prepare.prepare(str(tmp_path), str(tmp_path / 'out'), 32)
  assert [len(patient['patient']) for fold in datasets.folds(prepared) for patient in fold] == [244, 244]


def test_studies_of_one_name_are_refused(tmp_path):
  for severity in ('CT-0', 'CT-3'):
    save(tmp_path / 'studies' / severity / 'study_1.nii.gz', chest())
  (tmp_path / 'masks').mkdir()
  assert refused(tmp_path) == [
    'studies/CT-3/study_1.nii.gz: same patient as studies/CT-0/study_1.nii.gz; remove one of the two'
  ]
