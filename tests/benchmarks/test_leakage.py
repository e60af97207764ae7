"""The cohorts of the leakage self-test, and its verdict on its runs."""

import json
import logging
import re

import numpy as np
import pytest
from conftest import tiny

from benchmarks import leakage
from configs import cls
from data import prepare, survey
from data.cohorts import covid19_20
from fusa_jax.runs import result_files
from fusa_jax.scans import volume_files
from fusa_jax.system import own_files
from fusa_jax.system.errors import UserError
from fusa_jax.training import cross_validation

PATIENTS, SLICES = 5, 16


@pytest.fixture
def config(tmp_path, monkeypatch):
  """A config with few small phantoms, drawn into a separate cache."""
  monkeypatch.setattr(prepare, 'CACHE', tmp_path / 'cache')
  return tiny(cls, **{'data.phantom.patients': PATIENTS, 'data.phantom.slices': SLICES})


def read(folder):
  """Returns scans and masks [N, S, H, W] of a cohort."""
  cases = covid19_20.find(folder)
  scans = [volume_files.read_scan(case.ct) for case in cases]
  masks = [volume_files.read_mask(case.mask, scan) for case, scan in zip(cases, scans, strict=True)]
  return np.stack([scan.values for scan in scans]), np.stack(masks)


def test_slices_are_dealt_once_at_their_level_and_away_from_their_neighbours():
  patient, level = np.divmod(np.arange(PATIENTS * SLICES).reshape(PATIENTS, SLICES, 1, 1), SLICES)
  dealt_patient, dealt_level = leakage.deal_slices(patient)[..., 0, 0], leakage.deal_slices(level)[..., 0, 0]
  assert len(set(zip(dealt_patient.flat, dealt_level.flat, strict=True))) == PATIENTS * SLICES
  assert (dealt_level == np.arange(SLICES)).all()
  file = {(p, s): n for n in range(PATIENTS) for s, p in enumerate(dealt_patient[n])}
  for p in range(PATIENTS):
    for s in range(SLICES - 1):
      assert file[p, s] != file[p, s + 1]


def test_shuffled_masks_come_from_another_patient_and_are_rolled():
  masks = np.random.default_rng(0).integers(2, size=(PATIENTS, SLICES, 4, 4)).astype(np.uint8)
  shuffled = leakage.shuffle(masks, seed=3)
  donors, shifts = np.transpose(
    [
      (n, shift)
      for mask in shuffled
      for n in range(PATIENTS)
      for shift in range(SLICES)
      if np.array_equal(mask, np.roll(masks[n], shift, axis=0))
    ]
  )
  assert sorted(donors) == list(range(PATIENTS))
  assert (donors != np.arange(PATIENTS)).all()
  assert len(set(shifts)) > 1
  assert not np.array_equal(shuffled, leakage.shuffle(masks, seed=4))


def test_cohorts_have_the_expected_scans_and_masks(config, tmp_path, caplog):
  raw, cohorts = {}, {}
  for name, (labels, unit) in leakage.ROWS.items():
    raw[name] = tmp_path / 'cohorts' / name
    leakage.write_cohort(config, raw[name], shuffled=labels == 'shuffled', by_slice=unit == 'slice')
    cohorts[name] = read(raw[name])
  scans, masks = cohorts['true-by-patient']
  drawn = read(prepare.draw_phantoms(32, PATIENTS, SLICES, 0))
  np.testing.assert_array_equal(scans, drawn[0])
  np.testing.assert_array_equal(masks, drawn[1])
  shuffled = leakage.shuffle(masks, config.seed)
  np.testing.assert_array_equal(cohorts['shuffled-by-patient'][0], scans)
  np.testing.assert_array_equal(cohorts['shuffled-by-patient'][1], shuffled)
  # True and shuffled masks stay with their slices.
  for name, expected_masks in (('true-by-slice', masks), ('shuffled-by-slice', shuffled)):
    np.testing.assert_array_equal(cohorts[name][0], leakage.deal_slices(scans))
    np.testing.assert_array_equal(cohorts[name][1], leakage.deal_slices(expected_masks))
  # No scan counts as a copy of another.
  for name in ('true-by-slice', 'shuffled-by-slice'):
    survey.survey(covid19_20.find(raw[name]))
  assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def result(auc, interval):
  return {'auc': auc, 'intervals': {'auc': interval}, 'num_patients': 20, 'num_slices': 480, 'commit': 'c0ffee'}


@pytest.mark.parametrize(
  ('interval', 'control', 'no_leak', 'verdict'),
  [
    ([0.42, 0.58], [0.74, 0.83], True, 'No leak: .*0.420 to 0.580.* a leak would have been seen'),
    ([0.42, 0.58], [0.45, 0.83], True, 'proves little'),
    ([0.51, 0.7], [0.74, 0.83], False, 'Leak: .*0.510 to 0.700.*another --seed'),
    ([0.3, 0.49], [0.74, 0.83], False, 'Leak: '),
    (None, [0.74, 0.83], False, 'Leak: .*undefined'),
  ],
)
def test_shuffled_labels_must_have_0_5_in_their_interval(interval, control, no_leak, verdict):
  results = {'shuffled-by-patient': result(0.5, interval), 'shuffled-by-slice': result(0.8, control)}
  passed, sentence = leakage.verdict(results)
  assert passed is no_leak
  assert re.search(verdict, sentence)


def test_finished_runs_make_the_table(config, tmp_path, monkeypatch):

  def finished(config, run, data_dir):
    table = {run / 'test' / result_files.TABLE: lambda path: path.touch()}
    own_files.write_together(run / 'test' / result_files.NUMBERS, result(0.5, [0.4, 0.6]), table, ())

  monkeypatch.setattr(prepare, 'prepare', lambda raw_dir, *_: raw_dir)
  monkeypatch.setattr(cross_validation, 'train_and_test', finished)
  for name in leakage.ROWS:
    leakage.finish(config, tmp_path, name)
  no_leak, text = leakage.write_table(config, tmp_path)
  assert no_leak
  assert text.splitlines()[2:6] == [
    f'| {labels} | {unit} | 0.500 | 0.400 to 0.600 | 20 | 480 |' for labels, unit in leakage.ROWS.values()
  ]
  assert (tmp_path / 'leakage.md').read_text() == text + '\n'
  record = json.loads((tmp_path / 'leakage.json').read_text())
  assert record['no_leak'] and record['rows']['shuffled-by-slice']['interval'] == [0.4, 0.6]
  config.train.steps += 1
  with pytest.raises(UserError, match='train.steps cannot change'):
    leakage.finish(config, tmp_path, 'true-by-patient')
