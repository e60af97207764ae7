"""A name means one patient, and one patient is in one fold."""

import logging
import shutil
import unicodedata

import numpy as np
import pytest
from nifti_files import chest, save
from PIL import Image

from data import survey
from data.cohorts import AS_RELEASED, CohortOptions
from data.find import find
from fusa_jax.system.errors import UserError

GREY = CohortOptions(intensity='grey')


def pair(folder, name, seed=0, ending='_mask'):
  save(folder / f'{name}.nii.gz', chest(seed=seed))
  save(folder / f'{name.removesuffix("ct")}{ending}.nii.gz', (chest(seed=seed) > 300).astype(np.uint8))


def dealt(cases):
  """The patients of each fold, if all have the same burden."""
  return [
    [one.case.patient for one in fold] for fold in survey.deal([survey.Patient(case, (1,), 1.0) for case in cases])
  ]


def refused(folder, options=AS_RELEASED):
  with pytest.raises(UserError) as caught:
    find(folder, options)
  return str(caught.value).replace(f'{folder}/', '').splitlines()


@pytest.mark.parametrize(
  'twins', [('P1', 'p1'), ('P1', 'P01', 'P001'), ('P 1', 'P1'), ('P\uff11', 'P1'), ('STRASSE1', 'stra\xdfe1')]
)
def test_likely_twins_are_in_one_fold_and_said(tmp_path, caplog, twins):
  for number, name in enumerate((*twins, 'P10', 'Q1', 'P1b', 'P2')):
    pair(tmp_path, name, number)
  cases = find(tmp_path)[1]
  assert len({case.patient for case in cases}) == len(cases) == len(twins) + 4
  (line,) = caplog.messages
  assert line.startswith(f'{", ".join(sorted(twins))}: names that differ only in capitals')
  folds = dealt(cases)
  assert len(folds) == 5
  assert sorted(next(fold for fold in folds if twins[0] in fold)) == sorted(twins)


def test_both_forms_of_a_letter_are_one_name(tmp_path, caplog):
  """Macs write ü as u and dots: a scan and a mask, or a picture and its row in the list, may differ in this."""
  one, other = (unicodedata.normalize(form, 'M\xfcller') for form in ('NFC', 'NFD'))
  (
    save(tmp_path / 'a' / f'{one}_ct.nii.gz', chest()),
    save(tmp_path / 'a' / f'{other}_seg.nii.gz', np.zeros((7, 6, 5), np.uint8)),
  )
  assert [case.patient for case in find(tmp_path / 'a')[1]] == [one]
  save(tmp_path / 'a' / f'{other}_ct.nii.gz', chest())
  if len(list((tmp_path / 'a').iterdir())) == 3:  # not on file systems that unite the two forms
    assert f'{one}_ct.nii.gz: same patient as {other}_ct.nii.gz; remove one of the two' in refused(tmp_path / 'a')
  for listed, stored in ((one, other), (other, one)):
    folder = tmp_path / listed / 'b'
    for name in ('images', 'masks'):
      (folder / name).mkdir(parents=True)
      Image.fromarray(np.eye(8, dtype=np.uint8)).save(folder / name / f'{stored}.png')
    (folder / 'slices.csv').write_text(f'name,patient\n{listed}.png,{other}\n', encoding='utf-8')
    assert [case.patient for case in find(folder, GREY)[1]] == [one]
    shutil.rmtree(folder)


def test_patients_of_one_name_at_two_sites_stay_two(tmp_path):
  for number, site in enumerate(('siteA', 'siteB', 'siteC')):
    pair(tmp_path / 'flat' / site, 'P1_ct', number, 'seg')
    pair(tmp_path / 'deep' / site / 'P1', 'ct', number, 'mask')
    save(tmp_path / 'list' / 'imagesTr' / site / 'P1.nii.gz', chest(seed=number))
    save(tmp_path / 'list' / 'labelsTr' / site / 'P1.nii.gz', np.zeros((7, 6, 5), np.uint8))
  pair(tmp_path / 'flat' / 'siteA', 'P2_ct', 9, 'seg')
  listed = [
    f'{{"image": "imagesTr/{site}/P1.nii.gz", "label": "labelsTr/{site}/P1.nii.gz"}}' for site in ('siteA', 'siteB')
  ]
  (tmp_path / 'list' / 'dataset.json').write_text(f'{{"training": [{", ".join(listed)}]}}')
  names = ['siteA_P1', 'siteB_P1', 'siteC_P1']
  for folder, expected in (('flat', ['P2', *names]), ('deep', names), ('list', names[:2])):
    cases = find(tmp_path / folder)[1]
    assert [case.patient for case in cases] == expected
    assert all(case.patient.startswith(('P2', 'site')) and case.patient[:5] in f'P2{case.ct}' for case in cases)
    assert max(map(len, dealt(cases))) == 1
  (tmp_path / 'list' / 'dataset.json').write_text(f'{{"training": [{listed[0]}, {listed[0]}]}}')
  assert refused(tmp_path / 'list') == [
    'imagesTr/siteA/P1.nii.gz: the same name (P1) as imagesTr/siteA/P1.nii.gz; rename one, or remove one'
  ]


def test_lists_may_name_files_outside_their_folder(tmp_path):
  for number, site in enumerate(('siteA', 'siteB')):
    pair(tmp_path / site, 'P1', number)
  names = [
    f'{{"image": "{tmp_path}/{site}/P1.nii.gz", "label": "../{site}/P1_mask.nii.gz"}}' for site in ('siteA', 'siteB')
  ]
  (tmp_path / 'list').mkdir()
  (tmp_path / 'list' / 'dataset.json').write_text(f'{{"training": [{", ".join(names)}]}}')
  assert [case.patient for case in find(tmp_path / 'list')[1]] == ['siteA_P1', 'siteB_P1']
  (tmp_path / 'list' / 'patients.csv').write_text('scan,patient\nsiteA_P1,x\n../siteB/P1.nii.gz,x\n')
  assert [case.owner for case in find(tmp_path / 'list')[1]] == ['x', 'x']


def test_folders_name_their_scans(tmp_path):
  """As TotalSegmentator, KiTS and many exports: files of equal names in a folder per patient."""
  for number in range(2):
    case = tmp_path / f's{number:04d}'
    save(case / 'ct.nii.gz', chest(seed=number))
    for organ in ('lesion', 'liver', 'lung_upper_lobe_left'):
      save(case / 'segmentations' / f'{organ}.nii.gz', np.zeros((7, 6, 5), np.uint8))
    pair(tmp_path / 'kits' / f'case_{number}', 'imaging', number, 'segmentation')
    (tmp_path / 'kits' / f'case_{number}' / 'imagingsegmentation.nii.gz').rename(
      tmp_path / 'kits' / f'case_{number}' / 'segmentation.nii.gz'
    )
  name, cases = find(tmp_path / 'kits')
  assert name == 'folders' and [case.patient for case in cases] == ['case_0', 'case_1']
  shutil.rmtree(tmp_path / 'kits')
  name, cases = find(tmp_path)
  assert name == 'folders' and [(case.patient, case.mask.name) for case in cases] == [
    ('s0000', 'lesion.nii.gz'),
    ('s0001', 'lesion.nii.gz'),
  ]
  (tmp_path / 's0001' / 'segmentations' / 'lesion.nii.gz').unlink()
  save(tmp_path / 's0000' / 'image.nii.gz', chest())
  assert refused(tmp_path) == [
    's0000: 2 scans of one patient (ct.nii.gz, image.nii.gz); keep one of them',
    's0001: 2 masks of one patient (segmentations/liver.nii.gz, segmentations/lung_upper_lobe_left.nii.gz); keep one '
    'of them',
  ]


def test_patients_csv_keeps_the_scans_of_a_patient_together(tmp_path, caplog):
  caplog.set_level(logging.INFO)
  for number in range(6):
    pair(tmp_path, f'scan{number}', number)
  rows = ['scan0,A', 'scan1.nii.gz,A', 'scan2,B', 'scan3,B ', 'scan4,C', 'scan5,A']
  (tmp_path / 'patients.csv').write_text('\n'.join(['Scan,Patient', *rows, ',', '']))
  cases = find(tmp_path)[1]
  assert [case.owner for case in cases] == ['A', 'A', 'B', 'B', 'C', 'A']
  assert sorted(map(sorted, dealt(cases))) == [['scan0', 'scan1', 'scan5'], ['scan2', 'scan3'], ['scan4']]
  assert not caplog.messages  # the list itself is not left out
  rows[1:4] = ['scan9,A', 'scan2,', 'scan0,B']
  (tmp_path / 'patients.csv').write_text('\n'.join(['scan,patient', *rows]))
  assert refused(tmp_path) == [
    "patients.csv: line 3: no scan with the name 'scan9'; correct it, and add the folder if two scans share it",
    "patients.csv: line 4: 'scan2' has no patient; add the patient",
    "patients.csv: line 5: 'scan0' has another patient in a line above; correct one of the two",
    *(f'scan{number}.nii.gz: is not in patients.csv; add it with its patient' for number in (1, 2, 3)),
  ]
  (tmp_path / 'patients.csv').write_text('scan;patient\n' + ''.join(f'scan{n};{n:02d}\n' for n in range(6)))
  assert len(dealt(find(tmp_path)[1])) == 5


EXCEL = {
  'commas': ('name,patient', '{},{}', '\n', 'utf-8'),
  'excel': ('name;patient', '{};{}', '\r\n', 'utf-8-sig'),
  'utf16': ('name\tpatient', '{}\t{}', '\r\n', 'utf-16'),
  'sep': ('sep=;\r\nName; Patient ;Notes', '{}; {};x', '\r\n', 'utf-8-sig'),
  'trailing': ('Patient,NAME,,', '{1},{0},,', '\r\n,,,\r\n', 'utf-8'),
  'quoted': ('"name","patient"', '"{}.png","{}"', '\n', 'utf-8'),
}


@pytest.mark.parametrize('name', EXCEL)
def test_lists_as_spreadsheets_save_them(tmp_path, name):
  header, row, end, encoding = EXCEL[name]
  for number in range(4):
    for folder in ('images', 'masks'):
      (tmp_path / folder).mkdir(exist_ok=True)
      Image.fromarray(np.eye(8, dtype=np.uint8)).save(tmp_path / folder / f'M\xfc{number}.png')
  rows = [row.format(f'M\xfc{number}', f'Pat. \xe9{number // 2}') for number in range(4)]
  (tmp_path / 'slices.csv').write_bytes(''.join(line + end for line in (header, *rows)).encode(encoding))
  cases = find(tmp_path, GREY)[1]
  assert [(case.patient, [path.name for path in case.ct]) for case in cases] == [
    ('Pat. \xe90', ['M\xfc0.png', 'M\xfc1.png']),
    ('Pat. \xe91', ['M\xfc2.png', 'M\xfc3.png']),
  ]


@pytest.mark.parametrize(
  ('names', 'groups'),
  [
    (('P1_t0', 'P1_t1', 'P2_t0'), 'P1_t0 + P1_t1'),
    (('P1_baseline', 'P1_followup', 'P2'), 'P1_baseline + P1_followup'),
    (('sub-01_ses-1', 'sub-01_ses-2', 'sub-02_ses-1', 'sub-02_ses-2'), 'sub-01_ses-1 + sub-01_ses-2, sub-02_'),
    (('P7_20200401', 'P7_20210401', 'P8_20200401'), 'P7_20200401 + P7_20210401'),
    (('case_1', 'case_2', 'case_3'), ''),
    (('scan_20200401', 'scan_20200402', 'volume-covid19-A-0001', 'volume-covid19-A-0002'), ''),
  ],
)
def test_names_like_follow_ups_are_said_in_one_line(tmp_path, caplog, names, groups):
  for number, name in enumerate(names):
    pair(tmp_path, name, number)
  assert not any(case.owner for case in find(tmp_path)[1])
  assert len(caplog.messages) == bool(groups)
  assert all(f'but each counts as one patient: {groups}' in line for line in caplog.messages)
  (tmp_path / 'patients.csv').write_text('scan,patient\n' + ''.join(f'{name},{name[:2]}\n' for name in names))
  caplog.clear()
  find(tmp_path)
  assert not caplog.messages
