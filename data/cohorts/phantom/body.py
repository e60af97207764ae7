"""The body without the contents of the lungs: skin, muscle, bones, heart, great vessels, and the lungs' outline."""

import math

import numpy as np

from data.cohorts.phantom import abdomen
from data.cohorts.phantom.build import Build
from data.cohorts.phantom.shapes import Atlas, ellipsoid, inside, ramp

DOME = 100.0  # mm: an upper limit of the diaphragm


def anatomy(rng: np.random.Generator, build: Build, atlas: Atlas) -> tuple[dict[str, np.ndarray], float]:
  """Draws organs on the atlas, each [Z, Y, X] of distances in mm or of HU. Also returns the level of the carina."""
  z, y, x = grid = atlas.grid
  width, depth, fat = build.width, build.depth, build.fat
  wobble = atlas.sampled_noise(rng, 25)
  deep, wide = depth - fat - 13, width - fat - 17
  # The middle of the vertebral bodies. Those of the neck lie in front of those of the chest.
  spine = deep - 20 - 45 * ramp(z, 230, 330)
  apex = rng.uniform(264, 284)
  girth = 1 + build.belly * ramp(-z, -70, 120)
  flesh, limbs = _flesh(rng, build, atlas, apex, girth, spine)
  flesh += wobble
  skin = np.maximum(flesh, _breasts(rng, build, grid)) if build.breast else flesh

  # The rib cage narrows to the apex, which lies behind the middle of the chest.
  taper = np.clip((z - 110) / (apex - 110), 0, 0.999)
  scale = np.sqrt(1 - taper**3)
  chest = ellipsoid((y - 14 * taper, x + 0 * z), (deep * scale * girth, wide * scale), 2.2) + 3 * wobble
  chest = np.minimum(chest, apex - z)

  dome, left = _dome(rng, grid)
  dome = dome + 3 * wobble
  tilt = rng.uniform(0.5, 0.9)  # the axis of the heart points forwards and to the left
  base, front, across = left + rng.uniform(20, 35), y + 20, x - rng.uniform(16, 26)
  turned = (across * math.cos(tilt) - front * math.sin(tilt), across * math.sin(tilt) + front * math.cos(tilt))
  heart = ellipsoid((z - base, *turned), (rng.uniform(48, 60), 0.5 * wide, 0.36 * wide), 2.3)
  heart += 3 * wobble
  arch, aorta = rng.uniform(188, 202), (deep - 42, 19)
  great = atlas.nowhere()
  for vessel in (
    ((100, -8, -4), (arch, -12, -10), 15),
    ((arch, -12, -10), (arch, *aorta), 13),
    ((arch, *aorta), (-10, *aorta), 11.5),
    ((-10, *aorta), (-260, deep - 42, 6), 10),
    ((120, -12, -30), (290, -14, -22), 8),
  ):
    atlas.stamp_tube(great, *vessel)
  carina = rng.uniform(158, 172)

  middle = 12 + 16 * np.exp(-(((y - 5) / 30) ** 2)) * np.exp(-(((z - 165) / 90) ** 2))
  column = inside(24 - np.abs(x), y - spine + 16)
  lungs = inside(chest - 2, np.abs(x) - middle, -heart, -great, -column, 0.8 * (z - dome))

  lower = atlas.up_to(DOME)
  low = slice(lower.shape[0])
  below, gas = abdomen.organs(rng, build, lower, dome[low], chest[low], deep - 20, wobble[low])
  viscera, bubble = -75 + 35 * wobble, atlas.nowhere()
  viscera[low] = np.where(z[low] > dome[low] + 2, viscera[low], below)
  bubble[low] = gas
  # Planes of fat separate the muscles.
  planes = np.abs(atlas.sampled_noise(rng, 8)) + 0.8 * ramp(chest, -14, 0)
  muscle = 52 + 14 * wobble - rng.uniform(60, 150) * np.clip(1.3 - planes / rng.uniform(0.12, 0.3), 0, 1)
  bone = np.maximum(_bones(build, grid, chest, spine, wide, deep), limbs)
  return {
    'skin': skin,
    'flesh': flesh - fat,
    'chest': chest,
    'solid': np.maximum(heart, great),
    'heart': heart,
    'lungs': lungs,
    'bone': np.minimum(bone, flesh - 0.7 * fat),
    'bubble': bubble,
    'viscera': viscera,
    'muscle': muscle,
  }, carina


def _flesh(rng, build, atlas, apex, girth, spine):
  """Returns two distances in mm: to the trunk, neck, jaw and arms, and to the bones of shoulders and arms."""
  z, y, x = atlas.grid
  shoulder = ramp(z, 190, 262)
  depth = build.depth * girth * (1 - rng.uniform(0.22, 0.36) * shoulder)
  width = (build.width + rng.uniform(5, 25) * shoulder) * (0.4 + 0.6 * girth)
  trunk = ellipsoid((y - 10 * shoulder, x + 0 * z), (depth, width), 2.5)
  slope = apex + rng.uniform(45, 65) - rng.uniform(0.15, 0.35) * np.hypot(x, y - 10)  # the shoulders fall outwards
  trunk = inside(trunk, 0.8 * (slope - z), rounding=6)
  neck = rng.uniform(52, 66)
  throat = np.minimum(ellipsoid((y - spine + 24, x + 0 * z), (neck, neck * rng.uniform(0.95, 1.15))), z - 220)
  jaw = ellipsoid((z - 430, y + 35, x), (rng.uniform(60, 90), 62, 55))
  flesh = np.maximum.reduce([trunk, throat, jaw])

  limbs = np.minimum(4 - np.abs(jaw + 0 * z - 14), y * -1 - 20 + 0 * z)  # the jaw's arch
  for side, raised in zip((-1, 1), build.arms, strict=True):
    joint = (rng.uniform(250, 268), rng.uniform(8, 28), side * (build.width + rng.uniform(0, 14)))
    stout = rng.uniform(36, 48)
    if raised:
      hand = (joint[0] + 160, rng.uniform(-50, 20), joint[2] * rng.uniform(0.8, 1.25))
    else:
      hand = (joint[0] - 300, rng.uniform(0, 40), side * (build.width + rng.uniform(44, 64)))
    ends = [(joint, hand)]
    if not raised:
      ends.append((hand, (-330, rng.uniform(-60, 10), side * (build.width + rng.uniform(10, 40)))))
    for start, end in ends:
      atlas.stamp_tube(flesh, start, end, stout, margin=25)
      atlas.stamp_tube(limbs, start, end, 11.5)
    atlas.stamp_ball(flesh, joint, (stout + 8, stout + 4, stout + 4))
    atlas.stamp_ball(limbs, joint, (24, 24, 24))
    # The collar bone, from the sternum to the top of the shoulder.
    atlas.stamp_tube(limbs, (238, -0.5 * build.depth, side * 22), (joint[0] + 16, -6, joint[2] - side * 16), 6.5)
  return flesh, limbs


def _breasts(rng, build, grid):
  z, y, x = grid
  high, apart = rng.uniform(130, 170), rng.uniform(66, 84)
  offsets = (z - high, y + build.depth - 18, np.abs(x) - apart)
  return ellipsoid(offsets, (rng.uniform(45, 70), build.breast + 18, rng.uniform(48, 64)))


def _dome(rng, grid):
  """Returns the level [Z or 1, Y, X] of the diaphragm, and the level of its left summit.

  The summits lie within the lungs: slices through them show an island of liver or spleen in the lung.
  """
  _, y, x = grid
  right, left = rng.uniform(58, 84), rng.uniform(48, 70)
  right_side = 0.5 - 0.5 * np.tanh(x / 15)
  summit = rng.uniform(58, 78)
  outwards, backwards = np.abs(x) - summit, y - rng.uniform(-15, 15)
  bend = np.where(outwards > 0, outwards**2, 0.9 * outwards**2)
  bend = bend + np.maximum(backwards - 4, 0) ** 2 + np.clip(backwards + 8, -50, 0) ** 2
  return left + (right - left) * right_side - rng.uniform(0.006, 0.0085) * bend, left


def _bones(build, grid, chest, spine, wide, deep):
  """Returns the distance in mm to ribs, sternum, shoulder blades and vertebrae."""
  z, y, x = grid
  # Ribs run down and forwards, so a slice cuts several of them. The lowest ribs end at the back.
  level = (z - 0.55 * y) % 24 - 12
  ribs = np.minimum(4.2 - np.hypot(chest + 6, 0.6 * level), 0.6 * (z + 20 + 0.8 * y))
  sternum = np.minimum(ellipsoid((y + deep + 8, x), (6.5, 19)), np.minimum(z - 70, 235 - z))
  blade = 2.5 - np.abs(chest + 20)  # the shoulder blade
  blade = np.minimum.reduce(np.broadcast_arrays(blade, y - 5, np.abs(x) - 55, z - 150, 262 - z))
  vertebra = np.maximum.reduce(
    np.broadcast_arrays(
      ellipsoid((y - spine, x), (15, 19), 2.4),
      np.minimum(5 - np.abs(y - spine - 27), 26 - 2 * np.abs(level) - np.abs(x)),
      np.minimum(4 - np.abs(x), 18 - np.abs(y - spine - 40)),
    )
  )
  vertebra = np.minimum(vertebra, -ellipsoid((y - spine - 22, x), (8, 9)))  # the spinal canal
  return np.maximum.reduce(np.broadcast_arrays(ribs, sternum, blade, vertebra))
