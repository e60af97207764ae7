"""A chest without what is in the lungs: skin, bones, heart, vessels, and the lungs' outline."""

import math

import numpy as np

from data.cohorts.phantom import shapes


def build(rng):
  """Half width, half depth, thickness of the fat and field of view of a patient, in mm."""
  width = rng.uniform(143, 163)
  depth = width * rng.uniform(0.66, 0.78)
  return width, depth, rng.uniform(8, 18), 2 * width + rng.uniform(18, 36)


def anatomy(rng, build):
  """Organs on the atlas, each [Z, Y, X]: distances in mm, or HU; and the carina's level."""
  z, y, x = grid = shapes.atlas()
  width, depth, fat, _ = build
  wobble = shapes.sampled_noise(rng, 25, grid)
  skin = shapes.ellipsoid((y, x), (depth, width), 2.5) + wobble

  # The rib cage narrows to the apex, which lies behind the middle of the chest.
  apex = rng.uniform(264, 284)
  taper = np.clip((z - 110) / (apex - 110), 0, 0.999)
  scale = np.sqrt(1 - taper**3)
  deep, wide = depth - fat - 13, width - fat - 17
  offsets = (y - 14 * taper, x + 0 * z)
  chest = shapes.ellipsoid(offsets, (deep * scale, wide * scale), 2.2) + 3 * wobble
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
  heart = shapes.ellipsoid((z - base, *turned), (rng.uniform(48, 60), 0.5 * wide, 0.36 * wide), 2.3)
  heart += 3 * wobble
  arch, aorta = rng.uniform(188, 202), (spine - 22, 19)
  vessels = [
    ((100, -8, -4), (arch, -12, -10), 15),
    ((arch, -12, -10), (arch, *aorta), 13),
    ((arch, *aorta), (-20, *aorta), 11.5),
    ((120, -12, -30), (290, -14, -22), 8),
  ]
  great = np.maximum.reduce([shapes.tube(grid, *vessel) for vessel in vessels])
  carina = rng.uniform(158, 172)

  middle = 12 + 16 * np.exp(-(((y - 5) / 30) ** 2)) * np.exp(-(((z - 165) / 90) ** 2))
  column = shapes.inside(24 - np.abs(x), y - spine + 16 + 0 * z)
  lungs = shapes.inside(chest - 2, np.abs(x) - middle, -heart, -great, -column, 0.8 * (z - dome))

  # Ribs run down and forwards, so that a slice cuts several of them.
  level = (z - 0.55 * y) % 24 - 12
  ribs = 4.2 - np.hypot(chest + 6, 0.6 * level)
  sternum = np.minimum(shapes.ellipsoid((y + deep + 8, x), (6.5, 19)), np.minimum(z - 70, 235 - z))
  blade = 2.5 - np.abs(chest + 20)  # of the shoulder
  blade = np.minimum.reduce(np.broadcast_arrays(blade, y - 5, np.abs(x) - 55, z - 150))
  vertebra = np.maximum.reduce(
    np.broadcast_arrays(
      shapes.ellipsoid((y - spine, x), (15, 19), 2.4),
      np.minimum(5 - np.abs(y - spine - 27), 26 - 2 * np.abs(level) - np.abs(x)),
      np.minimum(4 - np.abs(x), 18 - np.abs(y - spine - 40)),
    )
  )
  vertebra = np.minimum(vertebra, -shapes.ellipsoid((y - spine - 22, x), (8, 9)))  # the canal
  bone = np.maximum.reduce(np.broadcast_arrays(ribs, sternum, blade, vertebra))
  bone = np.minimum(bone, skin - fat)

  bubble = shapes.ellipsoid((z - 28, y + 35, x - 62), (22, rng.uniform(12, 26), 30))  # in the stomach
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
