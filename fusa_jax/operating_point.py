"""The threshold and temperature of a run: chosen on its validation fold, never on its test fold, and kept beside it."""

import dataclasses
import json
import pathlib

import ml_collections
import numpy as np
from scipy import optimize, special

from fusa_jax import histogram, metrics
from fusa_jax.errors import UserError
from fusa_jax.files import write_json
from fusa_jax.statistics import defined, ratio

FILE = 'operating_point.json'


@dataclasses.dataclass(frozen=True)
class OperatingPoint:
  """From which probability on a pixel or slice is called a lesion.

  Attributes:
    threshold: of the probability, after the temperature.
    bin: the first of the histograms' bins (fusa_jax.histogram) that is called a lesion, which it stands for.
    temperature: what logits are divided by; 1 leaves them as the network gives them.
    chosen_by: how and on what it was chosen, in words.
    step: of the checkpoint that it is for; None where that is none.
    validation: Dice, sensitivity, specificity and precision there, at this threshold and at 0.5.
    curve: the same at every threshold, as lists.
  """

  threshold: float = 0.5
  bin: int = histogram.HALF
  temperature: float = 1.0
  chosen_by: str = 'default: nothing to choose on'
  step: int | None = None
  validation: dict = dataclasses.field(default_factory=dict)
  curve: dict = dataclasses.field(default_factory=dict)

  def about(self) -> dict:
    """What every JSON says of it."""
    return {'threshold': self.threshold, 'temperature': self.temperature, 'chosen_by': self.chosen_by}

  def save(self, workdir: pathlib.Path) -> None:
    write_json(workdir / FILE, dataclasses.asdict(self))


def load(workdir: pathlib.Path) -> OperatingPoint:
  """The one of a run; the default where it has none yet.

  Raises:
    UserError: the file is damaged.
  """
  path = workdir / FILE
  try:
    return OperatingPoint(**json.loads(path.read_text()))
  except FileNotFoundError:
    return OperatingPoint()
  except (json.JSONDecodeError, TypeError) as error:
    raise UserError(f'{path}: damaged ({error}); make it anew with --mode=evaluate --workdir={workdir}') from None


def check(options: ml_collections.ConfigDict) -> None:
  """Raises a UserError where config.evaluate asks for a sensitivity or a prevalence that is no share."""
  target = options.get('target_sensitivity')
  if target is not None and not 0 < target <= 1:
    raise UserError(f'evaluate.target_sensitivity: {target} is no share; give one above 0, up to 1')
  for share in options.get('prevalences', ()):
    if not 0 < share < 1:
      raise UserError(f'evaluate.prevalences: {share} is no share; give some between 0 and 1')


def choose(
  table: dict[str, np.ndarray],
  *,
  step: int,
  score: str = 'Dice',
  target_sensitivity: float | None = None,
  fit_temperature: bool = False,
) -> OperatingPoint:
  """The operating point by a validation fold's table of slices.

  Args:
    table: of the validation fold, with its histograms.
    step: of the checkpoint that made it.
    score: what Dice is called; of slices it is F1.
    target_sensitivity: take the highest threshold that finds this share of what is lesion (pixels of a segmenter,
      slices of a classifier); None takes the one with the best Dice (of slices: F1).
    fit_temperature: divide logits by what makes them most likely on that fold (Guo et al. 2017, section 4.2). No
      ranking changes, nor what is marked at 0.5 or at the operating point.
  """
  pooled = table['histogram'].sum(axis=0, dtype=np.int64)
  counts = histogram.counts_from(pooled)
  tp, fp, fn, tn = (counts[key] for key in metrics.COUNTS)
  temperature = temperature_of(pooled) if fit_temperature else 1.0
  if not tp[0] or not fp[0]:
    return OperatingPoint(chosen_by='default: the validation fold has lesions only, or none', step=step)
  curve = {
    'threshold': special.expit(histogram.edges() / temperature),
    'dice': metrics.dice(tp, fp, fn),
    'sensitivity': ratio(tp, tp + fn),
    'specificity': ratio(tn, tn + fp),
    'precision': ratio(tp, tp + fp),
  }
  middle = histogram.HALF
  if target_sensitivity is None:
    best = np.flatnonzero(curve['dice'] == curve['dice'].max())
    chosen = int(best[np.argmin(np.abs(best - middle))])
    how = f'best {score} on the validation fold'
  else:
    chosen = int(np.flatnonzero(curve['sensitivity'] >= target_sensitivity)[-1])
    how = f'sensitivity of at least {target_sensitivity:g} on the validation fold'
  at = lambda k: {name: defined(values[k]) for name, values in curve.items()}
  return OperatingPoint(
    threshold=float(curve['threshold'][chosen]),
    bin=chosen,
    temperature=temperature,
    chosen_by=how,
    step=step,
    validation={'chosen': at(chosen), 'half': at(middle)},
    curve={name: [defined(v) for v in values] for name, values in curve.items()},
  )


def temperature_of(pooled: np.ndarray) -> float:
  """The temperature with the least cross-entropy, of a histogram of logits by truth [2, BINS]."""
  logits = histogram.centres()

  def cross_entropy(log_temperature):
    scaled = logits / np.exp(log_temperature)
    return float(pooled[0] @ np.logaddexp(0, scaled) + pooled[1] @ np.logaddexp(0, -scaled))

  return float(np.exp(optimize.minimize_scalar(cross_entropy, bounds=(-3, 3), method='bounded').x))
