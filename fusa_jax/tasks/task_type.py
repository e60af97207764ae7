"""The interface of a type of task: all differences between segmentation and classification.

To add a type of task, write a file next to this one that creates a `TaskType`, and add one line to
fusa_jax/tasks/__init__.py. All other code reads these attributes and never compares names.
"""

import dataclasses
from collections.abc import Callable

import jax
import numpy as np


@dataclasses.dataclass(frozen=True)
class TaskType:
  """One type of task: what it computes and reports, and how two of its runs are compared.

  In the shapes below, B is the batch size, H and W are the sides of a slice, and P is the number of patients.

  Attributes:
    name: the value of `config.task`.
    models: names of its models, from `models.NAMES`.
    has_masks: True if the model predicts a mask; training then needs masks. False if it predicts one label per slice.
    output: the shape of the predicted probability, as text for a bundle.
    truth: returns the reference of a batch {'image', 'mask', 'label'}: mask [B, H, W] or label [B].
    definition: computes the metrics, {name: value}, from sums over patients (fusa_jax.measures.metrics).
    selection: name of the validation metric that selects the best checkpoint. Higher is better.
    shown: names of the metrics in log lines, the report and the model card, in this order.
    counted: what TP, FP, FN and TN count: 'pixels' or 'slices'.
    overlap: the name of 2 TP / (2 TP + FP + FN): 'Dice' or 'F1'.
    patient_score_name: the name of `patient_score` in a comparison of two runs.
    patient_score: computes each patient's score [P] from the sums of `metrics.Patients`. A comparison of two runs uses
      these scores. An undefined score is NaN.
    slice_result: describes the result for one slice at the operating point: (table of slices, row) -> text.
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
