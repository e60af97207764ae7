"""Scans with one label per patient: slices inherit it in training, and only patients are scored."""

import csv
import json
import logging
import shutil

import dicom_series
import nibabel as nib
import numpy as np
import one_class
import pytest
from conftest import SIZE, SLICES, tiny
from PIL import Image
from sklearn import metrics as sk

from configs import cls, seg
from data import prepare, survey
from data.cohorts import CohortOptions, patient_labels
from data.find import find
from fusa_jax.inference import export, predictor
from fusa_jax.runs import compare, operating_point, report, result_files, results
from fusa_jax.system.errors import UserError
from fusa_jax.training import cross_validation, datasets, evaluate, train


def write_labels(folder, rows, columns='patient,class'):
  (folder / 'labels.csv').write_text('\n'.join([columns, *(','.join(map(str, row)) for row in rows)]) + '\n')


@pytest.fixture(scope='module')
def cohort(raw_dir, tmp_path_factory):
  """The ten phantoms without their masks, for nine persons: p0 has two scans. Every second one gets the class COVID.

  The phantoms themselves have too few healthy patients for five folds; nothing here depends on what they show.
  """
  folder = tmp_path_factory.mktemp('labelled')
  scans, labels = [], {}
  for number, path in enumerate(sorted(raw_dir.glob('*_ct.nii.gz'))):
    person = f'p{max(number - 1, 0)}'
    shutil.copy(path, folder / f'scan{number}.nii.gz')
    scans.append(f'scan{number},{person}')
    labels[person] = max(number - 1, 0) % 2
  (folder / 'patients.csv').write_text('\n'.join(['scan,patient', *scans]) + '\n')
  write_labels(folder, [(person, 'COVID' if label else 'healthy') for person, label in labels.items()])
  return folder, labels


@pytest.fixture(scope='module')
def prepared(cohort, tmp_path_factory):
  return prepare.prepare(str(cohort[0]), str(tmp_path_factory.mktemp('prepared')), SIZE)


@pytest.fixture
def pictures(tmp_path):
  """Three noisy pictures of each of six patients, in the folder `images`."""
  rng, lines = np.random.default_rng(0), ['name,patient']
  (tmp_path / 'cohort' / 'images').mkdir(parents=True)
  for number in range(18):
    values = rng.integers(0, 256, (SIZE, SIZE), np.uint8)
    Image.fromarray(values).save(tmp_path / 'cohort' / 'images' / f's{number:02d}.png')
    lines.append(f's{number:02d}.png,p{number // 3}')
  (tmp_path / 'cohort' / 'slices.csv').write_text('\n'.join(lines) + '\n')
  return tmp_path / 'cohort'


@pytest.mark.parametrize('names', [('healthy', 'COVID'), ('normal', 'COVID', 'CAP')])
def test_pictures_inherit_the_label_of_their_patient(pictures, tmp_path, names, caplog):
  """Two classes, and three exclusive ones. With a new patient, the others keep their folds."""
  caplog.set_level(logging.INFO)
  write_labels(pictures, [(f'p{number}', names[number % len(names)]) for number in range(6)])
  (pictures / 'originals.zip').write_bytes(b'')
  options = CohortOptions(intensity='grey', classes='auto')
  data_dir = prepare.prepare(str(pictures), str(tmp_path / 'data'), SIZE, options=options)
  assert 'left out: 1 file (originals.zip)' in caplog.text
  dataset = datasets.load_dataset(data_dir, 0, SIZE)
  order = names if len(names) == 2 else ('normal', 'CAP', 'COVID')
  for part in (dataset.train, dataset.validation, dataset.test):
    for row, (patient, number, bits) in enumerate(zip(part.patient, part.slice, part.bits.tolist(), strict=True)):
      true = names[int(patient[1:]) % len(names)]
      assert bits == (order.index(true) if len(names) == 2 else 1 << order.index(true))
      picture = pictures / 'images' / f's{3 * int(patient[1:]) + number:02d}.png'
      np.testing.assert_array_equal(part.source[row]['image'], np.asarray(Image.open(picture)))
  assert dataset.patient_labels and dataset.by_patient and not dataset.masks
  config = tiny(cls, **{'data.intensity': 'grey', 'data.context': 1})
  config.data.classes = 'auto'
  datasets.load_dataset_for(config, data_dir)  # the pictures of a patient are neighbours

  Image.fromarray(np.eye(SIZE, dtype=np.uint8)).save(pictures / 'images' / 'new.png')
  with (pictures / 'slices.csv').open('a') as slices, (pictures / 'labels.csv').open('a') as labels:
    slices.write('new.png,p6\n')
    labels.write(f'p6,{names[0]}\n')
  caplog.clear()
  grown = prepare.prepare(str(pictures), str(tmp_path / 'grown'), SIZE, options=options)
  assert '6 of 7 patients keep their folds' in caplog.text and 'damaged' not in caplog.text
  assert sum(len(part) for part in vars(datasets.load_dataset(grown, 0, SIZE)).values() if hasattr(part, 'bits')) == 19


def test_pictures_of_unknown_patients_are_refused(pictures):
  rows = [(f'p{number}', number % 2) for number in range(6)]
  for listed, columns, reason in (
    ([*rows, ('p9', 1)], 'patient,class', "labels.csv: line 8: no picture of the patient 'p9'; correct the name"),
    (rows[1:], 'patient,class', 's00.png: its patient is not in labels.csv; add p0, or remove it'),
  ):
    write_labels(pictures, listed, columns)
    with pytest.raises(UserError, match=reason):
      find(pictures, CohortOptions(intensity='grey'))
  write_labels(pictures, rows)
  (pictures / 'slices.csv').unlink()
  with pytest.raises(UserError, match=r'labels.csv: has classes of patients; add slices.csv \(name,patient\) with the'):
    find(pictures, CohortOptions(intensity='grey'))


def test_scans_with_labels_of_patients_have_neighbours(prepared, caplog):
  caplog.set_level(logging.INFO)
  split = datasets.load_dataset_for(tiny(cls, **{'data.context': 1, 'data.context_mm': 1000.0}), prepared).test
  stack, *others = (split.source[row]['image'] for row in (1, 0, 2))
  np.testing.assert_array_equal(stack[..., 0], others[0][..., 1])
  np.testing.assert_array_equal(stack[..., 2], others[1][..., 1])
  assert 'distances' not in caplog.text


def fold_of_both_kinds(prepared):
  """A fold for which training, validation and test have patients of both kinds."""
  for fold in range(5):
    dataset = datasets.load_dataset(prepared, fold, SIZE)
    if all(len(set(part.label.tolist())) == 2 for part in (dataset.train, dataset.test, dataset.validation)):
      return fold
  raise AssertionError('no such fold')


@pytest.fixture(scope='module')
def run(prepared, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('run') / 'run'
  config = tiny(cls, **{'data.fold': fold_of_both_kinds(prepared)})
  train.train(config, workdir, prepared)
  evaluate.evaluate(config, workdir, prepared)
  return workdir, config


def test_every_slice_inherits_the_label_of_its_patient(cohort, prepared, caplog):
  folder, labels = cohort
  caplog.set_level(logging.INFO)
  name, cases = find(folder)
  assert name == 'patient_labels' and len(cases) == 10
  assert {case.owner: case.patient_label for case in cases} == labels
  assert 'patients with lesion: COVID; without: healthy' in caplog.text
  dataset = datasets.load_dataset(prepared, 0, SIZE)
  assert dataset.patient_labels and not dataset.masks and dataset.by_patient
  for part in (dataset.train, dataset.validation, dataset.test):
    for patient, owner, label in zip(part.patient.tolist(), part.owner.tolist(), part.label.tolist(), strict=True):
      assert label == bool(labels[owner]), patient
    example = part.source[0]
    assert example['label'] == labels[part.owner[0]] and not example['mask'].any()
  assert sum(len(part) for part in (dataset.train, dataset.validation, dataset.test)) == 10 * SLICES


def test_only_patients_are_scored(run, cohort):
  workdir, _ = run
  result = result_files.read_numbers(workdir)
  assert result['labels'].startswith('of patients: each slice has the label of its patient')
  assert [result[name] for name in ('auc', 'accuracy', 'recall', 'tp', 'brier')] == [None] * 5
  point = result['operating_point']
  assert point['slices']['auc'] is None and point['slices']['at_prevalence'] == [] and point['precision'] is None
  assert not any(value for key, value in result['intervals'].items() if key in ('auc', 'accuracy', 'brier'))
  assert point['threshold'] == 0.5 and point['chosen_by'] == operating_point.NO_SLICE_LABELS
  table = one_class.part(workdir).patients
  assert table['label'].tolist() == [cohort[1][owner] for owner in table['owner'].tolist()]
  assert result['patient']['auc'] == pytest.approx(sk.roc_auc_score(table['label'], table['score']), abs=1e-9)
  assert result['patient']['sensitivity'] is not None
  with (workdir / 'test' / 'slices.csv').open(newline='') as file:
    rows = list(csv.DictReader(file))
  assert all(row['label'] == row['tp'] == row['tn'] == '' and row['score'] for row in rows)
  with (workdir / 'test' / 'patients.csv').open(newline='') as file:
    rows = list(csv.DictReader(file))
  assert [int(row['label']) for row in rows] == table['label'].tolist() and 'dice' not in rows[0]
  drawn = {path.name for path in (workdir / 'test').rglob('*.png')}
  assert drawn == {'roc_of_patients.png'}
  log = [json.loads(line) for line in (workdir / 'log.jsonl').read_text().splitlines()]
  validated = [line for line in log if any(key.startswith('validation/') for key in line)]
  assert validated and all('validation/patient_auc' in line and 'validation/auc' not in line for line in validated)


def test_report_comparison_prediction_and_card_have_no_numbers_of_slices(run, prepared, cohort, tmp_path):
  workdir, config = run
  text = report.write_report(workdir, [datasets.card(prepared, config.data.fold)]).read_text()
  assert 'Labels are of patients' in text and 'Detection of patients with lesion' in text
  for absent in ('Detection of slices', 'Thresholds and calibration', 'slices with lesion</th>', 'Threshold 0.5'):
    assert absent not in text
  assert 'best score (AUC of patients) on validation patients' in text
  shutil.copytree(workdir, tmp_path / 'other')
  compared = compare.compare(workdir, tmp_path / 'other')
  assert compared['numbers'] == {} and compared['per_patient'] is None
  assert compared['patient']['auc']['difference'] == 0
  numbers = predictor.load_predictor(workdir)(cohort[0] / 'scan3.nii.gz').numbers
  assert numbers['patient']['score'] is not None and len(numbers['slice_scores']) == SLICES
  export.write_bundle([workdir], tmp_path / 'bundle')
  card = (tmp_path / 'bundle' / 'README.md').read_text()
  assert 'Labels of network 0 are of patients' in card and 'Detection of patients with lesion, network 0: ' in card


def test_what_needs_labels_of_slices_is_refused(run, prepared, tmp_path):
  workdir, config = run
  fitted = tiny(cls, **{'data.fold': config.data.fold, 'evaluate.fit_temperature': True})
  for refused in (
    lambda: evaluate.evaluate(fitted, workdir, prepared),
    lambda: train.train(fitted, tmp_path, prepared),
  ):
    with pytest.raises(UserError, match='evaluate.fit_temperature: needs labels of slices, but these are of patients'):
      refused()
  with pytest.raises(UserError, match='has labels of patients but no masks; train a classifier'):
    datasets.load_dataset_for(tiny(seg), prepared)


@pytest.mark.slow
def test_cross_validation_pools_patients_only(prepared, cohort, tmp_path):
  config = tiny(cls, **{'data.fold': 'all', 'train.steps': 2})
  result = cross_validation.cross_validate(config, tmp_path, prepared)
  assert result['auc'] is None and results.scores_slices(result) is False
  table = one_class.part(tmp_path).patients
  assert sorted(table['owner'].tolist()) == sorted(cohort[1]) and result['patient']['auc'] is not None
  assert 'Labels are of patients' in report.write_report(tmp_path, [datasets.card(prepared, 'all')]).read_text()


def small(folder, rows, scans=('a', 'b', 'c'), columns='patient,class'):
  folder.mkdir(exist_ok=True)
  for name in scans:
    (folder / f'{name}_ct.nii.gz').write_bytes(b'')
  write_labels(folder, rows, columns)
  return folder


@pytest.mark.parametrize(
  ('rows', 'lines'),
  [
    ([('a', 1), ('b', 0), ('c', 1), ('a', 0)], ["labels.csv: line 5: 'a' has another class in a line above"]),
    ([('a', 1), ('b', 0), ('c', 1), ('d', 0)], ["labels.csv: line 5: no scan of the patient 'd'"]),
    ([('a', 1), ('b', 0)], ['c_ct.nii.gz: its patient is not in labels.csv; add c, or remove it']),
    ([('a', 1), ('b', ''), ('c', 0)], ["labels.csv: line 3: 'b' has no class"]),
    ([('a', 1), ('b', 1), ('c', 1)], ['labels.csv: cannot tell which class (1) is without lesion']),
    ([('a', 'x'), ('b', 'y'), ('c', 'x')], ['labels.csv: cannot tell which class (x, y) is without lesion']),
    (
      [('a', 1), ('a', 0), ('d', 1), ('c', 0)],
      [
        "labels.csv: line 3: 'a' has another class in a line above",
        "labels.csv: line 4: no scan of the patient 'd'",
        'b_ct.nii.gz: its patient is not in labels.csv',
      ],
    ),
  ],
)
def test_lists_that_do_not_fit_are_refused_line_by_line(tmp_path, rows, lines):
  folder = small(tmp_path / 'in', rows)
  with pytest.raises(UserError) as caught:
    prepare.prepare(str(folder), str(tmp_path / 'out'), SIZE)
  got = str(caught.value).splitlines()
  assert len(got) == len(lines) and all(line in one for line, one in zip(lines, got, strict=True))
  assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize(
  ('content', 'message'),
  [
    ('patient,class\na,Läsion\nb,healthy\n'.encode('latin-1'), r'not a CSV file in UTF-8 \(.*\); save it in UTF-8'),
    (b'patient,label\na,1\nb,0\n', 'no columns patient and class; use commas, with patient,class as first line'),
  ],
)
def test_a_list_that_cannot_be_read_is_refused_if_nothing_else_has_labels(tmp_path, content, message):
  folder = small(tmp_path / 'in', [], scans=('a', 'b'))
  (folder / 'labels.csv').write_bytes(content)
  with pytest.raises(UserError, match=f'labels.csv: {message}'):
    find(folder)
  for kind in ('CT_COVID', 'CT_NonCOVID'):  # classes of pictures beside their archive
    (folder / kind).mkdir()
    (folder / kind / 'a.png').write_bytes(b'')
  assert not patient_labels.recognises(folder)


def test_results_beside_scans_are_no_scans(tmp_path):
  folder = small(tmp_path, [('a', 1), ('b', 0)], ('a', 'b'))
  for name in ('a_probability', 'a_gradcam_explanation'):
    (folder / f'{name}.nii.gz').write_bytes(b'')
  assert [case.patient for case in find(folder)[1]] == ['a', 'b']


def test_severities_of_mosmed_are_labels_of_patients(raw_dir, tmp_path, caplog):
  """CT-0 is without lesion. With `masks`, these decide. A list of the user overrides the folders."""
  caplog.set_level(logging.INFO)
  for number, path in enumerate(sorted(raw_dir.glob('*_ct.nii.gz'))):
    folder = tmp_path / 'studies' / f'CT-{number % 5}'
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(path, folder / f'study_{number:04d}.nii.gz')
  (tmp_path / 'LICENSE.txt').write_text('x')
  for place in (tmp_path, tmp_path / 'studies'):
    name, cases = find(place)
    assert name == 'patient_labels'
    assert [case.patient_label for case in cases] == [int(number % 5 > 0) for number in range(10)]
    assert [case.patient for case in cases] == [f'study_{number:04d}' for number in range(10)]
  assert 'studies: patients with lesion: CT-1, CT-2, CT-3, CT-4; without: CT-0' in caplog.text
  prepared = prepare.prepare(str(tmp_path), str(tmp_path / 'out'), SIZE)
  assert datasets.load_dataset(prepared, 0, SIZE).patient_labels
  write_labels(tmp_path / 'studies', [(case.patient, 1 - case.patient_label) for case in cases])
  assert [case.patient_label for case in find(tmp_path / 'studies')[1]] == [1 - case.patient_label for case in cases]
  (tmp_path / 'studies' / 'labels.csv').unlink()
  twice = tmp_path / 'studies' / 'CT-1' / 'study_0000.nii.gz'
  shutil.copy(tmp_path / 'studies' / 'CT-2' / 'study_0002.nii.gz', twice)
  with pytest.raises(UserError, match=r'CT-1/study_0000.nii.gz: same patient as .*CT-0/study_0000.nii.gz; remove one'):
    find(tmp_path)
  twice.unlink()
  (tmp_path / 'masks').mkdir()
  assert find(tmp_path)[0] == 'mosmed'


def test_scans_of_one_person_cannot_have_two_classes(tmp_path):
  folder = small(tmp_path / 'in', [('a', 1), ('b', 0), ('c', 1)])
  (folder / 'patients.csv').write_text('scan,patient\na,p1\nb,p1\nc,p2\n')
  with pytest.raises(UserError, match='b_ct.nii.gz: the scans of its patient have two classes in labels.csv'):
    find(folder)


def test_masks_decide_where_there_are_masks(raw_dir, tmp_path):
  """Cohorts that were known before stay what they were, whatever lists lie beside them."""
  for path in raw_dir.glob('*000[1-3]_*.nii.gz'):
    shutil.copy(path, tmp_path / path.name)
  before = find(tmp_path)
  write_labels(tmp_path, [('volume-phantom-A-0001', 1)])
  assert find(tmp_path) == before and before[0] != 'patient_labels'
  write_labels(tmp_path, [('x', 1)], columns='image,class')
  assert not patient_labels.recognises(tmp_path)


def test_a_changed_label_is_another_cohort_and_dicom_is_read(raw_dir, tmp_path):
  folder = tmp_path / 'in'
  for number, path in enumerate(sorted(raw_dir.glob('*_ct.nii.gz'))[:2]):
    image = nib.load(path)
    made = dicom_series.slices(np.asarray(image.dataobj), image.affine, number, PatientID=f'id-{number}')
    dicom_series.save(folder / f'd{number}', made)
  write_labels(folder, [('d0', 1), ('d1', 0)])
  name, cases = find(folder)
  assert name == 'patient_labels' and [case.patient_label for case in cases] == [1, 0]
  known = [survey.case_digests(cases, survey.fingerprint(cases))]
  assert [patient.lesion_voxels for patient in survey.survey(cases)] == [(1,) * SLICES, (0,) * SLICES]
  write_labels(folder, [('d0', 0), ('d1', 1)])
  cases = find(folder)[1]
  changed = survey.case_digests(cases, survey.fingerprint(cases))
  assert all(changed[name] != known[0][name] for name in ('d0', 'd1'))


def test_a_cohort_that_grew_keeps_its_folds_and_its_slices(cohort, tmp_path, caplog):
  folder = tmp_path / 'in'
  shutil.copytree(cohort[0], folder)
  new, rows = folder / 'scan9.nii.gz', (folder / 'labels.csv').read_text()
  persons = (folder / 'patients.csv').read_text()
  content = new.read_bytes()
  new.unlink()
  (folder / 'labels.csv').write_text(''.join(line for line in rows.splitlines(True) if not line.startswith('p8')))
  (folder / 'patients.csv').write_text(''.join(line for line in persons.splitlines(True) if 'scan9' not in line))
  fold_of = lambda place: {one['patient']: k for k, fold in enumerate(datasets.folds(place)) for one in fold}
  before = fold_of(prepare.prepare(str(folder), '', SIZE))
  new.write_bytes(content)
  (folder / 'labels.csv').write_text(rows), (folder / 'patients.csv').write_text(persons)
  caplog.set_level(logging.INFO)
  after = fold_of(prepare.prepare(str(folder), '', SIZE))
  assert len(before) == 9 and before.items() < after.items()
  assert '1 of 10 scans are prepared' in caplog.text
