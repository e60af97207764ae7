"""The operating point of a run: the threshold and the other options that turn probabilities into masks.

It is chosen on the validation fold of the run, never on its test fold, and saved in the folder of the run. A run of
several classes has one for each class: `Points`, by the name of the class. `flips` and `lungs` are the same in all.
"""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence

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


# The key of several classes, in operating_point.json and in the other files that repeat operating points.
CLASSES = 'classes'


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


Points = dict[str, OperatingPoint]


def about(points: Points) -> dict:
  """Returns `OperatingPoint.about` of the only class; of several classes, {'classes': {name: that of the class}}."""
  return _one_or_by_class({name: point.about() for name, point in points.items()})


def from_about(values: Mapping, classes: Sequence[str]) -> Points:
  """Returns the operating points whose `about` is `values`.

  Raises:
    TypeError, KeyError, AttributeError: the values are damaged, or are for other classes.
  """
  by_class = values[CLASSES] if CLASSES in values else {classes[0]: values}
  if list(by_class) != list(classes):
    raise KeyError(f'they are for {", ".join(by_class)}, not for {", ".join(classes)}')
  return {name: OperatingPoint(**by_class[name]) for name in classes}


def shared(points: Points) -> OperatingPoint:
  """Returns the operating point of the first class, for the options that are the same in all: `flips` and `lungs`."""
  return next(iter(points.values()))


def with_options(
  points: Points,
  threshold: float | Mapping[str, float] | None = None,
  smallest_ml: float | Mapping[str, float] | None = None,
  **options,
) -> Points:
  """Returns copies with the given options, as `OperatingPoint.with_options`.

  Args:
    points: the operating points.
    threshold, smallest_ml: of the only class; or values by the name of the class, which need not name all classes.
    **options: `flips` and `lungs`, of all classes.

  Raises:
    UserError: a value is out of range; there are several classes, and a value does not say for which; or the model has
      no class of that name.
  """
  thresholds, volumes = (
    _by_class(points, name, value) for name, value in (('threshold', threshold), ('smallest_ml', smallest_ml))
  )
  return {
    name: point.with_options(threshold=thresholds.get(name), smallest_ml=volumes.get(name), **options)
    for name, point in points.items()
  }


def for_model(
  points: Points,
  task: str,
  intensity: str,
  *,
  threshold: float | Mapping[str, float] | None = None,
  lungs: bool | None = None,
  smallest_ml: float | Mapping[str, float] | None = None,
) -> Points:
  """Does the same as `with_options`, after checking that the options fit the model.

  Args:
    points: the operating points.
    task: the task of the model.
    intensity: the intensity of its images, one of volumes.VALUES.
    threshold, lungs, smallest_ml: as in `with_options`.

  Raises:
    UserError: as `with_options`. `lungs` is given for a model on 8-bit images. `lungs` or `smallest_ml` is given for a
      model without masks.
  """
  if not tasks.type_of(task).has_masks and (lungs or smallest_ml):
    flag = 'lungs' if lungs else 'smallest_ml'
    raise UserError(f'{flag}: applies to masks only, and this model gives none; leave it out')
  if intensity != 'hu' and lungs:
    raise UserError('lungs: needs HU to find the lungs, but this model takes 8-bit images; leave it out')
  return with_options(points, threshold, smallest_ml, lungs=lungs)


def _by_class(points, name, value):
  """Returns the values of an option by class."""
  if value is None:
    return {}
  if not isinstance(value, Mapping):
    if len(points) > 1:
      listed = ', '.join(points)
      raise UserError(
        f'{name}: {value} is for one class, but the model has {len(points)} ({listed}); give it for each class, for '
        f"example '{next(iter(points))}:{value}'"
      )
    return dict.fromkeys(points, value)
  for given in value:
    if given in points:
      continue
    if any(sign in given for sign in ',;:='):  # the separators of a list with errors are in the name
      numbers = ','.join(f'{of_class}:{value[given]:g}' for of_class in points)
      raise UserError(
        f'{name}: {given!r} is not the name of one class; give CLASS:NUMBER for each, separated by commas, for example '
        f"'{numbers}'"
      )
    raise UserError(f'{name}: the model has no class {given!r}; give one of {", ".join(points)}')
  return dict(value)


def _one_or_by_class(values):
  return next(iter(values.values())) if len(values) == 1 else {CLASSES: values}


def save_points(workdir: pathlib.Path, points: Points) -> None:
  """Saves the operating points of a run."""
  write_json(workdir / FILE, _one_or_by_class({name: dataclasses.asdict(point) for name, point in points.items()}))


def load_points(workdir: pathlib.Path, classes: Sequence[str]) -> Points:
  """Returns the operating points of a run, or the defaults if none are saved.

  Args:
    workdir: the folder of the run.
    classes: the names of its classes.

  Raises:
    UserError: the file is damaged, or is for other classes.
  """
  path, advice = workdir / FILE, f'choose it again with --mode=evaluate --workdir={workdir}'
  if not path.exists():
    return {name: OperatingPoint() for name in classes}
  try:
    return from_about(read_json(path, advice), classes)
  except (TypeError, KeyError, AttributeError) as error:
    raise UserError(f'{path}: damaged ({error}); {advice}') from None


def mean(points: Sequence[Points]) -> Points:
  """Returns the operating points for the mean probabilities of several runs of the same classes, class by class."""
  return {name: _mean([of_run[name] for of_run in points]) for name in points[0]}


def _mean(points):
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
