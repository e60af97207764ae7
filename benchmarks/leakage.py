"""Tests end to end whether patients leak from training into the test: shuffled labels must not be predictable.

  python -m benchmarks.leakage

The command writes four cohorts of phantoms as NIfTI files. It prepares, trains and evaluates them like any user's
files. Two cohorts have their true masks, and two have shuffled masks, which no image can predict. In each pair, one is
split by patient and one by slice, as if slices were patients.

The exit code is 1 if shuffled labels, split by patient, have an AUC with a 95% interval that excludes 0.5. Chance alone
does this with one seed in twenty, a leak with all seeds: test again with --seed=1.

The command writes `leakage.md` and `leakage.json` into the workdir. Rerun it to resume.
"""

import datetime
import json
import logging
import pathlib
import shutil

import jax
import ml_collections
import numpy as np
import tqdm
from absl import flags

from configs import cls
from data import prepare
from data.cohorts import covid19_20
from fusa_jax.runs import arguments, result_files, run_config
from fusa_jax.scans import nifti, volume_files
from fusa_jax.system import exits, program
from fusa_jax.system.files import replacing
from fusa_jax.training import cross_validation

_WORKDIR = flags.DEFINE_string('workdir', None, 'folder for the four runs; default: runs/leakage-seedN')
_SEED = flags.DEFINE_integer('seed', 0, 'seed of the shuffled labels, initialisation and sampling')

# Run name: (labels, split), with the table's words.
ROWS = {
  'true-by-patient': ('true', 'patient'),
  'true-by-slice': ('true', 'slice'),
  'shuffled-by-patient': ('shuffled', 'patient'),
  'shuffled-by-slice': ('shuffled', 'slice'),
}


def main(_):
  program.start_logging()
  program.use_compilation_cache()
  config, workdir = protocol(_SEED.value), pathlib.Path(_WORKDIR.value or f'runs/leakage-seed{_SEED.value}')
  for name in ROWS:
    finish(config, workdir, name)
  no_leak, text = write_table(config, workdir)
  print(text)
  if not no_leak:
    exits.fail(
      RuntimeError('the interval of the AUC of shuffled labels excludes 0.5: a leak, or chance; see the verdict above'),
      1,
    )


def protocol(seed: int) -> ml_collections.ConfigDict:
  """Returns the demo config of classification, small enough to run in minutes.

  It has no augmentation, so that the model can easily memorise patients.
  """
  config = cls.get_config('demo')
  config.seed = seed
  config.data.image_size = 64
  config.data.phantom.update(patients=100, slices=24)
  config.augment.update(flip=False, hu_shift=0.0, hu_scale=0.0)
  config.train.update(steps=1000, evaluate_every=1000)
  return config


def finish(config: ml_collections.ConfigDict, workdir: pathlib.Path, name: str) -> None:
  """Trains and evaluates one of ROWS; resumes a stopped run.

  Raises:
    UserError: the workdir holds a run with another protocol.
  """
  run = workdir / name
  run_config.save_config(run, config)
  labels, unit = ROWS[name]
  logging.info('%s labels, split by %s', labels, unit)
  raw_dir = workdir / 'cohorts' / name
  if not raw_dir.exists():
    write_cohort(config, raw_dir, shuffled=labels == 'shuffled', by_slice=unit == 'slice')
  data_dir = prepare.prepare(str(raw_dir), str(workdir / 'prepared' / name), config.data.image_size, tqdm.tqdm)
  cross_validation.train_and_test(config, run, data_dir)


def write_cohort(config: ml_collections.ConfigDict, raw_dir: pathlib.Path, *, shuffled: bool, by_slice: bool) -> None:
  """Writes the config's phantoms under their own names, optionally with shuffled masks or exchanged slices."""
  cases = covid19_20.find(prepare.draw_phantoms(config.data.image_size, progress=tqdm.tqdm, **config.data.phantom))
  scans = [volume_files.read_scan(case.ct) for case in cases]
  volumes = np.stack([scan.values for scan in scans])
  masks = np.stack([volume_files.read_mask(case.mask, scan) for case, scan in zip(cases, scans, strict=True)])
  if shuffled:
    masks = shuffle(masks, config.seed)
  if by_slice:
    volumes, masks = deal_slices(volumes), deal_slices(masks)
  partial = raw_dir.with_name(f'.{raw_dir.name}')
  shutil.rmtree(partial, ignore_errors=True)
  for case, scan, hu, mask in zip(cases, scans, volumes, masks, strict=True):
    nifti.write_volume(partial / case.ct.name, hu, scan)
    nifti.write_volume(partial / case.mask.name, mask, scan)
  partial.rename(raw_dir)


def shuffle(masks: np.ndarray, seed: int) -> np.ndarray:
  """Gives each patient the masks of another patient: [N, S, H, W] -> [N, S, H, W].

  The masks are also rolled along the slices by a random number. Otherwise, the level in the chest alone would tell
  something about the label.
  """
  patients, slices = masks.shape[:2]
  rng = np.random.default_rng(seed)
  order = rng.permutation(patients)
  shuffled = np.empty_like(masks)
  for patient, donor, shift in zip(order, np.roll(order, 1), rng.integers(slices, size=patients), strict=True):
    shuffled[patient] = np.roll(masks[donor], shift, axis=0)
  return shuffled


def deal_slices(volumes: np.ndarray) -> np.ndarray:
  """Exchanges slices between patients: slice s of volume n comes from patient n + s. [N, S, H, W] -> [N, S, H, W].

  Neighbouring slices are then in different volumes. Each slice is used once, at its own level.
  """
  patients, slices = volumes.shape[:2]
  level = np.arange(slices)
  return volumes[(np.arange(patients)[:, None] + level) % patients, level]


def write_table(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> tuple[bool, str]:
  """Writes leakage.md and leakage.json from the finished runs; returns whether there was no leak, and the text."""
  tests = {name: result_files.read_numbers(workdir / name) for name in ROWS}
  lines = ['| Labels | Split by | AUC | 95% interval | Test files | Test slices |', '| --- | --- |' + ' ---: |' * 4]
  for name, (labels, unit) in ROWS.items():
    result = tests[name]
    auc, interval = _numbers(result)
    lines.append(f'| {labels} | {unit} | {auc} | {interval} | {result["num_patients"]} | {result["num_slices"]} |')
  no_leak, sentence = verdict(tests)
  text = '\n'.join([*lines, '', sentence, '', _caption(config, tests)])
  record = {
    'no_leak': no_leak,
    'verdict': sentence,
    'rows': {
      name: {
        'auc': result['auc'],
        'interval': result['intervals']['auc'],
        'num_patients': result['num_patients'],
        'num_slices': result['num_slices'],
      }
      for name, result in tests.items()
    },
    'config': config.to_dict(),
  }
  for file, content in (('leakage.md', text), ('leakage.json', json.dumps(record, indent=2))):
    with replacing(workdir / file) as partial:
      partial.write_text(content + '\n')
  return no_leak, text


def verdict(tests: dict[str, dict]) -> tuple[bool, str]:
  """Returns whether there was no leak, and a verdict as text, from the metrics.json of each of ROWS."""
  auc, shown = _numbers(tests['shuffled-by-patient'])
  interval = tests['shuffled-by-patient']['intervals']['auc']
  no_leak = interval is not None and interval[0] <= 0.5 <= interval[1]
  if not no_leak:
    return False, (
      f'Leak: split by patient, shuffled labels have an AUC of {auc} ({shown}); the interval should contain 0.5. '
      'Chance does this with one seed in twenty: test again with another --seed before you look for the leak.'
    )
  control, shown_control = _numbers(tests['shuffled-by-slice'])
  interval = tests['shuffled-by-slice']['intervals']['auc']
  would_show = interval is not None and interval[0] > 0.5
  return True, (
    f'No leak: split by patient, shuffled labels have an AUC of {auc} ({shown}). Split by slice, the AUC is {control} '
    f'({shown_control}): '
    + ('a leak would have been seen.' if would_show else 'it shows no leak either, so this test proves little.')
  )


def _numbers(result):
  """Returns a result's AUC and interval as text."""
  auc, interval = result['auc'], result['intervals']['auc']
  return (
    'undefined' if auc is None else f'{auc:.3f}',
    'undefined' if interval is None else f'{interval[0]:.3f} to {interval[1]:.3f}',
  )


def _caption(config, tests):
  phantom, size = config.data.phantom, config.data.image_size
  return (
    f'{phantom.patients} phantoms of {phantom.slices} slices of {size} x {size}, fold {config.data.fold}, '
    f'{config.model.name}, {config.train.steps} steps of {config.train.batch_size} slices, seed {config.seed}. '
    'Split by slice, a file holds slices of many patients. Files are then not independent, but the interval assumes '
    f'that they are. {datetime.date.today()}, jax {jax.__version__}, commit {tests["true-by-patient"]["commit"]}.'
  )


if __name__ == '__main__':
  arguments.start(main)
