"""One scan under two names: equal voxels in any storage are refused; similar scans give a warning."""

import logging
import shutil

import nibabel as nib
import numpy as np
import pytest
from nifti_files import chest, save
from PIL import Image
from scipy import ndimage

from data import prepare, survey, workers
from data.cohorts import CohortOptions, covid19_20, phantom
from data.find import find
from fusa_jax.scans import volume_files
from fusa_jax.system.errors import UserError


def path_of(folder, number, kind='ct', suffix='.nii.gz'):
  return folder / f'volume-phantom-A-{number:04d}_{kind}{suffix}'


@pytest.fixture
def raw(raw_dir, tmp_path):
  """Three patients of the cohort; tests may change them."""
  folder = tmp_path / 'raw'
  folder.mkdir()
  for number in (1, 2, 3):
    for kind in ('ct', 'seg'):
      shutil.copy(path_of(raw_dir, number, kind), folder)
  return folder


def add(folder, number, hu, scan):
  """Adds a scan [S, H, W] on the grid of `scan`, without lesions."""
  for kind, volume in (('ct', hu), ('seg', np.zeros_like(hu))):
    nib.save(nib.Nifti1Image(volume.transpose(2, 1, 0), scan.affine), path_of(folder, number, kind))


def warnings(caplog):
  return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_scan_under_two_names_is_refused_in_any_storage(raw, tmp_path):
  shutil.copy(path_of(raw, 1), path_of(raw, 7))
  shutil.copy(path_of(raw, 1, 'seg'), path_of(raw, 7, 'seg'))
  # Patient 8 is patient 2 with another orientation, voxel type, scaling, compression and mask.
  image = nib.load(path_of(raw, 2))
  turned = image.as_reoriented([[1, 1], [0, -1], [2, -1]])
  other = nib.Nifti1Image(turned.get_fdata() + 3, turned.affine, dtype=np.float32)
  other.header.set_slope_inter(1, -3)
  nib.save(other, path_of(raw, 8, suffix='.nii'))
  nib.save(nib.Nifti1Image(np.zeros(other.shape, np.uint8), other.affine), path_of(raw, 8, 'seg', '.nii'))
  path_of(raw, 3).write_bytes(b'nothing')
  with pytest.raises(UserError) as caught:
    prepare.prepare(str(raw), str(tmp_path / 'out'), 32)
  lines = str(caught.value).splitlines()
  assert [line.split(': ')[0] for line in lines] == [
    str(path) for path in (path_of(raw, 3), path_of(raw, 7), path_of(raw, 8, suffix='.nii'))
  ]
  for line, known in zip(lines[1:], (1, 2), strict=True):
    assert f'the same image as {path_of(raw, known).name}' in line and 'remove one of the two' in line
  assert not list((tmp_path / 'out').rglob('*array_record*'))


def test_other_reconstructions_of_a_scan_are_warned_of(raw, caplog):
  scan = volume_files.read_scan(path_of(raw, 1))
  sharper = 2.0 * scan.values - ndimage.gaussian_filter(scan.values.astype(float), (0, 1, 1))
  add(raw, 7, np.rint(sharper).astype(np.int16), scan)
  scan = volume_files.read_scan(path_of(raw, 2))
  add(raw, 8, scan.values.reshape(-1, 2, *scan.values.shape[1:]).mean(axis=1).astype(np.int16), scan)
  assert len(survey.survey(covid19_20.find(raw))) == 5
  lines = warnings(caplog)
  assert len(lines) == 2
  for line, number, known in zip(lines, (7, 8), (1, 2), strict=True):
    assert line.startswith(f'{path_of(raw, number)}: looks like {path_of(raw, known).name} (correlation 0.9')
    assert 'remove one of the two' in line


def test_different_patients_give_no_warning(raw_dir, caplog):
  survey.survey(covid19_20.find(raw_dir))
  assert not warnings(caplog)


def test_smoothing_changes_a_thumbnail_less_than_another_patient():
  """Coarse matrices are the hard case: a blur of one pixel changes much. At the paper's size the gap is wider."""
  volumes = [phantom.patient(0, number, size=96, slices=24)[0].astype(np.float32) for number in range(1, 9)]
  smoother = [ndimage.gaussian_filter(volume, (0, 1, 1)) for volume in volumes]
  one, other = (np.stack([survey._thumbnail(volume, 'hu') for volume in each]) for each in (volumes, smoother))
  np.testing.assert_allclose(np.linalg.norm(one, axis=1), 1, rtol=1e-5)
  correlations = one @ other.T
  assert np.diag(correlations).min() > survey._ALIKE
  assert np.max(correlations - 2 * np.eye(8)) < survey._ALIKE - 0.05


def labelled(folder, masks):
  """Writes a scan per mask; a mask is given by its values, each in a quarter of the voxels."""
  for number, values in enumerate(masks):
    save(folder / f'P{number}.nii.gz', chest(seed=number))
    mask = np.zeros((7, 6, 5), np.uint8)
    mask.flat[: 50 * len(values)] = np.repeat(values, 50)
    save(folder / f'P{number}_mask.nii.gz', mask)
  return folder


def surveyed(folder, *labels):
  return survey.survey(find(folder, CohortOptions(lesion_labels=labels))[1])


@pytest.mark.parametrize(
  ('masks', 'labels', 'missing'),
  [
    ([[1], [1], [255], [255]], (3,), '3; the masks have 1 (in 2 masks), 255 (in 2 masks)'),
    ([[1, 2], [1]], (2, 3), '3; the masks have 1 (in 2 masks), 2 (in 1 mask)'),
    ([[], []], (1,), '1; the masks have only 0'),
  ],
)
def test_labels_of_no_mask_are_refused(tmp_path, masks, labels, missing):
  with pytest.raises(UserError) as caught:
    surveyed(labelled(tmp_path, masks), *labels)
  assert str(caught.value) == (f'data.lesion_labels: no mask has the value {missing}; give the values that are lesion')


@pytest.mark.parametrize(
  ('masks', 'labels', 'refused'),
  [
    ([[1], [1], [255], [255]], (1,), {2: 255, 3: 255}),  # two annotators
    ([[1], [1], [255], [255]], (255,), {0: 1, 1: 1}),
    ([[1, 2], [1, 2], [1], [1, 3]], (2,), {3: 3}),  # the organ is 1, and of one patient the lesion is 3
    ([[7], [1, 2]], (2,), {0: 7}),
  ],
)
def test_masks_with_labels_of_their_own_are_refused(tmp_path, masks, labels, refused):
  """Their patients would count as free of lesions."""
  with pytest.raises(UserError) as caught:
    surveyed(labelled(tmp_path, masks), *labels)
  lines = str(caught.value).splitlines()
  assert [line.split(': ')[0] for line in lines] == [str(tmp_path / f'P{number}_mask.nii.gz') for number in refused]
  for line, value in zip(lines, refused.values(), strict=True):
    assert f'no mask with lesion has {value}; add it to data.lesion_labels if it is lesion, or set it to 0' in line


def test_labels_of_organs_are_background_and_said(tmp_path, caplog):
  caplog.set_level(logging.INFO)
  patients = surveyed(labelled(tmp_path, [[1, 2], [1, 2, 4], [1], [1, 4], []]), 2)
  assert [sum(patient.lesion_voxels) for patient in patients] == [50, 50, 0, 0, 0]
  said = '3 of 5 patients have no lesion; values taken as background: 1 (in 4 masks), 4 (in 2 masks)'
  assert said in caplog.messages
  caplog.clear()
  surveyed(labelled(tmp_path / 'both', [[1], [255], [1], []]), 1, 255)
  assert '1 of 4 patients have no lesion' in caplog.messages


def test_labels_of_pictures(tmp_path):
  """Each mask of a slice is checked, because one patient may have masks of two annotators."""
  for folder in ('images', 'masks'):
    (tmp_path / folder).mkdir()
  rng = np.random.default_rng(0)
  for number, value in enumerate((1, 1, 255, 255, 0)):
    Image.fromarray(rng.integers(0, 256, (8, 8)).astype(np.uint8)).save(tmp_path / 'images' / f'{number}.png')
    Image.fromarray(np.full((8, 8), value, np.uint8)).save(tmp_path / 'masks' / f'{number}.png')
  (tmp_path / 'slices.csv').write_text('name,patient\n' + ''.join(f'{n},P{n % 2}\n' for n in range(5)))
  cases = find(tmp_path, CohortOptions((255,), intensity='grey'))[1]
  with pytest.raises(UserError) as caught:
    survey.survey(cases)
  lines = str(caught.value).splitlines()
  assert sorted(line.split(': ')[0][-5:] for line in lines) == ['0.png', '1.png']
  patients = survey.survey(find(tmp_path, CohortOptions((1, 255), intensity='grey'))[1])
  assert [patient.lesion_voxels for patient in patients] == [(64, 64, 0), (64, 64)]


def test_pictures_in_colour_are_left_out_by_a_key(tmp_path, caplog):
  caplog.set_level(logging.INFO)
  for folder in ('images', 'masks'):
    (tmp_path / folder).mkdir()
  rng, lines = np.random.default_rng(0), ['name,patient']
  for number in range(9):
    patient = number // 3
    image = np.repeat(rng.integers(0, 200, (8, 8, 1)), 3, axis=2).astype(np.uint8)
    if number == 1 or patient == 2:
      image[:2, :2, 0] = 255  # an arrow
      image[:2, :2, 1] = 0
    Image.fromarray(image).save(tmp_path / 'images' / f'{number}.png')
    Image.fromarray(np.full((8, 8), 255 * (number % 2), np.uint8)).save(tmp_path / 'masks' / f'{number}.png')
    lines.append(f'{number},P{patient}')
  (tmp_path / 'slices.csv').write_text('\n'.join(lines))
  grey = CohortOptions(intensity='grey')
  with pytest.raises(UserError) as caught:
    survey.survey(find(tmp_path, grey)[1])
  assert [line.split(': ')[0][-5:] for line in str(caught.value).splitlines()] == [f'{n}.png' for n in (1, 6, 7, 8)]
  options = grey._replace(coloured='leave_out')
  patients = survey.survey(find(tmp_path, options)[1])
  assert [[path.stem for path in one.case.ct] for one in patients] == [['0', '2'], ['3', '4', '5']]
  assert [[path.stem for path in one.case.mask] for one in patients] == [['0', '2'], ['3', '4', '5']]
  assert [one.lesion_voxels for one in patients] == [(0, 0), (64, 0, 64)]
  assert 'left out (in colour): 4 files (1.png, 6.png, 7.png, 8.png)' in caplog.messages
  out = tmp_path / 'out'
  prepared = prepare.prepare(str(tmp_path), str(out), 8, options=options)
  assert prepare.prepare(str(tmp_path), str(out), 8, options=options) == prepared
  with pytest.raises(
    UserError, match=r'was prepared with data.coloured=leave_out, now it is refuse; use another folder'
  ):
    prepare.prepare(str(tmp_path), str(out), 8, options=grey)
  with pytest.raises(UserError, match=r"data.coloured: 'drop' is unknown; give one of refuse, leave_out"):
    find(tmp_path, grey._replace(coloured='drop'))


@pytest.mark.parametrize('in_file', [False, True])
def test_thumbnails_are_compared_in_blocks(tmp_path, monkeypatch, caplog, in_file):
  """The pairs, their order and their correlations are those of the whole matrix in float64."""
  monkeypatch.setattr(survey, '_BLOCK', 3)
  rng = np.random.default_rng(0)
  vectors = rng.standard_normal((10, 16 * 64 * 64))
  for copy, of, noise in ((7, 1, 0.2), (8, 1, 0.3), (4, 3, 0.4), (9, 0, 1.0)):
    vectors[copy] = vectors[of] + noise * rng.standard_normal(vectors.shape[1])
  vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
  store = survey._Thumbnails(tmp_path / 'thumbnails.npy' if in_file else None, len(vectors))
  for number, vector in enumerate(vectors):
    store.add(f'/folder/scan{number}', vector.astype(np.float16))
  store.warn_of_similar()
  correlations = vectors @ vectors.T
  expected = [
    f'/folder/scan{other}: looks like scan{one} (correlation {correlations[one, other]:.3f})'
    for one, other in np.argwhere(np.triu(correlations, k=1) >= 0.8)
  ]
  assert [line.partition(', perhaps')[0] for line in warnings(caplog)] == expected and len(expected) == 4


def test_processes_are_limited_by_memory(monkeypatch, caplog):
  """A process needs 25 bytes x 32 million voxels + 300 MB = 1.1 GB; two fit into 80% of 4 GB."""
  counts = []

  class Executor:
    map = map

    def __init__(self, processes, *_):
      counts.append(processes)

    def shutdown(self, **_):
      pass

  monkeypatch.setattr(workers, 'ProcessPoolExecutor', Executor)
  monkeypatch.setattr(workers.os, 'sched_getaffinity', lambda _: range(64))
  caplog.set_level('INFO')
  for available in (4 * 10**9, 10**8, 10**12, None):
    monkeypatch.setattr(workers, 'available_memory', lambda available=available: available)
    with workers.pool(100, 32 * 10**6):
      pass
  assert counts == [2, 1, 64, 64]
  assert caplog.messages[0].startswith('reading 2 scans at a time instead of 64: 4.0 GB of memory are available')
  monkeypatch.undo()
  assert workers.available_memory() > 10**6
