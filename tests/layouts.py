"""Writes the phantom cohort with the file names and labels of each public release, for the tests of cohort readers."""

import json
import pathlib
import shutil

import dicom_series
import nibabel as nib
import numpy as np
from conftest import SIZE
from PIL import Image

from fusa_jax.scans import dicom, dicom_seg, volume_files


def files(raw_dir):
  """Returns (scan, mask) of each phantom."""
  return [(path, path.with_name(path.name.replace('_ct', '_seg'))) for path in sorted(raw_dir.glob('*_ct.nii.gz'))]


def copy(source, target):
  target.parent.mkdir(parents=True, exist_ok=True)
  shutil.copy(source, target)


def relabel(source, target, change):
  """Saves a mask with other labels: `change` maps the old values to the new ones."""
  target.parent.mkdir(parents=True, exist_ok=True)
  image = nib.load(source)
  nib.save(nib.Nifti1Image(change(np.asarray(image.dataobj)).astype(np.uint8), image.affine, image.header), target)


def covid19_20(raw_dir, out):
  for scan, mask in files(raw_dir):
    copy(scan, out / 'Train' / scan.name), copy(mask, out / 'Train' / mask.name)
    copy(scan, out / 'Validation' / scan.name)


def nnunet(raw_dir, out):
  for number, (scan, mask) in enumerate(files(raw_dir)):
    copy(scan, out / 'imagesTr' / f'covid_{number:03d}_0000.nii.gz')
    copy(mask, out / 'labelsTr' / f'covid_{number:03d}.nii.gz')
    copy(scan, out / 'imagesTs' / f'covid_{number:03d}_0000.nii.gz')
  (out / 'dataset.json').write_text('{"numTraining": 10, "labels": {"background": 0, "lesion": 1}}')


def decathlon(raw_dir, out):
  listed = []
  for number, (scan, mask) in enumerate(files(raw_dir)):
    (
      copy(scan, out / 'imagesTr' / f'lung_{number:03d}.nii.gz'),
      copy(mask, out / 'labelsTr' / f'lung_{number:03d}.nii.gz'),
    )
    listed.append({'image': f'./imagesTr/lung_{number:03d}.nii.gz', 'label': f'./labelsTr/lung_{number:03d}.nii.gz'})
  (out / 'dataset.json').write_text(json.dumps({'numTraining': len(listed), 'training': listed, 'test': []}))


def pairs(raw_dir, out):
  for number, (scan, mask) in enumerate(files(raw_dir)):
    copy(scan, out / f'patient{number}.nii.gz'), copy(mask, out / f'patient{number}_mask.nii.gz')


def dicom_pairs(raw_dir, out):
  """One folder per patient, one of them zipped. Masks are NIfTI files beside the folders or DICOM SEG inside them."""
  for number, (scan, mask) in enumerate(files(raw_dir)):
    name, image = volume_files.stem(scan).removesuffix('_ct'), nib.load(scan)
    made = dicom_series.slices(np.asarray(image.dataobj), image.affine, number)
    syntax = ('uncompressed', 'jpeg lossless', 'jpeg 2000', 'uncompressed', 'uncompressed')[number % 5]
    folder = dicom_series.save(out / name / 'study' / 'series', made, syntax)
    if number % 5 == 4:  # patients 5 and 10; every fifth phantom has no lesion
      (series,) = dicom.find_series(folder.iterdir())
      of_series = dicom.read_series(series)
      about = {'model': 'none', 'step': 0, 'threshold': 0.5}
      masks = {'Lesion': volume_files.read_mask(mask, of_series)}
      dicom_seg.write_seg(out / name / 'SEG', masks, of_series, {'Lesion': about})
    else:
      copy(mask, out / f'{name}_{"seg" if number % 2 else "mask"}.nii.gz')
    if number == 3:
      shutil.make_archive(out / name, 'zip', out / name)
      shutil.rmtree(out / name)


# Names as released: case, study and series. Cases 10 and 29 have two scans each.
RADIOPAEDIA = [
  f'radiopaedia_{name}'
  for name in ('10_85902_1', '10_85902_3', '14_85914_0', '27_86410_0', '29_86490_1', '29_86491_1')
  + ('36_86526_0', '40_86625_0', '4_85506_1', '7_85703_0')
]


def zenodo_20(raw_dir, out):
  """Labels 1 and 2 are the lungs, 3 is lesion. The radiopaedia volumes are 8-bit."""
  for number, (scan, mask) in enumerate(files(raw_dir), start=1):
    name = f'coronacases_{number:03d}.nii.gz'
    copy(scan, out / 'COVID-19-CT-Seg_20cases' / name)
    halves = lambda mask: np.where(mask, 3, 1 + (np.arange(SIZE)[:, None, None] >= SIZE // 2))
    relabel(mask, out / 'Lung_and_Infection_Mask' / name, halves)
    grey = f'{RADIOPAEDIA[number - 1]}.nii.gz'
    relabel(scan, out / 'COVID-19-CT-Seg_20cases' / grey, lambda hu: np.clip((hu + 1000) / 1300, 0, 1) * 255)
    relabel(mask, out / 'Lung_and_Infection_Mask' / grey, halves)


def mosmed(raw_dir, out):
  """Every fifth phantom has no lesion: CT-0. One more study is CT-2 and has no published mask."""
  pairs = files(raw_dir)
  for number, (scan, mask) in enumerate(pairs, start=1):
    severity = 'CT-0' if number % 5 == 0 else 'CT-1'
    copy(scan, out / 'studies' / severity / f'study_{number:04d}.nii.gz')
    if severity != 'CT-0':
      copy(mask, out / 'masks' / f'study_{number:04d}_mask.nii.gz')
  copy(scan, out / 'studies' / 'CT-2' / 'study_0999.nii.gz')


def medseg(raw_dir, out):
  """Scans, and a hundred slices of unknown patients. Labels: 0 none, 1 ground glass, 2 consolidation, 3 effusion."""
  both = lambda mask: mask * (1 + (np.arange(SIZE)[:, None, None] >= SIZE // 2))
  for number, (scan, mask) in enumerate(files(raw_dir), start=1):
    copy(scan, out / 'rp_im' / f'{number}.nii.gz'), relabel(mask, out / 'rp_msk' / f'{number}.nii.gz', both)
  scans, masks = zip(*files(raw_dir), strict=True)
  stack = lambda paths: np.concatenate([np.asarray(nib.load(path).dataobj) for path in paths], axis=2)[..., :100]
  slices = stack(scans)
  # As in the release: each slice is windowed on its own, and air and fat have their usual HU.
  tops = np.linspace(180, 320, slices.shape[2])
  nib.save(nib.Nifti1Image(np.minimum(slices, tops).astype(np.float32), np.eye(4)), out / 'tr_im.nii.gz')
  labels = both(stack(masks))
  labels[:3, :3] = 3
  nib.save(nib.Nifti1Image(labels.astype(np.uint8), np.eye(4)), out / 'tr_mask.nii.gz')


def pictures_of(raw_dir):
  """Yields (patient, slice, grey [H, W], mask [H, W]) of each slice, in radiological orientation."""
  for number, (scan, mask) in enumerate(files(raw_dir), start=1):
    scan = volume_files.read_scan(scan)
    grey = np.rint(np.clip((scan.values + 1000) / 1300, 0, 1) * 255).astype(np.uint8)
    for index, pair in enumerate(zip(grey, volume_files.read_mask(mask, scan), strict=True)):
      yield f'p{number:02d}', index, *pair


def slices(raw_dir, out):
  """Images as JPEG, masks of 0 and 255 as PNG, and a patient list with file names without ending."""
  (out / 'images').mkdir(), (out / 'masks').mkdir()
  lines = ['name,patient']
  for number, (patient, _, grey, mask) in enumerate(pictures_of(raw_dir)):
    Image.fromarray(grey).save(out / 'images' / f'{number:04d}.jpg', quality=95)
    Image.fromarray(mask * 255).save(out / 'masks' / f'{number:04d}.png')
    lines.append(f'{number:04d},{patient}')
  (out / 'slices.csv').write_text('\n'.join(lines) + '\n')


def classes(raw_dir, out):
  """As COVID-CT: two folders with equal file names, RGBA PNG, unknown patients."""
  for name in ('CT_COVID', 'CT_NonCOVID'):
    (out / name).mkdir()
  for number, (_, _, grey, mask) in enumerate(pictures_of(raw_dir)):
    folder = out / ('CT_COVID' if mask.any() else 'CT_NonCOVID')
    size = (SIZE + number % 3, SIZE)
    Image.fromarray(grey).resize(size).convert('RGBA').save(folder / f'{len(list(folder.iterdir()))}.png')


KINDS = ('normal', 'consolidation', 'ground glass')


def three_kinds(folder, out, listed=False):
  """Pictures of phantoms with kinds of lesions, each in the folder of the kind with the larger area, or in labels.csv.

  Returns the class of each picture, by its name without ending. The second letter of a name is the patient.
  """
  classes, patients = {}, ['name,patient']
  for number, (scan, mask) in enumerate(files(folder)):
    hu, labels = volume_files.read_scan(scan), np.asarray(nib.load(mask).dataobj).T[:, ::-1]
    grey = np.rint(np.clip((hu.values + 1000) / 1300, 0, 1) * 255).astype(np.uint8)
    for index, (image, kinds) in enumerate(zip(grey, labels, strict=True)):
      name, areas = f'p{number}s{index:02d}', [(kinds == 2).sum(), (kinds == 1).sum()]
      classes[name] = KINDS[1 + int(np.argmax(areas))] if any(areas) else KINDS[0]
      place = out / ('images' if listed else classes[name])
      place.mkdir(parents=True, exist_ok=True)
      Image.fromarray(image).save(place / f'{name}.png')
      patients.append(f'{name},p{number}')
  (out / 'slices.csv').write_text('\n'.join(patients))
  if listed:
    (out / 'labels.csv').write_text('\n'.join(['name,class', *(f'{name}.png,{one}' for name, one in classes.items())]))
  return classes


LAYOUTS = {
  f.__name__: f for f in (covid19_20, nnunet, decathlon, dicom_pairs, pairs, zenodo_20, mosmed, medseg, slices)
}


def write_all(raw_dir, tmp_path_factory) -> dict[str, pathlib.Path]:
  """Writes each of LAYOUTS and `classes` (slices without masks). Returns {name: folder}."""
  folders = {}
  for name, lay in {**LAYOUTS, 'classes': classes}.items():
    folders[name] = tmp_path_factory.mktemp(name)
    lay(raw_dir, folders[name])
  return folders
