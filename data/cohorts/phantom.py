"""Chest CT phantoms with COVID-like lesions: the cohort of the demo and of the tests.

A patient is drawn in millimetres, so that every matrix size shows the same anatomy; only the
noise belongs to the matrix. Smooth things (organs, lesions, textures) are signed distances or
noise on a coarse atlas in patient space, interpolated at the voxel centres; thin things (vessels,
airways) are drawn into small boxes of the scan. Vessels, fissures, atelectasis and partial volume
share the HU of the lesions, so that no threshold finds them: shape, place and texture do.

Coordinates are (z, y, x): inferior to superior from 0 to HEIGHT, anterior to posterior and the
patient's right to left, both from -fov / 2 to fov / 2. Distances are positive inside a shape.
"""

import gzip
import math
import pathlib
from collections.abc import Callable, Iterable

import nibabel as nib
import numpy as np
from scipy import ndimage

from data.workers import pool, silent

HEIGHT = 280.0  # of the chest that the scan covers, in mm
ORIGIN = (-5.0, -200.0, -200.0)  # of the atlas, in mm: it contains every field of view
EXTENT = (290.0, 400.0, 400.0)
ATLAS_STEP = (6.0, 3.8, 3.8)
SLAB = 8  # slices rendered at once, for a small memory


def _atlas():
  """Coordinates z [Z, 1, 1], y [1, Y, 1], x [1, 1, X] of the atlas in mm."""
  axes = (o + np.arange(0, e + s, s) for o, e, s in zip(ORIGIN, EXTENT, ATLAS_STEP, strict=True))
  return np.ix_(*(axis.astype(np.float32) for axis in axes))


def _places(region):
  """Coordinates [N, 3] in mm of the points of the atlas where `region` holds."""
  return np.argwhere(region) * ATLAS_STEP + ORIGIN


def _sample(values, grid, step=ATLAS_STEP):
  """Trilinear interpolation of `values`, `step` mm apart from ORIGIN, at the open grid."""
  for axis in (0, 2, 1):  # columns before rows, which are copied faster
    at = (grid[axis].ravel() - ORIGIN[axis]) / step[axis]
    low = np.clip(at.astype(int), 0, values.shape[axis] - 2)
    below = np.take(values, low, axis)
    above = np.take(values, low + 1, axis)
    above -= below
    above *= (at - low).astype(np.float32).reshape(grid[axis].shape)
    values = np.add(below, above, out=above)
  return values


def _noise(rng, scale):
  """Smooth noise of unit variance with features of about 2 * `scale` mm: values and step."""
  step = (max(scale, ATLAS_STEP[0]), scale, scale)  # slices are thick: no finer noise along z
  shape = [int(e / s) + 3 for e, s in zip(EXTENT, step, strict=True)]
  values = rng.standard_normal(shape, np.float32)
  values = ndimage.gaussian_filter(values, 1, mode='wrap', truncate=3)
  return values / values.std(), step


def _sampled_noise(rng, scale, grid):
  """`_noise` at the open grid."""
  values, step = _noise(rng, scale)
  return _sample(values, grid, step)


def _ellipsoid(offsets, radii, power=2.0):
  """Distance in mm to the surface of a (super)ellipsoid, to first order."""
  scaled = [np.abs(o / r) + 1e-6 for o, r in zip(offsets, radii, strict=True)]
  rho = sum(u**power for u in scaled)
  slope = sum((u ** (power - 1) / r) ** 2 for u, r in zip(scaled, radii, strict=True))
  return (1 - rho ** (1 / power)) * rho ** (1 - 1 / power) / np.sqrt(slope)


def _tube(grid, start, end, radius):
  """Distance in mm to the surface of a capsule from `start` to `end`."""
  z, y, x = (g - float(s) for g, s in zip(grid, start, strict=True))
  a, b, c = (float(e - s) for e, s in zip(end, start, strict=True))
  length = a * a + b * b + c * c
  dot = a * z + b * y + c * x
  along = np.clip(dot / length, 0, 1)
  square = z * z + y * y + x * x - along * (2 * dot - length * along)
  return radius - np.sqrt(np.maximum(square, 0))


def _inside(*distances, rounding=4.0):
  """The intersection of shapes, its edges rounded by about `rounding` mm."""
  return -rounding * np.log(sum(np.exp(np.clip(-d / rounding, -60, 60)) for d in distances))


def _build(rng):
  """Half width, half depth, thickness of the fat and field of view of a patient, in mm."""
  width = rng.uniform(143, 163)
  depth = width * rng.uniform(0.66, 0.78)
  return width, depth, rng.uniform(8, 18), 2 * width + rng.uniform(18, 36)


def _anatomy(rng, build):
  """Organs on the atlas, each [Z, Y, X]: distances in mm, or HU; and the carina's level."""
  z, y, x = grid = _atlas()
  width, depth, fat, _ = build
  wobble = _sampled_noise(rng, 25, grid)
  skin = _ellipsoid((y, x), (depth, width), 2.5) + wobble

  # The rib cage narrows to the apex, which lies behind the middle of the chest.
  apex = rng.uniform(264, 284)
  taper = np.clip((z - 110) / (apex - 110), 0, 0.999)
  scale = np.sqrt(1 - taper**3)
  deep, wide = depth - fat - 13, width - fat - 17
  offsets = (y - 14 * taper, x + 0 * z)
  chest = _ellipsoid(offsets, (deep * scale, wide * scale), 2.2) + 3 * wobble
  chest = np.minimum(chest, apex - z)
  spine = deep - 20  # the middle of the vertebral bodies

  right, left = rng.uniform(58, 84), rng.uniform(48, 70)
  right_side = 0.5 - 0.5 * np.tanh(x / 15)
  dome = left + (right - left) * right_side
  bend = np.maximum(np.abs(x) - 55, 0) ** 2 + np.maximum(y + 25, -20) ** 2
  dome = dome - rng.uniform(0.006, 0.0085) * bend + 3 * wobble
  tilt = rng.uniform(0.5, 0.9)  # the axis of the heart points forwards and to the left
  base, front, across = left + rng.uniform(20, 35), y + 20, x - rng.uniform(16, 26)
  turned = (across * math.cos(tilt) - front * math.sin(tilt), across * math.sin(tilt) + front * math.cos(tilt))
  heart = _ellipsoid((z - base, *turned), (rng.uniform(48, 60), 0.5 * wide, 0.36 * wide), 2.3)
  heart += 3 * wobble
  arch, aorta = rng.uniform(188, 202), (spine - 22, 19)
  vessels = [
    ((100, -8, -4), (arch, -12, -10), 15),
    ((arch, -12, -10), (arch, *aorta), 13),
    ((arch, *aorta), (-20, *aorta), 11.5),
    ((120, -12, -30), (290, -14, -22), 8),
  ]
  great = np.maximum.reduce([_tube(grid, *vessel) for vessel in vessels])
  carina = rng.uniform(158, 172)

  middle = 12 + 16 * np.exp(-(((y - 5) / 30) ** 2)) * np.exp(-(((z - 165) / 90) ** 2))
  column = _inside(24 - np.abs(x), y - spine + 16 + 0 * z)
  lungs = _inside(chest - 2, np.abs(x) - middle, -heart, -great, -column, 0.8 * (z - dome))

  # Ribs run down and forwards, so that a slice cuts several of them.
  level = (z - 0.55 * y) % 24 - 12
  ribs = 4.2 - np.hypot(chest + 6, 0.6 * level)
  sternum = np.minimum(_ellipsoid((y + deep + 8, x), (6.5, 19)), np.minimum(z - 70, 235 - z))
  blade = 2.5 - np.abs(chest + 20)  # of the shoulder
  blade = np.minimum.reduce(np.broadcast_arrays(blade, y - 5, np.abs(x) - 55, z - 150))
  vertebra = np.maximum.reduce(
    np.broadcast_arrays(
      _ellipsoid((y - spine, x), (15, 19), 2.4),
      np.minimum(5 - np.abs(y - spine - 27), 26 - 2 * np.abs(level) - np.abs(x)),
      np.minimum(4 - np.abs(x), 18 - np.abs(y - spine - 40)),
    )
  )
  vertebra = np.minimum(vertebra, -_ellipsoid((y - spine - 22, x), (8, 9)))  # the canal
  bone = np.maximum.reduce(np.broadcast_arrays(ribs, sternum, blade, vertebra))
  bone = np.minimum(bone, skin - fat)

  bubble = _ellipsoid((z - 28, y + 35, x - 62), (22, rng.uniform(12, 26), 30))  # in the stomach
  viscera = np.where(z > dome + 2, -75 + 35 * wobble, 46 + 12 * right_side + 6 * wobble)
  return {
    'skin': skin,
    'chest': chest,
    'solid': np.maximum(heart, great),
    'heart': heart,
    'lungs': lungs,
    'bone': bone,
    'bubble': bubble,
    'viscera': viscera,
    'muscle': 52 + 14 * wobble,
  }, carina


def _tree(rng, root, targets, tip):
  """Grows a vascular tree: starts [N, 3], ends [N, 3] and radii [N] in mm of its segments.

  Each target joins the node that is near and not far along the tree, so that branches fan out;
  a vessel then carries what its branches carry (Murray's law).
  """
  nodes, parents, path = np.array([root], float), [-1], np.zeros(1)
  for target in targets[np.argsort(np.linalg.norm(targets - root, axis=1))]:
    gap = np.linalg.norm(nodes - target, axis=1)
    parent = np.argmin(gap + 0.5 * path)
    count = int(np.ceil(gap[parent] / 16))
    steps = np.linspace(0, 1, count + 1)[1:, None]
    new = nodes[parent] + steps * (target - nodes[parent])
    new += rng.normal(0, 1.2, new.shape)
    parents += [parent, *range(len(nodes), len(nodes) + count - 1)]
    path = np.append(path, path[parent] + gap[parent] * steps[:, 0])
    nodes = np.concatenate([nodes, new])
  flow = np.zeros(len(nodes))
  for node in range(len(nodes) - 1, 0, -1):
    flow[node] = flow[node] or tip**2.8
    flow[parents[node]] += flow[node]
  return nodes[parents[1:]], nodes[1:], flow[1:] ** (1 / 2.8)


def _draw(volume, grid, spacing, starts, ends, radii):
  """Draws tubes into `volume`, as the fraction of each voxel that they fill."""
  parts = int(np.ceil(spacing[0] / 4))  # a thick slice is the mean of thin ones
  thin = ((np.arange(parts) + 0.5) / parts - 0.5) * spacing[0]
  levels = (grid[0] + thin.astype(np.float32)).reshape(-1, 1, 1)
  first = np.array([axis.flat[0] for axis in grid])
  low = np.minimum(starts, ends) - radii[:, None] - spacing - first
  high = np.maximum(starts, ends) + radii[:, None] + spacing - first
  low = np.maximum(np.ceil(low / spacing), 0).astype(int)
  high = np.minimum(np.floor(high / spacing) + 1, volume.shape).astype(int)
  for start, end, radius, (k, j, i), (m, n, o) in zip(
    starts, ends, radii.tolist(), low.tolist(), high.tolist(), strict=True
  ):
    if k < m and j < n and i < o:
      local = levels[k * parts : m * parts], grid[1][:, j:n], grid[2][:, :, i:o]
      depth = _tube(local, start, end, radius) / spacing[2] + 0.5
      filled = np.clip(depth, 0, min(1, 2 * radius / spacing[2]), out=depth)
      box = volume[k:m, j:n, i:o]
      np.maximum(box, filled.reshape(-1, parts, *box.shape[1:]).mean(1), out=box)


def _fill(depth):
  """The fraction of a voxel inside an edge that lies `depth` voxels away."""
  return np.clip(depth + 0.5, 0, 1)


def _paint(hu, fraction, value):
  """Partial volume: what is painted displaces what was there."""
  hu += fraction * (value - hu)


def _branches(rng, region, carina, grid, spacing):
  """Pulmonary vessels with the walls of airways, and the air in them: two fractions [Z, Y, X]."""
  tissue, air = np.zeros([2, *(axis.size for axis in grid)], np.float32)
  places = _places(region > 4)
  trachea = [((290, -5, 0), (carina, 8, 0), 8.5)]
  for sign in (-1, 1):
    lung = places[places[:, 2] * sign > 0]
    trachea.append(((carina, 8, 0), (carina - 22, 12, sign * 38), 6.5))
    for hilum in ((carina - 22, 4, sign * 34), (carina - 38, 10, sign * 30)):  # artery, vein
      targets = rng.choice(lung, 160) + rng.uniform(-1.5, 1.5, (160, 3))
      starts, ends, radii = _tree(rng, hilum, targets, rng.uniform(0.8, 1.05))
      _draw(tissue, grid, spacing, starts, ends, radii)
      if hilum[1] == 4:  # bronchi run beside arteries
        large = radii > 1.7
        radii = radii[large]
        beside = (radii * 1.5 + 1)[:, None] * np.array([0.3, 0.8, 0.5 * sign])
        starts, ends = starts[large] + beside, ends[large] + beside
        _draw(tissue, grid, spacing, starts, ends, radii * 0.85 + 0.9)
        _draw(air, grid, spacing, starts, ends, radii * 0.85)
  _draw(air, grid, spacing, *map(np.array, zip(*trachea, strict=True)))
  return tissue, air


def _lesions(rng, region, count):
  """The lesions on the atlas: depth [Z, Y, X] in widths of their soft edge, and added HU."""
  grid = _atlas()
  coarse, fine = _sampled_noise(rng, 10, grid), _sampled_noise(rng, 4, grid)
  depth, lift = np.full(coarse.shape, -9, np.float32), np.zeros_like(coarse)
  # They favour the periphery, the back, and some level of the lungs that is the patient's own.
  places, level = _places(region > 7), rng.uniform(50, 140)
  weight = np.exp(places[:, 1] / 60 - np.abs(places[:, 0] - level) / 35)
  weight *= np.exp(-region[region > 7] / 14)
  for centre in rng.choice(places, count, p=weight / weight.sum()).tolist():
    radius = 13 + 22 * rng.beta(1.6, 1.1)
    stretch = rng.uniform((0.7, 1.0, 1.0), (1.0, 1.4, 1.4)).tolist()
    offsets = [(g - c) / s for g, c, s in zip(grid, centre, stretch, strict=True)]
    blob = radius * (1 + 0.18 * coarse) + 0.9 * fine - np.sqrt(sum(o * o for o in offsets))
    glass, dense = rng.uniform(140, 280), rng.uniform(620, 860)
    core = np.clip((blob - 0.35 * radius) / 5 + 0.5, 0, 1)
    # Ground glass, ground glass with a dense core, consolidation, and a reversed halo.
    kinds = (glass, glass), (glass, dense), (dense, dense), (dense, glass)
    outer, inner = kinds[rng.choice(4, p=[0.55, 0.25, 0.12, 0.08])]
    added = (outer + (inner - outer) * core) * (1 + 0.16 * fine + 0.1 * coarse)
    blob /= rng.uniform(2, 5)
    lift = np.where(blob > depth, added, lift)
    depth = np.maximum(depth, blob)
  return depth, lift


def _parenchyma(rng, region, depth, voxel):
  """Lung without lesions: HU on the atlas [Z, Y, X], denser at the back, and a list of sheets.

  A sheet, of a fissure or of plate atelectasis, is its distance and its extent on the atlas
  with the width in mm and the HU at which slices of this thickness show it.
  """
  _, y, x = grid = _atlas()
  mottle, folds = _sampled_noise(rng, 9, grid), _sampled_noise(rng, 12, grid)
  back = y / depth
  healthy = rng.uniform(-890, -850) + rng.uniform(20, 60) * (back + back * back) + 12 * mottle
  thickness = rng.uniform(2, 7) * (1 + 0.6 * folds)
  dependent = np.clip((thickness - region) / 3 + 0.5, 0, 1)
  dependent *= np.clip((y - rng.uniform(5, 35)) / 20, 0, 1) * rng.uniform(120, 420)
  folds = 3 * folds + rng.uniform(-0.15, 0.25) * np.abs(x)
  sheets = [((0.65, -0.76, 0.05), (rng.uniform(130, 160), 15, 0), 900, 0.8, 320)]  # fissures
  for _ in range(rng.integers(1, 4)):
    normal = rng.normal(size=3) * (1.0, 1.0, 0.4)
    centre = (rng.uniform(70, 130), rng.uniform(-30, 60), rng.choice([-80.0, 80.0]).item())
    sheets.append(
      (
        (normal / np.linalg.norm(normal)).tolist(),
        centre,
        rng.uniform(20, 40),
        rng.uniform(1.2, 2.2),
        rng.uniform(250, 600),
      )
    )
  seen = []
  for (a, b, c), centre, radius, width, lift in sheets:
    w, v, u = (g - o for g, o in zip(grid, centre, strict=True))
    extent = np.clip((radius - np.sqrt(w * w + v * v + u * u)) / 10, 0, 1)
    blurred = math.hypot(width, voxel[2] / 3.5, a * voxel[0] / 3.5)
    seen.append((a * w + b * v + c * u + folds, extent, blurred, lift * width / blurred))
  return healthy + dependent, seen


def spacing(seed: int, number: int, *, size: int, slices: int) -> tuple[float, float, float]:
  """The size of a voxel of `patient(...)` in mm: slice thickness, row height, column width."""
  fov = _build(np.random.default_rng([seed, number, 1]))[-1]
  return HEIGHT / slices, fov / size, fov / size


def patient(seed: int, number: int, *, size: int, slices: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """A patient of the cohort, the same for the same arguments.

  Args:
    seed: of the cohort, 0 or more.
    number: of the patient, 1 or more. Every fifth one has no lesion.
    size: rows and columns of a slice. The field of view is about 340 mm at any size.
    slices: of the scan. They cover 280 mm of the chest, however many there are.

  Returns:
    hu: int16 [slices, size, size], inferior to superior, anterior to posterior, and from the
      patient's right to left. Corners outside the field of view may be -2048, as on scanners.
    mask: uint8 of the same shape, 1 where there is lesion (with the vessels that cross it).
    lungs: uint8 of the same shape, 1 in the lungs, lesions included.

  Raises:
    ValueError: an argument is out of its range; the smallest scan is 16 slices of 32 x 32.
  """
  if seed < 0 or number < 1 or size < 32 or slices < 16:
    raise ValueError(
      f'no phantom for {seed=}, {number=}, {size=}, {slices=}: needs seed >= 0, '
      'number >= 1, size >= 32 and slices >= 16'
    )
  rng, scanner = (np.random.default_rng([seed, number, stream]) for stream in (1, 2))
  _, depth, fat, fov = build = _build(rng)
  voxel = thickness, pixel, _ = spacing(seed, number, size=size, slices=slices)
  atlas, carina = _anatomy(rng, build)
  region = atlas['lungs']
  # Where the edge of the lung is oblique to the slice, as on the dome, the slice blurs it.
  slope = np.abs(np.gradient(region, ATLAS_STEP[0], axis=0))
  atlas['lungs'] = region / (pixel + slope * thickness)
  count = 1 + rng.binomial(5, 0.65) if number % 5 else 0
  atlas['lesion'], atlas['lift'] = _lesions(rng, region, count)
  atlas['healthy'], sheets = _parenchyma(rng, region, depth, voxel)
  (grain, grain_step), grainy = _noise(rng, 2.8), rng.uniform(10, 22)

  across = (np.arange(size, dtype=np.float32) + 0.5 - size / 2) * pixel
  outside = np.hypot(across[:, None], across) > fov / 2
  off = rng.uniform(-6, 6, 2).tolist()  # nobody lies quite in the middle
  levels = (np.arange(slices, dtype=np.float32) + 0.5) * thickness
  z, y, x = np.ix_(levels, across + off[0], across + off[1])
  tissue, air = _branches(rng, region, carina, (z, y, x), voxel)

  table = _fill((3 - np.abs(y - depth - 16 + x * x / 1500)) / pixel)
  blood, cortex, marrow = rng.uniform(38, 60), rng.uniform(600, 900), rng.uniform(180, 300)
  motion, level, padding = rng.uniform(0.3, 0.9), rng.uniform(10, 32), rng.choice([-1024, -2048])

  scan = np.empty([slices, size, size], np.int16)
  mask, lungs = np.empty([2, *scan.shape], np.uint8)
  for slab in (slice(first, first + SLAB) for first in range(0, slices, SLAB)):
    grid = z[slab], y, x
    at = {name: _sample(values, grid) for name, values in atlas.items()}
    hu = np.full_like(at['skin'], -1000)
    _paint(hu, table, -350)
    _paint(hu, _fill(at['skin'] / pixel), -105)
    _paint(hu, _fill((at['skin'] - fat) / pixel), at['muscle'])
    _paint(hu, _fill(at['chest'] / pixel), at['viscera'])
    _paint(hu, _fill(at['solid'] / pixel), blood)
    _paint(hu, _fill(at['bubble'] / pixel), -950)
    _paint(hu, _fill(at['bone'] / pixel), cortex)
    _paint(hu, _fill((at['bone'] - 1.8) / pixel), marrow)

    lung = at['healthy'] + grainy * _sample(grain, grid, grain_step)
    for plane, extent, width, lift in sheets:
      sheet = np.exp(-0.5 * (_sample(plane, grid) / width) ** 2)
      lung += lift * sheet * _sample(extent, grid)
    lung += _fill(at['lesion']) * at['lift']
    inside = _fill(at['lungs'])
    _paint(hu, inside, np.minimum(lung, 60))
    _paint(hu, tissue[slab] * inside, 45)
    _paint(hu, air[slab], -985)
    lungs[slab] = at['lungs'] > 0
    mask[slab] = (at['lesion'] > 0) & (at['lungs'] > 0)

    # The heart beats during the rotation; then the focal spot, and the noise of the scanner.
    blurred = ndimage.gaussian_filter(hu, (0, 2.5 / pixel, 2.5 / pixel), truncate=2)
    _paint(hu, motion * np.exp(-((at['heart'] / 9) ** 2)), blurred)
    hu = ndimage.gaussian_filter(hu, (0, 0.55 / pixel, 0.55 / pixel), truncate=3)
    noise = scanner.standard_normal(hu.shape, np.float32)
    noise = ndimage.gaussian_filter(noise, (0, 0.7, 0.7), truncate=3)
    hu += noise * (level / noise.std()) * np.clip(0.6 + at['skin'] / 180, 0.35, 1.1)
    scan[slab] = np.clip(np.rint(hu), -1024, 3071)
  scan[:, outside] = padding
  return scan, mask, lungs


def _write_patient(job):
  raw_dir, seed, number, size, slices = job
  hu, mask, _ = patient(seed, number, size=size, slices=slices)
  thickness, height, width = spacing(seed, number, size=size, slices=slices)
  affine = np.diag([-width, -height, thickness, 1])  # NIfTI's world is R, A, S
  affine[:3, 3] = np.array([width, height, 0]) * (size - 1) / 2
  for kind, array in (('ct', hu), ('seg', mask)):
    image = nib.Nifti1Image(array.transpose(2, 1, 0), affine)
    if number % 4 == 0:  # so that readers meet another orientation every time
      image = image.as_reoriented([[0, -1], [1, -1], [2, 1]])
    image.set_qform(image.affine, code=1)
    image.set_sform(None, code=0)
    path = raw_dir / f'volume-phantom-A-{number:04d}_{kind}.nii.gz'
    path.write_bytes(gzip.compress(image.to_bytes(), compresslevel=1, mtime=0))


def write(
  raw_dir: pathlib.Path,
  *,
  patients: int,
  size: int = 512,
  slices: int = 48,
  seed: int = 0,
  progress: Callable[..., Iterable] = silent,
) -> None:
  """Writes a cohort in the layout of the COVID-19-20 challenge.

  Each patient n from 1 is `volume-phantom-A-NNNN_ct.nii.gz` (int16 HU) beside `..._seg.nii.gz`
  (uint8, 0 or 1), a function of (seed, n, size, slices) alone. Arrays are stored in L, P, S
  order, every fourth patient's in R, A, S; the affine is in the qform, as in the challenge.

  Args:
    raw_dir: folder, made if it does not exist; files of the same names are replaced.
    patients, size, slices, seed: as in `patient`; the cohort is patients 1 to `patients`.
    progress: wraps an iterable of one item a patient, as tqdm does.

  Raises:
    ValueError: an argument is out of its range (see `patient`).
  """
  if patients < 1:
    raise ValueError(f'no cohort of {patients=}: needs 1 or more')
  raw_dir = pathlib.Path(raw_dir)
  raw_dir.mkdir(parents=True, exist_ok=True)
  jobs = [(raw_dir, seed, number, size, slices) for number in range(1, patients + 1)]
  with pool(patients) as run:
    for _ in progress(run(_write_patient, jobs), total=patients, desc='Drawing phantoms', unit='patient'):
      pass
