"""The contents of healthy lungs: vessels, airways, fissures and atelectasis. They have the same HU as lesions."""

import math

import numpy as np

from data.cohorts.phantom.build import Build
from data.cohorts.phantom.shapes import Atlas, draw


def _tree(rng, root, targets, tip):
  """Grows a vascular tree. Returns starts [N, 3], ends [N, 3] and radii [N] of its segments in mm.

  Each target joins the node with the smallest sum of distance and weighted path length from the root;
  the branches therefore fan out. The radii follow Murray's law: a vessel carries the flow of all its branches.
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


def _hilum(rng, sign, carina):
  """Returns the central vessels of a lung as tubes (start, end, radius) in mm.

  They are wider than Murray's law gives for the branches of `_tree`. The right artery passes in front of the
  bronchus; the left artery arches over it; both descend behind it. The lower vein rises to the heart; the upper
  vein lies in front.
  """
  if sign < 0:
    bend, down = (carina - 24, 0, -42), (carina - 62, 16, -54)
    artery = ((carina - 20, -10, 8), bend, rng.uniform(8.5, 11))
  else:
    bend, down = (carina - 2, 6, 36), (carina - 58, 24, 48)
    artery = ((carina - 14, -10, 10), bend, rng.uniform(9, 11.5))
  tubes = [
    artery,
    (bend, down, rng.uniform(6, 9)),
    ((carina - 58, 6, sign * 20), (carina - 72, 20, sign * 62), rng.uniform(5, 7)),
    ((carina - 36, -18, sign * 24), (carina - 6, -24, sign * 54), rng.uniform(4.5, 6.5)),
  ]
  shift = rng.normal(0, (5, 3, 3))
  return [(np.add(start, shift), np.add(end, shift), radius) for start, end, radius in tubes]


def branches(rng: np.random.Generator, atlas: Atlas, region: np.ndarray, carina: float, axes, spacing):
  """Draws vessels and airway walls, and the air in the airways: two fractions [Z, Y, X] on the scan's axes."""
  tissue, air = np.zeros([2, *(axis.size for axis in axes)], np.float32)

  def add(volume, starts, ends, radii):
    draw(volume, axes, spacing, atlas.along_scanner(starts), atlas.along_scanner(ends), np.asarray(radii))

  places = atlas.places(region > 4)
  trachea = [((290, -5, 0), (carina, 8, 0), 8.5), ((342, -24, 0), (290, -5, 0), 8), ((420, -14, 0), (342, -24, 0), 9)]
  for sign in (-1, 1):
    lung = places[places[:, 2] * sign > 0]
    trachea.append(((carina, 8, 0), (carina - 22, 12, sign * 38), 6.5))
    add(tissue, *zip(*_hilum(rng, sign, carina), strict=True))
    for hilum in ((carina - 22, 4, sign * 34), (carina - 38, 10, sign * 30)):  # artery, vein
      targets = rng.choice(lung, 160) + rng.uniform(-1.5, 1.5, (160, 3))
      starts, ends, radii = _tree(rng, hilum, targets, rng.uniform(0.8, 1.05))
      add(tissue, starts, ends, radii)
      if hilum[1] == 4:  # bronchi run beside arteries
        large = radii > 1.7
        radii = radii[large]
        beside = (radii * 1.5 + 1)[:, None] * np.array([0.3, 0.8, 0.5 * sign])
        starts, ends = starts[large] + beside, ends[large] + beside
        add(tissue, starts, ends, radii * 0.85 + 0.9)
        add(air, starts, ends, radii * 0.85)
  add(air, *zip(*trachea, strict=True))
  return tissue, air


def parenchyma(rng: np.random.Generator, build: Build, atlas: Atlas, region: np.ndarray, voxel):
  """Draws the lung without lesions. Returns its HU on the atlas [Z, Y, X] and a list of sheets.

  The lung is denser in its lowest parts along gravity. A sheet is a fissure or a plate atelectasis. It holds the
  distance and the extent on the atlas, and the width in mm and the HU that slices of this thickness show.
  """
  grid, (_, v, u) = atlas.grid, atlas.axes
  mottle, folds = atlas.sampled_noise(rng, 9), atlas.sampled_noise(rng, 12)
  deep = build.down * v
  back = deep / build.depth
  healthy = rng.uniform(-890, -850) + rng.uniform(20, 60) * (back + back * back) + 12 * mottle
  thickness = rng.uniform(2, 7) * (1 + 0.6 * folds)
  dependent = np.clip((thickness - region) / 3 + 0.5, 0, 1)
  dependent *= np.clip((deep - rng.uniform(5, 35)) / 20, 0, 1) * rng.uniform(120, 420)
  folds = 3 * folds + rng.uniform(-0.15, 0.25) * np.abs(u)
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
