"""Each type of task is complete and lists its metrics and models."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import seg
from fusa_jax import models, tasks
from fusa_jax.measures import metrics
from fusa_jax.system.errors import UserError


def test_each_type_of_task_fits_the_metrics_and_the_models():
  assert {name: task_type.has_masks for name, task_type in tasks.TASKS.items()} == {
    'segmentation': True,
    'classification': False,
  }
  totals = dict.fromkeys(metrics.COUNTS, np.array([1.0]))
  for name in ('slices', 'slice_dice', 'slice_dice_defined', 'patient_dice', 'patient_dice_defined', 'lesion_dice'):
    totals[name] = np.array([1.0])
  totals |= dict.fromkeys(('lesion_slices', 'squared_error', 'wins', 'positives'), np.array([1.0]))
  totals['reliability'] = np.ones((1, 3, 20))
  for name, task_type in tasks.TASKS.items():
    assert task_type.name == name and tasks.type_of(name) is task_type
    assert set(task_type.models) <= set(models.NAMES)
    defined = task_type.definition(totals).keys()
    assert {task_type.selection, *task_type.shown} <= defined <= metrics.DEFINITIONS.keys()


def test_an_unknown_task_is_refused_with_the_list():
  with pytest.raises(UserError, match=r"^task: 'detection' is unknown; give one of segmentation, classification$"):
    tasks.type_of('detection')


def test_the_result_of_a_slice_in_words():
  """At the operating point: 3 of 4 lesion pixels are found and 2 others are marked; one lesion slice is missed."""
  pixels = {'tp_chosen': [3], 'fp_chosen': [2], 'fn_chosen': [1], 'tn_chosen': [10]}
  assert tasks.TASKS['segmentation'].slice_result(pixels, 0) == 'Dice 0.6667'
  one = {'tp_chosen': [1, 0], 'fp_chosen': [0, 0], 'fn_chosen': [0, 1], 'tn_chosen': [0, 0], 'score': [0.875, 0.25]}
  slices = {name: np.array(values) for name, values in one.items()}
  results = [tasks.TASKS['classification'].slice_result(slices, row) for row in (0, 1)]
  assert results == ['score 0.875, true positive', 'score 0.250, false negative']


def test_the_dtype_that_auto_means_depends_on_the_devices(monkeypatch):
  config = seg.get_config('demo')
  assert [tasks.resolved_dtype(config, platform) for platform in ('cpu', 'gpu', 'tpu')] == [
    'float32',
    'bfloat16',
    'bfloat16',
  ]
  for backend, dtype in (('cpu', 'float32'), ('gpu', 'bfloat16')):
    monkeypatch.setattr(jax, 'default_backend', lambda backend=backend: backend)
    assert tasks.resolved_dtype(config) == dtype and tasks.create(config).model.dtype == jnp.dtype(dtype)
  config.model.dtype = 'float32'
  assert tasks.resolved_dtype(config, 'tpu') == tasks.resolved_dtype(config) == 'float32'
