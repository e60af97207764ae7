"""Makes DICOM series like those of scanners and archives from a volume and its affine."""

import pathlib

import gdcm
import nibabel as nib
import numpy as np
import pydicom
from nibabel import affines
from pydicom import uid

from fusa_jax.scans import dicom

# None of these values may appear in printed text or written files.
PERSONAL = {
  'PatientName': 'Markername^Anna',
  'PatientID': 'MARKERID-4711',
  'PatientBirthDate': '19030714',
  'ReferringPhysicianName': 'Markerphysician^Otto',
  'OtherPatientIDs': 'MARKEROTHER-12',
}
SYNTAXES = {
  'uncompressed': uid.ExplicitVRLittleEndian,
  'implicit': uid.ImplicitVRLittleEndian,
  'deflated': uid.DeflatedExplicitVRLittleEndian,
  'rle': uid.RLELossless,
  'jpeg lossless': uid.JPEGLosslessSV1,
  'jpeg-ls': uid.JPEGLSLossless,
  'jpeg 2000': uid.JPEG2000Lossless,
}
_BY_GDCM = {
  'jpeg lossless': gdcm.TransferSyntax.JPEGLosslessProcess14_1,
  'jpeg-ls': gdcm.TransferSyntax.JPEGLSLossless,
  'jpeg 2000': gdcm.TransferSyntax.JPEG2000Lossless,
}


def slices(hu, affine, number=3, slope=1.0, intercept=-8192.0, **elements) -> list[pydicom.Dataset]:
  """Makes a CT series, one dataset per slice.

  Args:
    hu: int [x, y, z].
    affine: [4, 4], maps (x, y, z) to world millimetres (RAS+), without shear between x and y.
    number: number of the series.
    slope, intercept: rescale slope and intercept of the stored values, which are unsigned.
    elements: further DICOM elements to set or to change in each slice.
  """
  affine = np.diag([-1, -1, 1, 1]) @ affine
  spacing = np.linalg.norm(affine[:3, :2], axis=0)
  series, study, frame = (uid.generate_uid(entropy_srcs=[str(number), what]) for what in ('series', 'study', 'frame'))
  made = []
  for index in range(hu.shape[2]):
    one = pydicom.Dataset()
    own = [str(number), str(index), repr(affine.tolist())]
    one.SOPClassUID, one.SOPInstanceUID = uid.CTImageStorage, uid.generate_uid(entropy_srcs=own)
    one.StudyInstanceUID, one.SeriesInstanceUID, one.FrameOfReferenceUID = study, series, frame
    one.Modality, one.ImageType, one.SeriesNumber, one.InstanceNumber = (
      'CT',
      ['ORIGINAL', 'PRIMARY', 'AXIAL'],
      number,
      1,
    )
    one.SeriesDescription, one.StudyDate, one.StudyTime = 'Chest 5.0', '20200401', '101010'
    one.InstanceNumber, one.AcquisitionNumber, one.StudyID, one.Manufacturer = index + 1, 1, '1', 'ACME'
    one.ImageOrientationPatient = [f'{v:.10g}' for v in (affine[:3, :2] / spacing).T.ravel()]
    one.ImagePositionPatient = [f'{v:.10g}' for v in (affine @ [0, 0, index, 1])[:3]]
    one.PixelSpacing, one.SliceThickness = [f'{v:.10g}' for v in spacing[::-1]], '5'
    one.SamplesPerPixel, one.PhotometricInterpretation, one.PixelRepresentation = 1, 'MONOCHROME2', 0
    one.BitsAllocated, one.BitsStored, one.HighBit = 16, 16, 15
    one.RescaleSlope, one.RescaleIntercept, one.RescaleType = str(slope), str(intercept), 'HU'
    stored = np.rint((hu[:, :, index].T - intercept) / slope)
    one.Rows, one.Columns = stored.shape
    one.PixelData = stored.astype('<u2').tobytes()
    for key, value in {**PERSONAL, **elements}.items():
      setattr(one, key, value)
    made.append(one)
  return made


def save(folder: pathlib.Path, datasets, syntax: str = 'uncompressed', name='IM{:06d}') -> pathlib.Path:
  """Writes datasets under file names in shuffled order."""
  folder.mkdir(parents=True, exist_ok=True)
  order = np.random.default_rng(0).permutation(len(datasets))
  for place, one in zip(order, datasets, strict=True):
    path = folder / name.format(place)
    one.file_meta = pydicom.dataset.FileMetaDataset()
    one.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian if syntax in ('rle', *_BY_GDCM) else SYNTAXES[syntax]
    if syntax == 'rle':
      one.compress(uid.RLELossless, generate_instance_uid=False)
    one.save_as(path, enforce_file_format=True)
    if syntax in _BY_GDCM:
      _compress(path, _BY_GDCM[syntax])
    assert pydicom.dcmread(path).file_meta.TransferSyntaxUID == SYNTAXES[syntax]
  return folder


def _compress(path, syntax):
  reader, change, writer = gdcm.ImageReader(), gdcm.ImageChangeTransferSyntax(), gdcm.ImageWriter()
  reader.SetFileName(str(path))
  assert reader.Read()
  change.SetTransferSyntax(gdcm.TransferSyntax(syntax))
  change.SetInput(reader.GetImage())
  assert change.Change()
  writer.SetFile(reader.GetFile())
  writer.SetImage(change.GetOutput())
  writer.SetFileName(str(path))
  assert writer.Write()


def affine_of(columns, spacing=(0.7, 0.8, 5.0), turn=0.0, shear=0.0):
  """Makes an RAS+ affine: columns along named directions, rotated by `turn`, with a gantry tilt of `shear`."""
  signs = {'R': (0, 1), 'L': (0, -1), 'A': (1, 1), 'P': (1, -1), 'S': (2, 1), 'I': (2, -1)}
  directions = np.zeros((3, 3))
  for column, code in enumerate(columns):
    axis, sign = signs[code]
    directions[axis, column] = sign
  rotation = nib.eulerangles.euler2mat(turn, turn / 2, turn / 3)
  sheared = [[1, 0, 0], [0, 1, shear], [0, 0, 1]]
  return affines.from_matvec(rotation @ directions @ np.diag(spacing) @ sheared, [12.5, -40.25, 300])


def find(folder):
  return dicom.find_series(sorted(path for path in folder.rglob('*') if path.is_file() and dicom.Series.claims(path)))


def all_changed(**elements):
  def change(made):
    for one in made:
      for key, value in elements.items():
        setattr(one, key, value)
    return made

  return change
