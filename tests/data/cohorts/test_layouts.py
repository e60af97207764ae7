"""Every cohort's layout from small files in its own naming and labels: found, prepared, trained on, evaluated."""

import json
import pathlib
import shutil

import nibabel as nib
import numpy as np
import pytest
from conftest import PATIENTS, SIZE, SLICES, tiny

from configs import seg
from data import prepare
from data.find import find
from fusa_jax import evaluate, input_pipeline, train
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


def zenodo_20(raw_dir, out):
  """Lungs are 1 and 2, lesion 3; the radiopaedia volumes are 8-bit."""
  for number, (scan, mask) in enumerate(files(raw_dir), start=1):
    name = f'coronacases_{number:03d}.nii.gz'
    copy(scan, out / 'COVID-19-CT-Seg_20cases' / name)
    halves = lambda mask: np.where(mask, 3, 1 + (np.arange(SIZE)[:, None, None] >= SIZE // 2))
    relabel(mask, out / 'Lung_and_Infection_Mask' / name, halves)
  relabel(scan, out / 'COVID-19-CT-Seg_20cases' / 'radiopaedia_4_85506_1.nii.gz', lambda hu: (hu > -500) * 255)


def mosmed(raw_dir, out):
  """Every fifth phantom is without lesion: CT-0. The last one is a study of CT-2 of which no mask was published."""
  pairs = files(raw_dir)
  for number, (scan, mask) in enumerate(pairs, start=1):
    severity = 'CT-0' if number % 5 == 0 else 'CT-1'
    copy(scan, out / 'studies' / severity / f'study_{number:04d}.nii.gz')
    if severity != 'CT-0':
      copy(mask, out / 'masks' / f'study_{number:04d}_mask.nii.gz')
  copy(scan, out / 'studies' / 'CT-2' / 'study_0999.nii.gz')


LAYOUTS = {f.__name__: f for f in (covid19_20, nnunet, decathlon, pairs, zenodo_20, mosmed)}


@pytest.fixture(scope='module')
def laid(raw_dir, tmp_path_factory) -> dict[str, pathlib.Path]:
  folders = {}
  for name, lay in LAYOUTS.items():
    folders[name] = tmp_path_factory.mktemp(name)
    lay(raw_dir, folders[name])
  return folders


@pytest.mark.parametrize('name', LAYOUTS)
def test_found_and_prepared_with_the_lesions_that_were_written(laid, raw_dir, tmp_path, name):
  cohort, cases = find(laid[name])
  assert cohort == name
  assert len(cases) == len({case.patient for case in cases}) == PATIENTS
  assert [case.patient for case in cases] == sorted(case.patient for case in cases)
  prepared = prepare.prepare(str(laid[name]), str(tmp_path), SIZE)
  found = [patient for fold in input_pipeline.folds(prepared) for patient in fold]
  voxels = [int(np.asarray(nib.load(mask).dataobj).sum()) for _, mask in files(raw_dir)]
  assert sorted(sum(patient['lesion_voxels']) for patient in found) == sorted(voxels)
  assert input_pipeline.load(prepared, 0, SIZE).name.startswith(f'covid_ct/{name}_{SIZE}/')


@pytest.mark.slow
@pytest.mark.parametrize('name', ['zenodo_20', 'mosmed'])
def test_trained_and_evaluated_as_volumes_too(laid, tmp_path, name):
  """The cohorts whose masks need more than 0 and 1: another label, and no file at all."""
  data_dir = prepare.prepare(str(laid[name]), str(tmp_path / 'data'), SIZE)
  config = tiny(seg, **{'train.steps': 2})
  train.train(config, tmp_path / 'run', data_dir)
  result = evaluate.evaluate(config, tmp_path / 'run', data_dir, prepare.scans(laid[name]))
  assert result['num_slices'] == result['num_patients'] * SLICES
  assert result['volumes']['num_volumes'] == result['num_patients']


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
  prepared = prepare.prepare(str(tmp_path / 'raw'), str(tmp_path / 'out'), SIZE, lesion_labels=(2, 3))
  assert input_pipeline.load(prepared, 0, SIZE).train.label.any()
  with pytest.raises(UserError, match=r'was prepared with other data.lesion_labels; name another folder'):
    prepare.prepare(str(tmp_path / 'raw'), str(tmp_path / 'out'), SIZE, lesion_labels=(3,))


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
