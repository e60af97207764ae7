"""Every cohort's layout from small files in its own naming and labels: found, prepared, trained on, evaluated."""

import json
import pathlib
import shutil

import nibabel as nib
import numpy as np
import pytest
from conftest import PATIENTS, SIZE, tiny
from PIL import Image

from configs import cls, seg
from data import prepare, read, survey
from data.cohorts import Wanted
from data.cohorts import slices as slices_cohort
from data.find import find
from fusa_jax import ct, evaluate, input_pipeline, report, train
from fusa_jax.errors import UserError


def files(raw_dir):
  """(scan, mask) of each phantom."""
  return [(path, path.with_name(path.name.replace('_ct', '_seg'))) for path in sorted(raw_dir.glob('*_ct.nii.gz'))]


def copy(source, target):
  target.parent.mkdir(parents=True, exist_ok=True)
  shutil.copy(source, target)


def relabel(source, target, change):
  """A mask with other labels: `change` of its values."""
  target.parent.mkdir(parents=True, exist_ok=True)
  image = nib.load(source)
  nib.save(nib.Nifti1Image(change(np.asarray(image.dataobj)).astype(np.uint8), image.affine, image.header), target)


def covid19_20(raw_dir, out):
  for scan, mask in files(raw_dir):
    copy(scan, out / 'Train' / scan.name), copy(mask, out / 'Train' / mask.name)
    copy(scan, out / 'Validation' / scan.name)


def nnunet(raw_dir, out):
  for number, (scan, mask) in enumerate(files(raw_dir)):
    copy(scan, out / 'imagesTr' / f'covid_{number:03d}_0000.nii.gz')
    copy(mask, out / 'labelsTr' / f'covid_{number:03d}.nii.gz')
    copy(scan, out / 'imagesTs' / f'covid_{number:03d}_0000.nii.gz')
  (out / 'dataset.json').write_text('{"numTraining": 10, "labels": {"background": 0, "lesion": 1}}')


def decathlon(raw_dir, out):
  listed = []
  for number, (scan, mask) in enumerate(files(raw_dir)):
    (
      copy(scan, out / 'imagesTr' / f'lung_{number:03d}.nii.gz'),
      copy(mask, out / 'labelsTr' / f'lung_{number:03d}.nii.gz'),
    )
    listed.append({'image': f'./imagesTr/lung_{number:03d}.nii.gz', 'label': f'./labelsTr/lung_{number:03d}.nii.gz'})
  (out / 'dataset.json').write_text(json.dumps({'numTraining': len(listed), 'training': listed, 'test': []}))


def pairs(raw_dir, out):
  for number, (scan, mask) in enumerate(files(raw_dir)):
    copy(scan, out / f'patient{number}.nii.gz'), copy(mask, out / f'patient{number}_mask.nii.gz')


# As released: case, study and series. 10 and 29 have two scans each.
RADIOPAEDIA = [
  f'radiopaedia_{name}'
  for name in ('10_85902_1', '10_85902_3', '14_85914_0', '27_86410_0', '29_86490_1', '29_86491_1')
  + ('36_86526_0', '40_86625_0', '4_85506_1', '7_85703_0')
]


def zenodo_20(raw_dir, out):
  """Lungs are 1 and 2, lesion 3; the radiopaedia volumes are 8-bit."""
  for number, (scan, mask) in enumerate(files(raw_dir), start=1):
    name = f'coronacases_{number:03d}.nii.gz'
    copy(scan, out / 'COVID-19-CT-Seg_20cases' / name)
    halves = lambda mask: np.where(mask, 3, 1 + (np.arange(SIZE)[:, None, None] >= SIZE // 2))
    relabel(mask, out / 'Lung_and_Infection_Mask' / name, halves)
    grey = f'{RADIOPAEDIA[number - 1]}.nii.gz'
    relabel(scan, out / 'COVID-19-CT-Seg_20cases' / grey, lambda hu: np.clip((hu + 1000) / 1300, 0, 1) * 255)
    relabel(mask, out / 'Lung_and_Infection_Mask' / grey, halves)


def mosmed(raw_dir, out):
  """Every fifth phantom is without lesion: CT-0. The last one is a study of CT-2 of which no mask was published."""
  pairs = files(raw_dir)
  for number, (scan, mask) in enumerate(pairs, start=1):
    severity = 'CT-0' if number % 5 == 0 else 'CT-1'
    copy(scan, out / 'studies' / severity / f'study_{number:04d}.nii.gz')
    if severity != 'CT-0':
      copy(mask, out / 'masks' / f'study_{number:04d}_mask.nii.gz')
  copy(scan, out / 'studies' / 'CT-2' / 'study_0999.nii.gz')


def medseg(raw_dir, out):
  """Nine scans, and a hundred slices of nobody knows whom: 0 nothing, 1 ground glass, 2 consolidation, 3 effusion."""
  both = lambda mask: mask * (1 + (np.arange(SIZE)[:, None, None] >= SIZE // 2))
  for number, (scan, mask) in enumerate(files(raw_dir), start=1):
    copy(scan, out / 'rp_im' / f'{number}.nii.gz'), relabel(mask, out / 'rp_msk' / f'{number}.nii.gz', both)
  scans, masks = zip(*files(raw_dir), strict=True)
  stack = lambda paths: np.concatenate([np.asarray(nib.load(path).dataobj) for path in paths], axis=2)[..., :100]
  slices = stack(scans)
  # Windowed one by one, then set to where air and fat should be.
  tops = np.linspace(180, 320, slices.shape[2])
  nib.save(nib.Nifti1Image(np.minimum(slices, tops).astype(np.float32), np.eye(4)), out / 'tr_im.nii.gz')
  labels = both(stack(masks))
  labels[:3, :3] = 3
  nib.save(nib.Nifti1Image(labels.astype(np.uint8), np.eye(4)), out / 'tr_mask.nii.gz')


def pictures_of(raw_dir):
  """(patient, slice, grey [H, W], mask [H, W]) of each slice, as a radiologist sees it."""
  for number, (scan, mask) in enumerate(files(raw_dir), start=1):
    scan = ct.read(scan)
    grey = np.rint(np.clip((scan.values + 1000) / 1300, 0, 1) * 255).astype(np.uint8)
    for index, pair in enumerate(zip(grey, ct.read_mask(mask, scan), strict=True)):
      yield f'p{number:02d}', index, *pair


def slices(raw_dir, out):
  """Images as JPEG, masks of 0 and 255 as PNG, patients in a list whose names have no ending."""
  (out / 'images').mkdir(), (out / 'masks').mkdir()
  lines = ['name,patient']
  for number, (patient, _, grey, mask) in enumerate(pictures_of(raw_dir)):
    Image.fromarray(grey).save(out / 'images' / f'{number:04d}.jpg', quality=95)
    Image.fromarray(mask * 255).save(out / 'masks' / f'{number:04d}.png')
    lines.append(f'{number:04d},{patient}')
  (out / 'slices.csv').write_text('\n'.join(lines) + '\n')


def classes(raw_dir, out):
  """As COVID-CT: two folders, names that are in both, PNG with colour channels and alpha; of nobody knows whom."""
  for name in ('CT_COVID', 'CT_NonCOVID'):
    (out / name).mkdir()
  for number, (_, _, grey, mask) in enumerate(pictures_of(raw_dir)):
    folder = out / ('CT_COVID' if mask.any() else 'CT_NonCOVID')
    size = (SIZE + number % 3, SIZE)
    Image.fromarray(grey).resize(size).convert('RGBA').save(folder / f'{len(list(folder.iterdir()))}.png')


LAYOUTS = {f.__name__: f for f in (covid19_20, nnunet, decathlon, pairs, zenodo_20, mosmed, medseg, slices)}


@pytest.fixture(scope='module')
def laid(raw_dir, tmp_path_factory) -> dict[str, pathlib.Path]:
  folders = {}
  for name, lay in {**LAYOUTS, 'classes': classes}.items():
    folders[name] = tmp_path_factory.mktemp(name)
    lay(raw_dir, folders[name])
  return folders


@pytest.mark.parametrize('name', LAYOUTS)
def test_found_and_prepared_with_the_lesions_that_were_written(laid, raw_dir, tmp_path, name):
  wanted = Wanted(values='grey' if name == 'slices' else 'hu')
  cohort, cases = find(laid[name], wanted)
  assert cohort == name
  assert len(cases) == len({case.patient for case in cases}) == PATIENTS
  assert [case.patient for case in cases] == sorted(case.patient for case in cases)
  prepared = prepare.prepare(str(laid[name]), str(tmp_path), SIZE, wanted=wanted)
  found = [patient for fold in input_pipeline.folds(prepared) for patient in fold]
  voxels = [int(np.asarray(nib.load(mask).dataobj).sum()) for _, mask in files(raw_dir)]
  assert sorted(sum(patient['lesion_voxels']) for patient in found) == sorted(voxels)
  assert input_pipeline.load(prepared, 0, SIZE).name.startswith(f'covid_ct/{name}_{SIZE}/')


@pytest.mark.slow
@pytest.mark.parametrize(
  ('name', 'wanted', 'module'),
  [
    *((name, Wanted(), seg) for name in LAYOUTS if name != 'slices'),
    ('zenodo_20', Wanted(values='grey'), seg),
    ('medseg', Wanted(patients='each_slice'), seg),
    ('slices', Wanted(values='grey'), seg),
    ('slices', Wanted(values='grey'), cls),
    ('classes', Wanted(values='grey', patients='each_slice'), cls),
  ],
)
def test_trained_one_step_and_evaluated(laid, tmp_path, name, wanted, module):
  data_dir = prepare.prepare(str(laid[name]), str(tmp_path / 'data'), SIZE, wanted=wanted)
  steps = {'train.steps': 1, 'train.evaluate_every': 1, 'data.balanced': False, 'evaluate.num_overlays': 1}
  config = tiny(module, **steps)
  config.data['values'] = wanted.values
  train.train(config, tmp_path / 'run', data_dir)
  scans = prepare.scans(laid[name], wanted) if module is seg else None
  result = evaluate.evaluate(config, tmp_path / 'run', data_dir, scans)
  tested = input_pipeline.load(data_dir, 0, SIZE).test
  assert result['num_slices'] == len(tested) and result['num_patients'] == len(set(tested.patient.tolist()))
  assert result['tp'] + result['fn'] == (tested.label.sum() if module is cls else _lesion_pixels(tested))
  assert result['values'] == wanted.values
  by_slice = 'by slice, not by patient: whose the slices are is not known'
  assert result['split'] == (by_slice if wanted.patients == 'each_slice' else 'by patient')
  scored = [patient for patient in set(tested.patient.tolist()) if scans and patient in scans]
  assert result.get('volumes', {}).get('num_volumes', 0) == len(scored)
  assert (len(scored) > 0) == (name not in ('slices', 'classes'))
  page = report.write(tmp_path / 'run', data_dir, 'command').read_text()
  assert ('Not tested on new patients' in page) == (wanted.patients == 'each_slice')
  assert ('grey values 0 to 255' in page) == (wanted.values == 'grey')


def _lesion_pixels(split):
  return sum(int(split.source[index]['mask'].sum()) for index in range(len(split)))


def test_labels_that_nobody_said_are_lesion_are_refused(raw_dir, tmp_path):
  for scan, mask in files(raw_dir):
    copy(scan, tmp_path / 'raw' / scan.name)
    relabel(mask, tmp_path / 'raw' / mask.name, lambda values: values * 3)
  with pytest.raises(UserError) as caught:
    prepare.prepare(str(tmp_path / 'raw'), str(tmp_path / 'out'), SIZE)
  line = str(caught.value).splitlines()[0]
  assert line.endswith(
    'a mask holds 0 and 1 only, this one has 0, 3; name those that are lesion, as in --config.data.lesion_labels="(3,)"'
  )
  prepared = prepare.prepare(str(tmp_path / 'raw'), str(tmp_path / 'out'), SIZE, wanted=Wanted((2, 3)))
  assert input_pipeline.load(prepared, 0, SIZE).train.label.any()
  with pytest.raises(UserError, match=r'was prepared with other data.lesion_labels \(\[2, 3\]\); name another folder'):
    prepare.prepare(str(tmp_path / 'raw'), str(tmp_path / 'out'), SIZE, wanted=Wanted((3,)))


def test_what_is_missing_is_named(laid, raw_dir, tmp_path):
  def broken(name, change):
    folder = tmp_path / name
    shutil.copytree(laid[name], folder)
    change(folder)
    with pytest.raises(UserError) as caught:
      find(folder)
    return str(caught.value).replace(f'{folder}/', '')

  assert broken('nnunet', lambda f: (f / 'labelsTr' / 'covid_002.nii.gz').unlink()) == (
    'imagesTr/covid_002_0000.nii.gz: its mask labelsTr/covid_002.nii.gz is missing; add it, or take the scan out'
  )
  assert broken('pairs', lambda f: (f / 'patient3_mask.nii.gz').unlink()) == (
    'patient3.nii.gz: its mask patient3_mask.nii.gz is missing; add it, or take the scan out'
  )
  assert broken('mosmed', lambda f: (f / 'studies' / 'CT-1' / 'study_0001.nii.gz').unlink()) == (
    'masks/study_0001_mask.nii.gz: its study study_0001 is in none of studies/CT-0 to CT-4; '
    'add it, or take the mask out'
  )
  assert broken('decathlon', lambda f: (f / 'imagesTr' / 'lung_001.nii.gz').unlink()) == (
    'imagesTr/lung_001.nii.gz: in the list of dataset.json, but not there; add it, or take it out of the list'
  )
  assert broken('zenodo_20', lambda f: (f / 'Lung_and_Infection_Mask' / 'coronacases_002.nii.gz').unlink()) == (
    'COVID-19-CT-Seg_20cases/coronacases_002.nii.gz: its mask Lung_and_Infection_Mask/coronacases_002.nii.gz '
    'is missing; add it, or take the scan out'
  )
  two = lambda f: shutil.copy(files(raw_dir)[0][0], f / 'imagesTr' / 'covid_000_0001.nii.gz')
  shutil.rmtree(tmp_path / 'nnunet')
  assert broken('nnunet', two) == (
    'imagesTr/covid_000_0001.nii.gz: a second channel; CT has one, X_0000, so take it out'
  )


def test_slices_of_the_kind_and_of_the_patients_that_were_asked_for(laid, caplog):
  cases = find(laid['zenodo_20'], Wanted(values='grey'))[1]
  assert sorted(case.patient for case in cases) == sorted(RADIOPAEDIA)
  assert len({case.owner for case in cases}) == 8
  for seed in range(5):  # two scans of one patient are never dealt apart, whatever their lesions
    burdens = np.random.default_rng(seed).lognormal(3, 1, 10)
    folds = survey.deal([survey.Patient(case, (1,), ml) for case, ml in zip(cases, burdens, strict=True)])
    owners = [{patient.case.owner for patient in fold} for fold in folds]
    assert sum(map(len, owners)) == 8 and sum(map(len, folds)) == 10
  named = find(laid['medseg'])[1]
  assert len(named) == PATIENTS and all(case.lesion_labels == (1, 2) for case in named)
  assert '100 slices of unknown patients are left out; --config.data.patients=each_slice takes' in caplog.text
  every = find(laid['medseg'], Wanted(patients='each_slice'))[1]
  assert len(every) == PATIENTS + 100
  image, mask = (nib.load(laid['medseg'] / f'{name}.nii.gz').get_fdata() for name in ('tr_im', 'tr_mask'))
  found = read.slices(next(case for case in every if case.patient == 'tr_042'))
  # Axes of the files are right, anterior, superior by their affine; ours left, posterior, superior.
  np.testing.assert_array_equal(found.images[0], np.rint(image[::-1, ::-1, 42].T))
  np.testing.assert_array_equal(found.masks[0], np.isin(mask[::-1, ::-1, 42].T, (1, 2)))


def test_pictures_are_prepared_as_they_are(laid, raw_dir, tmp_path):
  prepared = prepare.prepare(str(laid['slices']), str(tmp_path), SIZE, wanted=Wanted(values='grey'))
  split = input_pipeline.load(prepared, 0, SIZE).test
  truth = {(patient, index): (grey, mask) for patient, index, grey, mask in pictures_of(raw_dir)}
  for index in range(len(split)):
    example = split.source[index]
    grey, mask = truth[example['patient'].decode(), int(example['slice'])]
    np.testing.assert_array_equal(example['mask'], mask)
    assert np.abs(example['image'] - grey.astype(int)).mean() < 4  # JPEG
    assert np.isnan(example['spacing']).all()


def test_classes_are_told_by_the_name_of_the_one_without_lesion(laid, raw_dir, tmp_path):
  name, cases = find(laid['classes'], Wanted(values='grey', patients='each_slice'))
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
    labels = {case.patient: case.labels[0] for case in slices_cohort.find(folder)}
    assert labels == {f'{each}-a': int(each in positive) for each in names}
  for names in (('a', 'b'), ('no_lesion', 'normal')):
    folder = tmp_path / names[1]
    for each in names:
      copy(laid['classes'] / 'CT_COVID' / '0.png', folder / each / 'a.png')
    with pytest.raises(
      UserError, match=rf'which of its folders \({names[0]}, {names[1]}\) is without lesion is not clear'
    ):
      find(folder, Wanted(values='grey'))


def test_what_is_wrong_with_pictures_is_named(laid, tmp_path):
  def refused(name, wanted, change=lambda folder: None):
    folder = tmp_path / str(len(list(tmp_path.iterdir())))
    shutil.copytree(laid[name], folder)
    change(folder)
    with pytest.raises(UserError) as caught:
      prepare.prepare(str(folder), str(tmp_path / 'out'), SIZE, wanted=wanted)
    assert not (tmp_path / 'out').exists() or not list((tmp_path / 'out').rglob('*array_record*'))
    return str(caught.value).replace(f'{folder}', 'X')

  grey = Wanted(values='grey')
  assert refused('slices', Wanted()) == ('X: holds 8-bit grey values, not HU; say so with --config.data.values=grey')
  assert (
    refused('mosmed', grey)
    .splitlines()[0]
    .endswith(
      'are Hounsfield units or the like, not grey values of an 8-bit image (0 to 255), which is what data.values=grey '
      'stands for; give such, or train on HU without it'
    )
  )
  assert refused('classes', grey) == (
    'X: whose slices these are is not known, so that a patient may be both trained on and tested; add slices.csv '
    '(name,patient), or say --config.data.patients=each_slice and take no number for one of new patients'
  )
  assert refused('slices', grey._replace(values='gray')) == "data.values: there is no 'gray'; one of hu, grey"
  assert refused('slices', grey._replace(patients='each')) == (
    "data.patients: there is no 'each'; one of named, each_slice"
  )
  assert refused('slices', grey, lambda f: (f / 'masks' / '0003.png').unlink()) == (
    'X/images/0003.jpg: its mask masks/0003.png is missing; add it, or take the picture out'
  )
  assert refused('slices', grey, lambda f: copy(f / 'images' / '0003.jpg', f / 'images' / '0003.jpeg')) == (
    'X/images/0003.jpg: a second picture of the name 0003; remove one, or rename it'
  )

  def change_list(folder):
    lines = (folder / 'slices.csv').read_text().splitlines()
    lines[1:5] = ['0000,p01', '0000,p02', 'nothing,p01', '0002,']
    (folder / 'slices.csv').write_text('\n'.join(lines))

  assert refused('slices', grey, change_list).splitlines() == [
    "X/slices.csv: line 3: '0000' has another patient above; correct one of the two",
    "X/slices.csv: line 4: no picture of the name 'nothing'; correct it, with its folder where two have the name",
    "X/slices.csv: line 5: '0002' has no patient; add the patient, or take the picture out",
    *(
      f'X/images/000{number}.jpg: it is not in slices.csv; add it with its patient, or take it out'
      for number in (1, 2, 3)
    ),
  ]
  for text in ('file,id\n0000,1\n', 'name;patient\n0000;1\n'):
    assert refused('slices', grey, lambda f, text=text: (f / 'slices.csv').write_text(text)) == (
      'X/slices.csv: no columns name and patient; separate by commas, first line name,patient'
    )
  latin = 'name,patient\n0000,Müller\n'.encode('latin-1')
  assert refused('slices', grey, lambda f: (f / 'slices.csv').write_bytes(latin)).startswith(
    "X/slices.csv: no CSV in UTF-8 ('utf-8' codec can't decode byte 0xfc"
  )
  # A slice of one patient that is there as another's, too.
  assert refused('slices', grey, lambda f: copy(f / 'images' / '0003.jpg', f / 'images' / '0100.jpg')) == (
    'X/images/0100.jpg: the same image as 0003.jpg, value for value, so it would be both trained on and tested, or '
    'count twice; remove one of the two, with its mask'
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
    'X/masks/0000.png: a mask holds 0 and 255, or 0 and 1, only, this one has 3; save it as PNG (JPEG blurs it), or '
    'name those that are lesion, as in --config.data.lesion_labels="(3,)"'
  )
  assert [line.split(' (')[0].split(';')[0] for line in lines[1:]] == [
    'X/images/0016.jpg: no picture that can be read',
    'X/images/0032.jpg: a picture in colour',
    'X/images/0048.png: more than 8 bits a pixel',
  ]
  only_size = lambda f: Image.fromarray(np.zeros((SIZE - 1, SIZE), np.uint8)).save(f / 'masks' / '0001.png')
  assert refused('slices', grey, only_size) == (
    'X/masks/0001.png: the mask has (31, 32) pixels and its slice (32, 32); save it in that size'
  )


def test_labels_only_are_not_for_segmentation(laid, tmp_path):
  wanted = Wanted(values='grey', patients='each_slice')
  data_dir = prepare.prepare(str(laid['classes']), str(tmp_path / 'data'), SIZE, wanted=wanted)
  shards = list(pathlib.Path(data_dir).glob('*.array_record*'))
  assert len(shards) < 2 * 160 / 32 + 5  # readers keep each one open
  config = tiny(seg)
  with pytest.raises(UserError, match=r'data.values: hu, but .* holds grey: a network of one cannot read the other'):
    train.train(config, tmp_path / 'run', data_dir)
  config.data['values'] = 'grey'
  with pytest.raises(UserError, match=r'has labels of slices and no masks; train a classifier'):
    train.train(config, tmp_path / 'run', data_dir)
  assert not (tmp_path / 'run').exists()


def test_a_folder_as_it_was_unpacked(laid, tmp_path):
  """In folders that hold nothing else, with what the systems of others leave, and in other words for the same."""
  wanted = Wanted(values='grey')
  shutil.copytree(laid['slices'], tmp_path / 'a' / 'archive' / 'release')
  (tmp_path / 'a' / '.DS_Store').write_bytes(b'')
  inner = tmp_path / 'a' / 'archive' / 'release'
  (inner / 'images' / '._0000.jpg').write_bytes(b'resource fork')
  (inner / 'images').rename(inner / 'Image')
  (inner / 'masks').rename(inner / 'Mask')
  assert [case.patient for case in find(tmp_path / 'a', wanted)[1]] == [f'p{n:02d}' for n in range(1, PATIENTS + 1)]
  shutil.copytree(laid['covid19_20'], tmp_path / 'b' / 'COVID-19-20_v2')
  assert find(tmp_path / 'b')[0] == 'covid19_20'
  for name in ('CT_COVID', 'CT_NonCOVID'):
    shutil.copytree(laid['classes'] / name, tmp_path / 'c' / name / name)
  unknown = wanted._replace(patients='each_slice')
  cases, flat = find(tmp_path / 'c', unknown)[1], find(laid['classes'], unknown)[1]
  assert [(case.patient, case.labels) for case in cases] == [(case.patient, case.labels) for case in flat]
  shutil.copytree(laid['classes'] / 'CT_COVID', tmp_path / 'c' / 'lesion_masks')
  with pytest.raises(UserError, match=r'lesion_masks: pictures that are no class of slices; call the folders of sl'):
    find(tmp_path / 'c', unknown)
  (tmp_path / 'd' / 'rp_im').mkdir(parents=True)
  with pytest.raises(UserError, match=r'd: laid out as medseg, but without any scan; unpack it again'):
    find(tmp_path / 'd')


def test_what_is_said_of_pictures_is_part_of_the_dataset(laid, tmp_path):
  """A corrected list of patients, or a slice moved to the other class, is another cohort of the same files."""
  folder, wanted = tmp_path / 'raw', Wanted(values='grey')
  shutil.copytree(laid['slices'], folder)
  before = survey.fingerprint(find(folder, wanted)[1])
  prepare.prepare(str(folder), str(tmp_path / 'data'), SIZE, wanted=wanted)
  text = (folder / 'slices.csv').read_text()
  (folder / 'slices.csv').write_text(text.replace('0159,p10', '0159,p09'))
  assert survey.fingerprint(find(folder, wanted)[1]) != before
  with pytest.raises(UserError, match=r'was prepared from other files than .* holds now'):
    prepare.prepare(str(folder), str(tmp_path / 'data'), SIZE, wanted=wanted)
  folder, wanted = tmp_path / 'classes', Wanted(values='grey', patients='each_slice')
  shutil.copytree(laid['classes'], folder)
  names = sorted(path.name for path in (folder / 'CT_COVID').iterdir())
  lines = [f'{"CT_COVID/" if (folder / "CT_NonCOVID" / name).exists() else ""}{name},p{name[0]}' for name in names]
  lines += [f'CT_NonCOVID/{path.name},p{path.name[0]}' for path in (folder / 'CT_NonCOVID').iterdir()]
  (folder / 'slices.csv').write_text('\n'.join(['name,patient', *lines]))
  moved = next(path for path in (folder / 'CT_NonCOVID').iterdir() if path.name not in names)
  before = find(folder, wanted)[1]
  fingerprint = survey.fingerprint(before)
  moved.rename(folder / 'CT_COVID' / moved.name)
  (folder / 'slices.csv').write_text(
    (folder / 'slices.csv').read_text().replace(f'CT_NonCOVID/{moved.name}', f'CT_COVID/{moved.name}')
  )
  after = find(folder, wanted)[1]
  assert sum(sum(case.labels) for case in after) == sum(sum(case.labels) for case in before) + 1
  assert survey.fingerprint(after) != fingerprint


def test_equal_pictures_are_a_matter_between_patients(tmp_path):
  """Within one patient nothing leaks; pictures of one value, as beyond the ends of a scan, are of nobody."""
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
  cases = find(tmp_path, Wanted(values='grey'))[1]
  assert [path.stem for path in cases[0].ct] == ['a8', 'a9', 'a10', 'a11']
  assert [found.case.patient for found in survey.survey(cases)] == ['a', 'b']
