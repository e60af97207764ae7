"""The numbers that describe a patient and a scan. They are chosen before anything is drawn."""

import dataclasses
import math

import numpy as np


@dataclasses.dataclass(frozen=True)
class Build:
  """A patient in a scanner. Lengths are in mm.

  Attributes:
    width, depth: half the width and half the depth of the chest, including the skin.
    fat: thickness of the fat under the skin.
    belly: relative extra depth of the abdomen; 0.2 is 20% deeper than the chest.
    breast: depth of the breasts; 0 draws none.
    arms: whether the right and the left arm are raised.
    bottom, top: lowest and highest level of the scan. The lungs lie between -50 and 285.
    fov: side of the square field of view.
    is_round: whether only the circle in that square is reconstructed.
    off: (rows, columns) from the middle of the field of view to the patient's axis. They are added to coordinates.
    angle: rotation of the patient on the table in radians.
    down: 1 for supine; -1 for prone, with the table in front of the body.
  """

  width: float
  depth: float
  fat: float
  belly: float
  breast: float
  arms: tuple[bool, bool]
  bottom: float
  top: float
  fov: float
  is_round: bool
  off: tuple[float, float]
  angle: float
  down: int


def draw(rng: np.random.Generator) -> Build:
  """Draws the numbers of a patient. Most scans show only the chest; others reach the kidneys, the jaw, or both."""
  width = rng.uniform(143, 168)
  raised = rng.random() < 0.7
  arms = (raised, raised if rng.random() < 0.85 else not raised)
  # Three sizes of the field of view: it cuts the arms or even the skin, it fits the patient, or it is very wide.
  margin = rng.choice([rng.uniform(-14, 14), rng.uniform(14, 50), rng.uniform(50, 150)], p=[0.3, 0.5, 0.2])
  turned = rng.uniform(8, 20) * rng.choice([-1, 1]) if rng.random() < 0.2 else rng.normal(0, 3)
  return Build(
    width=width,
    depth=width * rng.uniform(0.66, 0.78),
    fat=rng.uniform(8, 18),
    belly=rng.uniform(-0.1, 0.2),
    breast=rng.uniform(20, 50) if rng.random() < 0.45 else 0.0,
    arms=arms,
    bottom=rng.uniform(-170, -40) if rng.random() < 0.35 else 0.0,
    top=rng.uniform(300, 390) if rng.random() < 0.35 else 280.0,
    fov=2 * width + margin,
    is_round=rng.random() < 0.55,
    off=tuple(np.clip(rng.normal(0, 9, 2), -22, 22).tolist()),
    angle=math.radians(turned),
    down=-1 if rng.random() < 0.12 else 1,
  )
