"""Exclusive classes of slices and patients: from folders or labels.csv to the bits that training reads."""

import logging
import shutil

import nibabel as nib
import numpy as np
import pytest
from conftest import SIZE, tiny
from layouts import KINDS, three_kinds
from PIL import Image
from scipy import special
from sklearn import metrics as sk

from configs import cls, seg
from data import prepare, survey
from data.cohorts import Case, CohortOptions, labels, phantom, slices
from data.find import find
from fusa_jax import tasks
from fusa_jax.measures import exclusive
from fusa_jax.runs import experiment, prepared_dataset
from fusa_jax.scans.classes import LESION, of_slices
from fusa_jax.system import meshes
from fusa_jax.system.errors import UserError
from fusa_jax.training import datasets, input_pipeline, optimizers, scorer, train

AUTO = CohortOptions(intensity='grey', classes='auto')


@pytest.fixture(scope='module')
def cohort(tmp_path_factory):
  """(folder of the masks, folder with a folder per class, the class of each picture)."""
  masks, out = tmp_path_factory.mktemp('kinds'), tmp_path_factory.mktemp('classes')
  phantom.write_phantoms(masks, patients=7, size=SIZE, slices=16, kinds=True)
  return masks, out, three_kinds(masks, out)


@pytest.fixture(scope='module')
def prepared(cohort, tmp_path_factory):
  return prepare.prepare(str(cohort[1]), str(tmp_path_factory.mktemp('prepared')), SIZE, options=AUTO)


def config_of(**overrides):
  return tiny(cls, **{'data.intensity': 'grey', **overrides})


def test_folders_become_bits_of_classes(cohort, prepared, caplog):
  config = config_of()
  dataset = datasets.load_dataset_for(config, prepared)
  assert config.data.classes == KINDS and tasks.create(config).classes == KINDS
  assert dataset.exclusive and not dataset.masks and dataset.classes == [[name, []] for name in KINDS]
  seen, in_order = 0, sorted(cohort[2], key=lambda name: (cohort[2][name], name))  # folder by folder
  for part in (dataset.train, dataset.validation, dataset.test):
    for row, (patient, index) in enumerate(zip(part.patient, part.slice, strict=True)):
      picture = [name for name in in_order if name.startswith(patient)][index]
      name = cohort[2][picture]
      np.testing.assert_array_equal(part.source[row]['image'], Image.open(cohort[1] / name / f'{picture}.png'))
      assert part.bits[row] == 1 << KINDS.index(name) and part.label[row] == (name != 'normal')
      assert [label[row] for label in part.class_labels] == [name == one for one in KINDS]
      seen += 1
  assert seen == len(cohort[2]) == 7 * 16
  batch = next(input_pipeline.test_batches(dataset.test, meshes.create_mesh(), batch_size=8))
  np.testing.assert_array_equal(batch['label'], dataset.test.bits[:8])
  assert not np.asarray(batch['mask']).any()
  caplog.set_level(logging.INFO)
  find(cohort[1], AUTO)
  assert 'exclusive classes of slices: normal, consolidation, ground glass' in caplog.text


def test_the_report_counts_each_class(cohort, prepared):
  for number, name in enumerate(KINDS):
    rows = datasets.card(prepared, 0, number)['folds']
    of_class = [one for one, kind in cohort[2].items() if kind == name]
    assert sum(row['positive'] for row in rows) == len(of_class)
    assert sum(row['patients'] - row['without_lesion'] for row in rows) == len({one[:2] for one in of_class})


def test_a_list_gives_the_same_classes_as_folders(cohort, tmp_path):
  def classes(folder):
    cases = find(folder, AUTO)[1]
    assert {case.classes for case in cases} == {of_slices(KINDS)}
    return {
      path.stem: (case.patient, KINDS[label])
      for case in cases
      for path, label in zip(case.ct, case.labels, strict=True)
    }

  three_kinds(cohort[0], tmp_path, listed=True)
  assert classes(tmp_path) == classes(cohort[1]) == {name: (name[:2], kind) for name, kind in cohort[2].items()}
  for path in (tmp_path / 'images').iterdir():  # pictures beside the list
    path.rename(tmp_path / path.name)
  (tmp_path / 'images').rmdir()
  assert classes(tmp_path) == classes(cohort[1])
  (tmp_path / 'slices.csv').unlink()
  cases = find(tmp_path, AUTO._replace(patients='each_slice'))[1]
  assert [case.patient for case in cases] == sorted(cohort[2])


@pytest.mark.parametrize(
  ('change', 'reasons'),
  [
    (
      lambda rows: [*rows, 'p0s00,consolidation'],
      ["'p0s00' has the class 'consolidation', but 'normal' in a"],
    ),
    (lambda rows: rows[:-1], ['p6s15.png: is not in labels.csv; add it with its class']),
    (lambda rows: [*rows, 'x.png,normal', 'p0s01,'], ["no picture with the name 'x.png'", "'p0s01' has no class"]),
  ],
)
def test_lists_that_do_not_fit_are_refused_line_by_line(cohort, tmp_path, change, reasons):
  three_kinds(cohort[0], tmp_path, listed=True)
  rows = (tmp_path / 'labels.csv').read_text().splitlines()
  (tmp_path / 'labels.csv').write_text('\n'.join(change(rows)))
  with pytest.raises(UserError) as caught:
    find(tmp_path, AUTO)
  lines = str(caught.value).splitlines()
  assert len(lines) == len(reasons) and all(reason in line for reason, line in zip(reasons, lines, strict=True))


def make(folder, *names):
  for number, name in enumerate(names):
    (folder / name).mkdir(parents=True)
    Image.fromarray(np.full((8, 8), number, np.uint8)).save(folder / name / f'{number}.png')
  return folder


@pytest.mark.parametrize(
  ('names', 'classes', 'expected'),
  [
    # With two classes of which one is without lesion, and without data.classes, all is as before.
    (('CT_COVID', 'CT_NonCOVID'), 'auto', (LESION, {'CT_COVID': 1, 'CT_NonCOVID': 0})),
    (('0', '1'), 'auto', (LESION, {'0': 0, '1': 1})),
    (('COVID', 'CAP', 'Normal'), (), (LESION, {'COVID': 1, 'CAP': 1, 'Normal': 0})),
    (('COVID', 'CAP', 'Normal'), 'auto', (of_slices(['Normal', 'CAP', 'COVID']), {'Normal': 0, 'CAP': 1, 'COVID': 2})),
    (('b', 'a'), 'auto', (of_slices(['a', 'b']), {'a': 0, 'b': 1})),
    (('normal', 'no_lesion'), 'auto', (of_slices(['no_lesion', 'normal']), {'no_lesion': 0, 'normal': 1})),
    (('COVID', 'normal'), ('COVID', 'normal'), (of_slices(['COVID', 'normal']), {'COVID': 0, 'normal': 1})),
  ],
)
def test_what_folders_mean(tmp_path, names, classes, expected):
  cases = slices.find(make(tmp_path, *names), classes)
  assert {case.ct[0].parent.name: case.labels[0] for case in cases} == expected[1]
  assert {case.classes for case in cases} == {expected[0]}
  assert labels.meaning(names, classes, tmp_path, 'slices', 'x') == expected
  if expected[0] == LESION:
    assert cases == slices.find(tmp_path)


def test_folders_that_are_no_classes_are_refused(tmp_path):
  for names, reason in (
    (('train', 'val'), 'train: looks like a part of a split, not a class of slices'),
    (('a', 'b_masks'), 'b_masks: looks like a folder of masks'),
    (('COVID', 'covid '), "'COVID' and 'covid ' differ only in capitals or blanks"),
    ([f'class{k}' for k in range(31)], 'there are 31 classes of slices'),
  ):
    with pytest.raises(UserError, match=reason):
      slices.find(make(tmp_path / names[0], *names), 'auto')


@pytest.mark.parametrize(
  ('options', 'reason'),
  [
    (
      {'classes': ('normal', 'x')},
      r'data.classes: normal, x, but .* has .*; give the same names, or leave data.classes',
    ),
    ({'classes': ('x',)}, r'data.classes: there are 1 classes of slices \(x\), but there must be 2 to 30'),
    ({'classes': ('x', 'x')}, "data.classes: 'x' is given twice; give each class once"),
    ({'classes': ('x', 'X ')}, "data.classes: 'x' and 'X ' differ only in capitals or blanks; use one of them"),
    ({'classes': ('x', '.x')}, "data.classes: '.x' is not a name for files"),
    ({'classes': ('a b', 'a_b')}, "data.classes: 'a b' and 'a_b' would have the same files"),
    ({'classes': ('x', ' ')}, 'data.classes: a class has an empty name'),
    ({'classes': {'x': (1,)}}, r'data.classes: gives mask values, but .* has classes of slices \(consolidation, '),
    ({'classes': 'x'}, "data.classes: 'x' are not mask values by name"),
    ({'classes': 'auto', 'lesion_labels': (1,)}, 'data.lesion_labels: a mask value, but .* has classes of slices'),
    ({'classes': 'auto', 'ignore_label': 1}, 'data.ignore_label: needs data.classes with mask values'),
    ({}, None),
  ],
)
def test_options_that_do_not_fit_are_refused(cohort, options, reason):
  if reason is None:  # as before there were exclusive classes
    assert {label for case in find(cohort[1], CohortOptions(intensity='grey'))[1] for label in case.labels} == {0, 1}
    return
  with pytest.raises(UserError, match=f'^{reason}'):
    find(cohort[1], CohortOptions(intensity='grey', **options))


def test_masks_need_mask_values(cohort, tmp_path):
  with pytest.raises(UserError, match=r'^data.classes: names a, b without mask values, but .* has masks; give their'):
    find(cohort[0], CohortOptions(classes=('a', 'b')))
  with pytest.raises(UserError, match=r'^data.classes: a, b are exclusive classes of slices, but segmentation needs'):
    tasks.create(tiny(seg, **{'data.classes': ('a', 'b')}))
  with pytest.raises(UserError, match=r'^data.ignore_label: leaves out pixels, but classification scores slices'):
    tasks.create(tiny(cls, **{'data.classes': {'a': (1,)}, 'data.ignore_label': 2}))


def test_slices_of_masks_have_a_question_per_class(cohort, tmp_path):
  """A slice may show both kinds of lesions, so classification from masks asks for each class."""
  pairs = (('ground glass', (1,)), ('consolidation', (2,)))
  folder = prepare.prepare(str(cohort[0]), str(tmp_path), SIZE, options=CohortOptions(classes=pairs))
  config = tiny(cls)
  split = datasets.load_dataset_for(config, folder).train
  assert config.data.classes == pairs
  task = tasks.create(config)
  assert task.classes == ('ground glass', 'consolidation') and not task.exclusive
  checked = 0
  for row, (patient, index) in enumerate(zip(split.patient, split.slice, strict=True)):
    kinds = np.asarray(nib.load(cohort[0] / f'{patient}_seg.nii.gz').dataobj)[..., index]
    assert split.bits[row] == (1 in kinds) + 2 * (2 in kinds)
    checked += split.bits[row] == 3
  assert checked > 5


def test_one_class_stays_one_class(raw_dir, data_dir):
  config = tiny(cls)
  split = datasets.load_dataset_for(config, data_dir).train
  assert config.data.classes == () and tasks.create(config).classes == ('lesion',)
  np.testing.assert_array_equal(split.bits, split.label)
  assert [name for name, _ in prepare.scans(raw_dir, CohortOptions(classes='auto')).items()]


def test_a_run_and_its_data_have_the_same_classes(prepared, data_dir):
  for classes, theirs in (
    (('a', 'b', 'c'), r'a, b, c, but .* was prepared with normal, consolidation, ground glass'),
    ((), r'lesion \(a yes-or-no question per class\), but .* has normal, .* \(exclusive classes of slices\)'),
  ):
    with pytest.raises(UserError, match=f'^data.classes: {theirs}'):
      datasets.load_dataset_for(config_of(**{'data.classes': classes}), prepared)
  with pytest.raises(UserError, match=r'^data.classes: a, b \(exclusive classes of slices\), but .* has lesion'):
    datasets.load_dataset_for(tiny(cls, **{'data.classes': ('a', 'b')}), data_dir)
  config = config_of(**{'evaluate.fit_temperature': True})
  with pytest.raises(UserError, match='fit_temperature: calibrates each class alone, so that the probabilities of ex'):
    datasets.check_labels(config, datasets.load_dataset_for(config, prepared))


def test_the_command_takes_the_classes_from_the_cohort(cohort, tmp_path):
  config = config_of(**{'data.raw_dir': str(cohort[1]), 'data.dir': str(tmp_path)})
  experiment.prepared(config)
  assert config.data.classes == KINDS
  again = config_of(**{'data.dir': str(tmp_path)})
  experiment.prepared(again)
  assert again.data.classes == KINDS


def test_a_class_without_training_patients_is_refused(cohort, tmp_path):
  folder = tmp_path / 'in'
  shutil.copytree(cohort[1], folder)
  (folder / 'rare').mkdir()
  rows = (folder / 'slices.csv').read_text()
  Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(folder / 'rare' / 'r.png')
  (folder / 'slices.csv').write_text(f'{rows}\nr,p9')
  place = prepare.prepare(str(folder), str(tmp_path / 'out'), SIZE, options=AUTO)
  fold = next(k for k, one in enumerate(datasets.folds(place)) if 'p9' in [patient['patient'] for patient in one])
  config = config_of(**{'data.fold': fold})
  dataset = datasets.load_dataset_for(config, place)  # another model may be tested on it
  with pytest.raises(UserError, match=rf"^data.classes: no training patient of fold {fold} has the class 'rare'"):
    datasets.check_trainable(config, dataset)


def test_a_slice_in_two_classes_is_refused_with_both_files(cohort, tmp_path):
  shutil.copytree(cohort[1], tmp_path / 'in')
  name = next(name for name, kind in cohort[2].items() if kind == 'consolidation')
  shutil.copy(tmp_path / 'in' / 'consolidation' / f'{name}.png', tmp_path / 'in' / 'normal' / 'copy.png')
  with (tmp_path / 'in' / 'slices.csv').open('a') as file:
    file.write(f'\ncopy,{name[:2]}')  # of the same patient: else it could be in both training and test
  with pytest.raises(UserError) as caught:
    prepare.prepare(str(tmp_path / 'in'), str(tmp_path / 'out'), SIZE, options=AUTO)
  (line,) = str(caught.value).splitlines()
  assert 'normal/copy.png' in line and f'consolidation/{name}.png, but in another class; remove one of the two' in line


def test_patients_of_three_classes(cohort, tmp_path):
  kinds = ('CT-2', 'CT-0', 'CT-10', 'CT-2', 'CT-0', 'CT-10', 'CT-2')
  scans = sorted(cohort[0].glob('*_ct.nii.gz'))
  rows = ['patient,class']
  for number, (scan, kind) in enumerate(zip(scans, kinds, strict=True)):
    shutil.copy(scan, tmp_path / f'x{number}.nii.gz')
    rows.append(f'x{number},{kind}')
  (tmp_path / 'labels.csv').write_text('\n'.join(rows))
  options = CohortOptions(classes='auto')
  name, cases = find(tmp_path, options)
  assert name == 'patient_labels' and cases[0].classes == of_slices(['CT-0', 'CT-10', 'CT-2'])
  assert [case.classes.names[case.patient_label] for case in cases] == list(kinds)
  place = prepare.prepare(str(tmp_path), '', SIZE, options=options)
  config = tiny(cls)
  prepared_dataset.fill_classes(config, place)
  dataset = datasets.load_dataset(place, 0, SIZE)
  assert dataset.patient_labels and config.data.classes == ('CT-0', 'CT-10', 'CT-2')
  of_patient = {
    patient: set(part.bits[part.patient == patient].tolist())
    for part in (dataset.train, dataset.validation, dataset.test)
    for patient in part.patients
  }
  assert of_patient == {f'x{k}': {1 << config.data.classes.index(kind)} for k, kind in enumerate(kinds)}
  (tmp_path / 'patients.csv').write_text('scan,patient\n' + '\n'.join(f'x{k},p{max(k, 1)}' for k in range(7)))
  with pytest.raises(UserError, match=r'x1.nii.gz: .* two classes in labels.csv \(CT-0, but x0.nii.gz has CT-2\)'):
    find(tmp_path, options)


def test_each_fold_gets_persons_of_each_class():
  rng, three = np.random.default_rng(0), of_slices(['a', 'b', 'c'])
  patients = []
  for number in range(60):
    kind, count = number % 3, int(rng.integers(1, 30))
    voxels = tuple((int(k == kind),) * count for k in range(3))
    patients.append(survey.Patient(Case(f'p{number}', (), None, three), (1,) * count, None, class_voxels=voxels))
  persons = lambda fold: np.bincount([int(one.case.patient[1:]) % 3 for one in fold])
  np.testing.assert_array_equal([persons(fold) for fold in survey.deal(patients)], np.full((5, 3), 4))
  dealt = survey.deal(patients[:30])
  fold_of = {one.case.patient: k for k, fold in enumerate(dealt) for one in fold}
  grown = survey.deal(patients, lambda patient: fold_of.get(patient.case.patient))
  np.testing.assert_array_equal([persons(fold) for fold in grown], np.full((5, 3), 4))


def test_a_cohort_that_grew_keeps_its_slices(cohort, tmp_path, caplog):
  folder, last = tmp_path / 'in', [name for name in cohort[2] if name.startswith('p6')]
  shutil.copytree(cohort[1], folder)
  rows = (folder / 'slices.csv').read_text()
  for name in last:
    (folder / cohort[2][name] / f'{name}.png').rename(tmp_path / f'{name}.png')
  (folder / 'slices.csv').write_text('\n'.join(row for row in rows.splitlines() if not row.startswith('p6')))
  before = datasets.folds(prepare.prepare(str(folder), '', SIZE, options=AUTO))
  for name in last:
    (tmp_path / f'{name}.png').rename(folder / cohort[2][name] / f'{name}.png')
  (folder / 'slices.csv').write_text(rows)
  caplog.set_level(logging.INFO)
  after = datasets.folds(prepare.prepare(str(folder), '', SIZE, options=AUTO))
  assert '1 of 7 scans are prepared' in caplog.text or '6 of 7 patients keep their folds; 1 new' in caplog.text
  entries = {one['patient']: one for fold in after for one in fold}
  assert all(entries[one['patient']] == one for fold in before for one in fold) and len(entries) == 7


def test_trained_for_a_few_steps_and_scored(cohort, prepared):
  """The loss of the training batches falls, and the tables of the test slices hold a softmax."""
  config = config_of(**{'train.steps': 12, 'train.learning_rate': 3e-3})
  dataset, mesh = datasets.load_dataset_for(config, prepared), meshes.create_mesh()
  task, (optimizer, _) = tasks.create(config), optimizers.make_optimizer(config)
  shapes = train.state_shapes(task, optimizer, config, mesh)
  state, losses = train.compile_init(task, optimizer, config, meshes.replicated(mesh))(), []
  step = train.compile_step(task, optimizer, config, mesh, shapes)
  options = {'batch_size': 8, 'seed': 0, 'first_step': 0, 'last_step': 12, 'balanced': True}
  for batch in input_pipeline.train_batches(dataset.train, mesh, **options):
    state, scalars = step(state, batch)
    losses.append(float(scalars['loss']))
  assert len(losses) == 12 and np.log(3) - 0.2 < losses[0] < np.log(3) + 0.5 and np.mean(losses[-3:]) < losses[0]
  tables = scorer.Scorer(task, mesh, 8).tables(state.tested, dataset.test)
  assert tuple(tables) == KINDS
  probability = np.stack([table['score'] for table in tables.values()])
  np.testing.assert_allclose(probability.sum(axis=0), 1, atol=1e-6)
  np.testing.assert_allclose(probability, special.expit([table['logit'] for table in tables.values()]), atol=1e-6)
  for label, table in zip(dataset.test.class_labels, tables.values(), strict=True):
    np.testing.assert_array_equal(table['label'], label)
    np.testing.assert_array_equal(table['tp'] + table['fn'], label)
    np.testing.assert_array_equal(table['tp'] + table['fp'], table['score'] >= 0.5)
    assert table['histogram'].sum() == len(dataset.test)
  confusion = sk.confusion_matrix(np.log2(dataset.test.bits), probability.argmax(axis=0), labels=range(3))
  assert exclusive.numbers(tables)['confusion'] == confusion.tolist()
