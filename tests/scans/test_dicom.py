"""DICOM series compared with dcm2niix's output for the same files; and the reason of each refusal."""

import builtins
import logging
import pathlib
import shutil
import subprocess

import dcm2niix
import dicom_series
import nibabel as nib
import numpy as np
import pydicom
import pytest
from dicom_series import affine_of, all_changed, find
from nibabel import affines
from nifti_files import chest
from pydicom import fileset, uid

from fusa_jax.scans import dicom, nifti, volume_files
from fusa_jax.system.errors import UserError

REAL = pathlib.Path('../shared/ct/Train/volume-lung1_ct.nii.gz')


def read(folder):
  (series,) = find(folder)
  return dicom.read_series(series)


def of_dcm2niix(folder, tmp_path):
  """Returns dcm2niix's image of a folder, and its output."""
  out = tmp_path / 'dcm2niix'
  out.mkdir()
  done = subprocess.run([dcm2niix.bin, '-z', 'n', '-f', 'a', '-o', out, folder], capture_output=True, text=True)
  return nib.load(out / 'a.nii'), done.stdout


@pytest.mark.parametrize(
  'affine',
  [
    affine_of('LPS'),
    affine_of('LPI'),
    affine_of('RAS'),
    affine_of('LIP'),
    affine_of('PIL'),
    affine_of('LPS', turn=0.3),
    affine_of('LPI', turn=-0.2, spacing=(0.6543, 0.6543, 0.625)),
  ],
  ids=['axial', 'from the head', 'prone', 'coronal', 'sagittal', 'oblique', 'oblique, thin'],
)
def test_values_have_the_positions_of_dcm2niix(tmp_path, affine):
  hu = chest()
  scan = read(dicom_series.save(tmp_path / 'in', dicom_series.slices(hu, affine)))
  other, _ = of_dcm2niix(tmp_path / 'in', tmp_path)
  nib.save(nib.Nifti1Image(np.asarray(other.dataobj), other.affine), tmp_path / 'other.nii')
  other = volume_files.read_scan(tmp_path / 'other.nii')
  np.testing.assert_allclose(scan.affine, other.affine, atol=2e-4)
  np.testing.assert_array_equal(scan.values, other.values)
  # The written mask has the same affine.
  nifti.write_volume(tmp_path / 'mask.nii.gz', (scan.values > 0).astype(np.uint8), scan)
  mask = nib.load(tmp_path / 'mask.nii.gz')
  np.testing.assert_allclose(mask.get_qform(), mask.affine, atol=1e-3)
  mask, true = (nib.as_closest_canonical(image) for image in (mask, nib.Nifti1Image(hu, affine)))
  np.testing.assert_allclose(mask.affine, true.affine, atol=1e-4)
  np.testing.assert_array_equal(np.asarray(mask.dataobj), np.asarray(true.dataobj) > 0)


@pytest.mark.parametrize('syntax', dicom_series.SYNTAXES)
def test_each_transfer_syntax(tmp_path, syntax):
  hu, affine = chest((24, 20, 5)), affine_of('LPS')
  scan = read(dicom_series.save(tmp_path / 'in', dicom_series.slices(hu, affine), syntax))
  np.testing.assert_array_equal(scan.values, hu.transpose(2, 1, 0))


def test_each_slice_has_its_own_slope_and_intercept(tmp_path):
  hu = chest() // 2 * 2
  made = [
    one
    for index, (slope, intercept) in enumerate([(1, -1024), (2, -1024), (0.5, -1000), (1, -8192), (1, -1024)])
    for one in dicom_series.slices(hu, affine_of('LPS'), slope=slope, intercept=intercept)[index : index + 1]
  ]
  np.testing.assert_array_equal(read(dicom_series.save(tmp_path / 'in', made)).values, hu.transpose(2, 1, 0))


def test_a_tilted_gantry_is_reported_and_kept_as_shear(tmp_path, caplog):
  """dcm2niix reports the tilt, too. (It then resamples the slices to an affine without shear.)"""
  affine = affine_of('LPS', shear=np.tan(np.radians(15)) * 5 / 0.8)
  made = dicom_series.slices(chest(), affine, GantryDetectorTilt='15')
  scan = read(dicom_series.save(tmp_path / 'in', made))
  assert caplog.messages == [
    f'{scan.path}: the gantry was tilted by 15.0 degrees; the mask has the same shear in its affine'
  ]
  nifti.write_volume(tmp_path / 'mask.nii.gz', (scan.values > 0).astype(np.uint8), scan)
  mask = nib.load(tmp_path / 'mask.nii.gz')
  np.testing.assert_allclose(mask.affine, affine, atol=1e-4)
  np.testing.assert_array_equal(np.asarray(mask.dataobj), chest() > 0)
  for index, one in enumerate(made):  # DICOM axes point left and back
    place = affines.apply_affine(mask.affine, [0, 0, index]) * [-1, -1, 1]
    np.testing.assert_allclose(place, np.array(one.ImagePositionPatient, float), atol=1e-4)
  assert 'gantry tilt of' in of_dcm2niix(tmp_path / 'in', tmp_path)[1]


def one_changed(index=2, **elements):
  def change(made):
    for key, value in elements.items():
      setattr(made[index], key, value)
    return made

  return change


def moved(index, z):
  def change(made):
    x, y, _ = made[index].ImagePositionPatient
    made[index].ImagePositionPatient = [x, y, z]
    return made

  return change


def alternating(**elements):
  def change(made):
    for index, one in enumerate(made):
      for key, values in elements.items():
        setattr(one, key, values[index % 2])
    return made

  return change


def again(made):
  return made + [pydicom.Dataset(made[1])]


def smaller(made):
  made[1].Rows, made[1].PixelData = 3, made[1].PixelData[: 3 * made[1].Columns * 2]
  return made


def in_colour(made):
  for one in made:
    one.SamplesPerPixel, one.PhotometricInterpretation, one.PlanarConfiguration = 3, 'RGB', 0
    one.PixelData *= 3
  return made


def frames(made):
  made[0].NumberOfFrames, made[0].PixelData = 2, made[0].PixelData * 2
  return made[:1]


def cut(made):
  made[2].PixelData = made[2].PixelData[:10]
  return made


# Slices of chest() lie at 300, 305, ..., 320 mm.
REFUSALS = {
  'a slice is missing': (lambda made: made[:2] + made[3:], r'1 slices are missing between the 4 present'),
  'a slice is there twice': (again, r'1 of 6 slices have the position of another slice \(copies'),
  'two phases': (
    lambda made: made + [pydicom.Dataset(one) for one in made],
    r'5 of 10 slices have the position of another slice',
  ),
  'uneven': (moved(2, 311.0), r'unevenly spaced slices, 4 to 6 mm apart'),
  'shifted sideways': (one_changed(ImagePositionPatient=[3, 40.25, 310]), r'unevenly spaced'),
  'orientations': (
    one_changed(ImageOrientationPatient=[1, 0, 0, 0, 0.8, 0.6]),
    r'slices differ in orientation; export one series per scan',
  ),
  'skewed': (all_changed(ImageOrientationPatient=[1, 0, 0, 0.6, 0.8, 0]), r'invalid orientation \(rows and columns'),
  'no direction': (all_changed(ImageOrientationPatient=[0, 0, 0, 0, 1, 0]), r'invalid orientation \(rows and columns'),
  'pixel spacings': (one_changed(PixelSpacing=[0.8, 0.9]), r'slices differ in pixel spacing'),
  'sizes': (smaller, r'slices differ in size, \(3, 7\) and \(6, 7\) pixels'),
  'no spacing': (all_changed(PixelSpacing=None), r'5 of 5 slices lack position, orientation, spacing or size'),
  'a slice without position': (one_changed(ImagePositionPatient=None), r'1 of 5 slices lack position'),
  'no volume': (all_changed(PixelSpacing=[0, 0]), r'invalid affine'),
  'no modality': (all_changed(Modality=''), r'the modality must be CT, but is missing; remove it from the input'),
  'colour': (in_colour, r'the images are in colour'),
  'multi-frame': (frames, r'several frames in one file \(enhanced CT\); export it with one file per slice'),
  'two patients': (one_changed(4, PatientID='OTHER'), r'its slices belong to 2 patients; export one series per scan$'),
  'two patients without IDs': (
    lambda made: one_changed(0, PatientName='Markername^Otto')(all_changed(PatientID='')(made)),
    r'its slices belong to 2 patients',
  ),
  'two birth dates without IDs': (
    lambda made: one_changed(0, PatientBirthDate='19030715')(all_changed(PatientID='')(made)),
    r'its slices belong to 2 patients',
  ),
  'two frames of reference': (one_changed(FrameOfReferenceUID='1.2.3'), r'its slices belong to 2 frames of reference'),
  'two acquisitions': (alternating(AcquisitionNumber=[1, 2]), r'slices of 2 acquisitions alternate \(Acquisit'),
  'two dates': (alternating(AcquisitionDate=['20200401', '20200402']), r'alternate \(AcquisitionDate differs\)'),
  'two times': (alternating(AcquisitionTime=['101010', '101130.25']), r'alternate \(AcquisitionTime differs\)'),
  'two kernels': (alternating(ConvolutionKernel=['B30f', 'B70f']), r'alternate \(ConvolutionKernel differs\); export'),
  'two voltages': (alternating(KVP=['80', '140']), r'alternate \(KVP differs\)'),
  'two image types': (
    alternating(ImageType=[['ORIGINAL', 'PRIMARY', 'AXIAL', 'E1'], ['ORIGINAL', 'PRIMARY', 'AXIAL', 'E2']]),
    r'alternate \(ImageType differs\)',
  ),
  'with and without contrast': (alternating(ContrastBolusAgent=['', 'Iohexol']), r'alternate \(ContrastBolusAgent'),
  'cut': (cut, r': IM00000\d: cannot be decoded \(.*\); copy it again from its source'),
  'no HU': (all_changed(RescaleIntercept='0'), r'raw scanner values, not HU'),
}


@pytest.mark.parametrize('kind', REFUSALS)
def test_refusals_name_the_series_and_the_reason(tmp_path, kind):
  change, reason = REFUSALS[kind]
  folder = dicom_series.save(tmp_path / 'in', change(dicom_series.slices(chest(), affine_of('LPS'))))
  with pytest.raises(UserError, match=reason) as caught:
    read(folder)
  message = str(caught.value)
  assert message.startswith('series3_') and ' (Chest 5.0): ' in message
  assert '\n' not in message and str(tmp_path) not in message


def test_rounded_positions_count_as_even(tmp_path):
  """Positions are rounded to 0.1 mm at a spacing of 0.625 mm: the steps are 0.6 and 0.7 mm."""
  hu = chest((7, 6, 40))
  affine = affine_of('LPS', (0.7, 0.8, 0.625))
  made = dicom_series.slices(hu, affine)
  for one in made:
    one.ImagePositionPatient = [round(float(value), 1) for value in one.ImagePositionPatient]
  scan = read(dicom_series.save(tmp_path / 'in', made))
  np.testing.assert_allclose(scan.spacing[0], 0.625, atol=0.003)
  np.testing.assert_array_equal(scan.values, hu.transpose(2, 1, 0))


@pytest.mark.parametrize(
  'elements',
  [
    {'AcquisitionNumber': [1, 1, 1, 2, 2], 'AcquisitionTime': ['101010', '101011', '101012', '101130', '101131']},
    {'AcquisitionNumber': [2, 2, 1, 1, 1], 'AcquisitionTime': ['101130', '101131', '101010', '101011', '101012']},
    {'AcquisitionNumber': [1, 2, 3, 4, 5], 'AcquisitionTime': ['101010', '101025', '101040', '101055', '101110']},
    {'AcquisitionTime': ['101010', '101011', '101010', '101011', '101010']},
    {'AcquisitionTime': ['101010', None, '101211', '', '101010']},
    {'SliceThickness': ['5', '5.0', '5', '5.001', '5.000'], 'ContrastBolusAgent': ['', None, '', None, None]},
    {'ContentTime': ['101010', '111010', '101010', '111010', '101010']},
  ],
  ids=[
    'two breath-holds',
    'from the head',
    'step and shoot',
    'seconds',
    'unknown times',
    'written differently',
    'times of reconstruction',
  ],
)
def test_acquisitions_one_above_the_other_are_one_scan(tmp_path, elements):
  made = dicom_series.slices(chest(), affine_of('LPS'))
  for key, values in elements.items():
    for one, value in zip(made, values, strict=True):
      setattr(one, key, value)
  np.testing.assert_array_equal(read(dicom_series.save(tmp_path / 'in', made)).values, chest().transpose(2, 1, 0))


@pytest.mark.parametrize(
  'elements',
  [
    {'ImageType': ['DERIVED', 'SECONDARY', 'MIP']},
    {'ImageType': ['DERIVED', 'SECONDARY', 'AXIAL', 'CT_SOM5 MIP']},
    {'ImageType': ['DERIVED', 'SECONDARY', 'REFORMATTED', 'MIN IP']},
    {'ImageType': ['DERIVED', 'SECONDARY', 'PROJECTION IMAGE']},
    {'ImageType': ['DERIVED', 'PRIMARY', 'AXIAL', 'SUBTRACTION']},
    {'ImageType': ['DERIVED', 'SECONDARY', 'AXIAL'], 'SeriesDescription': 'Thorax MinIP 10.0'},
    {'ImageType': None, 'SeriesDescription': 'mip_24mm'},
  ],
  ids=str,
)
def test_projections_and_maps_are_skipped_and_counted(tmp_path, elements, caplog):
  caplog.set_level(logging.INFO)
  dicom_series.save(tmp_path / 'in' / '2', dicom_series.slices(chest(), affine_of('LPS'), 2))
  made = dicom_series.slices(chest(), affine_of('LPS'), 602, **elements)
  dicom_series.save(tmp_path / 'in' / '602', made)
  (series,) = find(tmp_path / 'in')
  assert series.number == 2
  assert caplog.messages == ['skipped: 5 projections, renderings or maps (for example MIP)']


REFORMATS = {
  'coronal': ('LIP', {'ImageType': ['DERIVED', 'SECONDARY', 'REFORMATTED']}),
  'sagittal': ('PIL', {'ImageType': ['DERIVED', 'SECONDARY']}),
  'axial': ('LPS', {'ImageType': ['DERIVED', 'SECONDARY', 'MPR']}),
  'in the description': ('LIP', {'ImageType': None, 'SeriesDescription': 'Cor MPR'}),
}


@pytest.mark.parametrize('name', REFORMATS)
def test_a_reformat_is_skipped_beside_its_original_only(tmp_path, name, caplog):
  """It shows the same lesions again. Alone, or beside a scan of another part of the body, it is read with a warning."""
  codes, elements = REFORMATS[name]
  frame = {'FrameOfReferenceUID': '1.2.3'}
  original = dicom_series.slices(chest((9, 9, 9)), affine_of('LPS', spacing=(5, 5, 5)), 2, **frame)
  corner = affine_of(codes, spacing=(5, 5, 5))
  # Its corner lies where the original begins, and it runs into the original's volume.
  middle = affine_of('LPS', spacing=(5, 5, 5)) @ [4, 4, 4, 1] - corner @ [3, 3, 2.5, 0]
  corner[:3, 3] = middle[:3]
  made = dicom_series.slices(chest((7, 7, 6)), corner, 601, **{**frame, **elements})
  dicom_series.save(tmp_path / 'in' / '601', made)
  (alone,) = find(tmp_path / 'in')
  assert str(alone).endswith('reformat)') and len(alone.read_image('hu').values.ravel()) == 7 * 7 * 6
  assert caplog.messages == [f'{alone}: computed from another series; the original series gives more reliable results']
  caplog.clear()
  caplog.set_level(logging.INFO)
  dicom_series.save(tmp_path / 'in' / '2', original)
  (series,) = find(tmp_path / 'in')
  assert series.number == 2 and not series.is_reformat
  assert caplog.messages == [f'skipped: {alone}, because the original {series} is there, too']
  for change in ({'FrameOfReferenceUID': '1.2.4'}, {'ImagePositionPatient': [500, 500, 500]}):
    for index, one in enumerate(original):
      one.FrameOfReferenceUID = change.get('FrameOfReferenceUID', '1.2.3')
      if 'ImagePositionPatient' in change:
        one.ImagePositionPatient = [500, 500, 500 + 5 * index]
    dicom_series.save(tmp_path / 'in' / '2', original)
    assert [one.number for one in find(tmp_path / 'in')] == [2, 601]


def test_original_coronal_slices_are_no_reformat(tmp_path, caplog):
  made = dicom_series.slices(chest(), affine_of('LIP'), ImageType=['ORIGINAL', 'PRIMARY', 'AXIAL'])
  scan = read(dicom_series.save(tmp_path / 'in', made))
  assert not scan.path.is_reformat and not caplog.messages


def test_other_objects_are_skipped_and_reported(tmp_path, caplog):
  """Skips localizers, dose sheets (as secondary captures or as images without position), reports, segmentations, MR,
  images at one place while contrast arrives, and a DICOMDIR."""
  caplog.set_level(logging.INFO)
  make = lambda number, **elements: dicom_series.slices(chest(), affine_of('LPS'), number, **elements)
  dicom_series.save(tmp_path / 'in' / '3', make(3))
  dicom_series.save(tmp_path / 'in' / '1', make(1, ImageType=['ORIGINAL', 'PRIMARY', 'LOCALIZER'])[:2])
  dicom_series.save(tmp_path / 'in' / '9', make(9, SOPClassUID=uid.SecondaryCaptureImageStorage)[:1])
  dicom_series.save(tmp_path / 'in' / '8', make(8, ImagePositionPatient=None)[:1])
  dicom_series.save(tmp_path / 'in' / '7', make(7, Modality='SEG', SOPClassUID=uid.SegmentationStorage)[:1])
  dicom_series.save(tmp_path / 'in' / '5', make(5, Modality='MR', SOPClassUID=uid.MRImageStorage))
  dicom_series.save(tmp_path / 'in' / '4', make(4, ImagePositionPatient=[0, 0, 310]))
  dicom_series.save(tmp_path / 'in' / '2', make(2)[:1])
  (report,) = make(6, Modality='SR', SOPClassUID=uid.XRayRadiationDoseSRStorage)[:1]
  for key in ('PixelData', 'Rows', 'Columns'):
    delattr(report, key)
  dicom_series.save(tmp_path / 'in' / '6', [report])
  directory = fileset.FileSet()
  directory.add(tmp_path / 'in' / '3' / 'IM000000')
  directory.write(tmp_path / 'set')
  shutil.copy(tmp_path / 'set' / 'DICOMDIR', tmp_path / 'in')
  (series,) = find(tmp_path / 'in')
  assert series.number == 3
  assert caplog.messages == [
    'skipped: 5 MR objects, 1 SEG objects, 1 SR objects, 6 images at one position (for example contrast bolus '
    'tracking), 1 images without a position (for example dose sheets), 2 localizers, 1 secondary captures (for '
    'example dose sheets)'
  ]


def test_series_are_named_by_number_and_uid(tmp_path):
  """Several series mixed in one folder: sorted by number, with unique names that are equal on every call."""
  for number in (12, 2, None):
    made = dicom_series.slices(chest(), affine_of('LPS'), number)
    dicom_series.save(tmp_path / 'in', made, name=f'{number}_{{}}')
  names = [series.name for series in find(tmp_path / 'in')]
  assert [name.partition('_')[0] for name in names] == ['series2', 'series12', 'series']
  assert len({name.partition('_')[2] for name in names}) == 3 and all(len(name.split('_')[1]) == 8 for name in names)
  assert [series.name for series in find(tmp_path / 'in')] == names


@pytest.mark.parametrize('description', ['Anna Chest', 'CT of markername', 'MARKERID-4711', '19030714 thorax'])
def test_a_description_that_names_the_patient_is_not_shown(tmp_path, description):
  made = dicom_series.slices(chest(), affine_of('LPS'), SeriesDescription=description)
  (series,) = find(dicom_series.save(tmp_path / 'in', made))
  assert str(series) == series.name


@pytest.mark.parametrize(
  ('name', 'description', 'shown'),
  [
    ('WU^LI', 'WU LI chest', False),
    ('Wu, Li', 'chest_wu', False),
    ('WU^LI', 'Liver 3.0 Wuhan', True),
    ('Wang^XiaoDong=王^小東', '王小東胸部', False),
  ],
)
def test_short_and_east_asian_names_are_not_shown(tmp_path, name, description, shown):
  elements = {'SpecificCharacterSet': 'ISO_IR 192', 'PatientName': name, 'SeriesDescription': description}
  made = dicom_series.slices(chest(), affine_of('LPS'), **elements)
  (series,) = find(dicom_series.save(tmp_path / 'in', made))
  assert str(series) == (f'{series.name} ({description})' if shown else series.name)


def test_without_pydicom_the_error_says_what_to_install(tmp_path, monkeypatch):
  folder = dicom_series.save(tmp_path / 'in', dicom_series.slices(chest(), affine_of('LPS')))
  real = builtins.__import__

  def without(name, *rest):
    if name.startswith('pydicom'):
      raise ImportError(name)
    return real(name, *rest)

  monkeypatch.setattr(builtins, '__import__', without)
  with pytest.raises(UserError, match=r'^DICOM: pydicom is not installed; pip install -r requirements-dicom.txt$'):
    find(folder)


def test_without_a_decoder_the_error_names_the_syntax(tmp_path):
  made = dicom_series.slices(chest(), affine_of('LPS'))
  folder = dicom_series.save(tmp_path / 'in', made, 'rle')
  for path in folder.iterdir():
    image = pydicom.dcmread(path)
    image.file_meta.TransferSyntaxUID = uid.MPEG2MPML
    image.save_as(path)
  with pytest.raises(
    UserError, match=r'^series3_\w+ \(Chest 5.0\): IM000000, .*: compressed as MPEG2 .*, but no decoder is installed'
  ):
    read(folder)


@pytest.mark.slow
@pytest.mark.skipif(not REAL.exists(), reason='no real CT here')
@pytest.mark.parametrize('syntax', ['jpeg lossless', 'jpeg 2000'])
def test_a_real_scan(tmp_path, syntax):
  image = nib.load(REAL)
  made = dicom_series.slices(np.asarray(image.dataobj), image.affine)
  scan, of_file = read(dicom_series.save(tmp_path / 'in', made, syntax)), volume_files.read_scan(REAL)
  np.testing.assert_array_equal(scan.values, of_file.values)
  np.testing.assert_allclose(scan.affine, of_file.affine, atol=1e-4)
