"""Shapes as signed distances in mm, positive inside, on a coarse atlas; and how they are drawn into voxels.

Smooth things (organs, lesions, textures) lie on the atlas and are interpolated at the voxel centres; thin things
(vessels, airways) are drawn into small boxes of the scan.
"""

import numpy as np
from scipy import ndimage

ORIGIN = (-5.0, -200.0, -200.0)  # of the atlas, in mm: it contains every field of view
EXTENT = (290.0, 400.0, 400.0)
ATLAS_STEP = (6.0, 3.8, 3.8)


def atlas():
  """Coordinates z [Z, 1, 1], y [1, Y, 1], x [1, 1, X] of the atlas in mm."""
  axes = (o + np.arange(0, e + s, s) for o, e, s in zip(ORIGIN, EXTENT, ATLAS_STEP, strict=True))
  return np.ix_(*(axis.astype(np.float32) for axis in axes))


def places(region):
  """Coordinates [N, 3] in mm of the points of the atlas where `region` holds."""
  return np.argwhere(region) * ATLAS_STEP + ORIGIN


def sample(values, grid, step=ATLAS_STEP):
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


def noise(rng, scale):
  """Smooth noise of unit variance with features of about 2 * `scale` mm: values and step."""
  step = (max(scale, ATLAS_STEP[0]), scale, scale)  # slices are thick: no finer noise along z
  shape = [int(e / s) + 3 for e, s in zip(EXTENT, step, strict=True)]
  values = rng.standard_normal(shape, np.float32)
  values = ndimage.gaussian_filter(values, 1, mode='wrap', truncate=3)
  return values / values.std(), step


def sampled_noise(rng, scale, grid):
  """`noise` at the open grid."""
  values, step = noise(rng, scale)
  return sample(values, grid, step)


def ellipsoid(offsets, radii, power=2.0):
  """Distance in mm to the surface of a (super)ellipsoid, to first order."""
  scaled = [np.abs(o / r) + 1e-6 for o, r in zip(offsets, radii, strict=True)]
  rho = sum(u**power for u in scaled)
  slope = sum((u ** (power - 1) / r) ** 2 for u, r in zip(scaled, radii, strict=True))
  return (1 - rho ** (1 / power)) * rho ** (1 - 1 / power) / np.sqrt(slope)


def tube(grid, start, end, radius):
  """Distance in mm to the surface of a capsule from `start` to `end`."""
  z, y, x = (g - float(s) for g, s in zip(grid, start, strict=True))
  a, b, c = (float(e - s) for e, s in zip(end, start, strict=True))
  length = a * a + b * b + c * c
  dot = a * z + b * y + c * x
  along = np.clip(dot / length, 0, 1)
  square = z * z + y * y + x * x - along * (2 * dot - length * along)
  return radius - np.sqrt(np.maximum(square, 0))


def inside(*distances, rounding=4.0):
  """The intersection of shapes, its edges rounded by about `rounding` mm."""
  return -rounding * np.log(sum(np.exp(np.clip(-d / rounding, -60, 60)) for d in distances))


def draw(volume, grid, spacing, starts, ends, radii):
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
      depth = tube(local, start, end, radius) / spacing[2] + 0.5
      filled = np.clip(depth, 0, min(1, 2 * radius / spacing[2]), out=depth)
      box = volume[k:m, j:n, i:o]
      np.maximum(box, filled.reshape(-1, parts, *box.shape[1:]).mean(1), out=box)


def fill(depth):
  """The fraction of a voxel inside an edge that lies `depth` voxels away."""
  return np.clip(depth + 0.5, 0, 1)


def paint(hu, fraction, value):
  """Partial volume: what is painted displaces what was there."""
  hu += fraction * (value - hu)
