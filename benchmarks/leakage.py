"""Whether patients leak from training into the test, tried end to end: labels without meaning must not be predictable.

  python -m benchmarks.leakage

Four cohorts of phantoms are written as NIfTI files, then prepared, trained on and evaluated as anyone's files would be:
with their true masks, and with shuffled ones, of which no image can tell anything; each split by patient, and by slice,
as if slices were patients. Where shuffled labels split by patient have an AUC whose 95% interval leaves out 0.5, the
command ends with exit code 1. Chance alone does so with one seed in twenty, a leak with all: --seed=1 asks again.

`leakage.md` and `leakage.json` are written into the workdir. The command may be stopped at any time: given again, it
keeps what is finished and resumes what is not.
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
from fusa_jax.runs import arguments, results, run_config
from fusa_jax.scans import nifti
from fusa_jax.system import exits, program
from fusa_jax.system.files import replacing
from fusa_jax.training import evaluate, train

_WORKDIR = flags.DEFINE_string('workdir', None, 'folder of the four runs; default: runs/leakage-seedN')
_SEED = flags.DEFINE_integer('seed', 0, 'of the shuffled labels, of initialisation and of sampling')

# By the name of its run: labels and split, as the table has them.
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
    exits.fail(RuntimeError('the AUC of shuffled labels leaves out 0.5: a leak, or chance; see the verdict above'), 1)


def protocol(seed: int) -> ml_collections.ConfigDict:
  """The demo of classification at a size for minutes, and without augmentation: patients should be easy to remember."""
  config = cls.get_config('demo')
  config.seed = seed
  config.data.image_size = 64
  config.data.phantom.slices = 24
  config.augment.update(flip=False, hu_shift=0.0, hu_scale=0.0)
  config.train.update(steps=1000, evaluate_every=1000)
  return config


def finish(config: ml_collections.ConfigDict, workdir: pathlib.Path, name: str) -> None:
  """Trains and evaluates one of ROWS, from where it was stopped.

  Raises:
    UserError: the workdir holds a run of another protocol.
  """
  run = workdir / name
  run_config.save_config(run, config)
  if (run / 'test' / 'metrics.json').exists():
    return
  labels, unit = ROWS[name]
  logging.info('%s labels, split by %s', labels, unit)
  raw_dir = workdir / 'cohorts' / name
  if not raw_dir.exists():
    write_cohort(config, raw_dir, shuffled=labels == 'shuffled', by_slice=unit == 'slice')
  data_dir = prepare.prepare(str(raw_dir), str(workdir / 'prepared' / name), config.data.image_size, tqdm.tqdm)
  train.train(config, run, data_dir)
  evaluate.evaluate(config, run, data_dir)


def write_cohort(config: ml_collections.ConfigDict, raw_dir: pathlib.Path, *, shuffled: bool, by_slice: bool) -> None:
  """Writes the phantoms of the config under their own names, with other masks, or with slices of each other."""
  cases = covid19_20.find(prepare.draw_phantoms(config.data.image_size, progress=tqdm.tqdm, **config.data.phantom))
  scans = [nifti.read_scan(case.ct) for case in cases]
  volumes = np.stack([scan.values for scan in scans])
  masks = np.stack([nifti.read_mask(case.mask, scan) for case, scan in zip(cases, scans, strict=True)])
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
  """Masks [N, S, H, W] of which each patient has another's, rolled along the slices by a random number of them.

  Unrolled, the level in the chest alone would tell something of the label.
  """
  patients, slices = masks.shape[:2]
  rng = np.random.default_rng(seed)
  order = rng.permutation(patients)
  shuffled = np.empty_like(masks)
  for patient, donor, shift in zip(order, np.roll(order, 1), rng.integers(slices, size=patients), strict=True):
    shuffled[patient] = np.roll(masks[donor], shift, axis=0)
  return shuffled


def deal_slices(volumes: np.ndarray) -> np.ndarray:
  """Volumes [N, S, H, W] of which each has its slice s from patient n + s, so that a slice's neighbours are in others.

  Every slice is used once, at its own level.
  """
  patients, slices = volumes.shape[:2]
  level = np.arange(slices)
  return volumes[(np.arange(patients)[:, None] + level) % patients, level]


def write_table(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> tuple[bool, str]:
  """Writes leakage.md and leakage.json from the finished runs; gives whether no leak was seen, and what to print."""
  tests = {name: results.read_numbers(workdir / name) for name in ROWS}
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
  """Whether no leak was seen, and a sentence of it, from the metrics.json of each of ROWS."""
  auc, shown = _numbers(tests['shuffled-by-patient'])
  interval = tests['shuffled-by-patient']['intervals']['auc']
  no_leak = interval is not None and interval[0] <= 0.5 <= interval[1]
  if not no_leak:
    return False, (
      f'Leak: split by patient, shuffled labels have an AUC of {auc} ({shown}), where 0.5 should be in the interval. '
      'Chance does this to one seed in twenty, so ask again with another --seed before looking for it.'
    )
  control, shown_control = _numbers(tests['shuffled-by-slice'])
  interval = tests['shuffled-by-slice']['intervals']['auc']
  would_show = interval is not None and interval[0] > 0.5
  return True, (
    f'No leak: split by patient, shuffled labels have an AUC of {auc} ({shown}). Split by slice they have {control} '
    f'({shown_control}): '
    + ('a leak would have been seen.' if would_show else 'no leak was seen there either, so that this proves little.')
  )


def _numbers(result):
  """A result's AUC and interval as text."""
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
    'Split by slice, a file holds slices of many patients; its interval takes files for independent, which they are '
    f'not. {datetime.date.today()}, jax {jax.__version__}, commit {tests["true-by-patient"]["commit"]}.'
  )


if __name__ == '__main__':
  arguments.start(main)
