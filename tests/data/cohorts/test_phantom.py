"""The phantom cohort: its files, anatomy, HU and lesions."""

import math

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from data import workers
from data.cohorts import phantom
from fusa_jax.scans import volume_files

SIZE = {'size': 128, 'slices': 24}
SMALL = {'size': 48, 'slices': 16}


@pytest.fixture(scope='module')
def cohort():
  """HU, masks and lungs of ten patients, each [10, 24, 128, 128]."""
  patients = [phantom.patient(0, number, **SIZE) for number in range(1, 11)]
  return [np.stack(arrays) for arrays in zip(*patients, strict=True)]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """A small cohort that `write_phantoms` wrote with its pool."""
  raw_dir = tmp_path_factory.mktemp('raw') / 'new'
  phantom.write_phantoms(raw_dir, patients=5, seed=3, **SMALL)
  return raw_dir


def test_a_patient_depends_only_on_seed_and_number():
  first, again = phantom.patient(1, 2, **SMALL), phantom.patient(1, 2, **SMALL)
  for array, same, dtype in zip(first, again, (np.int16, np.uint8, np.uint8), strict=True):
    assert array.dtype == dtype and array.shape == (16, 48, 48)
    np.testing.assert_array_equal(array, same)
  for other in (phantom.patient(1, 3, **SMALL), phantom.patient(2, 2, **SMALL)):
    assert (first[0] != other[0]).mean() > 0.3 and (first[2] != other[2]).any()


def test_anatomy_is_in_millimetres():
  """A finer matrix shows the same lungs and lesions."""
  _, mask, lungs = phantom.patient(0, 1, size=64, slices=24)
  _, fine_mask, fine_lungs = phantom.patient(0, 1, size=128, slices=24)
  for coarse, fine in ((mask, fine_mask), (lungs, fine_lungs)):
    shrunk = fine.reshape(24, 64, 2, 64, 2).mean((2, 4))
    assert (np.abs(coarse - shrunk) > 0.5).sum() < 0.05 * coarse.sum()


@pytest.mark.parametrize(
  'wrong', [{'number': 0}, {'seed': -1}, {'size': 31}, {'slices': 15}], ids=lambda wrong: next(iter(wrong))
)
def test_a_patient_out_of_range_is_an_error(wrong):
  with pytest.raises(ValueError, match='no phantom for'):
    phantom.patient(**({'seed': 0, 'number': 1, **SMALL} | wrong))


def test_a_cohort_without_patients_is_an_error(tmp_path):
  with pytest.raises(ValueError, match='patients=0'):
    phantom.write_phantoms(tmp_path / 'raw', patients=0)
  assert not (tmp_path / 'raw').exists()


def test_files_are_named_and_stored_as_in_the_challenge(folder):
  assert sorted(path.name for path in folder.iterdir()) == sorted(
    f'volume-phantom-A-{number:04d}_{kind}.nii.gz' for number in range(1, 6) for kind in ('ct', 'seg')
  )
  for number in range(1, 6):
    stem = f'volume-phantom-A-{number:04d}'
    ct, seg = (nib.load(folder / f'{stem}_{kind}.nii.gz') for kind in ('ct', 'seg'))
    assert ct.shape == seg.shape == (48, 48, 16)
    np.testing.assert_array_equal(ct.affine, seg.affine)
    np.testing.assert_allclose(ct.header.get_zooms()[::-1], phantom.spacing(3, number, **SMALL), rtol=1e-5)
    for image, dtype in ((ct, np.int16), (seg, np.uint8)):
      assert image.get_data_dtype() == dtype
      assert image.header['qform_code'] == 1 and image.header['sform_code'] == 0
      assert nib.aff2axcodes(image.affine) == tuple('RAS' if number % 4 == 0 else 'LPS')
      assert np.abs(image.affine @ [23.5, 23.5, 0, 1])[:2].max() < 1e-3  # centred


@pytest.mark.parametrize('number', [1, 4])
def test_files_hold_the_patient_in_both_orientations(folder, number):
  hu, mask, _ = phantom.patient(3, number, **SMALL)
  to_lps = nib.orientations.axcodes2ornt('LPS')
  for kind, expected in (('ct', hu), ('seg', mask)):
    image = nib.load(folder / f'volume-phantom-A-{number:04d}_{kind}.nii.gz')
    stored = nib.orientations.io_orientation(image.affine)
    image = image.as_reoriented(nib.orientations.ornt_transform(stored, to_lps))
    np.testing.assert_array_equal(np.asarray(image.dataobj).transpose(2, 1, 0), expected)


def test_a_file_does_not_depend_on_the_cohort_or_the_pool(folder, processes, tmp_path, monkeypatch):
  monkeypatch.setattr(workers, 'ProcessPoolExecutor', processes)
  seen = []
  phantom.write_phantoms(tmp_path, patients=1, seed=3, progress=lambda jobs, **_: map(seen.append, jobs), **SMALL)
  assert len(seen) == 1
  for path in tmp_path.iterdir():
    assert path.read_bytes() == (folder / path.name).read_bytes()


def test_hounsfield_units(cohort):
  hu, mask, lungs = cohort
  for volume, lesion, lung in zip(hu, mask, lungs, strict=True):
    healthy = volume[(lung > 0) & (lesion == 0)]
    assert -900 < np.median(healthy) < -800
    assert 0.04 < lung.mean() < 0.25
    assert ((volume > 0) & (volume < 120)).mean() > 0.08  # soft tissue
    assert 0.004 < (volume > 250).mean() < 0.1  # bone
    assert 300 < np.percentile(volume[volume > 250], 90) < 1200


def test_axes_are_canonical(cohort):
  """The spine is at the back, the heart on the left, the abdomen below; also for prone patients."""
  hu, _, lungs = cohort
  for volume, lung in zip(hu, lungs, strict=True):
    middle, _, column = (round(np.mean(where)) for where in np.nonzero(lung))
    bone = np.argwhere(volume[middle - 3 : middle + 3, :, column - 6 : column + 6] > 200)[:, 1]
    rows = np.nonzero(lung[middle])[0]
    assert np.median(bone) > np.percentile(rows, 75)
    right, left = (lung[:, :, part].sum() for part in (slice(0, column), slice(column, None)))
    assert 0.8 < right / left < 1.8
    levels = lung.sum((1, 2))
    assert levels.argmax() > np.flatnonzero(levels)[0] + 3


def bodies(hu):
  """Returns bool [S, H, W]: the largest dense region of each slice, with its holes filled."""
  largest = np.zeros(hu.shape, bool)
  for body, dense in zip(largest, hu > -250, strict=True):
    parts, count = ndimage.label(ndimage.binary_opening(dense))
    if count:
      body[:] = ndimage.binary_fill_holes(parts == 1 + np.argmax(np.bincount(parts.ravel())[1:]))
  return largest


def test_most_patients_have_surroundings(cohort):
  """Tables, mattresses, blankets and arms are denser than air and lie outside the body."""
  around = [
    ((volume > -900) & ~ndimage.binary_dilation(bodies(volume), np.ones((1, 5, 5)))).mean() for volume in cohort[0]
  ]
  assert sum(share > 0.01 for share in around) >= 8
  assert np.std(around) > 0.01  # and it differs between patients


def test_the_table_is_behind_most_patients_and_in_front_of_some(cohort):
  behind = []
  for volume, lung in zip(cohort[0], cohort[2], strict=True):
    table = (volume > -850).all(0) & ~bodies(volume).any(0)  # equal in all slices
    behind.append(np.median(np.nonzero(table)[0]) > np.nonzero(lung)[1].mean() if table.sum() > 20 else None)
  assert behind.count(True) >= 5 and behind.count(False) >= 1


def test_patients_are_turned_and_off_centre(cohort):
  lungs = cohort[2]
  turned, off = [], []
  for lung in lungs:
    place = np.argwhere(lung[lung.sum((1, 2)).argmax()])
    (yy, xy), (_, xx) = np.cov(place.T)
    turned.append(math.degrees(0.5 * math.atan2(2 * xy, xx - yy)))
    off.append(place.mean(0) - 63.5)
  assert np.max(np.abs(turned)) > 9 and np.median(np.abs(turned)) < 7
  assert np.std(off, axis=0).min() > 1


def test_scans_reach_beyond_the_lungs_in_some(cohort):
  """Below the lungs there is gas in the bowel and no lesion; above them the trachea in the neck."""
  below = above = 0
  for volume, mask, lung in zip(*cohort, strict=True):
    body = ndimage.binary_erosion(bodies(volume), np.ones((1, 5, 5)))
    first, *_, last = np.flatnonzero(lung.any((1, 2)))
    assert not mask[:first].any() and not mask[last + 1 :].any()
    gas = ((volume < -700) & body).sum((1, 2))
    below += first >= 2 and gas[:first].any()
    above += last < 22 and gas[last + 1 :].all()
  assert below >= 2 and above >= 2


def test_fields_of_view_depend_on_the_patient(cohort):
  spacings = [phantom.spacing(0, number, **SIZE) for number in range(1, 11)]
  for number, (thickness, height, width) in enumerate(spacings, 1):
    assert height == width
    np.testing.assert_allclose(phantom.spacing(0, number, size=64, slices=48), (thickness / 2, 2 * height, 2 * width))
  fields, covered = 128 * np.array(spacings)[:, 1], 24 * np.array(spacings)[:, 0]
  assert fields.min() < 320 and fields.max() > 400
  assert covered.min() == pytest.approx(280) and covered.max() > 380
  corners = [set(volume[:, :8, 0].ravel().tolist()) for volume in cohort[0]]
  round_ones = [corner for corner in corners if len(corner) == 1]
  assert 2 <= len(round_ones) <= 8 and set().union(*round_ones) <= {-1024, -2048}


def test_every_phantom_is_accepted_as_a_scan_in_hu(folder):
  for path in sorted(folder.glob('*_ct.nii.gz')):
    volume_files.read_scan(path)  # refuses windowed or rescaled values and scans without air


def test_lesions(cohort):
  _, mask, lungs = cohort
  loads = mask.mean((1, 2, 3))
  assert (loads[[4, 9]] == 0).all() and (np.delete(loads, [4, 9]) > 1e-3).all()
  assert not (mask & ~lungs & 1).any()
  assert 0.004 < loads.mean() < 0.03
  assert 0.25 < mask.any((2, 3)).mean() < 0.5
  plane = np.ones((1, 3, 3))
  touching = [(ndimage.binary_dilation(m, plane) & (lung == 0)).sum() > 20 for m, lung in zip(mask, lungs, strict=True)]
  assert sum(touching) >= 5  # lesions lie against the pleura


def test_no_threshold_separates_the_lesions(cohort):
  """Tries all thresholds and all bands of HU inside the true lungs; all voxels are pooled."""
  hu, mask, lungs = cohort
  bins = np.arange(-1030, 400, 10)
  lesion = np.histogram(hu[mask > 0], bins)[0]
  healthy = np.histogram(hu[(lungs > 0) & (mask == 0)], bins)[0]
  tp, fp = (np.append(0, counts.cumsum()) for counts in (lesion, healthy))
  tp, fp = tp - tp[:, None], fp - fp[:, None]  # [low, high]
  dice = np.triu(2 * tp / (tp + fp + mask.sum()))
  single, (low, high) = dice[:, -1], np.unravel_index(dice.argmax(), dice.shape)
  figure = (
    f'best threshold hu > {bins[single.argmax()]}: Dice {single.max():.3f}; '
    f'best band {bins[low]}..{bins[high]}: Dice {dice.max():.3f}'
  )
  print(figure)
  assert 0.3 <= single.max() <= 0.6, figure
