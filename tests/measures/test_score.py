"""--mode=score: numbers compared with scikit-learn, MONAI and hand counts; names, grids and errors."""

import csv
import pathlib

import nibabel as nib
import numpy as np
import pytest
from nibabel import orientations
from scipy import ndimage
from sklearn.metrics import f1_score

from fusa_jax.measures import masks, score, statistics, surface
from fusa_jax.scans import classes, volume_files
from fusa_jax.scans.volumes import Grid
from fusa_jax.system import files, own_files
from fusa_jax.system.errors import UserError

AFFINE = np.array([[-0.7, 0, 0, 12.5], [0, -0.8, 0, -40.25], [0, 0, 5, 300], [0, 0, 0, 1]])
SCANS = volume_files.VolumeFile.endings
GRID = Grid((4, 10, 10), AFFINE, 'a mask')
REAL = pathlib.Path(__file__).parents[3] / 'shared' / 'ct' / 'Train' / 'volume-lung2_seg.nii.gz'


def blobs(seed, shape=(6, 20, 18), share=0.2):
  """Returns a predicted and a reference mask that are similar."""
  rng = np.random.default_rng(seed)
  fields = [ndimage.gaussian_filter(rng.normal(size=shape), (1, 2, 2)) for _ in range(2)]
  return tuple(field > np.quantile(field, 1 - share) for field in (fields[0] + 0.5 * fields[1], fields[0]))


def save(path, mask, affine=AFFINE):
  """Saves a mask [S, H, W] in L, P, S order."""
  path.parent.mkdir(parents=True, exist_ok=True)
  nib.save(nib.Nifti1Image(np.asarray(mask).transpose(2, 1, 0).astype(np.uint8), affine), path)
  return path


@pytest.fixture
def folders(tmp_path):
  """Folders of predictions and reference masks of five cases. The last two are healthy; one has a false mark."""
  for seed in range(5):
    predicted, true = blobs(seed)
    save(tmp_path / 'true' / f'p{seed}_seg.nii.gz', true & (seed < 3))
    save(tmp_path / 'predicted' / f'p{seed}_ct_mask.nii.gz', predicted & (seed < 4))
  return tmp_path / 'predicted', tmp_path / 'true'


def refusal(*arguments) -> list[str]:
  """Returns the lines of the error and checks that nothing was written."""
  with pytest.raises(UserError) as caught:
    score.score(*arguments)
  assert not arguments[2].exists()
  return str(caught.value).splitlines()


@pytest.mark.parametrize('seed', range(3))
def test_numbers_of_a_volume(seed):
  predicted, true = blobs(seed)
  row = masks.volume(predicted.astype(np.uint8), true, GRID)
  assert list(row) == list(masks.DEFINITIONS)
  assert row['dice'] == pytest.approx(f1_score(true.ravel(), predicted.ravel()), abs=1e-12)
  assert row['predicted_ml'] == pytest.approx(predicted.sum() * 0.0028)
  assert row['true_ml'] == pytest.approx(true.sum() * 0.0028)
  assert row['error_ml'] == pytest.approx(row['predicted_ml'] - row['true_ml'])
  # Computed on the whole volume, not a crop. test_surface.py compares these distances with MONAI.
  distances = surface.distances(predicted, true, GRID.steps, np.inf)
  assert row['hd95_mm'] == surface.hd95(distances)
  for tolerance in (1, 2):
    assert row[f'surface_dice_{tolerance}mm'] == surface.surface_dice(distances, tolerance)


def test_lesions_by_hand():
  """True lesions: A, B (two voxels that share a corner), C. Predicted: one lesion over A and B, and two false ones."""
  predicted, true = np.zeros((2, 5, 12, 12), bool)
  true[1, 1:3, 1:3] = True
  true[1, 5, 5] = true[2, 6, 6] = True
  true[3, 10, 10] = True
  predicted[1, 2, 2:6] = predicted[1, 2:6, 5] = True
  predicted[4, 0, 0] = predicted[4, 0, 2] = True
  row = masks.volume(predicted, true, GRID)
  assert row['lesions'] == 3 and row['lesions_found'] == 2
  assert row['lesion_sensitivity'] == pytest.approx(2 / 3)
  assert row['predicted_lesions'] == 3 and row['false_positives'] == 2


def test_healthy_and_missed_patients():
  empty, some = np.zeros((2, 4, 10, 10), bool)
  some[1, 2:5, 2:5] = True
  measured = dict.fromkeys(masks.DEFINITIONS, 0)
  undefined = dict.fromkeys(('dice', 'hd95_mm', 'surface_dice_1mm', 'surface_dice_2mm', 'lesion_sensitivity'), np.nan)
  diagonal, volume = pytest.approx(np.sqrt(20**2 + 8**2 + 7**2)), 9 * GRID.voxel_ml
  assert masks.volume(empty, empty, GRID) == pytest.approx(measured | undefined, nan_ok=True)
  marked = {
    'hd95_mm': diagonal,
    'predicted_ml': volume,
    'error_ml': volume,
    'predicted_lesions': 1,
    'false_positives': 1,
  }
  row = masks.volume(some, empty, GRID)
  assert np.isnan(row.pop('lesion_sensitivity'))
  assert row == {name: (measured | marked)[name] for name in row}
  missed = {'hd95_mm': diagonal, 'true_ml': volume, 'error_ml': -volume, 'lesions': 1}
  assert masks.volume(empty, some, GRID) == measured | missed


@pytest.mark.parametrize(('shear', 'expected'), [(0, np.hypot(40, 4)), (0.625, 40), (-4.0625, 50), (5.3125, 50)])
def test_distances_with_a_tilted_gantry(tmp_path, shear, expected):
  """Two voxels, eight slices of 5 mm and minus five rows of 0.8 mm apart; each slice lies `shear` rows further on."""
  masks_of = np.zeros((2, 9, 6, 5))
  masks_of[0, 0, 5, 2] = masks_of[1, 8, 0, 2] = 1
  affine = AFFINE @ nib.affines.from_matvec([[1, 0, 0], [0, 1, shear], [0, 0, 1]])
  paths = [save(tmp_path / str(n) / 'p.nii.gz', mask, affine) for n, mask in enumerate(masks_of)]
  score.score(*paths, tmp_path / 'out')
  with (tmp_path / 'out' / 'volumes.csv').open() as file:
    (row,) = csv.DictReader(file)
  assert float(row['hd95_mm']) == pytest.approx(expected, abs=1e-4)
  assert float(row['true_ml']) == pytest.approx(0.0028)  # a shear keeps volumes
  # A missed lesion: the longest diagonal of the sheared box.
  save(tmp_path / '0' / 'p.nii.gz', masks_of[0] * 0, affine)
  score.score(*paths, tmp_path / 'missed')
  with (tmp_path / 'missed' / 'volumes.csv').open() as file:
    (row,) = csv.DictReader(file)
  ends = np.array([affine[:3, :3] @ (x, y, 9) for x in (-5, 5) for y in (-6, 6)])
  assert float(row['hd95_mm']) == pytest.approx(np.linalg.norm(ends, axis=1).max(), abs=1e-4)


def test_written_files(folders, tmp_path):
  result = score.score(*folders, tmp_path / 'out')
  assert sorted(path.name for path in (tmp_path / 'out').iterdir()) == ['scores.json', 'volumes.csv']
  written = own_files.read_record(tmp_path / 'out' / 'scores.json')
  assert written.pop('files') == {'volumes.csv': files.sha256_of(tmp_path / 'out' / 'volumes.csv')}
  assert written == result
  assert (result['source'], result['truth']) == tuple(map(str, folders))
  assert result['definitions'] == masks.DEFINITIONS and result['intervals'] == statistics.method()
  with (tmp_path / 'out' / 'volumes.csv').open() as file:
    rows = list(csv.DictReader(file))
  assert [row['case'] for row in rows] == ['p0', 'p1', 'p2', 'p3', 'p4']
  assert [row['dice'] == '' for row in rows] == [False] * 4 + [True]
  assert [row['lesion_sensitivity'] == '' for row in rows] == [False] * 3 + [True] * 2
  assert int(rows[3]['false_positives']) == int(rows[3]['predicted_lesions']) > 0
  assert result['num_volumes'] == 5
  for name, measure in result['measures'].items():
    values = np.array([float(row[name]) for row in rows if row[name]])
    assert measure['defined'] == len(values)
    for average, expected in (('mean', values.mean()), ('median', np.median(values))):
      assert measure[average] == pytest.approx(expected)
      if measure[f'{average}_interval']:
        low, high = measure[f'{average}_interval']
        # The interval of a mean can reach values that no case of this test has.
        least, most = (values.min(), values.max()) if average == 'median' else masks.SUPPORT[name]
        assert least <= low <= measure[average] <= high <= most
  assert all(result['measures'][name]['mean_interval'] for name in ('hd95_mm', 'error_ml', 'false_positives'))


def test_the_log_has_means_and_intervals(folders, tmp_path, caplog):
  caplog.set_level('INFO')
  dice = score.score(*folders, tmp_path / 'out')['measures']['dice']
  low, high = dice['mean_interval']
  assert f'5 volumes, means: dice {dice["mean"]:.2f} [{low:.2f}, {high:.2f}], hd95_mm ' in caplog.text
  caplog.clear()
  healthy = [folder / f'p4{ending}.nii.gz' for folder, ending in zip(folders, ('_ct_mask', '_seg'), strict=True)]
  assert score.score(*healthy, tmp_path / 'healthy')['measures']['dice']['mean'] is None
  assert '1 volumes, means: dice undefined, hd95_mm undefined, ' in caplog.text
  assert 'error_ml 0.00, lesion_sensitivity undefined, false_positives 0.00' in caplog.text


@pytest.mark.parametrize('codes', ['RAS', 'IPL', 'ASR'])
def test_prediction_in_any_orientation(tmp_path, codes):
  predicted, true = blobs(0)
  source, truth = save(tmp_path / 'a.nii.gz', predicted), save(tmp_path / 'b.nii.gz', true)
  expected = score.score(source, truth, tmp_path / 'out')
  image = nib.load(source)
  turn = orientations.ornt_transform(orientations.io_orientation(AFFINE), orientations.axcodes2ornt(codes))
  nib.save(image.as_reoriented(turn), source)
  assert nib.aff2axcodes(nib.load(source).affine) == tuple(codes)
  assert score.score(source, truth, tmp_path / 'again') == expected


@pytest.mark.parametrize(
  ('predicted', 'true'),
  [
    (['A_ct_mask.nii.gz', 'A_ct_probability.nii.gz'], ['A_ct.nii.gz', 'A_seg.nii.gz']),  # our prediction, COVID-19-20
    (['A_ct_mask.nii.gz'], ['Train/A_ct.nii.gz', 'Train/A_seg.nii.gz']),
    (['A.nii.gz'], ['A.nii.gz', 'A_0000.nii.gz']),  # nnU-Net
    (['A_0000_pred.nii'], ['A_label.nii.gz']),
    (['A_CT_Mask.NII.GZ', 'A_CT_Probability.nii.gz'], ['A_CT.nii', 'A_SEG.nii']),
    (['A_mask.nii', '._A_mask.nii'], ['A_seg.nii']),  # macOS leaves ._ files
    (['A_ct.nii.gz'], ['A_gt.nii']),  # no other file can be the mask
    (['A/A_mask.nii.gz'], ['A/B_seg.nii.gz']),  # one file against one file
    (['A/A_mask.nii.gz'], ['A_seg.nii.gz', 'B_seg.nii.gz']),  # one file against a folder
    (['A_mask.nii.gz', 'B_mask.nii.gz'], ['A/A_seg.nii.gz']),
  ],
)
def test_matching_file_names(tmp_path, predicted, true):
  """Files that are not the mask of the case have another grid: to score one would be an error."""
  arguments = []
  for folder, names in (('predicted', predicted), ('true', true)):
    for name in names:
      is_mask = not name.endswith(('robability.nii.gz', 'A_0000.nii.gz')) and name[0] != '.'
      is_mask = is_mask and (len(names) == 1 or '_ct.' not in name.lower())
      save(tmp_path / folder / name, blobs(0)[0] if is_mask else np.ones((3, 3, 3)))
    arguments.append(tmp_path / folder / names[0] if names[0].startswith('A/') else tmp_path / folder)
  result = score.score(*arguments, tmp_path / 'out')
  assert result['num_volumes'] == 1 and result['measures']['dice']['mean'] == 1


@pytest.mark.parametrize(
  ('predicted', 'true'),
  [
    ('A_CT_MASK.NII.GZ', 'A_Seg.nii.gz'),
    ('M\xfcller_mask.nii.gz', 'Mu\u0308ller_seg.nii.gz'),  # a Mac writes u and dots
    ('M\udcfcller.nii.gz', 'M\udcfcller_gt.nii'),  # Latin-1 bytes, as unzip leaves those of Windows
  ],
)
def test_other_forms_of_a_name(tmp_path, predicted, true):
  for folder, name in (('predicted', predicted), ('TRAIN', true)):
    (tmp_path / folder).mkdir()
    save(tmp_path / 'new.nii.gz' if name.lower().endswith('gz') else tmp_path / 'new.nii', blobs(0)[0]).rename(
      tmp_path / folder / name
    )
    (tmp_path / folder / f'._{name}').write_bytes(b'resource fork')
    (tmp_path / folder / 'Thumbs.db').write_bytes(b'x')
  result = score.score(tmp_path / 'predicted', tmp_path, tmp_path / 'out')
  assert result['num_volumes'] == 1 and result['measures']['dice']['mean'] == 1
  with (tmp_path / 'out' / 'volumes.csv').open(encoding='utf-8') as file:
    (row,) = csv.DictReader(file)
  assert row['case'] in ('A', 'M\xfcller', r'M\xfcller')


def test_other_files_are_counted_and_named(folders, tmp_path, caplog):
  caplog.set_level('INFO')
  score.score(*folders, tmp_path / 'out')
  assert not [message for message in caplog.messages if 'left out' in message]
  for name in ('p0.json', 'p9.png', 'more'):
    (folders[0] / name).mkdir() if name == 'more' else (folders[0] / name).write_bytes(b'x')
  save(folders[0] / 'p0_ct_probability.nii.gz', blobs(0)[0])
  save(folders[1] / 'p0_ct.nii.gz', blobs(0)[0])
  score.score(*folders, tmp_path / 'again')
  assert [message for message in caplog.messages if 'left out' in message] == [
    'left out of input: 4 files (more, p0.json, p0_ct_probability.nii.gz, p9.png)',
    'left out of truth: 1 file (p0_ct.nii.gz)',
  ]


def test_links_and_second_masks(folders, tmp_path):
  source, truth = folders
  (source / 'p0_ct_mask.nii.gz').rename(tmp_path / 'stored.nii.gz')
  (source / 'p0_ct_mask.nii.gz').symlink_to(tmp_path / 'stored.nii.gz')
  assert score.score(source, truth, tmp_path / 'first')['num_volumes'] == 5
  (tmp_path / 'stored.nii.gz').unlink()
  save(truth / 'p1_seg.nii', blobs(1)[1])
  save(truth / 'p2_mask.nii.gz', blobs(2)[1])
  lines = refusal(source, truth, tmp_path / 'out')
  assert lines[0].startswith(f'{source}/p0_ct_mask.nii.gz: ')
  assert lines[1:] == [
    f'{truth}/p1_seg.nii.gz: same case as p1_seg.nii (p1); keep one of the two',
    f'{truth}/p2_seg.nii.gz: same case as p2_mask.nii.gz (p2); keep one of the two',
  ]


def test_all_problems_are_reported_at_once(folders, tmp_path):
  source, truth = folders
  mask = blobs(0)[0]
  save(source / 'p0_ct_mask.nii.gz', mask[:-1])
  moved = AFFINE.copy()
  moved[2, 3] += 3
  save(source / 'p1_ct_mask.nii.gz', mask, moved)
  save(source / 'p2_ct_mask.nii.gz', mask * 2)
  (source / 'p3_ct_mask.nii.gz').write_bytes(b'no mask')
  save(source / 'p4.nii.gz', mask)
  save(source / 'extra.nii.gz', mask)
  save(truth / 'missed_seg.nii.gz', mask)
  (truth / 'p3_seg.nii.gz').write_bytes(b'no mask either')
  lines = refusal(source, truth, tmp_path / 'out')
  assert lines == [
    f'{source}/extra.nii.gz: no reference mask for case extra in {truth}; add it, or remove the prediction',
    f'{source}/p0_ct_mask.nii.gz: the mask has (5, 20, 18) voxels (slices, rows, columns), but its reference mask '
    'p0_seg.nii.gz has (6, 20, 18); save the mask on the grid of its reference mask',
    f'{source}/p1_ct_mask.nii.gz: the affines of the mask and its reference mask p1_seg.nii.gz differ (corners up to '
    '3 mm apart); save the mask on the grid of its reference mask',
    f'{source}/p2_ct_mask.nii.gz: mask values must be 0 and 1, but are 0, 2; save one lesion label as 1, or '
    'name the values of each class with --classes',
    *(line for line in lines if line.startswith(f'{source}/p3_ct_mask.nii.gz: not a NIfTI file')),
    f'{source}/p4_ct_mask.nii.gz: same case as p4.nii.gz (p4); keep one of the two',
    f'{truth}/missed_seg.nii.gz: no prediction for case missed in {source}; add it, or remove the reference mask',
    *(line for line in lines if line.startswith(f'{truth}/p3_seg.nii.gz: not a NIfTI file')),
  ]
  assert len(lines) == 8


def test_nothing_to_score(folders, tmp_path):
  source, truth = folders
  out, empty = tmp_path / 'out', tmp_path / 'empty'
  empty.mkdir()
  assert refusal(tmp_path / 'no', truth, out) == [
    f'input: {tmp_path}/no does not exist; give a mask ({SCANS}), or a folder of masks'
  ]
  assert refusal(source, empty, out) == [f'truth: no mask ({SCANS}) in {empty}; give a mask, or a folder of masks']
  assert refusal(source / 'p0_ct_mask.nii.gz', save(tmp_path / 'q' / 'q.nii', blobs(0)[0]).parent, out) == [
    f'{source}/p0_ct_mask.nii.gz: no reference mask for case p0 in {tmp_path}/q; add it, or remove the prediction'
  ]


def test_no_file_is_left_incomplete(folders, tmp_path, monkeypatch):
  monkeypatch.setattr(csv.DictWriter, 'writerows', lambda *_: (_ for _ in ()).throw(OSError(28, 'disk full')))
  with pytest.raises(UserError, match='disk full'):
    score.score(*folders, tmp_path / 'out')
  assert not list((tmp_path / 'out').iterdir())


# Regions: consolidation is a part of lesion. 9 is unknown, 4 is background.
REGIONS = {'lesion': (1, 2), 'Consolidation, dense': (2,), 'background': (4,)}


@pytest.fixture
def labelled(tmp_path):
  """Predicted and reference masks of six cases with the values of REGIONS, and their arrays [S, H, W]."""
  arrays, folder = [], tmp_path / 'labelled'
  for seed in range(6):
    rng = np.random.default_rng(seed)
    both = [np.where(mask, 1, 0) for mask in blobs(seed)]
    for labels in both:
      labels[(labels == 1) & (rng.random(labels.shape) < 0.1)] = 2
      labels[(labels == 0) & (rng.random(labels.shape) < 0.1)] = 4
    both[1][:, 5:9, 3:12] = 9
    arrays.append(both)
    save(folder / 'true' / f'p{seed}_seg.nii.gz', both[1])
    save(folder / 'predicted' / f'p{seed}_ct_mask.nii.gz', both[0])
  return folder / 'predicted', folder / 'true', arrays


def in_numpy(arrays, values):
  """Dice and volumes of the voxels with these values, without those that the reference mask leaves out."""
  of_cases = {'dice': [], 'predicted_ml': [], 'true_ml': []}
  for predicted, true in arrays:
    known = true != 9
    one, other = np.isin(predicted, values) & known, np.isin(true, values) & known
    of_cases['dice'].append(f1_score(other[known], one[known]))
    of_cases['predicted_ml'].append(one.sum() * 0.0028), of_cases['true_ml'].append(other.sum() * 0.0028)
  return of_cases


def test_classes_and_ignored_voxels(labelled, tmp_path):
  source, truth, arrays = labelled
  result = score.score(source, truth, tmp_path / 'out', classes=classes.chosen(REGIONS, 9))
  with (tmp_path / 'out' / 'volumes.csv').open() as file:
    rows = list(csv.DictReader(file))
  assert [(row['case'], row['class']) for row in rows[:3]] == [
    ('p0', 'lesion'), ('p0', 'Consolidation, dense'), ('p1', 'lesion')
  ]  # fmt: skip
  assert list(rows[0]) == ['case', 'class', *masks.DEFINITIONS] and len(rows) == 12
  assert list(result['classes']) == ['lesion', 'Consolidation, dense'] and result['num_volumes'] == 6
  expected = {name: in_numpy(arrays, REGIONS[name]) for name in result['classes']}
  for name, one in result['classes'].items():
    assert one['values'] == list(REGIONS[name])
    own = [row for row in rows if row['class'] == name]
    for measure, values in expected[name].items():
      np.testing.assert_allclose([float(row[measure]) for row in own], values, rtol=1e-5)
      assert one['measures'][measure]['mean'] == pytest.approx(np.mean(values), rel=1e-5)
      interval = statistics.mean_interval(np.array([float(row[measure]) for row in own]), masks.SUPPORT[measure])
      assert one['measures'][measure]['mean_interval'] == pytest.approx(interval)
  # The interval of the average is that of each case's average: a case is drawn with both classes.
  columns = np.array([[float(row['dice']) for row in rows if row['class'] == name] for name in expected])
  dice = result['measures']['dice']
  assert dice['mean'] == pytest.approx(columns.mean())
  assert dice['mean_interval'] == pytest.approx(statistics.mean_interval(columns.mean(axis=0), (0, 1)))
  draws = np.random.default_rng(statistics.SEED)
  drawn = np.concatenate([draws.multinomial(6, np.full(6, 1 / 6), size=250) for _ in range(8)])
  averages = [np.median(np.repeat(columns, row, axis=1), axis=1).mean() for row in drawn]
  tail = statistics.expanded_tail(6)
  assert dice['median'] == pytest.approx(np.median(columns, axis=1).mean())
  assert dice['median_interval'] == pytest.approx(np.quantile(averages, [tail, 1 - tail]))
  assert (result['ignore_label'], 'background in both masks' in result['ignored']) == (9, True)
  assert 'over_classes' in result['intervals'] and dice['mean_over'] == list(expected)


def test_ignored_voxels_count_as_background_for_distances_and_lesions(labelled, tmp_path):
  source, truth, arrays = labelled
  score.score(source, truth, tmp_path / 'out', classes=classes.chosen(REGIONS, 9))
  for number, both in enumerate(arrays):
    for array, folder in zip(both, ('one', 'other'), strict=True):
      save(tmp_path / folder / f'p{number}.nii.gz', np.isin(array, (1, 2)) & (both[1] != 9))
  score.score(tmp_path / 'one', tmp_path / 'other', tmp_path / 'binary')
  tables = []
  for folder in ('out', 'binary'):
    with (tmp_path / folder / 'volumes.csv').open() as file:
      tables.append([row for row in csv.DictReader(file) if row.pop('class', 'lesion') == 'lesion'])
  assert tables[0] == tables[1]


def test_one_class_is_scored_as_before(folders, labelled, tmp_path):
  """One class with a name or without it: the same files. With other values, the same numbers."""
  score.score(*folders, tmp_path / 'out')
  score.score(*folders, tmp_path / 'named', classes=classes.chosen({'anything': (1,)}, None))
  read = lambda folder: [path.read_bytes() for path in sorted((tmp_path / folder).iterdir())]
  assert read('out') == read('named')
  source, truth, _ = labelled
  both = score.score(source, truth, tmp_path / 'both', classes=classes.chosen(REGIONS, 9))
  dense = REGIONS | {'background': (1, 4)}
  del dense['lesion']
  one = score.score(source, truth, tmp_path / 'one', classes=classes.chosen(dense, 9))
  assert 'classes' not in one and one['measures'] == both['classes']['Consolidation, dense']['measures']


def test_a_class_without_voxels_is_left_out_of_averages(labelled, tmp_path, caplog):
  source, truth, _ = labelled
  named = classes.chosen(REGIONS | {'effusion': (3,)}, 9)
  result = score.score(source, truth, tmp_path / 'out', classes=named)
  assert result['classes']['effusion']['measures']['dice']['defined'] == 0
  without = score.score(source, truth, tmp_path / 'without', classes=classes.chosen(REGIONS, 9))
  for name in ('dice', 'hd95_mm'):
    assert result['measures'][name] == without['measures'][name]
    assert result['measures'][name]['mean_over'] == list(without['classes'])
  assert result['measures']['true_ml']['mean_over'] == list(result['classes'])
  assert result['measures']['true_ml']['mean'] == pytest.approx(
    np.mean([one['measures']['true_ml']['mean'] for one in result['classes'].values()])
  )
  assert [record.message for record in caplog.records if record.levelname == 'WARNING'] == [
    'effusion: no reference mask has this class'
  ]


def test_values_without_a_meaning_are_refused(labelled, tmp_path):
  source, truth, arrays = labelled
  named = classes.chosen({'lesion': (1, 2), 'background': (4,)}, 9, classes.Keys('--classes', '--ignore_label'))
  save(source / 'p0_ct_mask.nii.gz', np.where(arrays[0][0] == 4, 7, arrays[0][0]))
  outside = arrays[1][0].copy()
  outside[0, 0, 0] = 9
  save(source / 'p1_ct_mask.nii.gz', outside)
  with pytest.raises(UserError) as caught:
    score.score(source, truth, tmp_path / 'out', classes=named)
  lines = str(caught.value).splitlines()
  assert lines[0] == (
    f'{source}/p0_ct_mask.nii.gz: the mask value 7 belongs to no class of --classes; add it to a class, to '
    "'background', or give it as --ignore_label"
  )
  assert not (tmp_path / 'out').exists()
  save(source / 'p0_ct_mask.nii.gz', arrays[0][0])
  with pytest.raises(UserError, match='p1_ct_mask.nii.gz: the prediction has the value 9 of --ignore_label where its'):
    score.score(source, truth, tmp_path / 'out', classes=named)
  outside[0, 0, 0], outside[:, 5:9, 3:12] = 0, 9  # where the reference mask leaves voxels out, it may have the value
  save(source / 'p1_ct_mask.nii.gz', outside)
  score.score(source, truth, tmp_path / 'out', classes=named)


@pytest.mark.slow
@pytest.mark.skipif(not REAL.is_file(), reason='the real masks are not beside the checkout')
@pytest.mark.filterwarnings('ignore:monai:FutureWarning', 'ignore:the prediction of class 0 is all 0')
@pytest.mark.parametrize('change', ['moved', 'dilated', 'emptied'])
def test_a_real_mask(tmp_path, change):
  """Compares a lung tumour on 5 mm slices with MONAI."""
  metrics, torch = pytest.importorskip('monai.metrics'), pytest.importorskip('torch')
  image = nib.load(REAL)
  true = np.asarray(image.dataobj).astype(bool)
  predicted = {'moved': np.roll(true, 1, 0), 'dilated': ndimage.binary_dilation(true), 'emptied': np.zeros_like(true)}
  nib.save(nib.Nifti1Image(predicted[change].astype(np.uint8), None, image.header), tmp_path / 'a.nii.gz')
  measures = score.score(tmp_path / 'a.nii.gz', REAL, tmp_path / 'out')['measures']
  ours = {name: measure['mean'] for name, measure in measures.items()}
  spacing = tuple(map(float, image.header.get_zooms()))
  tensors = [torch.from_numpy(mask)[None, None].float() for mask in (predicted[change], true)]
  assert ours['dice'] == pytest.approx(float(metrics.compute_dice(*tensors)), abs=1e-6)
  options = {'include_background': True, 'spacing': spacing}
  for tolerance in (1, 2):
    theirs = float(metrics.compute_surface_dice(*tensors, [tolerance], **options))
    assert ours[f'surface_dice_{tolerance}mm'] == pytest.approx(theirs, abs=1e-6)
  theirs = float(metrics.compute_hausdorff_distance(*tensors, percentile=95, **options))
  if change == 'emptied':  # undefined in MONAI; here the diagonal of the scan
    assert not np.isfinite(theirs)
    theirs = np.linalg.norm(np.multiply(true.shape, spacing))
  assert ours['hd95_mm'] == pytest.approx(theirs, abs=1e-4)
  ml = np.prod(spacing) / 1000
  assert ours['true_ml'] == pytest.approx(true.sum() * ml, rel=1e-5)
  assert ours['predicted_ml'] == pytest.approx(predicted[change].sum() * ml, rel=1e-5)


@pytest.mark.parametrize('file', ['volumes.csv', 'scores.json'])
def test_tables_of_others_are_not_replaced(tmp_path, file):
  """Its own table is; one that was edited, or written by another program, is not."""
  save(tmp_path / 'masks' / 'a.nii.gz', np.eye(8, dtype=np.uint8)[..., None].repeat(3, 2))
  run = lambda **options: score.score(tmp_path / 'masks', tmp_path / 'masks', tmp_path / 'out', **options)
  run()
  run()
  with (tmp_path / 'out' / file).open('a') as table:
    table.write('a note')
  noted = (tmp_path / 'out' / file).read_bytes()
  with pytest.raises(UserError, match=rf'{file}: exists, and this program did not write it, or it was changed since'):
    run()
  assert (tmp_path / 'out' / file).read_bytes() == noted
  run(overwrite=True)
  assert b'a note' not in (tmp_path / 'out' / file).read_bytes()


def test_intervals_of_volumes_draw_persons():
  """Persons with one to three scans: the mean is that of the scans, the interval that of drawn persons in NumPy."""
  rng = np.random.default_rng(4)
  persons = np.repeat(np.arange(8), rng.integers(1, 4, 8))
  rows = [dict.fromkeys(masks.DEFINITIONS, float(person + rng.random())) for person in persons]
  got = masks.summary(rows, [f'p{person}' for person in persons])['measures']['dice']
  values, draws = np.array([row['dice'] for row in rows]), np.random.default_rng(statistics.SEED)
  drawn = np.concatenate([draws.multinomial(8, np.full(8, 1 / 8), size=250) for _ in range(8)])
  means, tail = [np.repeat(values, row[persons]).mean() for row in drawn], statistics.expanded_tail(8)
  assert got['mean'] == pytest.approx(values.mean())
  assert got['mean_interval'] == pytest.approx(np.quantile(means, [tail, 1 - tail]))
  as_patients = masks.summary(rows)['measures']['dice']['mean_interval']
  assert np.ptp(as_patients) < np.ptp(got['mean_interval'])
