"""The values that the keys of a config may have. All are checked here, before anything else happens.

Names of models, losses, optimizers and schedules are checked by their registries, which know them.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import ml_collections

from fusa_jax import tasks
from fusa_jax.measures import patients
from fusa_jax.scans import classes
from fusa_jax.system.errors import UserError


class _Domain(NamedTuple):
  """The values of a key: a test, and the words after `must be`."""

  holds: Callable[[Any], bool]
  words: str


def _is_number(value):
  return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_whole(value):
  return isinstance(value, int) and not isinstance(value, bool)


def _at_least(low):
  return _Domain(lambda value: _is_number(value) and value >= low, f'at least {low}')


def _range(low, high, low_too=False, high_too=False):
  above = lambda value: value >= low if low_too else value > low
  below = lambda value: value <= high if high_too else value < high
  words = f'{"at least" if low_too else "above"} {low} and {"at most" if high_too else "below"} {high}'
  return _Domain(lambda value: _is_number(value) and above(value) and below(value), words)


def _each(domain, example):
  """A list of which each value is in a domain; it must not be empty."""
  holds = lambda values: isinstance(values, list | tuple) and len(values) > 0 and all(map(domain.holds, values))
  return _Domain(holds, f'a list of numbers, each {domain.words}; give {example}, for example')


_WHOLE = _Domain(
  lambda values: (
    isinstance(values, list | tuple) and bool(values) and all(_is_whole(value) and value >= 1 for value in values)
  ),
  'a list of whole numbers above 0; give (1, 2), for example',
)
_WINDOW = _Domain(
  lambda window: (
    isinstance(window, list | tuple) and len(window) == 2 and all(map(_is_number, window)) and window[0] < window[1]
  ),
  'two numbers in HU, the lower one first',
)
_ABOVE_0 = _Domain(lambda value: _is_number(value) and value > 0, 'above 0')
_DTYPE = _Domain(
  lambda name: name in ('auto', 'float32', 'bfloat16') or (name == 'float64' and jax.config.jax_enable_x64),
  "'auto', 'float32' or 'bfloat16' ('float64' needs JAX_ENABLE_X64=1)",
)
_SHARE = _range(0, 1, low_too=True, high_too=True)


def _pair(domain, example):
  """A range of which both limits are in a domain."""
  holds = lambda pair: (
    isinstance(pair, list | tuple) and len(pair) == 2 and all(map(domain.holds, pair)) and pair[0] <= pair[1]
  )
  return _Domain(holds, f'two numbers, the lower one first, each {domain.words}; give {example}, for example')


_DOMAINS = {
  'seed': _at_least(0),
  'model.width': _at_least(1),
  'model.multiples': _WHOLE,
  'model.stage_sizes': _WHOLE,
  'model.dtype': _DTYPE,
  'data.fold': _Domain(lambda fold: fold == 'all' or (_is_whole(fold) and fold >= 0), "a fold, from 0, or 'all'"),
  'data.image_size': _at_least(1),
  'data.context': _Domain(lambda count: _is_whole(count) and 0 <= count <= 10, 'a whole number from 0 to 10'),
  'data.context_mm': _ABOVE_0,
  'data.window': _WINDOW,
  'data.phantom.patients': _at_least(2),
  'data.phantom.slices': _at_least(16),
  'data.phantom.seed': _at_least(0),
  'augment.crop_probability': _SHARE,
  'augment.crop_fractions': _each(_range(0, 1, high_too=True), '(0.5, 0.25)'),
  'augment.hu_shift': _at_least(0),
  'augment.hu_scale': _range(0, 1, low_too=True),
  **{f'augment.{part}_probability': _SHARE for part in ('affine', 'noise', 'blur', 'contrast', 'gamma')},
  'augment.low_resolution_probability': _SHARE,
  'augment.rotation': _range(0, 180, low_too=True, high_too=True),
  'augment.scaling': _pair(_range(0.5, 2, low_too=True, high_too=True), '(0.8, 1.25)'),
  'augment.shear': _range(0, 1, low_too=True),
  'augment.noise': _at_least(0),
  'augment.blur': _pair(_range(0, 10, high_too=True), '(0.5, 1.0)'),
  'augment.low_resolution': _pair(_range(0, 1, high_too=True), '(0.5, 1.0)'),
  'augment.contrast': _pair(_range(0, 10, high_too=True), '(0.75, 1.25)'),
  'augment.gamma': _pair(_range(0, 10, high_too=True), '(0.7, 1.5)'),
  'augment.gamma_inverted': _SHARE,
  'train.steps': _at_least(1),
  'train.epochs': _ABOVE_0,
  'train.patience': _at_least(1),
  'train.batch_size': _at_least(1),
  'train.learning_rate': _ABOVE_0,
  'train.warmup_steps': _at_least(0),
  'train.weight_decay': _at_least(0),
  'train.clip_norm': _ABOVE_0,
  'train.ema': _range(0, 1, low_too=True),
  'train.log_every': _at_least(1),
  'train.evaluate_every': _at_least(1),
  'evaluate.num_overlays': _at_least(0),
  'evaluate.target_sensitivity': _range(0, 1, high_too=True),
  'evaluate.patient_score': _Domain(
    lambda name: name in ('', *patients.OF_SLICES, *patients.OF_MASKS),
    f"one of {', '.join((*patients.OF_SLICES, *patients.OF_MASKS))}, or ''",
  ),
  'evaluate.prevalences': _each(_range(0, 1), '(0.1, 0.3)'),
  'mesh.data': _Domain(lambda count: count == -1 or (_is_whole(count) and count >= 1), '-1 or at least 1'),
  'mesh.space': _at_least(1),
}


def check(config: ml_collections.ConfigDict) -> None:
  """Checks the values of a config.

  Raises:
    UserError: values are out of range, a line for each; the classes are not valid (`scans.classes.chosen`); an option
      does not fit the task or the intensity.
  """
  lines = []
  for key, domain in _DOMAINS.items():
    value = config
    for part in key.split('.'):
      value = value[part]
    if value is not None and not domain.holds(value):  # None: as published, or the default
      lines.append(f'{key}: {value} must be {domain.words}')
  if lines:
    raise UserError('\n'.join(lines))
  classes.check_keys(config.data.classes, config.data.ignore_label, config.data.lesion_labels)
  if config.data.context and config.data.patients == 'each_slice':
    raise UserError(
      'data.context: slices of unknown patients have no neighbours (data.patients=each_slice); leave one of the two out'
    )
  options = config.evaluate
  mask_options = [key for key in ('lungs', 'fit_smallest') if options[key]]
  if mask_options and not tasks.type_of(config.task).has_masks:
    raise UserError(f'evaluate.{mask_options[0]}: applies to masks only, and {config.task} gives none; leave it out')
  if options.patient_score in patients.OF_MASKS and not tasks.type_of(config.task).has_masks:
    raise UserError(
      f'evaluate.patient_score: {options.patient_score} applies to masks only, and {config.task} gives none; give one '
      f'of {", ".join(patients.OF_SLICES)}'
    )
  if options.patient_score == 'lung_share' and config.data.intensity != 'hu':
    raise UserError('evaluate.patient_score: lung_share needs HU to find the lungs, but these are 8-bit images')
  if options.lungs and config.data.intensity != 'hu':
    raise UserError('evaluate.lungs: needs HU to find the lungs, but these are 8-bit images; leave it out')
