"""COVID-like lesions: ground glass, consolidation, both, and the reversed halo."""

import numpy as np

from data.cohorts.phantom.shapes import Atlas

# HU added to the lung: ground glass adds 140 to 280, consolidation 620 to 860, before their texture.
DENSE = 450


def lesions(rng: np.random.Generator, atlas: Atlas, region: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
  """Draws lesions on the atlas. Returns the depth inside them, in widths of their soft edge, and the HU they add."""
  coarse, fine = atlas.sampled_noise(rng, 10), atlas.sampled_noise(rng, 4)
  depth, lift = np.full(coarse.shape, -9, np.float32), np.zeros_like(coarse)
  # Lesions are more likely in the periphery, at the back, and around one level of the lungs per patient.
  places, level = atlas.places(region > 7), rng.uniform(50, 140)
  weight = np.exp(places[:, 1] / 60 - np.abs(places[:, 0] - level) / 35)
  weight *= np.exp(-region[region > 7] / 14)
  for centre in rng.choice(places, count, p=weight / weight.sum()).tolist():
    radius = 13 + 22 * rng.beta(1.6, 1.1)
    stretch = rng.uniform((0.7, 1.0, 1.0), (1.0, 1.4, 1.4)).tolist()
    box, grid = atlas.box(centre, 2.3 * radius + 8)
    offsets = [(g - c) / s for g, c, s in zip(grid, centre, stretch, strict=True)]
    blob = radius * (1 + 0.18 * coarse[box]) + 0.9 * fine[box] - np.sqrt(sum(o * o for o in offsets))
    glass, dense = rng.uniform(140, 280), rng.uniform(620, 860)
    core = np.clip((blob - 0.35 * radius) / 5 + 0.5, 0, 1)
    # Ground glass, ground glass with a dense core, consolidation, and a reversed halo.
    kinds = (glass, glass), (glass, dense), (dense, dense), (dense, glass)
    outer, inner = kinds[rng.choice(4, p=[0.55, 0.25, 0.12, 0.08])]
    added = (outer + (inner - outer) * core) * (1 + 0.16 * fine[box] + 0.1 * coarse[box])
    blob /= rng.uniform(2, 5)
    lift[box] = np.where(blob > depth[box], added, lift[box])
    depth[box] = np.maximum(depth[box], blob)
  return depth, lift
