"""The organs below the diaphragm: liver, spleen, kidneys, and the stomach and bowel with gas and stool."""

import itertools
from collections.abc import Iterator

import numpy as np

from data.cohorts.phantom.build import Build
from data.cohorts.phantom.shapes import Atlas, ellipsoid, fill, inside, paint, tube

SOFT = 4.0  # mm over which neighbouring organs on the atlas fade into each other
WALL = 3.0  # thickness of the bowel wall in mm


def organs(
  rng: np.random.Generator, build: Build, atlas: Atlas, dome, cavity, spine: float, wobble
) -> tuple[np.ndarray, np.ndarray]:
  """Draws the abdomen. Returns its HU and the distance in mm to gas, each [Z, Y, X].

  The HU are meant for the `cavity` below the `dome`.

  Args:
    rng: random generator of the anatomy.
    build: the patient's build.
    atlas: the patient's atlas.
    dome: level [Z, Y, X] of the diaphragm in mm.
    cavity: distance [Z, Y, X] in mm to the wall of the body.
    spine: y of the middle of the lumbar vertebrae.
    wobble: smooth noise [Z, Y, X].
  """
  z, _, _ = grid = atlas.grid
  wide = build.width - build.fat - 17
  mottle = atlas.sampled_noise(rng, 4)
  hu = -98 + 12 * mottle
  enhanced = rng.choice([0.0, 1.0])  # with or without contrast medium
  psoas, kidneys, sinus, spleen = (atlas.nowhere() for _ in range(4))
  for side in (-1, 1):
    atlas.stamp_tube(psoas, (-20, spine + 2, side * 26), (-230, spine - 10, side * 50), 20)
    centre = np.array([rng.uniform(-100, -55), spine - rng.uniform(0, 14), side * rng.uniform(58, 70)])
    atlas.stamp_ball(kidneys, centre, (54, 28, 27))
    atlas.stamp_ball(sinus, centre - (0, 4, side * 12), (28, 11, 13))
  place = (rng.uniform(-5, 25), spine - rng.uniform(20, 40), wide * 0.74)
  atlas.stamp_ball(spleen, place, (rng.uniform(40, 62), 46, 30))
  low = rng.uniform(-130, -60)  # the tip of the liver, which fills the right dome
  bulk = [g - c for g, c in zip(grid, (low + 95, 0, -50), strict=True)]
  liver = inside(ellipsoid(bulk, (100, 120, rng.uniform(80, 100)), 2.4), cavity - 3)
  paint(hu, fill(psoas / SOFT), 55)
  paint(hu, fill(kidneys / SOFT), 34 + 130 * enhanced)
  paint(hu, fill(sinus / SOFT), -80)
  paint(hu, fill(np.minimum(spleen, cavity - 4) / SOFT), 48 + 60 * enhanced)
  paint(hu, fill(liver / SOFT), rng.uniform(30, 62) + 45 * enhanced + 8 * wobble)

  wall, fluid, stool, gas = (atlas.nowhere() for _ in range(4))
  for start, end, radius, kind in _hollow(rng, wide, spine):
    lumen = {'stool': stool, 'gas': gas}.get(kind, fluid)
    atlas.stamp_tube(wall, start, end, radius)
    atlas.stamp_tube(lumen, start, end, radius - WALL)
    if kind == 'level':  # gas rises against gravity
      level = rng.uniform(-0.6, 0.5) * radius + build.down * atlas.along_scanner(start)[1]
      _stamp_gas(gas, atlas, build.down, (start, end, radius - WALL), level)
  within, folds = cavity - 4, 3 * mottle
  lumps = np.clip(-80 + 330 * mottle - 150 * wobble, -850, 130)
  paint(hu, fill(np.minimum(wall + folds, within) / SOFT), 44)
  paint(hu, fill(np.minimum(fluid + folds, within) / SOFT), rng.uniform(0, 40))
  paint(hu, fill(np.minimum(stool + folds, within) / SOFT), lumps)
  return hu, np.minimum.reduce([gas + folds, within - 2, dome - 6 - z])


def _stamp_gas(gas, atlas, down, lumen, level):
  """Joins the part of a tube above `level` to `gas`. `level` is in mm from the isocentre along gravity."""
  start, end, radius = lumen
  shape = lambda grid: np.minimum(tube(grid, start, end, radius), level - down * atlas.rows(grid))
  atlas.stamp(gas, [start, end], radius + 12, shape)


def _hollow(rng, wide, spine) -> Iterator[tuple]:
  """Yields start, end, radius in mm and contents of each piece of the stomach and bowel."""
  top = rng.uniform(10, 35)  # of the stomach, under the left dome
  stomach = (top, rng.uniform(0, 25), 0.55 * wide), (top - 75, -25, 20)
  yield *stomach, rng.uniform(26, 38), rng.choice(['level', 'level', 'fluid', 'stool'])
  bend = (rng.uniform(-10, 45), rng.uniform(-30, 15), rng.uniform(0.7, 0.82) * wide)
  sag = rng.uniform(-130, -40)
  colon = [(-220, -5, -0.75 * wide), (-70, rng.uniform(-20, 20), -0.78 * wide)]
  colon += [(sag + 10, -62, -0.4 * wide), (sag, -68, 0.2 * wide), bend]
  colon += [(-70, 0.4 * spine, 0.82 * wide), (-230, 0.3 * spine, 0.78 * wide)]
  for start, end in itertools.pairwise(colon):
    steps = np.linspace(start, end, int(np.ceil(np.linalg.norm(np.subtract(end, start)) / 40)) + 1)
    steps[1:-1] += rng.normal(0, 6, steps[1:-1].shape)
    for one, other in itertools.pairwise(steps):
      yield one, other, rng.uniform(15, 27), rng.choice(['gas', 'level', 'stool', 'fluid'], p=[0.25, 0.25, 0.35, 0.15])
  at = np.array([-40.0, -20.0, 20.0])
  for _ in range(18):  # loops of the small bowel
    to = np.clip(at + rng.normal(0, (22, 20, 38)), (-220, -60, -80), (-25, 15, 80)) + rng.normal(0, 2, 3)
    yield at, to, rng.uniform(9, 15), rng.choice(['fluid', 'level', 'gas', 'stool'], p=[0.68, 0.15, 0.09, 0.08])
    at = to
