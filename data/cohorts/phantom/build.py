"""What a patient and a scan are like, in numbers: all that is decided before anything is drawn."""

import dataclasses
import math

import numpy as np


@dataclasses.dataclass(frozen=True)
class Build:
  """A patient in a scanner. Lengths are in mm.

  Attributes:
    width, depth: half of the chest's, skin included.
    fat: thickness under the skin.
    belly: how much deeper the abdomen is than the chest, as a share.
    breast: depth of the breasts; 0 is none.
    arms: of the right and of the left, whether it is raised.
    bottom, top: what the scan covers. The lungs lie between -50 and 285.
    fov: side of the square field of view.
    is_round: whether nothing is reconstructed outside the circle in that square.
    off: (rows, columns) from the middle of the field of view to the patient's axis, as added to coordinates.
    angle: by which the patient is turned on the table, in radians.
    down: 1 if the patient lies on the back; -1 if on the front, and the table is in front of the body.
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
  """Most scans are of the chest alone; others begin at the kidneys, end at the jaw, or both."""
  width = rng.uniform(143, 168)
  raised = rng.random() < 0.7
  arms = (raised, raised if rng.random() < 0.85 else not raised)
  # Fields that cut the arms, or even the skin, that fit the patient, and that are opened to the widest.
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
