"""COVID-like lesions: ground glass, consolidation, both, and the reversed halo."""

import numpy as np

from data.cohorts.phantom import shapes


def lesions(rng, region, count):
  """The lesions on the atlas: depth [Z, Y, X] in widths of their soft edge, and added HU."""
  grid = shapes.atlas()
  coarse, fine = shapes.sampled_noise(rng, 10, grid), shapes.sampled_noise(rng, 4, grid)
  depth, lift = np.full(coarse.shape, -9, np.float32), np.zeros_like(coarse)
  # They favour the periphery, the back, and some level of the lungs that is the patient's own.
  places, level = shapes.places(region > 7), rng.uniform(50, 140)
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
