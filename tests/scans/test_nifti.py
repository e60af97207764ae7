"""Reading and writing scans, compared with nibabel on the same files; and the reason of each refusal."""

import gzip
import itertools
import zlib

import nibabel as nib
import numpy as np
import pytest
from nibabel import affines, orientations
from nifti_files import SHAPE, chest, save

from fusa_jax.scans import nifti, volume_files, volumes
from fusa_jax.scans.classes import of_lesion
from fusa_jax.system.errors import UserError

ORIENTATIONS = [
  ''.join(axes)
  for pairs in itertools.permutations([('L', 'R'), ('P', 'A'), ('S', 'I')])
  for axes in itertools.product(*pairs)
]


@pytest.mark.parametrize('codes', ORIENTATIONS)
def test_every_orientation_is_converted_to_canonical_axes_and_back(tmp_path, codes):
  path = save(tmp_path / 'a_ct.nii.gz', chest(), codes, oblique=0.2)
  scan = volume_files.read_scan(path)
  stored = nib.load(path)
  data = np.asarray(stored.dataobj)
  assert nib.aff2axcodes(scan.affine) == ('L', 'P', 'S')
  # The affine gives the position of each canonical voxel; the file has the same value there.
  for s, r, c in np.ndindex(scan.values.shape):
    world = affines.apply_affine(scan.affine, [c, r, s])
    place = affines.apply_affine(np.linalg.inv(stored.affine), world)
    np.testing.assert_allclose(place, np.rint(place), atol=1e-4)
    assert scan.values[s, r, c] == data[tuple(np.rint(place).astype(int))]
  nifti.write_volume(tmp_path / 'back.nii.gz', scan.values, scan)
  back = nib.load(tmp_path / 'back.nii.gz')
  np.testing.assert_array_equal(np.asarray(back.dataobj), data)
  np.testing.assert_array_equal(back.affine, stored.affine)


@pytest.mark.parametrize('sform', [True, False])
def test_masks_keep_both_affines_and_codes_but_no_text(tmp_path, sform):
  path = save(tmp_path / 'a.nii', chest(), 'RAS', oblique=0.3, sform=sform)
  image = nib.load(path)
  image.header['descrip'] = b'John Doe'
  image.header.extensions.append(nib.nifti1.Nifti1Extension('comment', b'born 1950'))
  nib.save(image, tmp_path / 'named.nii.gz')
  scan = volume_files.read_scan(tmp_path / 'named.nii.gz')
  mask = (scan.values > 0).astype(np.uint8)
  nifti.write_volume(tmp_path / 'out' / 'mask.nii.gz', mask, scan)
  out = nib.load(tmp_path / 'out' / 'mask.nii.gz')
  assert out.get_data_dtype() == np.uint8
  assert out.header.get_slope_inter() in ((None, None), (1.0, 0.0))
  for fields in ('qform_code', 'sform_code', 'pixdim', 'srow_x', 'srow_y', 'srow_z', 'quatern_c', 'qoffset_x'):
    np.testing.assert_array_equal(out.header[fields], image.header[fields])
  raw = gzip.decompress((tmp_path / 'out' / 'mask.nii.gz').read_bytes())
  assert b'John' not in raw and b'1950' not in raw
  assert sorted(p.name for p in (tmp_path / 'out').iterdir()) == ['mask.nii.gz']


@pytest.mark.parametrize(
  ('slope', 'intercept', 'dtype'), [(1, -1024, np.uint16), (2, 0, np.int16), (0.5, -500, np.int16)]
)
def test_scaling_is_applied(tmp_path, slope, intercept, dtype):
  stored = ((chest().astype(float) - intercept) / slope).astype(dtype)
  image = nib.Nifti1Image(stored, np.diag([-1, -1, 1, 1]))
  image.header.set_slope_inter(slope, intercept)
  nib.save(image, tmp_path / 'a.nii.gz')
  # Nibabel may replace the slope by 1; its own reading of the file is the reference.
  expected = np.rint(nib.load(tmp_path / 'a.nii.gz').get_fdata()).transpose(2, 1, 0)
  np.testing.assert_array_equal(volume_files.read_scan(tmp_path / 'a.nii.gz').values, expected)


@pytest.mark.parametrize('shear', [0.0, 0.3])
def test_from_volume_equals_reading_the_file(tmp_path, shear):
  """The scan and its mask equal those from the file. Quaternions are written if they can represent the affine."""
  stored = nib.load(save(tmp_path / 'a.nii.gz', chest(), 'RPI', oblique=0.2))
  affine = stored.affine @ affines.from_matvec([[1, 0, 0], [0, 1, shear], [0, 0, 1]])
  stored.set_sform(affine, 1)
  nib.save(stored, tmp_path / 'a.nii.gz')
  scan, of_file = volumes.from_volume(chest(), affine, 'series 3'), volume_files.read_scan(tmp_path / 'a.nii.gz')
  np.testing.assert_array_equal(scan.values, of_file.values)
  np.testing.assert_array_equal(scan.affine, of_file.affine)
  nifti.write_volume(tmp_path / 'mask.nii.gz', (scan.values > 0).astype(np.uint8), scan)
  mask = nib.load(tmp_path / 'mask.nii.gz')
  np.testing.assert_array_equal(np.asarray(mask.dataobj), chest() > 0)
  np.testing.assert_allclose(mask.affine, affine, rtol=1e-6)
  np.testing.assert_allclose(mask.header.get_zooms(), np.linalg.norm(affine[:3, :3], axis=0), rtol=1e-6)
  quaternions, code = mask.get_qform(coded=True)
  assert code == (shear == 0)
  if code:
    np.testing.assert_allclose(quaternions, affine, atol=1e-4)
  with pytest.raises(UserError, match=r'^series 3: values 0 to 1 are a mask, not HU'):
    volumes.from_volume((chest() > 0).astype(np.int16), affine, 'series 3')


@pytest.mark.parametrize('name', ['a.nii', 'a.nii.gz'])
@pytest.mark.parametrize('image_class', [nib.Nifti1Image, nib.Nifti2Image])
def test_both_formats(tmp_path, name, image_class):
  scan = volume_files.read_scan(save(tmp_path / name, chest(), image_class=image_class))
  np.testing.assert_array_equal(scan.values, chest().transpose(2, 1, 0))
  np.testing.assert_allclose(scan.spacing, (5.0, 0.8, 0.7))
  np.testing.assert_allclose(scan.voxel_ml, 0.7 * 0.8 * 5 / 1000)
  nifti.write_volume(tmp_path / 'out.nii.gz', scan.values, scan)
  assert isinstance(nib.load(tmp_path / 'out.nii.gz'), image_class)


def test_padding_is_clipped_to_air(tmp_path):
  data = chest()
  data[0] = -3024
  data[1, 0, 0] = 3071
  hu = volume_files.read_scan(save(tmp_path / 'a.nii.gz', data)).values
  assert hu.dtype == np.int16
  np.testing.assert_array_equal(hu, np.maximum(data, -1024).transpose(2, 1, 0))


def test_mask_stored_in_another_orientation_than_its_scan(tmp_path):
  data = chest()
  mask = (data > 100).astype(np.uint8)
  scan = volume_files.read_scan(save(tmp_path / 'a_ct.nii.gz', data))
  image = nib.load(save(tmp_path / 'a_seg.nii.gz', mask))
  turned = image.as_reoriented(
    orientations.ornt_transform(orientations.axcodes2ornt('LPS'), orientations.axcodes2ornt('IRA'))
  )
  nib.save(turned, tmp_path / 'turned_seg.nii.gz')
  np.testing.assert_array_equal(volume_files.read_mask(tmp_path / 'turned_seg.nii.gz', scan), mask.transpose(2, 1, 0))


def bad(kind, path):
  """Writes a file with one fault."""
  data = chest()
  if kind == 'absent':
    return
  if kind == 'text':
    path.write_text('not a scan' * 100)
  elif kind == 'empty':
    path.write_bytes(b'')
  elif kind in ('truncated gzip', 'flipped byte', 'no gzip trailer'):
    raw = bytearray(save(path, np.tile(data, (4, 4, 4))).read_bytes())
    if kind == 'flipped byte':
      raw[len(raw) // 2] ^= 0xFF
    path.write_bytes(raw[: len(raw) // 2] if kind == 'truncated gzip' else raw[:-6] if 'trailer' in kind else raw)
  elif kind == 'truncated':
    plain = save(path.with_name('plain.nii'), data)
    path.write_bytes(gzip.compress(plain.read_bytes()[:-50]))
  elif kind == '4d':
    nib.save(nib.Nifti1Image(np.stack([data, data], -1), np.eye(4)), path)
  elif kind == '2d':
    nib.save(nib.Nifti1Image(data[..., 0], np.eye(4)), path)
  elif kind == 'no voxels':
    save(path, data[:0])
  elif kind in ('nan', 'inf'):
    data = data.astype(np.float32)
    data[1, 2, 3] = float(kind)
    save(path, data)
  elif kind == 'colour':
    save(path, np.zeros(SHAPE, np.dtype([('R', 'u1'), ('G', 'u1'), ('B', 'u1')])))
  elif kind == 'one slice':
    save(path, data[..., :1])
  elif kind == 'flat affine':
    image = nib.Nifti1Image(data, None)
    image.header['sform_code'] = 1
    nib.save(image, path)
    raw = bytearray(gzip.decompress(path.read_bytes()))
    raw[280:328] = bytes(48)  # srow_x, srow_y, srow_z
    path.write_bytes(gzip.compress(raw))
  elif kind == 'parallel axes':
    image = nib.Nifti1Image(data, None)
    image.set_sform(np.array([[1, 1, 0, 0], [0, 1e-6, 0, 0], [0, 0, 5, 0], [0, 0, 0, 1.0]]), 1)
    nib.save(image, path)
  elif kind == 'mask':
    save(path, (data > 100).astype(np.uint8))
  elif kind == '0-255':
    save(path, np.linspace(0, 255, data.size).reshape(SHAPE).astype(np.uint8))
  elif kind == 'normalised':
    save(path, np.linspace(0, 1, data.size).reshape(SHAPE).astype(np.float32))
  elif kind == 'z-scores':
    save(path, np.random.default_rng(0).normal(size=SHAPE).astype(np.float32))
  elif kind == 'unsigned':
    save(path, (data + 1024).astype(np.uint16))
  elif kind == 'soft tissue window':
    save(path, np.clip(data, -160, 240))
  elif kind == 'lung window':
    save(path, np.clip(data, -1350, 150))


REFUSALS = {
  'absent': 'file not found',
  'text': 'not a NIfTI file',
  'empty': 'the file is empty',
  'truncated gzip': 'truncated or unreadable',
  'flipped byte': 'truncated or unreadable',
  'no gzip trailer': 'truncated or unreadable',
  'truncated': 'truncated or damaged',
  '4d': '4D array of shape',
  '2d': '2D array of shape',
  'no voxels': r'3D array of shape \(0, 6, 5\); save one 3D volume',
  'nan': '1 of 210 voxels are NaN or infinite',
  'inf': '1 of 210 voxels are NaN or infinite',
  'colour': 'not numbers',
  'one slice': '1 axial slice',
  'flat affine': r'invalid affine \(zero or undefined spacing\)',
  'parallel axes': 'its axes are nearly parallel',
  'mask': 'values 0 to 1 are a mask, not HU',
  '0-255': 'values 0 to 255 are an 8-bit image, not HU',
  'normalised': 'values 0 to 1 are normalised data, not HU',
  'z-scores': 'hold no air',
  'unsigned': 'raw scanner values, not HU',
  'soft tissue window': 'hold no air',
  'lung window': 'windowed: .*% of all voxels have the highest value, 150',
}


@pytest.mark.parametrize('kind', REFUSALS)
def test_refusals_name_the_file_and_the_reason(tmp_path, kind):
  path = tmp_path / 'bad_ct.nii.gz'
  bad(kind, path)
  with pytest.raises(UserError, match=REFUSALS[kind]) as caught:
    volume_files.read_scan(path)
  message = str(caught.value)
  assert message.startswith(f'{path}: ')
  assert '\n' not in message


@pytest.mark.parametrize(
  ('change', 'reason'),
  [
    (lambda m, a: (m[:-1], a), r'the mask has \(5, 6, 6\) voxels .*, but its scan a_ct.nii.gz has \(5, 6, 7\)'),
    (lambda m, a: (m, affines.from_matvec(a[:3, :3], a[:3, 3] + [3, 0, 0])), 'corners up to 3 mm apart'),
    (lambda m, a: (m, a @ np.diag([1.05, 1, 1, 1])), 'the affines of the mask and its scan a_ct.nii.gz differ'),
    (lambda m, a: (m * 2, a), 'mask values must be 0 and 1, but are 0, 2'),
    (lambda m, a: (m * 0.5, a), 'mask values must be 0 and 1, but are 0, 0.5'),
    (lambda m, a: (np.arange(m.size, dtype=np.int16).reshape(m.shape), a), '0, 1, 2, 3, 4, 5, ...;'),
  ],
)
def test_bad_masks_are_refused(tmp_path, change, reason):
  data = chest()
  scan = volume_files.read_scan(save(tmp_path / 'a_ct.nii.gz', data))
  mask, affine = change((data > 100).astype(np.uint8), nib.load(tmp_path / 'a_ct.nii.gz').affine)
  nib.save(nib.Nifti1Image(mask, affine), tmp_path / 'a_seg.nii.gz')
  with pytest.raises(UserError, match=reason) as caught:
    volume_files.read_mask(tmp_path / 'a_seg.nii.gz', scan)
  assert str(caught.value).startswith(f'{tmp_path / "a_seg.nii.gz"}: ')


@pytest.mark.parametrize(
  ('stored', 'scaling'),
  [
    (lambda labels: labels * np.float32(0.9999), None),
    (lambda labels: labels * 0.99999 - 4e-4, None),
    (lambda labels: (labels * 30583).astype(np.uint16), (1 / 30583.3, 0)),
    (lambda labels: (labels * 100 - 100).astype(np.int16), (0.01, 1)),
  ],
)
def test_labels_that_a_scaling_rounded_are_whole_numbers(tmp_path, stored, scaling):
  scan = volume_files.read_scan(save(tmp_path / 'a_ct.nii.gz', chest()))
  for values in ((0, 1), (0, 1, 2)):
    labels = np.random.default_rng(0).choice(values, SHAPE)
    image = nib.Nifti1Image(stored(labels), nib.load(tmp_path / 'a_ct.nii.gz').affine)
    if scaling:
      image.header.set_slope_inter(*scaling)
    path = tmp_path / f'{len(values)}.nii'
    nib.save(image, path)
    if scaling:  # nibabel stores integers without a scaling
      raw = bytearray(path.read_bytes())
      raw[112:120] = np.array(scaling, '<f4').tobytes()
      path.write_bytes(raw)
    read = nib.load(path).get_fdata()
    assert not np.array_equal(read, labels) and np.abs(read - labels).max() <= 1e-3
    mask, distinct = volume_files.read_mask_and_values(path, scan, of_lesion((1,)))
    np.testing.assert_array_equal(mask, (labels == 1).transpose(2, 1, 0))
    assert mask.dtype == np.uint8 and distinct == values
    np.testing.assert_array_equal(volume_files.read_mask(path, scan, of_lesion((1,))), mask)
  path = tmp_path / '2.nii'
  mask = volume_files.read_labels(path).mask
  np.testing.assert_array_equal(volume_files.read_mask_and_values(path, scan)[0], mask)
  assert volume_files.read_mask_and_values(path, scan)[1] == (0, 1) and set(np.unique(mask)) == {0, 1}


@pytest.mark.parametrize(('value', 'shown'), [(0.5, '0.5'), (0.998, '0.998'), (1.0011, '1.0011'), (-0.002, '-0.002')])
def test_labels_that_are_not_whole_numbers_are_refused(tmp_path, value, shown):
  scan = volume_files.read_scan(save(tmp_path / 'a_ct.nii.gz', chest()))
  mask = np.zeros(SHAPE)
  mask[1, 2, 3] = value
  path = save(tmp_path / 'a_seg.nii', mask)
  for function, refusal in (
    (
      lambda: volume_files.read_mask(path, scan, of_lesion((1,))),
      'labels in a mask must be whole numbers, but values are',
    ),
    (lambda: volume_files.read_mask(path, scan), 'mask values must be 0 and 1, but are'),
    (lambda: volume_files.read_labels(path), 'mask values must be 0 and 1, but are'),
  ):
    listed = ', '.join(sorted(['0', shown], key=float))
    with pytest.raises(UserError, match=f'^{path}: {refusal} {listed};'):
      function()


def test_distinct_values_of_a_mask(tmp_path):
  """A cohort compares them with its lesion labels, so they must be those of the file, not of the lesions."""
  scan = volume_files.read_scan(save(tmp_path / 'a_ct.nii.gz', chest()))
  for dtype in (np.int16, np.float64):
    for values in ((0,), (0, 255), (-1, 0, 3, 7), (1, 2)):
      labels = np.random.default_rng(0).choice(values, SHAPE).astype(dtype)
      path = save(tmp_path / 'a_seg.nii', labels)
      mask, distinct = volume_files.read_mask_and_values(path, scan, of_lesion((3,)))
      assert distinct == tuple(np.unique(labels)) == values and all(type(value) is int for value in distinct)
      assert mask.sum() == np.count_nonzero(labels == 3)


def test_affines_that_differ_by_float32_are_the_same_grid(tmp_path):
  """The mask has a float32 quaternion (qform only); the scan has a float32 matrix (sform)."""
  data = chest()
  scan = volume_files.read_scan(save(tmp_path / 'a_ct.nii.gz', data, oblique=0.3))
  mask = (data > 100).astype(np.uint8)
  save(tmp_path / 'a_seg.nii.gz', mask, oblique=0.3, sform=False)
  assert not np.array_equal(nib.load(tmp_path / 'a_seg.nii.gz').affine, nib.load(tmp_path / 'a_ct.nii.gz').affine)
  np.testing.assert_array_equal(volume_files.read_mask(tmp_path / 'a_seg.nii.gz', scan), mask.transpose(2, 1, 0))


def test_a_mask_without_a_scan(tmp_path):
  """A mask read without its scan equals the mask read with it."""
  data = chest()
  labels = (data > 100).astype(np.uint8)
  scan = volume_files.read_scan(save(tmp_path / 'a_ct.nii.gz', data, 'RAS', oblique=0.2))
  mask = volume_files.read_labels(save(tmp_path / 'a_seg.nii.gz', labels, 'RAS', oblique=0.2))
  np.testing.assert_array_equal(mask.mask, volume_files.read_mask(mask.path, scan))
  assert mask.mask.dtype == np.uint8 and mask.shape == mask.mask.shape == scan.shape == scan.values.shape
  np.testing.assert_allclose(mask.affine, scan.affine)
  assert mask.spacing == scan.spacing and mask.voxel_ml == scan.voxel_ml
  volumes.check_same_grid(mask, scan, 'scan')
  other = volume_files.read_labels(save(tmp_path / 'b_seg.nii.gz', labels, 'RAS', oblique=0.3))
  with pytest.raises(
    UserError, match=r'a_seg.nii.gz: the affines of the mask and its reference mask b_seg.nii.gz differ'
  ):
    volumes.check_same_grid(mask, other, 'reference mask')
  with pytest.raises(UserError, match='mask values must be 0 and 1, but are 0, 3;'):
    volume_files.read_labels(save(tmp_path / 'c_seg.nii.gz', labels * 3))


def test_resize_keeps_means_and_positions():
  """Compares with the definition: halving averages with a triangle filter; a ramp stays a ramp at pixel centres."""
  ramp = np.tile(np.arange(16, dtype=np.int16), (2, 16, 1))
  half = volumes.resize(ramp, (8, 8))
  np.testing.assert_allclose(half[0, 0, 1:-1], 2 * np.arange(1, 7) + 0.5, atol=1e-4)
  same = volumes.resize(ramp, (16, 16))
  np.testing.assert_array_equal(same, ramp)
  assert volumes.resize(ramp, (24, 32)).shape == (2, 24, 32)


def test_gzip_damage_is_detected_as_by_python(tmp_path):
  """Random damage and trailing bytes, compared with Python's gzip: refused if it refuses, otherwise the same bytes."""
  path, rng, outcomes = tmp_path / 'a.nii.gz', np.random.default_rng(0), set()
  whole = save(path, chest()).read_bytes()
  files = [whole + tail for tail in (b'', bytes(9), b'xyz', whole[:30])] + [whole[:n] for n in (2, 9, 200, -1)]
  for _ in range(300):
    raw = bytearray(whole)
    for position in rng.integers(2, len(raw), rng.integers(1, 3)):
      raw[position] = rng.integers(256)
    files.append(bytes(raw))
  for content in files:
    path.write_bytes(content)
    try:
      expected = gzip.decompress(content) == gzip.decompress(whole)
    except (OSError, EOFError, zlib.error):
      with pytest.raises(UserError, match='truncated or unreadable'):
        volume_files.read_scan(path)
      outcomes.add('refused')
    else:
      assert expected
      np.testing.assert_array_equal(volume_files.read_scan(path).values, chest().transpose(2, 1, 0))
      outcomes.add('read')
  assert outcomes == {'refused', 'read'}


def test_equal_volumes_give_equal_files(tmp_path):
  scan = volume_files.read_scan(save(tmp_path / 'a.nii', chest()))
  for name in ('b.nii.gz', 'c.nii.gz', 'd.nii'):
    nifti.write_volume(tmp_path / name, scan.values, scan)
  first, second, plain = ((tmp_path / name).read_bytes() for name in ('b.nii.gz', 'c.nii.gz', 'd.nii'))
  assert first == second and gzip.decompress(first) == plain


@pytest.mark.parametrize(
  ('shape', 'affine'), [((2, 40_000, 2), np.eye(4)), ((2, 2, 2), np.eye(3)), ((2, 2, 2), [['a'] * 4] * 4)]
)
def test_invalid_shapes_and_affines_give_one_line(shape, affine):
  with pytest.raises(UserError, match=r'^array: invalid shape or affine \(.*\); save it again$'):
    volumes.from_volume(np.zeros(shape, np.int16), affine, 'array')
