"""Shapes as signed distances in mm (positive inside) on a coarse atlas, and functions that draw them into voxels.

Smooth shapes (organs, lesions, textures) lie on the atlas and are interpolated at the voxel centres.
Thin shapes (vessels, airways) are drawn into small boxes of the scan.
"""

import math
from collections.abc import Callable

import numpy as np
from scipy import ndimage

STEP = (6.0, 3.8, 3.8)  # distance between the points of an atlas in mm


class Atlas:
  """Points STEP mm apart that cover a whole scan, along the scanner's axes. The patient may be rotated in these axes.

  Attributes:
    axes: open grid along the scanner's axes in mm: z [Z, 1, 1], v [1, Y, 1], u [1, 1, X].
    grid: the points along the patient's axes in mm: z [Z, 1, 1], y [1, Y, X], x [1, Y, X].
  """

  def __init__(self, bottom: float, top: float, half: float, angle: float):
    """Covers `bottom` to `top`, and `half` mm in each direction. The patient is rotated by `angle` in radians."""
    self._parts = bottom, half, angle
    self.origin = (bottom - 5, -half, -half)
    self.extent = (top - bottom + 10, 2 * half, 2 * half)
    self._turn = math.cos(angle), math.sin(angle)
    axes = (o + np.arange(0, e + s, s) for o, e, s in zip(self.origin, self.extent, STEP, strict=True))
    self.axes = z, v, u = np.ix_(*(axis.astype(np.float32) for axis in axes))
    c, s = self._turn
    self.grid = z, c * v - s * u, s * v + c * u
    self.shape = (z.size, v.size, u.size)

  def up_to(self, top: float) -> 'Atlas':
    """Returns an atlas of the lower levels of this one, up to `top` mm."""
    bottom, half, angle = self._parts
    return Atlas(bottom, top, half, angle)

  def along_scanner(self, points):
    """Converts points [..., 3] from the patient's (z, y, x) to the scanner's (z, v, u)."""
    z, y, x = np.moveaxis(np.asarray(points, float), -1, 0)
    c, s = self._turn
    return np.stack([z, c * y + s * x, c * x - s * y], -1)

  def rows(self, grid):
    """Returns v of the points of `grid`, which are in the patient's coordinates."""
    c, s = self._turn
    return c * grid[1] + s * grid[2]

  def places(self, region):
    """Returns coordinates [N, 3] of the points in `region`, in mm along the patient's axes."""
    k, j, i = np.nonzero(region)
    z, y, x = self.grid
    return np.stack([z[k, 0, 0], y[0, j, i], x[0, j, i]], -1).astype(float)

  def sample(self, values, grid, step=STEP):
    """Interpolates `values`, which lie `step` mm apart, at an open grid along the scanner's axes (trilinear)."""
    for axis in (0, 2, 1):  # columns before rows: rows are copied faster
      at = (grid[axis].ravel() - self.origin[axis]) / step[axis]
      low = np.clip(at.astype(int), 0, values.shape[axis] - 2)
      below = np.take(values, low, axis)
      above = np.take(values, low + 1, axis)
      above -= below
      above *= (at - low).astype(np.float32).reshape(grid[axis].shape)
      values = np.add(below, above, out=above)
    return values

  def noise(self, rng, scale):
    """Returns smooth noise of unit variance and its step in mm. Its features are about 2 * `scale` mm wide."""
    step = (max(scale, STEP[0]), scale, scale)  # no finer along z: slices are thick
    shape = [int(e / s) + 3 for e, s in zip(self.extent, step, strict=True)]
    values = rng.standard_normal(shape, np.float32)
    values = ndimage.gaussian_filter(values, 1, mode='wrap', truncate=3)
    return values / values.std(), step

  def sampled_noise(self, rng, scale):
    """Returns `noise` at the points of the atlas."""
    values, step = self.noise(rng, scale)
    return self.sample(values, self.axes, step)

  def nowhere(self):
    """Returns an empty shape, into which others can be stamped."""
    return np.full(self.shape, -60, np.float32)

  def box(self, points, reach: float) -> tuple:
    """Returns the part of the atlas within `reach` mm of points: its index, and its grid along the patient's axes."""
    at = np.atleast_2d((self.along_scanner(points) - self.origin) / STEP)
    low = np.maximum(np.floor(at.min(0) - reach / np.array(STEP)), 0).astype(int)
    high = np.maximum(np.ceil(at.max(0) + reach / np.array(STEP)) + 1, 0).astype(int)
    k, j, i = (slice(a, b) for a, b in zip(low, high, strict=True))
    z, y, x = self.grid
    return (k, j, i), (z[k], y[:, j, i], x[:, j, i])

  def stamp(self, field: np.ndarray, points, reach: float, shape: Callable) -> None:
    """Joins a shape to `field` within `reach` mm of `points`. `shape` maps the patient's (z, y, x) to distances."""
    box, grid = self.box(points, reach)
    if field[box].size:
      np.maximum(field[box], shape(grid), out=field[box])

  def stamp_tube(self, field, start, end, radius, margin=12.0):
    """Joins a `tube` to `field`. Distances are computed up to `margin` mm outside the tube."""
    self.stamp(field, [start, end], radius + margin, lambda grid: tube(grid, start, end, radius))

  def stamp_ball(self, field, centre, radii):
    """Joins an `ellipsoid` to `field`."""
    shape = lambda grid: ellipsoid([g - c for g, c in zip(grid, centre, strict=True)], radii)
    self.stamp(field, centre, max(radii) + 12, shape)


def ellipsoid(offsets, radii, power=2.0):
  """Returns the distance in mm to the surface of a (super)ellipsoid, to first order."""
  scaled = [np.abs(o / r) + 1e-6 for o, r in zip(offsets, radii, strict=True)]
  rho = sum(u**power for u in scaled)
  slope = sum((u ** (power - 1) / r) ** 2 for u, r in zip(scaled, radii, strict=True))
  return (1 - rho ** (1 / power)) * rho ** (1 - 1 / power) / np.sqrt(slope)


def tube(grid, start, end, radius):
  """Returns the distance in mm to the surface of a capsule from `start` to `end`."""
  z, y, x = (g - float(s) for g, s in zip(grid, start, strict=True))
  a, b, c = (float(e - s) for e, s in zip(end, start, strict=True))
  length = a * a + b * b + c * c
  dot = a * z + b * y + c * x
  along = np.clip(dot / length, 0, 1)
  square = z * z + y * y + x * x - along * (2 * dot - length * along)
  return radius - np.sqrt(np.maximum(square, 0))


def inside(*distances, rounding=4.0):
  """Returns the intersection of shapes, with edges rounded by about `rounding` mm."""
  return -rounding * np.log(sum(np.exp(np.clip(-d / rounding, -60, 60)) for d in distances))


def ramp(values, start, end):
  """Rises smoothly from 0 at `start` to 1 at `end`."""
  t = np.clip((values - start) / (end - start), 0, 1)
  return t * t * (3 - 2 * t)


def draw(volume, grid, spacing, starts, ends, radii):
  """Draws tubes into `volume` as the fraction of each voxel that they fill, all along the scanner's axes."""
  parts = int(np.ceil(spacing[0] / 4))  # a thick slice is the mean of thin slices
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
  """Returns the filled fraction of a voxel that lies `depth` voxels inside an edge."""
  return np.clip(depth + 0.5, 0, 1)


def layer(distance, thickness, pixel):
  """Returns the fraction of a voxel of `pixel` mm that a layer fills. Its middle lies `distance` mm away."""
  return np.clip((thickness / 2 - np.abs(distance)) / pixel + 0.5, 0, min(1, thickness / pixel))


def paint(hu, fraction, value):
  """Replaces `fraction` of each voxel in `hu` by `value` (partial volume)."""
  hu += fraction * (value - hu)
