"""MetaImage, NRRD and pairs of .hdr and .img: compared with SimpleITK and nibabel; what they do not say is refused."""

import gzip
import pathlib

import nibabel as nib
import numpy as np
import pytest
from dicom_series import affine_of
from nifti_files import chest, save

from data.cohorts import pairs
from fusa_jax.measures import score
from fusa_jax.scans import itk, nifti, sources, volume_files
from fusa_jax.scans.classes import of_lesion
from fusa_jax.system.errors import UserError

sitk = pytest.importorskip('SimpleITK')

MASK = (chest() > 100).astype(np.uint8)
LPS = np.diag([-1, -1, 1, 1])
AFFINES = {
  'axial': affine_of('LPS'),
  'RAS': affine_of('RAS'),
  'coronal': affine_of('LIP'),
  'oblique': affine_of('LPI', turn=0.3),
}


def write(path, data=None, affine=AFFINES['oblique'], compressed=False):
  """Writes an array [x, y, z] with SimpleITK."""
  image = sitk.GetImageFromArray(np.ascontiguousarray((chest() if data is None else data).T))
  lps = LPS @ affine
  spacing = np.linalg.norm(lps[:3, :3], axis=0)
  image.SetSpacing(spacing.tolist())
  image.SetDirection((lps[:3, :3] / spacing).ravel().tolist())
  image.SetOrigin(lps[:3, 3].tolist())
  sitk.WriteImage(image, str(path), compressed)
  return path


def pair(path, data=None, affine=AFFINES['oblique'], image_class=nib.Nifti1Pair):
  image = image_class(chest() if data is None else data, affine)
  if image_class in (nib.Nifti1Pair, nib.Nifti2Pair):
    image.set_qform(affine, 1)
    image.set_sform(affine, 2)
  nib.save(image, path)
  return path


def compressed_pair(path):
  """As FSL writes pairs: .hdr.gz and .img.gz."""
  pair(path.with_name('plain.hdr'))
  for ending in ('hdr', 'img'):
    plain = path.with_name(f'plain.{ending}')
    path.with_name(f'a.{ending}.gz').write_bytes(gzip.compress(plain.read_bytes()))
    plain.unlink()
  return path


@pytest.mark.parametrize('affine', AFFINES.values(), ids=AFFINES)
@pytest.mark.parametrize('compressed', [False, True])
@pytest.mark.parametrize('name', ['a.mha', 'a.mhd', 'a.nrrd', 'a.nhdr'])
def test_values_lie_where_nibabel_finds_those_of_the_converted_file(tmp_path, name, compressed, affine):
  path = write(tmp_path / name, affine=affine, compressed=compressed)
  sitk.WriteImage(sitk.ReadImage(str(path)), str(tmp_path / 'converted.nii'))
  converted = nib.load(tmp_path / 'converted.nii')
  np.testing.assert_allclose(converted.affine, affine, atol=1e-4)
  scan, expected = volume_files.read_scan(path), volume_files.read_scan(tmp_path / 'converted.nii')
  np.testing.assert_array_equal(scan.values, expected.values)
  np.testing.assert_allclose(scan.affine, expected.affine, atol=1e-4)
  # Results are NIfTI, on the grid of the scan for nibabel and for SimpleITK.
  nifti.write_volume(tmp_path / 'mask.nii.gz', (scan.values > 100).astype(np.uint8), scan)
  mask = nib.load(tmp_path / 'mask.nii.gz')
  np.testing.assert_array_equal(np.asarray(mask.dataobj), MASK)
  np.testing.assert_allclose(mask.affine, affine, atol=1e-4)
  theirs, own = sitk.ReadImage(str(tmp_path / 'mask.nii.gz')), sitk.ReadImage(str(path))
  for get in ('GetSize', 'GetSpacing', 'GetOrigin', 'GetDirection'):
    np.testing.assert_allclose(getattr(theirs, get)(), getattr(own, get)(), atol=1e-4)


@pytest.mark.parametrize('image_class', [nib.Nifti1Pair, nib.Nifti2Pair])
@pytest.mark.parametrize('affine', AFFINES.values(), ids=AFFINES)
def test_pairs_are_read_as_by_nibabel(tmp_path, affine, image_class):
  path = pair(tmp_path / 'a.hdr', affine=affine, image_class=image_class)
  scan = volume_files.read_scan(path)
  image, single = nib.load(path), {nib.Nifti1Pair: nib.Nifti1Image, nib.Nifti2Pair: nib.Nifti2Image}[image_class]
  nib.save(single(np.asarray(image.dataobj), None, image.header), tmp_path / 'b.nii')
  expected = volume_files.read_scan(tmp_path / 'b.nii')
  np.testing.assert_array_equal(scan.values, expected.values)
  np.testing.assert_array_equal(scan.affine, expected.affine)
  nifti.write_volume(tmp_path / 'mask.nii.gz', (scan.values > 100).astype(np.uint8), scan)
  mask, stored = nib.load(tmp_path / 'mask.nii.gz'), nib.load(path)
  np.testing.assert_array_equal(np.asarray(mask.dataobj), MASK)
  for field in ('pixdim', 'sform_code', 'qform_code', 'srow_x', 'quatern_b', 'qoffset_z'):
    np.testing.assert_array_equal(mask.header[field], stored.header[field])


def test_capital_endings_and_compressed_pairs(tmp_path):
  expected = volume_files.read_scan(pair(tmp_path / 'b.hdr')).values
  (tmp_path / 'b.hdr').rename(tmp_path / 'B.HDR'), (tmp_path / 'b.img').rename(tmp_path / 'B.IMG')
  for path in (tmp_path / 'B.HDR', compressed_pair(tmp_path / 'a.hdr.gz')):
    np.testing.assert_array_equal(volume_files.read_scan(path).values, expected)
  for name in ('c.mha', 'c.nrrd'):
    path = write(tmp_path / name).rename(tmp_path / name.upper())
    np.testing.assert_array_equal(volume_files.read_scan(path).values, expected)
    assert volume_files.stem(path) == 'C'


def test_all_formats_in_one_folder(tmp_path):
  """Each header is one input with its data file; masks and loose data files are left out, and named."""
  folder = tmp_path / 'in'
  folder.mkdir()
  for name in ('a.mha', 'b.mhd', 'c.nrrd', 'd.nhdr'):
    write(folder / name)
  write(folder / 'z.mhd', compressed=True)
  pair(folder / 'e.hdr')
  save(folder / 'f.nii', chest())
  write(folder / 'c.seg.nrrd', MASK)
  write(folder / 'b_seg.mhd', MASK)
  (folder / 'loose.raw').write_bytes(b'1')
  (folder / 'loose.img').write_bytes(b'1')
  (tmp_path / 'unpacked').mkdir()
  messages = []
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sources.logging, 'info', lambda text, *values: messages.append(text % values))
    found = sources.find_sources(folder, 'hu', tmp_path / 'unpacked')
  assert sorted(source.name for source in found) == ['a.mha', 'b.mhd', 'c.nrrd', 'd.nhdr', 'e.hdr', 'f.nii', 'z.mhd']
  assert sorted(source.stem for source in found) == ['a', 'b', 'c', 'd', 'e', 'f', 'z']
  files = {source.stem: [path.name for path in source.files()] for source in found}
  assert files['b'] == ['b.mhd', 'b.raw'] and files['d'] == ['d.nhdr', 'd.raw'] and files['e'] == ['e.hdr', 'e.img']
  assert files['z'] == ['z.mhd', 'z.zraw'] and files['a'] == ['a.mha']
  (line,) = messages
  assert line.startswith('left out: 5 files (')
  assert set(line.partition('(')[2][:-1].split(', ')) == {
    'loose.img',
    'loose.raw',
    'b_seg.mhd',
    'b_seg.raw',
    'c.seg.nrrd',
  }
  for source in found:
    np.testing.assert_array_equal(
      source.read_image('hu').values.shape, chest().shape[::-1] if source.stem == 'f' else (5, 6, 7)
    )
  # The digest covers the values: they are not in the header.
  digest = found[1].sha256()
  (folder / 'b.raw').write_bytes((folder / 'b.raw').read_bytes()[::-1])
  assert found[1].sha256() != digest


@pytest.mark.parametrize('name', ['p_seg.mha', 'p_seg.nhdr', 'p.seg.nrrd', 'p_seg.hdr', 'p_seg.nii.gz'])
def test_masks_of_every_format(tmp_path, name):
  """A mask may have another format than its scan; cohorts and scores find it by its name."""
  scan = volume_files.read_scan(write(tmp_path / 'p_ct.nrrd'))
  labels = MASK * 3
  path = tmp_path / name
  if name.endswith('.nii.gz'):
    nib.save(nib.Nifti1Image(MASK, AFFINES['oblique']), path)
  else:
    (pair if name.endswith('.hdr') else write)(path, MASK)
  np.testing.assert_array_equal(volume_files.read_mask(path, scan), scan.values > 100)
  np.testing.assert_array_equal(volume_files.read_labels(path).mask, scan.values > 100)
  assert volume_files.stem(path) == 'p_seg'
  result = score.score(path, path, tmp_path / 'scores')
  assert result['measures']['dice']['mean'] == 1
  assert result['measures']['true_ml']['mean'] == pytest.approx(MASK.sum() * 0.7 * 0.8 * 5 / 1000, rel=1e-5)
  if 'hdr' not in name and 'nii' not in name:
    write(path, labels)
    mask, values = volume_files.read_mask_and_values(path, scan, of_lesion((3,)))
    np.testing.assert_array_equal(mask, scan.values > 100)
    assert values == (0, 3)


def change(path, old, new):
  """Replaces text in a header."""
  content = path.read_bytes()
  assert old in content
  path.write_bytes(content.replace(old, new))
  return path


@pytest.mark.parametrize(
  ('name', 'old', 'new', 'reason'),
  [
    ('a.mha', b'ElementSpacing', b'Unknown', 'states no spacing'),
    ('a.mha', b'TransformMatrix', b'Unknown', 'states no axes'),
    ('a.nrrd', b'space: left-posterior-superior', b'space dimension: 3', 'states no anatomical space'),
    ('a.nhdr', b'space: left-posterior-superior', b'space: scanner-xyz', 'states no anatomical space'),
  ],
)
def test_a_header_without_geometry_is_refused(tmp_path, name, old, new, reason):
  for path in (write(tmp_path / name), write(tmp_path / f'mask{name}', MASK)):
    change(path, old, new)
    with pytest.raises(UserError, match=f'^{path}: the header {reason} .*7 x 6 x 5 voxels'):
      (volume_files.read_labels if 'mask' in path.name else volume_files.read_scan)(path)


@pytest.mark.parametrize(
  ('space', 'signs'), [(b'right-anterior-superior', (-1, -1)), (b'RAS', (-1, -1)), (b'left-anterior-superior', (1, -1))]
)
def test_spaces_of_nrrd(tmp_path, space, signs):
  """The same numbers in another space turn the scan."""
  expected = volume_files.read_scan(write(tmp_path / 'b.nrrd')).affine
  path = change(write(tmp_path / 'a.nrrd'), b'left-posterior-superior', space)
  stored = volume_files.read_grid(path).affine
  # World positions of the first stored voxel, in RAS+.
  first = lambda affine, flips: np.diag([*flips, 1, 1]) @ affine
  assert not np.allclose(stored, expected)
  turned = first(AFFINES['oblique'], signs)
  np.testing.assert_allclose(np.abs(np.linalg.det(stored[:3, :3])), np.abs(np.linalg.det(turned[:3, :3])), rtol=1e-5)
  corners = lambda affine: {
    tuple((affine @ [x, y, z, 1]).round(2) + 0.0) for x in (0, 6) for y in (0, 5) for z in (0, 4)
  }
  assert corners(stored) == corners(turned)


@pytest.mark.parametrize(
  ('name', 'old', 'new', 'factor'),
  [
    ('a.mha', b'ElementSpacing', b'DistanceUnits = um\nElementSpacing', 0.001),
    ('a.mha', b'ElementSpacing', b'DistanceUnits = cm\nElementSpacing', 10),
    ('a.nrrd', b'kinds:', b'space units: "m" "m" "m"\nkinds:', 1000),
    ('a.nrrd', b'kinds:', b'space units: "mm" "mm" "mm"\nkinds:', 1),
  ],
)
def test_units_are_applied(tmp_path, name, old, new, factor):
  affine = np.diag([1 / factor] * 3 + [1]) @ AFFINES['oblique']
  scan = volume_files.read_scan(change(write(tmp_path / name, affine=affine), old, new))
  np.testing.assert_allclose(scan.spacing, (5, 0.8, 0.7), rtol=1e-5)
  np.testing.assert_allclose(
    scan.affine, volume_files.read_scan(write(tmp_path / 'b.mha')).affine, rtol=1e-5, atol=1e-5
  )


def bad(kind, tmp_path):
  """Writes a file with one fault."""
  if kind.startswith('no data file'):
    name = kind.split()[-1]
    path = (pair if name == 'hdr' else write)(tmp_path / f'a.{name}')
    path.with_suffix('.img' if name == 'hdr' else '.raw').unlink()
  elif kind.startswith(('truncated', 'flipped', 'compressed')):
    name = kind.split()[-1]
    path = write(tmp_path / f'a.{name}', compressed='truncated' not in kind)
    data = {'mhd': '.raw' if 'truncated' in kind else '.zraw', 'nhdr': '.raw' if 'truncated' in kind else '.raw.gz'}
    file = path.with_suffix(data[name]) if name in data else path
    raw = bytearray(file.read_bytes())
    if 'flipped' in kind:
      raw[-30] ^= 0xFF
    file.write_bytes(raw if 'flipped' in kind else raw[:-40])
  elif kind.startswith('empty'):
    path = tmp_path / f'a.{kind.split()[-1]}'
    path.write_bytes(b'')
  elif kind.startswith('text'):
    path = tmp_path / f'a.{kind.split()[-1]}'
    path.write_text('not a scan\n' * 100)
  elif kind == 'layers':
    path = tmp_path / 'a.seg.nrrd'
    layers = sitk.GetImageFromArray(np.stack([MASK, MASK], -1), isVector=True)
    sitk.WriteImage(layers, str(path))
  elif kind == 'time series':
    path = tmp_path / 'a.nrrd'
    sitk.WriteImage(sitk.GetImageFromArray(np.stack([chest().T] * 2), isVector=False), str(path))
  elif kind == 'picture':
    path = tmp_path / 'a.mha'
    sitk.WriteImage(sitk.GetImageFromArray(chest()[0]), str(path))
  elif kind == 'unknown unit':
    path = change(write(tmp_path / 'a.mha'), b'ElementSpacing', b'DistanceUnits = furlong\nElementSpacing')
  elif kind == 'analyze':
    path = pair(tmp_path / 'a.hdr', affine=np.diag([-0.7, 0.8, 5, 1]), image_class=nib.AnalyzeImage)
  elif kind == 'spm':
    path = pair(tmp_path / 'a.hdr', affine=np.diag([-0.7, 0.8, 5, 1]), image_class=nib.Spm99AnalyzeImage)
  elif kind == 'two data files':
    path = pair(tmp_path / 'a.hdr')
    (tmp_path / 'a.img.gz').write_bytes(gzip.compress((tmp_path / 'a.img').read_bytes()))
  elif kind == 'data file':
    path = pair(tmp_path / 'a.hdr').with_suffix('.img')
  return path


REFUSALS = {
  'no data file mhd': 'its data file a.raw is missing; copy it beside the header',
  'no data file nhdr': 'its data file a.raw is missing; copy it beside the header',
  'no data file hdr': r'has no data file \(.img\); copy it beside the header',
  **{f'truncated {name}': 'truncated or damaged' for name in ('mha', 'mhd', 'nrrd', 'nhdr')},
  **{f'compressed {name}': 'truncated or unreadable' for name in ('mha', 'mhd', 'nrrd', 'nhdr')},
  **{f'flipped {name}': 'truncated or unreadable' for name in ('mha', 'mhd', 'nrrd', 'nhdr')},
  **{f'empty {name}': 'the file is empty' for name in ('mha', 'mhd', 'nrrd', 'nhdr', 'hdr', 'nii')},
  'text mha': 'not a MetaImage file',
  'text nrrd': 'not a NRRD file',
  'text hdr': 'Analyze|not a NIfTI file|no data file',
  'layers': '2 values per voxel, which are colours or layers of a segmentation',
  'time series': r'4D array of shape \(7, 6, 5, 2\); save one 3D volume',
  'picture': '2D array of shape',
  'unknown unit': r'unknown unit of length \(furlong\)',
  'analyze': 'Analyze states no orientation',
  'spm': 'Analyze states no orientation',
  'two data files': 'has two data files, a.img and a.img.gz; keep one',
  'data file': r'holds only the values; give its header \(a.hdr\)',
}


@pytest.mark.parametrize('kind', REFUSALS)
def test_refusals_name_the_file_and_the_reason(tmp_path, kind):
  path = bad(kind, tmp_path)
  for function in (volume_files.read_scan, volume_files.read_labels):
    with pytest.raises(UserError, match=REFUSALS[kind]) as caught:
      function(path)
    assert str(caught.value).startswith(f'{path}: ') and '\n' not in str(caught.value)


def test_data_files_in_a_list_or_pattern(tmp_path):
  path = write(tmp_path / 'a.mhd')
  raw, size = (tmp_path / 'a.raw').read_bytes(), 7 * 6 * 2
  for number in range(5):
    (tmp_path / f'slice{number}.raw').write_bytes(raw[number * size : (number + 1) * size])
  header, names = path.read_text(), [f'slice{number}.raw' for number in range(5)]
  for value in ('slice%d.raw 0 4 1', '\n'.join(['LIST', *names])):
    path.write_text(header.replace('a.raw', value))
    assert [file.name for file in volume_files.data_files(path)] == names
    np.testing.assert_array_equal(
      volume_files.read_scan(path).values, volume_files.read_scan(write(tmp_path / 'b.mha')).values
    )
  (tmp_path / 'slice3.raw').unlink()
  with pytest.raises(UserError, match=f'^{path}: its data file slice3.raw is missing'):
    volume_files.read_scan(path)


def test_without_simpleitk(tmp_path, monkeypatch):
  path = write(tmp_path / 'a.mha')
  monkeypatch.setattr(itk.importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(UserError, match=f'^{path}: SimpleITK is not installed; pip install -r requirements-itk.txt$'):
    volume_files.read_scan(path)


def test_files_without_permission(tmp_path, monkeypatch):
  def denied(path, *arguments):
    raise PermissionError(13, 'Permission denied', str(path))

  for path in (write(tmp_path / 'a.mha'), pair(tmp_path / 'a.hdr'), save(tmp_path / 'a.nii.gz', chest())):
    with monkeypatch.context() as patch:
      patch.setattr(pathlib.Path, 'open', denied)
      with pytest.raises(UserError, match=f'^{path}: you have no permission to read'):
        volume_files.read_scan(path)


def test_pairs_of_a_cohort(tmp_path):
  """A cohort of other formats is found by the names of its files."""
  for number in range(2):
    write(tmp_path / f'p{number}.mha'), write(tmp_path / f'p{number}_mask.mha', MASK)
  found = [(case.patient, case.ct.name, case.mask.name) for case in pairs.find(tmp_path)]
  assert found == [('p0', 'p0.mha', 'p0_mask.mha'), ('p1', 'p1.mha', 'p1_mask.mha')]


@pytest.mark.parametrize(
  ('name', 'old', 'new'),
  [
    ('a.nrrd', b'(0,0,5)', b'(0,1.5,5)'),
    ('a.mha', b'1 0 0 0 1 0 0 0 1\n', b'1 0 0 0 1 0 0 0.287347886 0.957826285\n'),  # 1.5 and 5 of 5.22
  ],
)
def test_a_tilted_gantry_keeps_its_shear(tmp_path, name, old, new):
  spacing = (0.7, 0.8, 5.0 if name == 'a.nrrd' else np.hypot(1.5, 5))
  path = change(write(tmp_path / name, affine=np.diag([-spacing[0], -spacing[1], spacing[2], 1])), old, new)
  scan = volume_files.read_scan(path)
  np.testing.assert_allclose(scan.steps, [[0, -1.5, 5], [0, -0.8, 0], [-0.7, 0, 0]], atol=1e-6)
  assert scan.voxel_ml == pytest.approx(0.7 * 0.8 * 5 / 1000, rel=1e-6)
  nifti.write_volume(tmp_path / 'mask.nii', (scan.values > 100).astype(np.uint8), scan)
  np.testing.assert_allclose(nib.load(tmp_path / 'mask.nii').affine, scan.affine, atol=1e-6)
