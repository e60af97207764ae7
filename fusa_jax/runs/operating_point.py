"""From probabilities to masks: threshold, temperature and all else that a run is used with.

What can be chosen is chosen on the run's validation fold, never on its test fold, and kept beside it.
"""

import dataclasses
import pathlib
from collections.abc import Sequence

import ml_collections
import numpy as np
from scipy import optimize, special

from fusa_jax import tasks
from fusa_jax.measures import histogram, metrics
from fusa_jax.measures.statistics import defined, ratio
from fusa_jax.system.errors import UserError
from fusa_jax.system.files import read_json, write_json

FILE = 'operating_point.json'
# Round numbers, so that a validation fold of a few patients does not decide on a digit. 2 mL is a ball of 16 mm: what
# is larger should be looked at, whatever the fold says.
SMALLEST_ML = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)


@dataclasses.dataclass(frozen=True)
class OperatingPoint:
  """From which probability on a pixel or slice is called a lesion.

  Attributes:
    threshold: of the probability, after the temperature.
    bin: the first of the histograms' bins (fusa_jax.measures.histogram) that is called a lesion, which it stands for.
    temperature: what logits are divided by; 1 leaves them as the network gives them. Of an ensemble, those of its
      members.
    flips: whether probabilities are the mean of slices as they are and mirrored left and right.
    lungs: whether masks are limited to the lungs (fusa_jax.scans.lungs).
    smallest_ml: lesions of a scan's mask below so many mL are left out.
    chosen_by: how and on what it was chosen, in words.
    step: of the checkpoint that it is for; None where that is none.
    validation: Dice, sensitivity, specificity and precision there, at this threshold and at 0.5.
    curve: the same at every threshold, as lists.
  """

  threshold: float = 0.5
  bin: int = histogram.HALF
  temperature: float | tuple[float, ...] = 1.0
  flips: bool = False
  lungs: bool = False
  smallest_ml: float = 0.0
  chosen_by: str = 'default: nothing to choose on'
  step: int | None = None
  validation: dict = dataclasses.field(default_factory=dict)
  curve: dict = dataclasses.field(default_factory=dict)

  def about(self) -> dict:
    """What every JSON says of it."""
    said = ('threshold', 'temperature', 'flips', 'lungs', 'smallest_ml', 'chosen_by')
    return {name: getattr(self, name) for name in said}

  def with_options(
    self,
    threshold: float | None = None,
    flips: bool | None = None,
    lungs: bool | None = None,
    smallest_ml: float | None = None,
  ) -> 'OperatingPoint':
    """The same but for what is given.

    Raises:
      UserError: a threshold that is no probability; a volume below zero.
    """
    if threshold is not None and not 0 <= threshold <= 1:
      raise UserError(f'threshold: {threshold} must be between 0 and 1')
    if smallest_ml is not None and not smallest_ml >= 0:
      raise UserError(f'smallest_ml: {smallest_ml} must be mL from 0 up; 0 keeps all lesions')
    given = {'threshold': threshold, 'flips': flips, 'lungs': lungs, 'smallest_ml': smallest_ml}
    given = {name: value for name, value in given.items() if value is not None}
    return dataclasses.replace(self, **given, **({'chosen_by': 'given'} if 'threshold' in given else {}))

  def for_model(self, task: str, intensity: str, lungs: bool | None = None, smallest_ml: float | None = None, **given):
    """As `with_options`, for a model of a task and one of volumes.VALUES.

    Raises:
      UserError: as `with_options`; `lungs` of grey values; `lungs` or `smallest_ml` of a model without masks.
    """
    if not tasks.type_of(task).has_masks and (lungs or smallest_ml):
      flag = 'lungs' if lungs else 'smallest_ml'
      raise UserError(f'{flag}: is about masks, and this model gives none; leave it out')
    if intensity != 'hu' and lungs:
      raise UserError('lungs: lungs are found by their HU, and this model takes grey values; leave it out')
    return self.with_options(lungs=lungs, smallest_ml=smallest_ml, **given)

  def save(self, workdir: pathlib.Path) -> None:
    write_json(workdir / FILE, dataclasses.asdict(self))


def load_point(workdir: pathlib.Path) -> OperatingPoint:
  """The one of a run; the default where it has none yet.

  Raises:
    UserError: the file is damaged.
  """
  path, advice = workdir / FILE, f'choose it again with --mode=evaluate --workdir={workdir}'
  if not path.exists():
    return OperatingPoint()
  try:
    return OperatingPoint(**read_json(path, advice))
  except TypeError as error:
    raise UserError(f'{path}: damaged ({error}); {advice}') from None


def mean(points: Sequence[OperatingPoint]) -> OperatingPoint:
  """The one of the mean of several runs' probabilities: their mean threshold and smallest lesion.

  There are no patients left to choose it on: those that one fold's run was validated on, others were trained on.

  Raises:
    UserError: only some of them are used with flips, or limited to the lungs.
  """
  if len(points) == 1:
    return points[0]
  for name, flag in (('flips', 'tta'), ('lungs', 'lungs')):
    if len({getattr(point, name) for point in points}) > 1:
      raise UserError(
        f'workdir: the runs differ in evaluate.{name}; say --{flag} or --no{flag} (in code, {name}=True or False)'
      )
  return OperatingPoint(
    threshold=float(np.mean([point.threshold for point in points])),
    temperature=tuple(point.temperature for point in points),
    flips=points[0].flips,
    lungs=points[0].lungs,
    smallest_ml=float(np.mean([point.smallest_ml for point in points])),
    chosen_by=f'mean of {len(points)} runs',
  )


def check(config: ml_collections.ConfigDict) -> None:
  """Raises a UserError where config.evaluate asks for a share that is none, or for what the task or values lack."""
  options = config.evaluate
  masks = [key for key in ('lungs', 'fit_smallest') if options[key]]
  if masks and not tasks.type_of(config.task).has_masks:
    raise UserError(f'evaluate.{masks[0]}: is about masks, and {config.task} gives none; leave it out')
  if options.lungs and config.data.intensity != 'hu':
    raise UserError('evaluate.lungs: lungs are found by their HU, and these are grey values; leave it out')
  target = options.target_sensitivity
  if target is not None and not 0 < target <= 1:
    raise UserError(f'evaluate.target_sensitivity: {target} is no share; give one above 0, up to 1')
  for share in options.prevalences:
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


def choose_smallest(point: OperatingPoint, volumes: Sequence[tuple[np.ndarray, np.ndarray, float]]) -> OperatingPoint:
  """The point with the smallest lesion that gives a validation fold's masks the best Dice, of all their mL pooled.

  Args:
    point: with a threshold, by which the masks were made, and without a smallest lesion.
    volumes: of each scan the mL of its mask's lesions, how many of each are true, and the true ones in all.
  """
  sizes, rightly = (np.concatenate([of_scan[k] for of_scan in volumes]) for k in (0, 1))
  truth = sum(of_scan[2] for of_scan in volumes)
  found = {}
  for smallest in SMALLEST_ML:
    kept = sizes >= smallest
    right, marked = rightly[kept].sum(), sizes[kept].sum()
    found[smallest] = defined(metrics.dice(right, marked - right, truth - right))
  # The least of equals: what nothing speaks against stays.
  best = max(SMALLEST_ML, key=lambda smallest: (found[smallest] or 0, -smallest))
  curve = {'smallest_ml': list(found), 'dice_of_volumes': list(found.values())}
  return dataclasses.replace(point, smallest_ml=best, validation=point.validation | curve)


def temperature_of(pooled: np.ndarray) -> float:
  """The temperature with the least cross-entropy, of a histogram of logits by truth [2, BINS]."""
  logits = histogram.centres()

  def cross_entropy(log_temperature):
    scaled = logits / np.exp(log_temperature)
    return float(pooled[0] @ np.logaddexp(0, scaled) + pooled[1] @ np.logaddexp(0, -scaled))

  return float(np.exp(optimize.minimize_scalar(cross_entropy, bounds=(-3, 3), method='bounded').x))
