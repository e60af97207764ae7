"""Each cohort layout is recognised, prepared with the written lesions, used for training, and evaluated."""

import shutil

import nibabel as nib
import numpy as np
import pytest
from conftest import PATIENTS, SIZE, tiny
from layouts import LAYOUTS, RADIOPAEDIA, copy, files, relabel, write_all

from configs import cls, seg
from data import prepare, read, survey
from data.cohorts import CohortOptions
from data.find import find
from fusa_jax.runs import report
from fusa_jax.system.errors import UserError
from fusa_jax.training import datasets, evaluate, train


@pytest.fixture(scope='module')
def laid(raw_dir, tmp_path_factory):
  return write_all(raw_dir, tmp_path_factory)


@pytest.mark.parametrize('name', LAYOUTS)
def test_recognised_and_prepared_with_the_written_lesions(laid, raw_dir, tmp_path, name):
  options = CohortOptions(intensity='grey' if name == 'slices' else 'hu')
  cohort, cases = find(laid[name], options)
  assert cohort == name
  assert len(cases) == len({case.patient for case in cases}) == PATIENTS
  assert [case.patient for case in cases] == sorted(case.patient for case in cases)
  prepared = prepare.prepare(str(laid[name]), str(tmp_path), SIZE, options=options)
  patients = [patient for fold in datasets.folds(prepared) for patient in fold]
  voxels = [int(np.asarray(nib.load(mask).dataobj).sum()) for _, mask in files(raw_dir)]
  assert sorted(sum(patient['lesion_voxels']) for patient in patients) == sorted(voxels)
  assert datasets.load_dataset(prepared, 0, SIZE).name.startswith(f'covid_ct/{name}_{SIZE}/')


@pytest.mark.slow
@pytest.mark.parametrize(
  ('name', 'options', 'module'),
  [
    *((name, CohortOptions(), seg) for name in LAYOUTS if name != 'slices'),
    ('zenodo_20', CohortOptions(intensity='grey'), seg),
    ('medseg', CohortOptions(patients='each_slice'), seg),
    ('slices', CohortOptions(intensity='grey'), seg),
    ('slices', CohortOptions(intensity='grey'), cls),
    ('classes', CohortOptions(intensity='grey', patients='each_slice'), cls),
  ],
)
def test_trained_one_step_and_evaluated(laid, tmp_path, name, options, module):
  data_dir = prepare.prepare(str(laid[name]), str(tmp_path / 'data'), SIZE, options=options)
  steps = {'train.steps': 1, 'train.evaluate_every': 1, 'data.balanced': False, 'evaluate.num_overlays': 1}
  config = tiny(module, **steps)
  config.data.intensity = options.intensity
  train.train(config, tmp_path / 'run', data_dir)
  scans = prepare.scans(laid[name], options) if module is seg else None
  result = evaluate.evaluate(config, tmp_path / 'run', data_dir, scans)
  tested = datasets.load_dataset(data_dir, 0, SIZE).test
  assert result['num_slices'] == len(tested) and result['num_patients'] == len(set(tested.owner.tolist()))
  assert result['tp'] + result['fn'] == (tested.label.sum() if module is cls else _lesion_pixels(tested))
  assert result['values'] == options.intensity
  by_slice = 'by slice, not by patient: the patients of the slices are unknown'
  assert result['split'] == (by_slice if options.patients == 'each_slice' else 'by patient')
  scored = [patient for patient in set(tested.patient.tolist()) if scans and patient in scans]
  assert result.get('volumes', {}).get('num_volumes', 0) == len(scored)
  assert (len(scored) > 0) == (name not in ('slices', 'classes'))
  page = report.write_report(tmp_path / 'run', [datasets.card(data_dir, 0)]).read_text()
  assert ('Not tested on new patients' in page) == (options.patients == 'each_slice')
  assert ('8-bit values 0 to 255' in page) == (options.intensity == 'grey')


def _lesion_pixels(split):
  return sum(int(split.source[index]['mask'].sum()) for index in range(len(split)))


def test_unknown_labels_are_refused(raw_dir, tmp_path):
  for scan, mask in files(raw_dir):
    copy(scan, tmp_path / 'raw' / scan.name)
    relabel(
      mask, tmp_path / 'raw' / mask.name, lambda values: values * np.where(np.arange(SIZE)[:, None, None] % 2, 3, 2)
    )
  with pytest.raises(UserError) as caught:
    prepare.prepare(str(tmp_path / 'raw'), str(tmp_path / 'out'), SIZE)
  line = str(caught.value).splitlines()[0]
  assert line.endswith(
    'mask values must be 0 and 1, but are 0, 2, 3; name the lesion labels, for example '
    '--config.data.lesion_labels="(3,)"'
  )
  prepared = prepare.prepare(str(tmp_path / 'raw'), str(tmp_path / 'out'), SIZE, options=CohortOptions((2, 3)))
  assert datasets.load_dataset(prepared, 0, SIZE).train.label.any()
  with pytest.raises(UserError, match=r'was prepared with data.lesion_labels=\[2, 3\], now it is \[3\]; use another'):
    prepare.prepare(str(tmp_path / 'raw'), str(tmp_path / 'out'), SIZE, options=CohortOptions((3,)))


def test_missing_files_are_named(laid, raw_dir, tmp_path):
  def broken(name, change):
    folder = tmp_path / name
    shutil.copytree(laid[name], folder)
    change(folder)
    with pytest.raises(UserError) as caught:
      find(folder)
    return str(caught.value).replace(f'{folder}/', '')

  assert broken('nnunet', lambda f: (f / 'labelsTr' / 'covid_002.nii.gz').unlink()) == (
    'imagesTr/covid_002_0000.nii.gz: the mask labelsTr/covid_002.nii.gz is missing; add it, or remove the scan'
  )
  assert broken('pairs', lambda f: (f / 'patient3_mask.nii.gz').unlink()) == (
    'patient3.nii.gz: the mask patient3_mask.nii.gz is missing; add it, or remove the scan'
  )
  assert broken('mosmed', lambda f: (f / 'studies' / 'CT-1' / 'study_0001.nii.gz').unlink()) == (
    'masks/study_0001_mask.nii.gz: the study study_0001 is missing in studies/CT-0 to CT-4; add it, or remove the mask'
  )
  assert broken('decathlon', lambda f: (f / 'imagesTr' / 'lung_001.nii.gz').unlink()) == (
    'imagesTr/lung_001.nii.gz: listed in dataset.json, but missing; add it, or remove it from the list'
  )
  assert broken('zenodo_20', lambda f: (f / 'Lung_and_Infection_Mask' / 'coronacases_002.nii.gz').unlink()) == (
    'COVID-19-CT-Seg_20cases/coronacases_002.nii.gz: the mask Lung_and_Infection_Mask/coronacases_002.nii.gz '
    'is missing; add it, or remove the scan'
  )
  two = lambda f: shutil.copy(files(raw_dir)[0][0], f / 'imagesTr' / 'covid_000_0001.nii.gz')
  shutil.rmtree(tmp_path / 'nnunet')
  assert broken('nnunet', two) == (
    'imagesTr/covid_000_0001.nii.gz: a second channel, but CT has only X_0000; remove it'
  )


def test_options_select_intensity_and_patients(laid, caplog):
  cases = find(laid['zenodo_20'], CohortOptions(intensity='grey'))[1]
  assert sorted(case.patient for case in cases) == sorted(RADIOPAEDIA)
  assert len({case.owner for case in cases}) == 8
  for seed in range(5):  # two scans of one patient are always in the same fold
    burdens = np.random.default_rng(seed).lognormal(3, 1, 10)
    folds = survey.deal([survey.Patient(case, (1,), ml) for case, ml in zip(cases, burdens, strict=True)])
    owners = [{patient.case.owner for patient in fold} for fold in folds]
    assert sum(map(len, owners)) == 8 and sum(map(len, folds)) == 10
  named = find(laid['medseg'])[1]
  assert len(named) == PATIENTS and all(case.classes.values == ((1, 2),) for case in named)
  assert '100 slices without patient IDs are left out; --config.data.patients=each_slice includes' in caplog.text
  every = find(laid['medseg'], CohortOptions(patients='each_slice'))[1]
  assert len(every) == PATIENTS + 100
  image, mask = (nib.load(laid['medseg'] / f'{name}.nii.gz').get_fdata() for name in ('tr_im', 'tr_mask'))
  stored = read.slices(next(case for case in every if case.patient == 'tr_042'))
  # The axes of the files are right, anterior, superior; those of the slices left, posterior, superior.
  np.testing.assert_array_equal(stored.images[0], np.rint(image[::-1, ::-1, 42].T))
  np.testing.assert_array_equal(stored.masks[0], np.isin(mask[::-1, ::-1, 42].T, (1, 2)))


def test_nested_and_renamed_folders_are_read(laid, tmp_path):
  """Reads cohorts inside nested folders, with system files like .DS_Store, and with other folder names."""
  options = CohortOptions(intensity='grey')
  shutil.copytree(laid['slices'], tmp_path / 'a' / 'archive' / 'release')
  (tmp_path / 'a' / '.DS_Store').write_bytes(b'')
  inner = tmp_path / 'a' / 'archive' / 'release'
  (inner / 'images' / '._0000.jpg').write_bytes(b'resource fork')
  (inner / 'images').rename(inner / 'Image')
  (inner / 'masks').rename(inner / 'Mask')
  assert [case.patient for case in find(tmp_path / 'a', options)[1]] == [f'p{n:02d}' for n in range(1, PATIENTS + 1)]
  shutil.copytree(laid['covid19_20'], tmp_path / 'b' / 'COVID-19-20_v2')
  assert find(tmp_path / 'b')[0] == 'covid19_20'
  for name in ('CT_COVID', 'CT_NonCOVID'):
    shutil.copytree(laid['classes'] / name, tmp_path / 'c' / name / name)
  unknown = options._replace(patients='each_slice')
  cases, flat = find(tmp_path / 'c', unknown)[1], find(laid['classes'], unknown)[1]
  assert [(case.patient, case.labels) for case in cases] == [(case.patient, case.labels) for case in flat]
  shutil.copytree(laid['classes'] / 'CT_COVID', tmp_path / 'c' / 'lesion_masks')
  with pytest.raises(UserError, match=r'lesion_masks: looks like a folder of masks, not a class of slices; rename it'):
    find(tmp_path / 'c', unknown)
  (tmp_path / 'd' / 'rp_im').mkdir(parents=True)
  with pytest.raises(UserError, match=r'd: has the layout of medseg, but no scans; unpack it again'):
    find(tmp_path / 'd')
