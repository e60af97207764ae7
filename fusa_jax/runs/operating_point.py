"""The operating point of a run: the threshold and the other options that turn probabilities into masks.

It is chosen on the validation fold of the run, never on its test fold, and saved in the folder of the run.
"""

import dataclasses
import pathlib
from collections.abc import Sequence

import numpy as np
from scipy import optimize, special

from fusa_jax import tasks
from fusa_jax.measures import histogram, metrics, patients
from fusa_jax.measures.statistics import defined, ratio
from fusa_jax.runs import patient_rule
from fusa_jax.system.errors import UserError
from fusa_jax.system.files import read_json, write_json

FILE = 'operating_point.json'
# The candidates for `smallest_ml`. They are few and round, because a validation fold has too few patients for a finer
# choice. The largest, 2 mL, is the volume of a ball of 16 mm: larger lesions must stay visible in any case.
SMALLEST_ML = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)

# Why a run or bundle of an earlier version gives no answer for patients, and a test of the run on other data.
NO_RULE = 'the run has no rule for patients; choose one with --mode=evaluate'
NO_RULE_IN_BUNDLE = 'the bundle has no rule for patients; choose one with --mode=evaluate and export the run again'
NO_RULE_FOR_OTHER_DATA = 'the run has no rule for patients; evaluate it on its own data first'
# Why a run on slices of unknown patients has no rule for patients with a call.
UNKNOWN_PATIENTS = 'the patients of the slices are unknown'

# Why a run on labels of patients has no threshold for slices of its own.
NO_SLICE_LABELS = 'default: the labels are of patients, so no slice has a known label'


@dataclasses.dataclass(frozen=True)
class OperatingPoint:
  """The options that decide which pixels or slices count as lesion.

  Attributes:
    threshold: the lowest probability that counts as lesion. Logits are divided by the temperature first.
    bin: the same threshold as a bin of `fusa_jax.measures.histogram`: the first bin that counts as lesion.
    temperature: the logits are divided by it; 1 leaves them unchanged. For an ensemble, one number per member.
    flips: whether to average the probabilities of each slice and its left-right mirror image.
    lungs: whether to limit masks to the lungs (fusa_jax.scans.lungs).
    smallest_ml: lesions with a smaller volume, in mL, are left out of the mask of a scan.
    chosen_by: how the threshold was chosen, in words.
    step: the step of the checkpoint that it was chosen for; None if it was chosen for no checkpoint.
    validation: Dice, sensitivity, specificity and precision on the validation fold, at this threshold and at 0.5.
    curve: the same numbers at every threshold, as lists.
    patient: how the score and the call of a patient are made; None in runs of earlier versions.
  """

  threshold: float = 0.5
  bin: int = histogram.HALF
  temperature: float | tuple[float, ...] = 1.0
  flips: bool = False
  lungs: bool = False
  smallest_ml: float = 0.0
  chosen_by: str = 'default: no data to choose it on'
  step: int | None = None
  validation: dict = dataclasses.field(default_factory=dict)
  curve: dict = dataclasses.field(default_factory=dict)
  patient: patient_rule.PatientRule | None = None

  def __post_init__(self):
    if isinstance(self.patient, dict):  # from a JSON file
      object.__setattr__(self, 'patient', patient_rule.PatientRule(**self.patient))

  def about(self) -> dict:
    """Returns the attributes that every JSON file repeats."""
    names = ('threshold', 'temperature', 'flips', 'lungs', 'smallest_ml', 'chosen_by')
    about = {name: getattr(self, name) for name in names}
    return about | ({'patient': self.patient.about()} if self.patient else {})

  def with_options(
    self,
    threshold: float | None = None,
    flips: bool | None = None,
    lungs: bool | None = None,
    smallest_ml: float | None = None,
  ) -> 'OperatingPoint':
    """Returns a copy with the given options; None keeps an option.

    A call of patients by their masks is valid only for masks as they were made when it was chosen. If another option
    is given, the copy has no such call.

    Raises:
      UserError: the threshold is not between 0 and 1, or the volume is below zero.
    """
    if threshold is not None and not 0 <= threshold <= 1:
      raise UserError(f'threshold: {threshold} must be between 0 and 1')
    if smallest_ml is not None and not smallest_ml >= 0:
      raise UserError(f'smallest_ml: {smallest_ml} mL must be at least 0; 0 keeps all lesions')
    given = {'threshold': threshold, 'flips': flips, 'lungs': lungs, 'smallest_ml': smallest_ml}
    given = {name: value for name, value in given.items() if value is not None}
    changed = [name for name, value in given.items() if value != getattr(self, name)]
    patient = self.patient
    if changed and patient and patient.threshold is not None and patient.score_name in patients.OF_MASKS:
      patient = patient.without_call(f'it was chosen with another {" and ".join(changed)}')
    chosen_by = {'chosen_by': 'given'} if 'threshold' in given else {}
    return dataclasses.replace(self, **given, **chosen_by, patient=patient)

  def for_model(self, task: str, intensity: str, lungs: bool | None = None, smallest_ml: float | None = None, **given):
    """Does the same as `with_options`, after checking that the options fit the model.

    Args:
      task: the task of the model.
      intensity: the intensity of its images, one of volumes.VALUES.
      lungs: as in `with_options`.
      smallest_ml: as in `with_options`.
      **given: the other options of `with_options`.

    Raises:
      UserError: as `with_options`. `lungs` is given for a model on 8-bit images. `lungs` or `smallest_ml` is given for
        a model without masks.
    """
    if not tasks.type_of(task).has_masks and (lungs or smallest_ml):
      flag = 'lungs' if lungs else 'smallest_ml'
      raise UserError(f'{flag}: applies to masks only, and this model gives none; leave it out')
    if intensity != 'hu' and lungs:
      raise UserError('lungs: needs HU to find the lungs, but this model takes 8-bit images; leave it out')
    return self.with_options(lungs=lungs, smallest_ml=smallest_ml, **given)

  def save(self, workdir: pathlib.Path) -> None:
    write_json(workdir / FILE, dataclasses.asdict(self))


def load_point(workdir: pathlib.Path) -> OperatingPoint:
  """Returns the operating point of a run, or the default if none is saved.

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
  """Returns the operating point for the mean probabilities of several runs: their mean threshold and smallest lesion,
  and the mean of their rules for patients (`patient_rule.mean`).

  It cannot be chosen on data, because the validation patients of one fold are training patients of other folds.

  Raises:
    UserError: the runs differ in `flips` or `lungs`.
  """
  if len(points) == 1:
    return points[0]
  for name, flag in (('flips', 'tta'), ('lungs', 'lungs')):
    if len({getattr(point, name) for point in points}) > 1:
      raise UserError(
        f'workdir: the runs differ in evaluate.{name}; give --{flag} or --no{flag} (in Python, {name}=True or False)'
      )
  return OperatingPoint(
    threshold=float(np.mean([point.threshold for point in points])),
    temperature=tuple(point.temperature for point in points),
    flips=points[0].flips,
    lungs=points[0].lungs,
    smallest_ml=float(np.mean([point.smallest_ml for point in points])),
    chosen_by=f'mean of {len(points)} runs',
    patient=patient_rule.mean([point.patient for point in points]),
  )


def choose(
  table: dict[str, np.ndarray],
  *,
  step: int,
  score: str = 'Dice',
  target_sensitivity: float | None = None,
  fit_temperature: bool = False,
) -> OperatingPoint:
  """Chooses the operating point from the table of slices of a validation fold.

  Args:
    table: the table of slices of the validation fold, with the histogram of logits.
    step: the step of the checkpoint that the table was computed with.
    score: the name of the score in `chosen_by`: Dice, or F1 for slices.
    target_sensitivity: choose the highest threshold with at least this sensitivity, over pixels for a segmenter and
      over slices for a classifier. None chooses the threshold with the best Dice (for slices: F1).
    fit_temperature: also fit the temperature that makes the truth of the fold most likely (Guo et al. 2017, section
      4.2). It changes neither ranks nor the masks at 0.5 or at the operating point.
  """
  pooled = table['histogram'].sum(axis=0, dtype=np.int64)
  counts = histogram.counts_from(pooled)
  tp, fp, fn, tn = (counts[key] for key in metrics.COUNTS)
  temperature = temperature_of(pooled) if fit_temperature else 1.0
  if not tp[0] or not fp[0]:
    return OperatingPoint(chosen_by='default: all of the validation fold is lesion, or none of it', step=step)
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
  """Chooses `smallest_ml`: the value with the best Dice on the validation fold, over all volumes pooled.

  Args:
    point: the operating point that the masks were made with; its `smallest_ml` must be 0.
    volumes: for each scan, the volume of each lesion in its mask, the true part of each of these volumes, and the
      volume of the reference mask. All are in mL.

  Returns:
    `point` with the chosen value; `validation` also lists the Dice of every candidate.
  """
  sizes, true_parts = (np.concatenate([of_scan[k] for of_scan in volumes]) for k in (0, 1))
  truth = sum(of_scan[2] for of_scan in volumes)
  dice = {}
  for smallest in SMALLEST_ML:
    kept = sizes >= smallest
    tp, marked = true_parts[kept].sum(), sizes[kept].sum()
    dice[smallest] = defined(metrics.dice(tp, marked - tp, truth - tp))
  # Among equals take the smallest: a lesion is left out only if that improves Dice.
  best = max(SMALLEST_ML, key=lambda smallest: (dice[smallest] or 0, -smallest))
  curve = {'smallest_ml': list(dice), 'dice_of_volumes': list(dice.values())}
  return dataclasses.replace(point, smallest_ml=best, validation=point.validation | curve)


def temperature_of(pooled: np.ndarray) -> float:
  """Returns the temperature with the lowest cross-entropy, for a histogram of logits by truth [2, BINS]."""
  logits = histogram.centres()

  def cross_entropy(log_temperature):
    scaled = logits / np.exp(log_temperature)
    return float(pooled[0] @ np.logaddexp(0, scaled) + pooled[1] @ np.logaddexp(0, -scaled))

  return float(np.exp(optimize.minimize_scalar(cross_entropy, bounds=(-3, 3), method='bounded').x))
