"""Chest CT phantoms with COVID-like lesions: the cohort of the demo and of the tests.

A patient is drawn in millimetres. Every matrix size therefore shows the same anatomy; only the
noise depends on the matrix. Vessels, fissures, atelectasis and partial volume have the same HU as
lesions. A threshold therefore cannot separate the lesions; shape, place and texture can.

The surroundings of the lungs are drawn as in real scans: tables, cushions, blankets, arms, necks,
and bellies with gas in the bowel. Some patients are rotated, off the centre, prone, or wider than
the field of view. A model that was not trained on these surroundings marks them as lesions.

The patient's coordinates are (z, y, x) in mm: inferior to superior from the costophrenic angles,
anterior to posterior, and the patient's right to left. The scanner's coordinates are (z, v, u);
the patient may be rotated in them. Distances are positive inside a shape.
"""

import gzip
import pathlib
from collections.abc import Callable, Iterable

import nibabel as nib
import numpy as np
from scipy import ndimage

from data.cohorts.phantom import build
from data.cohorts.phantom.body import anatomy
from data.cohorts.phantom.lesions import DENSE, lesions
from data.cohorts.phantom.lungs import branches, parenchyma
from data.cohorts.phantom.shapes import STEP, Atlas, fill, paint
from data.cohorts.phantom.surroundings import cloth, couch
from data.workers import pool, silent

VERSION = 2  # of the drawing; increase it when a change alters the scan of any patient
SLAB = 8  # slices rendered at once, to save memory


def spacing(seed: int, number: int, *, size: int, slices: int) -> tuple[float, float, float]:
  """Returns the voxel size of `patient(...)` in mm: slice thickness, row height, column width."""
  built = _build(seed, number)
  return (built.top - built.bottom) / slices, built.fov / size, built.fov / size


def _build(seed, number):
  return build.draw(np.random.default_rng([seed, number, 0]))


def patient(
  seed: int, number: int, *, size: int, slices: int, kinds: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Draws a patient of the cohort. Equal arguments give equal arrays.

  Args:
    seed: seed of the cohort, 0 or more.
    number: number of the patient, 1 or more. Every fifth patient has no lesion.
    size: rows and columns of a slice. The field of view is 270 to 490 mm; it depends on the patient, not on `size`.
    slices: number of slices. They cover 280 to 560 mm of the body; the length depends on the patient, not on `slices`.
    kinds: mark consolidations, the dense parts of lesions, with 2.

  Returns:
    hu: int16 [slices, size, size], inferior to superior, anterior to posterior, and from the
      patient's right to left. Voxels outside a round field of view are -1024 or -2048, as on scanners.
    mask: uint8 of the same shape, 1 in lesions (including the vessels that cross them); 2 in consolidations if `kinds`.
    lungs: uint8 of the same shape, 1 in the lungs, including lesions.

  Raises:
    ValueError: an argument is out of range; the smallest scan is 16 slices of 32 x 32.
  """
  if seed < 0 or number < 1 or size < 32 or slices < 16:
    raise ValueError(
      f'no phantom for {seed=}, {number=}, {size=}, {slices=}: needs seed >= 0, '
      'number >= 1, size >= 32 and slices >= 16'
    )
  rng, scanner, around = (np.random.default_rng([seed, number, stream]) for stream in (1, 2, 3))
  built = _build(seed, number)
  voxel = thickness, pixel, _ = spacing(seed, number, size=size, slices=slices)
  atlas = Atlas(built.bottom, built.top, built.fov / 2 + max(map(abs, built.off)) + 8, built.angle)
  fields, carina = anatomy(rng, built, atlas)
  region = fields['lungs']
  # A slice blurs the edge of the lung where the edge is oblique to it, as on the dome.
  slope = np.abs(np.gradient(region, STEP[0], axis=0))
  fields['lungs'] = region / (pixel + slope * thickness)
  count = 1 + rng.binomial(5, 0.65) if number % 5 else 0
  fields['lesion'], fields['lift'] = lesions(rng, atlas, region, count)
  fields['healthy'], sheets = parenchyma(rng, built, atlas, region, voxel)
  (grain, grain_step), grainy = atlas.noise(rng, 2.8), rng.uniform(10, 22)

  across = (np.arange(size, dtype=np.float32) + 0.5 - size / 2) * pixel
  levels = built.bottom + (np.arange(slices, dtype=np.float32) + 0.5) * thickness
  z, v, u = np.ix_(levels, across + built.off[0], across + built.off[1])
  tissue, air = branches(rng, atlas, region, carina, (z, v, u), voxel)

  lowest = (built.down * atlas.axes[1])[:, (fields['skin'] > 0).any((0, 2))].max()
  table = couch(around, built, (v, u), lowest, pixel)
  cover = cloth(around, built, atlas, fields['skin'], lowest)
  fields |= cover.fields if cover else {}
  blood, cortex, marrow = rng.uniform(38, 60), rng.uniform(600, 900), rng.uniform(180, 300)
  motion, level, padding = rng.uniform(0.3, 0.9), rng.uniform(10, 32), rng.choice([-1024, -2048])

  scan = np.empty([slices, size, size], np.int16)
  mask, lungs = np.empty([2, *scan.shape], np.uint8)
  for slab in (slice(first, first + SLAB) for first in range(0, slices, SLAB)):
    axes = z[slab], v, u
    at = {name: atlas.sample(values, axes) for name, values in fields.items()}
    hu = np.repeat(table, axes[0].size, axis=0)
    if cover:
      cover.paint(hu, at, pixel)
    paint(hu, fill(at['skin'] / pixel), -105)
    paint(hu, fill(at['flesh'] / pixel), at['muscle'])
    paint(hu, fill(at['chest'] / pixel), at['viscera'])
    paint(hu, fill(at['solid'] / pixel), blood)
    paint(hu, fill(at['bubble'] / pixel), -950)
    paint(hu, fill(at['bone'] / pixel), cortex)
    paint(hu, fill((at['bone'] - 1.8) / pixel), marrow)

    inside = fill(at['lungs'])
    if inside.any():
      lung = at['healthy'] + grainy * atlas.sample(grain, axes, grain_step)
      for plane, extent, width, lift in sheets:
        sheet = np.exp(-0.5 * (atlas.sample(plane, axes) / width) ** 2)
        lung += lift * sheet * atlas.sample(extent, axes)
      lung += fill(at['lesion']) * at['lift']
      paint(hu, inside, np.minimum(lung, 60))
      paint(hu, tissue[slab] * inside, 45)
    paint(hu, air[slab], -985)
    lungs[slab] = at['lungs'] > 0
    mask[slab] = (at['lesion'] > 0) & (at['lungs'] > 0)
    if kinds:
      mask[slab] *= np.where(at['lift'] > DENSE, 2, 1).astype(np.uint8)

    # Motion blur of the beating heart, then the blur of the focal spot, then the noise of the scanner.
    beat = motion * np.exp(-((at['heart'] / 9) ** 2))
    if beat.max() > 0.01:
      paint(hu, beat, ndimage.gaussian_filter(hu, (0, 2.5 / pixel, 2.5 / pixel), truncate=2))
    hu = ndimage.gaussian_filter(hu, (0, 0.55 / pixel, 0.55 / pixel), truncate=3)
    noise = scanner.standard_normal(hu.shape, np.float32)
    noise = ndimage.gaussian_filter(noise, (0, 0.7, 0.7), truncate=3)
    hu += noise * (level / noise.std()) * np.clip(0.6 + at['skin'] / 180, 0.35, 1.1)
    scan[slab] = np.clip(np.rint(hu), -1024, 3071)
  if built.is_round:
    outside = np.hypot(across[:, None], across) > built.fov / 2
    scan[:, outside], mask[:, outside], lungs[:, outside] = padding, 0, 0
  return scan, mask, lungs


def write_patient(
  raw_dir: pathlib.Path, number: int, seed: int, size: int, slices: int, kinds: bool = False
) -> pathlib.Path:
  """Writes the scan and the mask of one patient, as `write_phantoms` does, and returns the path of the scan."""
  hu, mask, _ = patient(seed, number, size=size, slices=slices, kinds=kinds)
  thickness, height, width = spacing(seed, number, size=size, slices=slices)
  affine = np.diag([-width, -height, thickness, 1])  # world axes of NIfTI are R, A, S
  affine[:3, 3] = np.array([width, height, 0]) * (size - 1) / 2
  for kind, array in (('ct', hu), ('seg', mask)):
    image = nib.Nifti1Image(array.transpose(2, 1, 0), affine)
    if number % 4 == 0:  # stored in another orientation, to exercise the readers
      image = image.as_reoriented([[0, -1], [1, -1], [2, 1]])
    image.set_qform(image.affine, code=1)
    image.set_sform(None, code=0)
    path = raw_dir / f'volume-phantom-A-{number:04d}_{kind}.nii.gz'
    path.write_bytes(gzip.compress(image.to_bytes(), compresslevel=1, mtime=0))
  return raw_dir / f'volume-phantom-A-{number:04d}_ct.nii.gz'


def write_phantoms(
  raw_dir: pathlib.Path,
  *,
  patients: int,
  size: int = 512,
  slices: int = 48,
  seed: int = 0,
  kinds: bool = False,
  progress: Callable[..., Iterable] = silent,
) -> None:
  """Writes a cohort in the layout of the COVID-19-20 challenge.

  Each patient n, counted from 1, has two files: `volume-phantom-A-NNNN_ct.nii.gz` (int16 HU) and
  `..._seg.nii.gz` (uint8, 0 or 1; 2 in consolidations if `kinds`). They depend on (seed, n, size, slices, kinds) only.
  Arrays are stored in L, P, S order, those of every fourth patient in R, A, S. The affine is in the qform, as in the
  challenge.

  Args:
    raw_dir: output folder. It is created if it does not exist; files of the same names are replaced.
    patients: number of patients; they are numbered 1 to `patients`.
    size, slices, seed, kinds: as in `patient`.
    progress: wraps an iterable that yields one item per patient, as tqdm does.

  Raises:
    ValueError: an argument is out of range (see `patient`).
  """
  if patients < 1:
    raise ValueError(f'no cohort of {patients=}: needs 1 or more')
  raw_dir = pathlib.Path(raw_dir)
  raw_dir.mkdir(parents=True, exist_ok=True)
  numbers = range(1, patients + 1)
  jobs = [[value] * patients for value in (seed, size, slices, kinds)]
  with pool(patients) as run:
    written = run(write_patient, [raw_dir] * patients, numbers, *jobs)
    for _ in progress(written, total=patients, desc='Drawing phantoms', unit='patients'):
      pass
