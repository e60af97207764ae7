"""DICOM SEG, read with pydicom and highdicom, compared with the NIfTI mask pixel by pixel in world coordinates."""

import builtins
import logging
import warnings

import dicom_series
import highdicom
import nibabel as nib
import numpy as np
import pydicom
import pytest
from dicom_series import affine_of, all_changed, find
from nibabel import affines
from nifti_files import chest
from pydicom import uid
from pydicom.sr.codedict import codes

from fusa_jax.scans import classes, dicom, dicom_seg, formats, nifti, volumes
from fusa_jax.scans.classes import of_lesion
from fusa_jax.system.errors import UserError

ABOUT = {'model': 'fusa_resunet', 'step': 2400, 'threshold': 0.43}
AFFINES = {
  'axial': affine_of('LPS'),
  'from the head': affine_of('LPI'),
  'prone': affine_of('RAS'),
  'coronal': affine_of('LIP'),
  'sagittal': affine_of('PIL'),
  'oblique': affine_of('LPI', turn=-0.2, spacing=(0.6543, 0.6543, 0.625)),
  'tilted': affine_of('LPS', shear=np.tan(np.radians(15)) * 5 / 0.8),
}


def read(folder):
  (series,) = find(folder)
  dicom_seg.check_series([series])
  return dicom.read_series(series)


@pytest.fixture
def series(tmp_path):
  """A scan and a mask of it with one empty slice."""
  scan = read(dicom_series.save(tmp_path / 'in', dicom_series.slices(chest(), AFFINES['axial'])))
  return scan, mask_of(scan)


def mask_of(scan):
  mask = (np.random.default_rng(0).random(scan.values.shape) > 0.7).astype(np.uint8)
  mask[2] = 0
  return mask


def saved(path, scan, mask):
  dicom_seg.write_seg(path, {'Lesion': mask}, scan, {'Lesion': ABOUT})
  return pydicom.dcmread(path)


@pytest.mark.parametrize('name', AFFINES)
def test_pixels_have_the_positions_of_the_nifti_mask(tmp_path, name):
  sources = dicom_series.slices(chest(), AFFINES[name], PatientSex='F')
  scan = read(dicom_series.save(tmp_path / 'in', sources))
  mask = mask_of(scan)
  if name in ('coronal', 'sagittal'):
    mask[:, 2] = mask[:, :, 2] = 0  # one of these planes is a stored slice
  seg = saved(tmp_path / 'a_mask.dcm', scan, mask)
  nifti.write_volume(tmp_path / 'a_mask.nii.gz', mask, scan)
  stored = nib.load(tmp_path / 'a_mask.nii.gz')
  values, back = np.asarray(stored.dataobj), np.linalg.inv(stored.affine)
  of_uid = {source.SOPInstanceUID: source for source in sources}
  across, down = np.array(sources[0].ImageOrientationPatient, float).reshape(2, 3)
  height, width = map(float, sources[0].PixelSpacing)
  rows, columns = np.mgrid[: seg.Rows, : seg.Columns]
  frames = seg.pixel_array
  assert len(frames) == len(sources) - 1  # without the empty slice
  for frame, groups in zip(frames, seg.PerFrameFunctionalGroupsSequence, strict=True):
    source = of_uid.pop(groups.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID)
    first = np.array(source.ImagePositionPatient, float)
    np.testing.assert_allclose(groups.PlanePositionSequence[0].ImagePositionPatient, first, atol=1e-6)
    places = first + columns[..., None] * width * across + rows[..., None] * height * down
    voxels = affines.apply_affine(back, places * [-1, -1, 1])
    np.testing.assert_allclose(voxels, np.rint(voxels), atol=0.01)
    np.testing.assert_array_equal(frame, values[tuple(np.rint(voxels).astype(int).transpose(2, 0, 1))])
  assert frames.sum() == values.sum() > 0
  # highdicom reads it by referenced instance, and read_seg gives the same mask.
  again = highdicom.seg.segread(tmp_path / 'a_mask.dcm')
  headers, _ = scan.path.grid
  uids = [header.SOPInstanceUID for header in headers]
  own = again.get_pixels_by_source_instance(uids, combine_segments=True, assert_missing_frames_are_empty=True)
  np.testing.assert_array_equal(own, volumes.to_own_axes(mask, scan).transpose(2, 1, 0))
  np.testing.assert_array_equal(dicom_seg.read_seg(tmp_path / 'a_mask.dcm', scan), mask)


def test_headers_of_the_seg(tmp_path, series):
  scan, mask = series
  seg, source = saved(tmp_path / 'a.dcm', scan, mask), pydicom.dcmread(tmp_path / 'in' / 'IM000000')
  for key in (
    'PatientName',
    'PatientID',
    'PatientBirthDate',
    'PatientSex',
    'AccessionNumber',
    'ReferringPhysicianName',
  ):
    assert seg.get(key) == source.get(key, '')
  for key in ('StudyInstanceUID', 'FrameOfReferenceUID', 'StudyDate', 'StudyTime', 'StudyID'):
    assert seg[key] == source[key]
  assert seg.SeriesInstanceUID != source.SeriesInstanceUID and seg.SeriesNumber == 1003 and seg.Modality == 'SEG'
  assert (
    seg.ReferencedSeriesSequence[0].SeriesInstanceUID
    == source.SeriesInstanceUID
    == dicom_seg.series_uid(tmp_path / 'a.dcm')
  )
  assert len(seg.ReferencedSeriesSequence[0].ReferencedInstanceSequence) == 5
  (segment,) = seg.SegmentSequence
  assert seg.SegmentationType == 'BINARY' and segment.SegmentAlgorithmType == 'AUTOMATIC'
  assert highdicom.seg.segread(tmp_path / 'a.dcm').segmented_property_types == [codes.SCT.Lesion]
  assert segment.SegmentedPropertyCategoryCodeSequence[0].CodeValue == '49755003'
  assert segment.SegmentationAlgorithmIdentificationSequence[0].AlgorithmName == seg.Manufacturer == 'fusa_jax'
  assert seg.SeriesDescription == 'Lesions by fusa_jax, for research only'
  assert seg.ContentCreatorName == ''


def test_options_of_the_mask_are_in_the_headers(tmp_path, series):
  about = ABOUT | {'temperature': (1.25, 0.8), 'flips': True, 'lungs': True, 'smallest_ml': 0.05, 'threshold': 0.4375}
  dicom_seg.write_seg(tmp_path / 'a.dcm', {'Lesion': series[1]}, series[0], {'Lesion': about})
  seg = pydicom.dcmread(tmp_path / 'a.dcm')
  assert seg.ContentDescription == 'Lesions, probability >= 0.438, in lungs, >= 0.05 mL'
  parameters = seg.SegmentSequence[0].SegmentationAlgorithmIdentificationSequence[0].AlgorithmParameters
  for setting in ('temperature=(1.25, 0.8)', 'flips=True', 'lungs=True', 'smallest_ml=0.05'):
    assert setting in parameters


@pytest.mark.filterwarnings('ignore')
def test_several_segments_overlap_and_may_be_empty(tmp_path, series):
  """Each segment against its mask, by highdicom; codes, labels and parameters of each."""
  scan, mask = series
  other = np.roll(mask, 1, axis=2)
  masks = {'Pleural effusion': mask, 'white spots': other, 'ground glass': 0 * mask}
  about = {name: ABOUT | {'threshold': threshold} for name, threshold in zip(masks, (0.1, 0.2, 0.3), strict=True)}
  dicom_seg.write_seg(tmp_path / 'a.dcm', masks, scan, about)
  seg = highdicom.seg.segread(tmp_path / 'a.dcm')
  uids = [header.SOPInstanceUID for header in scan.path.grid[0]]
  frames = seg.get_pixels_by_source_instance(
    uids, segment_numbers=[1, 2, 3], combine_segments=False, assert_missing_frames_are_empty=True
  )
  for number, (name, expected) in enumerate(masks.items(), 1):
    np.testing.assert_array_equal(frames[..., number - 1], volumes.to_own_axes(expected, scan).transpose(2, 1, 0))
    described = seg.get_segment_description(number)
    assert described.segment_label == name
    parameters = described.SegmentationAlgorithmIdentificationSequence[0].AlgorithmParameters
    assert f'threshold={about[name]["threshold"]}' in parameters
  assert (mask & other).any()
  types = [seg.get_segment_description(number).segmented_property_type for number in (1, 2, 3)]
  assert types == [codes.SCT.PleuralEffusion, codes.SCT.Lesion, codes.DCM.GroundGlassOpacity]
  assert pydicom.dcmread(tmp_path / 'a.dcm').ContentDescription == '3 classes; each segment has its threshold'
  chosen = classes.chosen({'effusion': (1,), 'spots': (2,), 'any': (1, 2, 3)}, None)
  expected = mask + 2 * other + 4 * (mask | other)
  np.testing.assert_array_equal(dicom_seg.read_seg(tmp_path / 'a.dcm', scan, chosen), expected)


def test_every_code_is_in_a_dictionary():
  """The codes of pydicom's dictionary; the others have a value, a scheme and a meaning."""
  for name in dicom_seg._CODES:
    code = dicom_seg._code(name)
    assert code.value.isdigit() and code.scheme_designator in ('SCT', 'DCM') and code.meaning
  assert dicom_seg._code('something else') == codes.SCT.Lesion


def test_slices_without_preamble_have_segs(tmp_path, series):
  for path in (tmp_path / 'in').iterdir():
    image = pydicom.Dataset(pydicom.dcmread(path))
    pydicom.dcmwrite(path, image, implicit_vr=True, little_endian=True, enforce_file_format=False)
  scan = read(tmp_path / 'in')
  seg = saved(tmp_path / 'in' / 'a.dcm', scan, series[1])
  assert seg.PatientID == dicom_series.PERSONAL['PatientID']
  assert dicom_seg.find_segs(sorted((tmp_path / 'in').iterdir())) == [tmp_path / 'in' / 'a.dcm']
  np.testing.assert_array_equal(dicom_seg.read_seg(tmp_path / 'in' / 'a.dcm', scan), series[1])


def test_refused_sources_keep_their_own_error(series):
  dicom_seg.check_series([series[0].path, formats.Refused('IM9', 'IM9: damaged')])


def test_no_lesion_gives_empty_frames(tmp_path, series):
  scan, mask = series
  seg = saved(tmp_path / 'a.dcm', scan, 0 * mask)
  assert seg.NumberOfFrames == 5 and not seg.pixel_array.any()
  assert not dicom_seg.read_seg(tmp_path / 'a.dcm', scan).any()


def test_invalid_headers_are_copied_without_warnings(tmp_path, monkeypatch, caplog, capfd):
  """Values that the standard forbids are copied without a warning that quotes them; orientations may be rounded."""
  caplog.set_level(logging.DEBUG)
  odd = {
    'PatientName': 'Märkername',
    'PatientID': 'MARKERID' * 9,
    'PatientBirthDate': 'MARKERDATE',
    'PatientSex': 'MARKER',
  }
  with monkeypatch.context() as patched:
    patched.setattr(pydicom.config.settings, 'writing_validation_mode', pydicom.config.IGNORE)
    made = dicom_series.slices(chest(), AFFINES['oblique'], None, SpecificCharacterSet='ISO_IR 100', **odd)
    for one, rounding in zip(made, (0, 1e-5, -1e-5, 2e-5, 0), strict=True):
      one.ImageOrientationPatient = [float(value) + rounding for value in one.ImageOrientationPatient]
      del one.SliceThickness, one.StudyDate
    made[0].StudyTime = 'MARKERTIME'
    folder = dicom_series.save(tmp_path / 'in', made)
  caplog.clear()  # messages from making the series are not under test
  capfd.readouterr()
  scan = read(folder)
  with warnings.catch_warnings(record=True) as warned:
    warnings.simplefilter('always')
    mask = mask_of(scan)
    dicom_seg.write_seg(tmp_path / 'a.dcm', {'Lesion': mask}, scan, {'Lesion': ABOUT})
  assert not warned and not caplog.messages and capfd.readouterr() == ('', '')
  seg = pydicom.dcmread(tmp_path / 'a.dcm')
  assert {key: seg.get(key) for key in odd} == odd and seg.SeriesNumber == 1000
  np.testing.assert_array_equal(dicom_seg.read_seg(tmp_path / 'a.dcm', scan), mask)


def test_unsuitable_series_are_refused(tmp_path, monkeypatch):
  made = all_changed(FrameOfReferenceUID='')(dicom_series.slices(chest(), AFFINES['axial']))
  folder = dicom_series.save(tmp_path / 'in', made)
  with pytest.raises(UserError, match=r'\(Chest 5.0\): its slices lack FrameOfReferenceUID, which a SEG needs; leave'):
    read(folder)
  made = dicom_series.slices(chest(), AFFINES['axial'])
  made[1].StudyInstanceUID = uid.generate_uid()
  folder = dicom_series.save(tmp_path / 'of two studies', made)
  with pytest.raises(
    UserError, match=r'^series3_\w+ \(Chest 5.0\): no DICOM SEG can be made from its headers \(\w+\); l'
  ):
    read(folder)
  real = builtins.__import__

  def without(name, *rest):
    if name == 'highdicom':
      raise ImportError(name)
    return real(name, *rest)

  dicom_seg._highdicom.cache_clear()
  monkeypatch.setattr(builtins, '__import__', without)
  with pytest.raises(UserError, match=r'^dicom: highdicom is not installed; pip install -r requirements-dicom'):
    dicom_seg.check_series([])


@pytest.mark.parametrize(
  ('error', 'reason'),
  [
    (OSError(28, 'No space left on device'), r'a.dcm: cannot be written \(No space left on device\); free space'),
    (ValueError('Markername'), r'^series3_\w+ \(Chest 5.0\): no DICOM SEG can be made from its headers \(ValueError\)'),
  ],
)
def test_a_failed_write_leaves_no_file(tmp_path, series, monkeypatch, error, reason):
  def broken(self, path, **_):
    path.write_bytes(b'half')
    raise error

  monkeypatch.setattr(highdicom.seg.Segmentation, 'save_as', broken)
  with pytest.raises(UserError, match=reason) as caught:
    saved(tmp_path / 'out' / 'a.dcm', *series)
  assert not list((tmp_path / 'out').iterdir()) and '\n' not in str(caught.value)


def of_others(path, folder, mask, **options):
  """Writes a SEG like that of another program: segment 1 is the mask, segment 2 the rest; frames are reversed."""
  sources = [pydicom.dcmread(file, stop_before_pixels=True) for file in folder.iterdir()]
  for source in sources:
    source.PatientSex = source.AccessionNumber = ''
  sources.sort(key=lambda source: -float(source.ImagePositionPatient[2]))
  segments = [
    highdicom.seg.SegmentDescription(number, 'Segment', codes.SCT.Tissue, codes.SCT.Lesion, 'MANUAL')
    for number in (1, 2)
  ]
  own = mask[::-1, ::1, ::1, None]
  made = highdicom.seg.Segmentation(
    **{
      'source_images': sources,
      'pixel_array': np.concatenate([own, 1 - own], axis=3),
      'segmentation_type': 'BINARY',
      'segment_descriptions': segments,
      'series_instance_uid': uid.generate_uid(),
      'series_number': 9,
      'sop_instance_uid': uid.generate_uid(),
      'instance_number': 1,
      'manufacturer': 'ACME',
      'manufacturer_model_name': 'Viewer',
      'software_versions': '1',
      'device_serial_number': '1',
      **options,
    }
  )
  for groups in made.PerFrameFunctionalGroupsSequence:
    del groups.DerivationImageSequence  # not all programs write it
  made.save_as(path)
  return path


@pytest.mark.filterwarnings('ignore')
def test_segs_of_other_programs(tmp_path, series):
  """SEGs of other programs: chosen segments, and the reason of each refusal."""
  scan, mask = series
  path = of_others(tmp_path / 'IM1', tmp_path / 'in', mask)
  np.testing.assert_array_equal(dicom_seg.read_seg(path, scan, of_lesion((1,))), mask)
  np.testing.assert_array_equal(dicom_seg.read_seg(path, scan, of_lesion((2, 7))), 1 - mask)
  assert dicom_seg.read_seg(path, scan, of_lesion((1, 2))).all()
  assert dicom_seg.find_segs([*sorted((tmp_path / 'in').iterdir()), path]) == [path]

  def refused(reason, change=lambda seg: None, labels=(1,), **options):
    other = of_others(tmp_path / 'IM2', tmp_path / 'in', mask, **options)
    seg = pydicom.dcmread(other)
    change(seg)
    seg.save_as(other)
    with pytest.raises(UserError, match=rf'^IM2: {reason}'):
      dicom_seg.read_seg(other, scan, of_lesion(labels))

  several = r'the DICOM SEG has several segments \(1, 2\); name the lesion segments, for example --config'
  refused(rf'{several}.data.lesion_labels="\(1,\)"$', labels=())
  binary = r'the DICOM SEG must be of type BINARY; save it as a binary segmentation$'
  refused(binary, segmentation_type='FRACTIONAL')
  refused(r'data.lesion_labels \(3\) names no segment of the DICOM SEG \(1, 2\); add the lesion seg', labels=(3,))
  other_grid = (
    r'frames of the DICOM SEG do not match the slices of series3_\w+ \(Chest 5.0\) pixel by pixel; save it on the grid'
  )

  def moved(seg):
    seg.PerFrameFunctionalGroupsSequence[1].PlanePositionSequence[0].ImagePositionPatient[2] += 2.5

  def coarser(seg):
    seg.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].PixelSpacing = [0.9, 0.9]

  def turned(seg):
    seg.SharedFunctionalGroupsSequence[0].PlaneOrientationSequence[0].ImageOrientationPatient = [-1, 0, 0, 0, 1, 0]

  def smaller(seg):
    seg.Rows = 3

  for change in (moved, coarser, turned):
    refused(other_grid, change)
  refused(r'the DICOM SEG cannot be read \(\w+\); save it again$', smaller)


def test_damaged_segs_are_read_or_refused(tmp_path, series):
  scan, mask = series
  dicom_seg.write_seg(tmp_path / 'a.dcm', {'Lesion': mask}, scan, {'Lesion': ABOUT})
  whole, rng, outcomes = (tmp_path / 'a.dcm').read_bytes(), np.random.default_rng(0), set()
  for _ in range(100):
    raw = bytearray(whole)
    for position in rng.integers(132, len(raw), rng.integers(1, 9)):
      raw[position] = rng.integers(256)
    (tmp_path / 'a.dcm').write_bytes(raw[: rng.integers(132, len(raw)) if rng.random() < 0.1 else None])
    try:
      assert isinstance(dicom_seg.series_uid(tmp_path / 'a.dcm'), str)
      read = dicom_seg.read_seg(tmp_path / 'a.dcm', scan)
      assert read.shape == mask.shape and read.max() <= 1
      message = 'read'
    except UserError as error:
      message = str(error)
    assert message.startswith(('read', 'a.dcm: ')) and '\n' not in message and 'arker' not in message
    outcomes.add(message == 'read')
  assert outcomes == {True, False}
