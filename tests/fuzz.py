"""Damages input files of prediction at random. Each must be read or refused with a one-line error.

As a script, it tries more files than the tests do: python tests/fuzz.py --files=10000 [--kinds="nifti;png"]
"""

import argparse
import collections
import pathlib
import shutil
import sys
import tempfile
import time
import warnings
import zipfile

import nibabel as nib
import numpy as np
import pydicom
from PIL import Image

ROOT = pathlib.Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / 'tests')]

import dicom_series  # noqa: E402 (beside this file)
from dicom_series import affine_of  # noqa: E402
from nifti_files import chest, save  # noqa: E402

from fusa_jax.scans import sources  # noqa: E402
from fusa_jax.system.errors import UserError  # noqa: E402


def nifti(folder, ending='.nii'):
  return save(folder / f'a{ending}', chest())


def pair(folder):
  """Writes .hdr and .img and returns the header."""
  nib.save(nib.Nifti1Pair(chest(), affine_of('LPS')), folder / 'a.hdr')
  return folder / 'a.hdr'


def itk(folder, name, compressed=False):
  """Writes MetaImage or NRRD and returns the header."""
  import SimpleITK

  image = SimpleITK.GetImageFromArray(np.ascontiguousarray(chest().T))
  image.SetOrigin((1, 2, 3))
  SimpleITK.WriteImage(image, str(folder / name), compressed)
  return folder / name


def dicom(folder, syntax):
  """Writes four slices and returns the one to damage."""
  dicom_series.save(folder, dicom_series.slices(chest((17, 16, 4)), affine_of('LPS')), syntax)
  return folder / 'IM000002'


def bare_dicom(folder):
  """As `dicom`, without preamble and file meta."""
  file = dicom(folder, 'implicit')
  image = pydicom.dcmread(file)
  pydicom.dcmwrite(file, pydicom.Dataset(image), implicit_vr=True, little_endian=True, enforce_file_format=False)
  return file


def picture(folder, ending):
  image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 17), np.uint8))
  image.save(folder / f'a{ending}')
  return folder / f'a{ending}'


def archive(folder):
  with zipfile.ZipFile(folder / 'a.zip', 'w', zipfile.ZIP_DEFLATED) as file, tempfile.TemporaryDirectory() as inside:
    file.write(nifti(pathlib.Path(inside)), 'a.nii')
  return folder / 'a.zip'


# Format: (function, values, part). The function writes a sound input into an empty folder and returns the file to
# damage. `values` is the intensity scale. `part` is a range of important bytes; in 80% of files only they are damaged.
KINDS = {
  'nifti': (nifti, 'hu', (0, 352)),
  'nifti.gz': (lambda folder: nifti(folder, '.nii.gz'), 'hu', (0, None)),
  'hdr': (pair, 'hu', (0, None)),
  'mha': (lambda folder: itk(folder, 'a.mha'), 'hu', (0, -420)),
  'mhd': (lambda folder: itk(folder, 'a.mhd', compressed=True), 'hu', (0, None)),
  'nrrd': (lambda folder: itk(folder, 'a.nrrd'), 'hu', (0, -420)),
  'nrrd, gzip': (lambda folder: itk(folder, 'a.nrrd', compressed=True), 'hu', (0, None)),
  'dicom': (lambda folder: dicom(folder, 'uncompressed'), 'hu', (132, -600)),
  'dicom, jpeg lossless': (lambda folder: dicom(folder, 'jpeg lossless'), 'hu', (132, None)),
  'dicom, jpeg 2000': (lambda folder: dicom(folder, 'jpeg 2000'), 'hu', (132, None)),
  'dicom, no preamble': (bare_dicom, 'hu', (0, -600)),
  'zip': (archive, 'hu', (0, None)),
  'png': (lambda folder: picture(folder, '.png'), 'grey', (0, None)),
  'jpg': (lambda folder: picture(folder, '.jpg'), 'grey', (0, None)),
}


def damaged(whole: bytes, part: tuple[int, int | None], rng) -> bytes:
  """Changes one to eight bytes, in 80% of files only within `part`, and truncates 5% of files."""
  raw, places = bytearray(whole), np.arange(len(whole))
  places = places[slice(*part)] if rng.random() < 0.8 else places
  for position in rng.choice(places, rng.integers(1, 9)):
    raw[position] = rng.integers(256)
  return bytes(raw[: rng.integers(len(raw)) if rng.random() < 0.05 else None])


def outcome(folder: pathlib.Path, values: str, file: pathlib.Path) -> str:
  """Reads a folder that holds the damaged `file`. Returns 'read', 'refused', or a description of the failure."""
  try:
    with tempfile.TemporaryDirectory() as unpacked, warnings.catch_warnings():
      warnings.simplefilter('error')
      for one in sources.find_sources(folder, values, pathlib.Path(unpacked)):
        one.read_image(values)
  except UserError as error:
    named = str(error).startswith((f'{file}: ', f'{file.name}: ', 'series', 'input: ', unpacked))
    personal = any(part in str(error) for part in ('Marker', 'MARKER', '19030714'))
    return 'refused' if named and not personal and '\n' not in str(error) else f'refused as {error}'
  except Exception as error:
    return f'{type(error).__name__}: {error}'
  return 'read'


def outcomes(kind: str, files: int, folder: pathlib.Path, seed: int = 0) -> collections.Counter:
  """Counts the outcomes of `files` damaged files. A file neither read nor refused is kept in `folder`."""
  make, values, part = KINDS[kind]
  shutil.rmtree(folder / 'input', ignore_errors=True)
  (folder / 'input').mkdir()
  file, counts = make(folder / 'input'), collections.Counter()
  whole, rng = file.read_bytes(), np.random.default_rng(seed)
  for number in range(files):
    raw = damaged(whole, part, rng)
    file.write_bytes(raw)
    result = outcome(folder / 'input', values, file)
    counts[result] += 1
    if result not in ('read', 'refused'):
      (folder / f'{number}{file.suffix}').write_bytes(raw)
  return counts


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--files', type=int, default=10_000, help='damaged files per format')
  parser.add_argument('--kinds', default=';'.join(KINDS), help='formats, separated by ;')
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--output', type=pathlib.Path, default=pathlib.Path('runs/fuzz'), help='folder for failures')
  arguments = parser.parse_args()
  for kind in arguments.kinds.split(';'):
    folder = arguments.output / kind.replace(', ', '_').replace(' ', '_')
    folder.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    counts = outcomes(kind, arguments.files, folder, arguments.seed)
    read, refused = (counts.pop(name, 0) for name in ('read', 'refused'))
    print(
      f'{kind}: {arguments.files} files, {read} read, {refused} refused, {counts.total()} other; '
      f'{time.perf_counter() - began:.0f} s',
      flush=True,
    )
    for result, count in counts.most_common(20):
      print(f'  {count}: {result[:300]}', flush=True)


if __name__ == '__main__':
  main()
