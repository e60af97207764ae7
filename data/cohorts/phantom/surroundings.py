"""The surroundings of a patient: table, mattress, blanket and clothes."""

import dataclasses

import numpy as np

from data.cohorts.phantom.build import Build
from data.cohorts.phantom.shapes import Atlas, fill, layer, paint

AIR = -1000.0


def couch(rng: np.random.Generator, build: Build, axes, lowest: float, pixel: float) -> np.ndarray:
  """Returns the HU [1, rows, columns] of the empty couch, which is the same in all slices.

  The table is either one hard board, or a shell of carbon fibre around foam, flat or hollowed for the back.
  A mattress lies on it, and the body sinks into the mattress.

  Args:
    rng: random generator of the surroundings.
    build: the patient's build.
    axes: v [1, rows, 1] and u [1, 1, columns] of the voxels in mm, along the scanner's axes.
    lowest: height of the lowest skin (of the back, or of the front in a prone patient), in mm along gravity.
    pixel: width of a pixel in mm.
  """
  across = axes[1] - rng.uniform(-25, 25)
  hollow = rng.uniform(0.0012, 0.0026) if rng.random() < 0.6 else rng.uniform(0, 0.0002)
  mattress, sunk, half = rng.uniform(3, 30), rng.uniform(0, 10), rng.uniform(175, 250)
  # Depth in mm below the surface of the mattress, and below the surface of the table.
  depth = build.down * axes[0] - lowest + sunk + 0.5 * hollow * across**2
  below, sides = depth - mattress, half - np.abs(across)
  hu = np.full(np.broadcast_shapes(depth.shape, across.shape), AIR, np.float32)
  cushion = np.minimum(np.minimum(depth, -below), sides - rng.uniform(0, 40))
  paint(hu, fill(cushion / pixel), rng.uniform(-960, -750))
  paint(hu, layer(cushion - 1, rng.uniform(0.3, 1.5), pixel), rng.uniform(-700, -300))  # the cover of the mattress
  shell, carbon = rng.uniform(1.2, 3.5), rng.uniform(-350, 120)
  thick = rng.uniform(25, 75)
  if rng.random() < 0.15:  # a hard board
    thick = rng.uniform(6, 18)
    paint(hu, fill(np.minimum.reduce(np.broadcast_arrays(below, thick - below, sides)) / pixel), carbon)
    return hu
  lower = thick * np.sqrt(np.clip(1 - (across / half) ** 2, 0.02, 1)) - below
  core = np.minimum.reduce(np.broadcast_arrays(below, lower, sides))
  paint(hu, fill(core / pixel), rng.uniform(-985, -900))
  paint(hu, layer(core - shell / 2, shell, pixel), carbon)
  if rng.random() < 0.4:  # rails or cables in the foam
    for at in rng.uniform(-0.9, 0.9, rng.integers(1, 4)) * half:
      rod = rng.uniform(2, 6) - np.hypot(across - at, below - rng.uniform(8, 18))
      paint(hu, fill(rod / pixel), rng.uniform(-300, 900))
  return hu


@dataclasses.dataclass(frozen=True)
class Cloth:
  """A blanket or clothes over the body: their position on the atlas, and their properties.

  Attributes:
    fields: 'gap', the distance in mm outwards from the innermost layer, and 'folds', the distance in mm to a fold;
      each [Z, Y, X].
    thick: thickness of the blanket in mm.
    wad: HU of the filling.
    thread: HU of seams and folds.
    thread_width: width of seams and folds in mm.
  """

  fields: dict[str, np.ndarray]
  thick: float
  wad: float
  thread: float
  thread_width: float

  def paint(self, hu: np.ndarray, at: dict[str, np.ndarray], pixel: float) -> None:
    """Paints the cloth into a slab of HU. `at` holds its fields, sampled in the slab."""
    gap = at['gap']
    paint(hu, fill(np.minimum(gap, self.thick - gap) / pixel), self.wad)
    seams = layer(gap, self.thread_width, pixel)
    folds = layer(at['folds'], self.thread_width, pixel) * fill(np.minimum(gap + 6, self.thick + 22 - gap) / pixel)
    paint(hu, np.maximum(seams, folds), self.thread)


def cloth(rng: np.random.Generator, build: Build, atlas: Atlas, skin: np.ndarray, lowest: float) -> Cloth | None:
  """Draws the cover of the patient, from thin clothes to a thick blanket; None without a cover."""
  if rng.random() < 0.2:
    return None
  waves, creases = atlas.sampled_noise(rng, 18), atlas.sampled_noise(rng, 9)
  # The cloth lies over the body, not under it. Where it is wrinkled, it keeps some distance.
  gap = -skin - rng.uniform(1, 6) - rng.uniform(3, 11) * np.maximum(waves + 0.6, 0)
  over = lowest - 12 - build.down * atlas.axes[1]
  covered = rng.uniform(build.bottom, build.top) if rng.random() < 0.3 else build.top + 50
  gap = np.where((over > 0) & (atlas.axes[0] < covered), gap, -60)
  thick = rng.uniform(6, 25) if rng.random() < 0.4 else rng.uniform(0, 2)
  threads = (rng.uniform(-800, -300), rng.uniform(0.6, 1.8))
  return Cloth({'gap': gap, 'folds': 9 * creases + 4}, thick, rng.uniform(-960, -800), *threads)
