"""The interface of a type of task: everything in which segmentation and classification differ.

A new type of task is one file beside this one, which makes one `TaskType`, and one line in fusa_jax/tasks/__init__.py.
Everything else asks for these attributes and compares no names.
"""

import dataclasses
from collections.abc import Callable

import jax
import numpy as np


@dataclasses.dataclass(frozen=True)
class TaskType:
  """What one type of task computes, reports and is compared by.

  In the shapes below B is the batch size, H and W are the sides of a slice, P is the number of patients.

  Attributes:
    name: the value of `config.task`.
    models: names of the models that fit, from `models.NAMES`.
    has_masks: True if the model predicts a mask, so that training needs masks; False if it predicts one label per
      slice.
    output: the shape of the predicted probability, as a bundle describes it.
    truth: returns the reference in a batch {'image', 'mask', 'label'}: mask [B, H, W] or label [B].
    definition: computes the metrics by name from sums over patients (fusa_jax.measures.metrics).
    selection: name of the validation metric that selects the best checkpoint. Higher is better.
    shown: names of the metrics in log lines, the report and the model card, in this order.
    counted: what TP, FP, FN and TN count: 'pixels' or 'slices'.
    overlap: what 2 TP / (2 TP + FP + FN) is called: 'Dice' or 'F1'.
    patient_score_name: what `patient_score` is called in a comparison of two runs.
    patient_score: computes the score [P] of each patient, by which two runs are compared, from the sums of
      `metrics.Patients`. NaN where it is undefined.
    slice_result: describes the result on one slice at the operating point: (table of slices, row) -> text.
  """

  name: str
  models: tuple[str, ...]
  has_masks: bool
  output: str
  truth: Callable[[dict[str, jax.Array]], jax.Array]
  definition: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]
  selection: str
  shown: tuple[str, ...]
  counted: str
  overlap: str
  patient_score_name: str
  patient_score: Callable[[dict[str, np.ndarray]], np.ndarray]
  slice_result: Callable[[dict[str, np.ndarray], int], str]
