"""What a header says of the place of its voxels: units, two affines, none, and more than three axes."""

import logging

import nibabel as nib
import numpy as np
import pytest
from nibabel import affines
from nifti_files import SHAPE, chest

from fusa_jax.scans import nifti, volume_files, volumes
from fusa_jax.system.errors import UserError

AFFINE = np.array([[-0.7, 0, 0, 12.5], [0, -0.8, 0, -40.25], [0, 0, 5, 300], [0, 0, 0, 1]])
MASK = (chest() > 100).astype(np.uint8)


def write(path, data=None, sform=AFFINE, qform=AFFINE, codes=(1, 1), zooms=None, units='mm'):
  """Writes a file with two affines, a spacing and a unit of their own."""
  image = nib.Nifti1Image(chest() if data is None else data, sform)
  image.set_sform(sform, codes[0])
  image.set_qform(qform, codes[1])
  image.header.set_xyzt_units(units)
  if zooms:
    image.header['pixdim'][1:4] = zooms
  nib.save(image, path)
  return path


def stretched(*factors):
  return AFFINE @ np.diag([*factors, 1])


def turned(degrees):
  return affines.from_matvec(nib.eulerangles.euler2mat(np.radians(degrees), 0, 0)) @ AFFINE


@pytest.mark.parametrize(('units', 'millimetres'), [('meter', 1000), ('micron', 0.001), ('mm', 1), ('unknown', 1)])
def test_units_are_applied_and_kept(tmp_path, units, millimetres):
  affine = np.diag([1 / millimetres] * 3 + [1]) @ AFFINE
  path = write(tmp_path / 'a.nii', sform=affine, qform=affine, units=units)
  scan = volume_files.read_scan(path)
  np.testing.assert_allclose(scan.spacing, (5, 0.8, 0.7), rtol=1e-5)
  assert scan.voxel_ml == pytest.approx(0.7 * 0.8 * 5 / 1000, rel=1e-5)
  np.testing.assert_allclose(affines.apply_affine(scan.affine, [0, 0, 0]), [12.5, -40.25, 300], rtol=1e-5)
  # ITK applies units, too.
  simpleitk = pytest.importorskip('SimpleITK')
  np.testing.assert_allclose(simpleitk.ReadImage(str(path)).GetSpacing(), scan.spacing[::-1], rtol=1e-5)
  # The mask lies on the scan for programs that apply the unit, and for those that do not, as nibabel.
  nifti.write_volume(tmp_path / 'mask.nii', MASK.transpose(2, 1, 0), scan)
  stored, mask = nib.load(path), nib.load(tmp_path / 'mask.nii')
  np.testing.assert_array_equal(mask.affine, stored.affine)
  assert mask.header.get_xyzt_units() == stored.header.get_xyzt_units()
  np.testing.assert_array_equal(mask.header['pixdim'], stored.header['pixdim'])
  theirs, own = (simpleitk.ReadImage(str(one)) for one in (tmp_path / 'mask.nii', path))
  for get in ('GetSpacing', 'GetOrigin', 'GetDirection'):
    np.testing.assert_allclose(getattr(theirs, get)(), getattr(own, get)(), rtol=1e-6)
  # A mask in millimetres is on the same grid as a scan in metres.
  other = write(tmp_path / 'other.nii', MASK)
  for one in (tmp_path / 'mask.nii', other):
    np.testing.assert_array_equal(volume_files.read_mask(one, scan), MASK.transpose(2, 1, 0))
    assert volume_files.read_labels(one).voxel_ml == pytest.approx(scan.voxel_ml, rel=1e-5)


@pytest.mark.parametrize(
  ('factor', 'units', 'shown'),
  [(0.001, 'unknown', '0.0007 x 0.0008 x 0.005'), (1, 'meter', '700 x 800 x 5000'), (1000, 'mm', '700 x 800 x 5000')],
)
def test_voxels_of_an_impossible_size_are_refused(tmp_path, factor, units, shown):
  affine = np.diag([factor] * 3 + [1]) @ AFFINE
  path = write(tmp_path / 'a.nii', sform=affine, qform=affine, units=units)
  for function in (volume_files.read_scan, volume_files.read_labels, volume_files.read_grid):
    with pytest.raises(UserError, match=f'^{path}: voxels of {shown} mm cannot be those of a CT'):
      function(path)
  with pytest.raises(UserError, match=r'^array: voxels of 0.0007 x 0.0008 x 0.005 mm cannot be'):
    volumes.from_volume(chest(), np.diag([0.001] * 3 + [1]) @ AFFINE, 'array')


@pytest.mark.parametrize('more', [(1,), (1, 1), (1, 1, 1, 1)])
def test_further_axes_of_length_1_do_not_matter(tmp_path, more):
  data = chest().reshape(*SHAPE, *more)
  scan = volume_files.read_scan(write(tmp_path / 'a.nii.gz', data))
  np.testing.assert_array_equal(scan.values, chest().transpose(2, 1, 0))
  path = write(tmp_path / 'a_seg.nii.gz', MASK.reshape(*SHAPE, *more))
  np.testing.assert_array_equal(volume_files.read_mask(path, scan), MASK.transpose(2, 1, 0))
  np.testing.assert_array_equal(volume_files.read_labels(path).mask, MASK.transpose(2, 1, 0))
  nifti.write_volume(tmp_path / 'mask.nii.gz', MASK.transpose(2, 1, 0), scan)
  mask = nib.load(tmp_path / 'mask.nii.gz')
  np.testing.assert_array_equal(np.asarray(mask.dataobj), MASK)
  np.testing.assert_array_equal(mask.affine, nib.load(tmp_path / 'a.nii.gz').affine)


@pytest.mark.parametrize('more', [(2,), (1, 2), (1, 1, 1, 3)])
def test_several_volumes_are_refused(tmp_path, more):
  data = np.broadcast_to(chest().reshape(*SHAPE, *[1] * len(more)), (*SHAPE, *more))
  path = write(tmp_path / 'a.nii.gz', np.ascontiguousarray(data))
  with pytest.raises(UserError, match=rf'^{path}: {3 + len(more)}D array of shape \(7, 6, 5, .*; save one 3D volume'):
    volume_files.read_scan(path)


@pytest.mark.parametrize(
  ('header', 'readings'),
  [
    (
      {'sform': np.diag([-1, -1, 1, 1])},
      'sform: 1 x 1 x 1 mm, axes LPS, 0.001 mL per voxel; qform: 0.7 x 0.8 x 5 mm, axes LPS, 0.0028 mL per voxel',
    ),
    ({'qform': stretched(1, 1, 0.5)}, 'sform: 0.7 x 0.8 x 5 mm, .*; qform: 0.7 x 0.8 x 2.5 mm, axes LPS, 0.0014 mL'),
    ({'qform': AFFINE @ np.diag([-1, 1, 1, 1])}, 'sform: .* axes LPS, .*; qform: .* axes RPS, 0.0028 mL per voxel'),
    ({'qform': AFFINE @ np.diag([-1, -1, 1, 1])}, 'sform: .* axes LPS, .*; qform: .* axes RAS, 0.0028 mL per voxel'),
    ({'qform': turned(3)}, 'sform: 0.7 x 0.8 x 5 mm, axes LPS, .*; qform: 0.7 x 0.8 x 5 mm, axes LPS'),
    ({'codes': (2, 0), 'zooms': (1, 1, 1)}, 'sform: 0.7 x 0.8 x 5 mm, .*; pixdim: 1 x 1 x 1 mm, .* 0.001 mL per voxel'),
  ],
)
def test_two_geometries_are_refused(tmp_path, header, readings):
  scan = volume_files.read_scan(write(tmp_path / 'right.nii'))
  path = write(tmp_path / 'a.nii', MASK, **header)
  write(tmp_path / 'b.nii', **header)
  for function in (
    lambda: volume_files.read_labels(path),
    lambda: volume_files.read_mask(path, scan),
    lambda: volume_files.read_scan(tmp_path / 'b.nii'),
  ):
    with pytest.raises(UserError, match=rf'/[ab].nii: the header gives two (geometries|spacings) \({readings}'):
      function()


SHEARED = AFFINE @ affines.from_matvec([[1, 0, 0], [0, 1, 1.5], [0, 0, 1]])


@pytest.mark.parametrize(
  'header',
  [
    {'qform': affines.from_matvec(AFFINE[:3, :3], [12.5, -37.25, 300])},
    {'qform': stretched(1, 1, 1.005)},
    {'codes': (1, 0), 'zooms': (0.7, 0.8, 5.025)},
    # nibabel writes the nearest affine without shear; others leave out the shear.
    {'sform': SHEARED, 'qform': SHEARED},
    {'sform': SHEARED},
  ],
)
def test_a_second_position_is_said(tmp_path, caplog, header):
  path = write(tmp_path / 'a.nii', **header)
  scan = volume_files.read_scan(path)
  assert [record.levelno for record in caplog.records] == [logging.WARNING]
  name = 'pixdim' if 'zooms' in header else 'qform'
  message = caplog.records[0].getMessage()
  assert message.startswith(f'{path}: sform and {name} lie up to ')
  shown, _ = message.removeprefix(f'{path}: sform and {name} lie up to ').split(' mm apart', 1)
  image = nib.load(path)
  other = image.get_qform() if name == 'qform' else stretched(1, 1, 5.025 / 5)
  corners = np.array(np.meshgrid(*[(0, n - 1) for n in SHAPE])).reshape(3, -1).T
  expected = np.linalg.norm(affines.apply_affine(image.affine, corners) - affines.apply_affine(other, corners), axis=1)
  assert float(shown) == pytest.approx(expected.max(), rel=0.01)
  assert scan.voxel_ml == pytest.approx(abs(np.linalg.det(image.affine)) / 1000)


@pytest.mark.parametrize('header', [{}, {'codes': (0, 1)}, {'codes': (2, 0)}, {'qform': stretched(1, 1, 1.00001)}])
def test_rounding_is_no_second_geometry(tmp_path, caplog, header):
  volume_files.read_scan(write(tmp_path / 'a.nii', **header))
  assert not caplog.records


@pytest.mark.parametrize(
  ('header', 'reason'),
  [
    ({'codes': (0, 0)}, r'has no orientation \(the codes of sform and qform are 0\)'),
    ({'sform': np.eye(4), 'qform': np.eye(4)}, 'has the identity as affine'),
    ({'sform': np.eye(4), 'qform': np.eye(4), 'codes': (2, 0)}, 'has the identity as affine'),
    ({'sform': np.eye(4), 'qform': np.eye(4), 'codes': (0, 1)}, 'has the identity as affine'),
  ],
)
def test_a_guessed_orientation_is_refused(tmp_path, header, reason):
  scan, mask = write(tmp_path / 'a.nii', **header), write(tmp_path / 'b.nii', MASK, **header)
  for function, path in ((volume_files.read_scan, scan), (volume_files.read_labels, mask)):
    with pytest.raises(UserError, match=rf'^{path}: the header {reason}.*\(7 x 6 x 5 voxels of .* mm\)'):
      function(path)
  # The loose slices of a cohort do not form a volume.
  loose = volume_files.read_scan(scan, loose=True)
  assert volume_files.read_mask(mask, loose).sum() == MASK.sum()


@pytest.mark.parametrize(
  ('diagonal', 'shown'),
  [
    ((-1, -1, 1), '1 x 1 x 1 mm, axes LPS and origin 0'),
    ((0.7, 0.8, 5), '0.7 x 0.8 x 5 mm, axes RAS and origin 0'),
    ((-0.7, 0.8, 5), '0.7 x 0.8 x 5 mm, axes LAS and origin 0'),
  ],
)
def test_a_position_that_nobody_set_is_said(tmp_path, caplog, diagonal, shown):
  affine = np.diag([*diagonal, 1.0])
  path = write(tmp_path / 'a.nii', sform=affine, qform=affine)
  assert volume_files.read_scan(path).voxel_ml == pytest.approx(abs(np.prod(diagonal)) / 1000)
  assert f'{path}: 7 x 6 x 5 voxels of {shown}' in caplog.text


@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize(
  ('start', 'values'),
  [
    (256, [1, 1, 1]),
    (256, [np.nan] * 3),
    (268, [np.nan] * 3),
    (80, [np.nan] * 3),
    (80, [-np.inf] * 3),
  ],
  ids=['quaternion', 'no quaternion', 'no offset', 'no pixdim', 'infinite pixdim'],
)
def test_impossible_values_beside_an_sform_are_no_reading(tmp_path, start, values):
  path = write(tmp_path / 'a.nii')
  raw = bytearray(path.read_bytes())
  raw[start : start + 12] = np.array(values, '<f4').tobytes()
  path.write_bytes(raw)
  np.testing.assert_allclose(volume_files.read_scan(path).spacing, (5, 0.8, 0.7), rtol=1e-6)
