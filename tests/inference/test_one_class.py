"""One class stays what it was before there were several: digests that commit 739a497 gave for the same values.

Numbers are rounded to nine digits, because machines add in different orders.
"""

import dataclasses
import hashlib
import json
import pathlib

import numpy as np
import pytest

from fusa_jax.inference import predictor, trained
from fusa_jax.measures import histogram
from fusa_jax.runs import operating_point, patient_rule, results
from fusa_jax.scans import volumes
from fusa_jax.system import meshes
from fusa_jax.tasks import SEGMENTATION

NUMBERS = 'bc12f62207b88641a0609bfe686b67c834b4010f5251f4e3b61c3b7eb8b4eac0'
POINT = '692f91d45345e8c3e832003416074a32a1ec7eae19e16de1e806812fcf64a4ef'
PREDICTION = '5c9e56048f60af3a55360fa206d7e5e0bec2c4183ecbfdf85be89c1d0be7ec06'
MASK = '7efc2b0f5900512d40705e3d5d2b37e7736fd5957cfff409fbcf261ca6aca512'
RUN = 'c8e4bdc96bd587537f522e3115b95c3a9a0fe93acf953a0457202ed2a1aa688b'


def digest(value):
  return hashlib.sha256(json.dumps(rounded(json.loads(json.dumps(value)))).encode()).hexdigest()


def rounded(value):
  if isinstance(value, float):
    return float(f'{value:.9g}')
  if isinstance(value, dict):
    return {key: rounded(each) for key, each in value.items()}
  return [rounded(each) for each in value] if isinstance(value, list) else value


@pytest.fixture(scope='module')
def table():
  rng = np.random.default_rng(7)
  count = 24
  truth = rng.random((count, 40)) < 0.2
  truth[::3] = False
  logits = np.round(rng.normal(size=truth.shape) * 2 + truth * 2, 3)
  sums, bins = np.zeros((1, 2, histogram.BINS), np.int64), np.clip(np.floor(logits * 16) + 256, 0, 511).astype(int)
  np.add.at(sums[0], (truth.astype(int), bins), 1)
  patient, highest = np.repeat([f'p{k}' for k in range(6)], 4), logits.max(axis=1)
  columns = {'patient': patient, 'owner': patient, 'slice': np.tile(np.arange(4), 6)}
  columns['label'] = truth.any(axis=1).astype(int)
  for suffix, marked in (('', logits >= 0), ('_chosen', logits >= 1)):
    pairs = {'tp': truth & marked, 'fp': ~truth & marked, 'fn': truth & ~marked, 'tn': ~truth & ~marked}
    columns |= {f'{key}{suffix}': where.sum(axis=1) for key, where in pairs.items()}
  return columns | {
    'logit': highest,
    'score': np.round(1 / (1 + np.exp(-highest)), 6),
    'reliability': np.ones((count, 3, histogram.RELIABILITY_BINS)),
    'squared_error': np.arange(count) / 8,
    'histogram': sums,
  }


def test_numbers_and_operating_point(table):
  numbers = results.numbers(SEGMENTATION, table, (0.1, 0.5))
  assert digest(numbers) == NUMBERS
  assert results.with_classes(SEGMENTATION, {'lesion': numbers}, {'lesion': table}) == numbers
  assert digest(dataclasses.asdict(operating_point.choose(table, step=3))) == POINT


def test_mask_and_json():
  rng = np.random.default_rng(3)
  probability = np.round(rng.random((5, 16, 16)), 3).astype(np.float32)
  hu, affine = rng.integers(-1000, 300, (16, 16, 5)).astype(np.float32), np.diag([-1.5, -1.5, 4.0, 1.0])
  scan = volumes.from_volume(hu, affine, pathlib.Path('scan.nii.gz'), 'hu')
  rule = patient_rule.PatientRule('lesion_ml', threshold=0.5, chosen_by='x')
  point = operating_point.OperatingPoint(threshold=0.75, smallest_ml=0.05, step=3, patient=rule)
  model = trained.Model(
    function=lambda _, slices: slices,
    variables={},
    task='segmentation',
    values='hu',
    image_size=16,
    batch_size=8,
    name='resunet',
    step=3,
    sha256='0',
  )
  run = predictor.Predictor(model, {'lesion': point}, meshes.create_mesh())
  prediction = run.result(scan, probability)
  assert digest(prediction.numbers) == PREDICTION
  assert hashlib.sha256(prediction.mask.tobytes()).hexdigest() == MASK and prediction.mask.dtype == np.uint8
  assert run.sha256() == RUN
