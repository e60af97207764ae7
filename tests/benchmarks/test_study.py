"""A study of models, folds and seeds under one protocol: its tables, resuming, and refusals."""

import csv
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys

import numpy as np
import one_class
import pytest
from conftest import PATIENTS, SIZE, SLICES, tiny

from benchmarks import ablation, jobs, power, study, study_table
from configs import seg
from fusa_jax.measures import crossed, metrics
from fusa_jax.runs import compare, result_files, results, run_config
from fusa_jax.system import own_files
from fusa_jax.system.errors import UserError
from fusa_jax.tasks import SEGMENTATION
from fusa_jax.training import cross_validation, train

PAIR, SEEDS = ['resunet', 'fusa_resunet'], [3, 4]
COLUMNS = {'Dice': 'dice', 'Precision': 'precision', 'Recall': 'recall', 'Macro Dice': 'dice_macro'}


def protocol(**overrides):
  return tiny(seg, **{'train.steps': 2, 'evaluate.num_overlays': 1, **overrides})


def make(workdir, data_dir, names=PAIR, seeds=SEEDS, **overrides):
  return study.make(protocol(**overrides), names, seeds, workdir, data_dir, jobs.machine(), [])


def numbers(run):
  return json.loads((run / 'test' / 'metrics.json').read_text())


def dice_of_patients(run):
  """Computes {patient: Dice of all pixels} from slices.csv; patients with undefined Dice are left out."""
  sums = {}
  with (run / 'test' / 'slices.csv').open(newline='') as file:
    for row in csv.DictReader(file):
      sums.setdefault(row['patient'], np.zeros(3))
      sums[row['patient']] += [int(row[key]) for key in ('tp', 'fp', 'fn')]
  return {patient: 2 * tp / (2 * tp + fp + fn) for patient, (tp, fp, fn) in sums.items() if tp + fp + fn}


@pytest.fixture(scope='module')
def made(data_dir, tmp_path_factory):
  """A study of two models and two seeds on one fold."""
  workdir = tmp_path_factory.mktemp('study')
  make(workdir, data_dir)
  return workdir


@pytest.mark.slow
def test_a_row_is_the_mean_and_spread_of_its_seeds(made):
  rows = list(csv.DictReader((made / 'table.csv').open()))
  assert [(row['model'], row['name']) for row in rows] == [('ResUNet', 'resunet'), ('FUSA-ResUnet', 'fusa_resunet')]
  text = (made / 'table.md').read_text()
  assert text.startswith('| Model | Dice | Precision | Recall | Macro Dice | Parameters | GFLOPs | slices/s |\n')
  assert 'fold 0: 32 test slices of 2 patients, 32 x 32. 2 steps of 8 slices, seeds 3, 4. Mean ±' in text
  assert 'Unfinished' not in text and 'runs at a time' not in text and 'split' not in text
  for row in rows:
    runs = [numbers(made / f'{row["name"]}-seed{s}') for s in SEEDS]
    assert row['seeds'] == '2'
    for column, key in COLUMNS.items():
      values = [run[key] for run in runs if run[key] is not None]
      assert float(row[column]) == pytest.approx(statistics.mean(values))
      if len(values) == 2:
        # The standard deviation of two values is their distance divided by the square root of two.
        assert float(row[f'{column} sd']) == pytest.approx(abs(values[0] - values[1]) / 2**0.5)
    configs = [json.loads((made / f'{row["name"]}-seed{s}' / 'config.json').read_text()) for s in SEEDS]
    assert [config['seed'] for config in configs] == SEEDS
    (line,) = [line for line in text.splitlines() if line.startswith(f'| {row["model"]} ')]
    assert f'| {float(row["Dice"]) * 100:.2f}% ± ' in line


@pytest.mark.slow
def test_fusa_minus_plain_over_all_seeds_and_per_seed(made):
  """Recomputes the gain of FUSA from the slices: the mean over patients of the difference of seed means."""
  found = json.loads((made / 'differences.json').read_text())
  assert [each['seeds'] for each in found] == [[3, 4], [3], [4]]
  text = (made / 'table.md').read_text()
  for each, title in zip(found, ('seeds 3, 4', 'seed 3', 'seed 4'), strict=True):
    assert (each['run'], each['against'], each['fold']) == ('fusa_resunet', 'resunet', 0)
    dice = {
      name: [dice_of_patients(made / f'{name}-seed{seed}') for seed in each['seeds']]
      for name in ('fusa_resunet', 'resunet')
    }
    everywhere = set.intersection(*(set(one) for side in dice.values() for one in side))
    mean = lambda side, patient: statistics.mean(one[patient] for one in side)
    gains = [mean(dice['fusa_resunet'], patient) - mean(dice['resunet'], patient) for patient in everywhere]
    mine = each['per_patient']
    assert mine['patients'] == len(gains)
    assert mine['difference'] == pytest.approx(statistics.mean(gains))
    if len(each['seeds']) > 1:
      each_seed = [
        [one[patient] - other[patient] for patient in everywhere]
        for one, other in zip(dice['fusa_resunet'], dice['resunet'], strict=True)
      ]
      assert mine['with_other_runs']['interval'] == pytest.approx(crossed.interval(np.array(each_seed)))
    else:
      assert 'with_other_runs' not in mine
    assert f'\nfusa_resunet minus resunet, {title}: Dice: {mine["difference"]:.4f} [' in text
    pooled = [statistics.mean(numbers(made / f'{name}-seed{s}')['dice'] for s in each['seeds']) for name in dice]
    assert each['numbers']['dice']['difference'] == pytest.approx(pooled[0] - pooled[1])


@pytest.mark.slow
def test_a_finished_study_is_kept_and_another_protocol_is_refused(made, data_dir, monkeypatch):
  trained = []
  monkeypatch.setattr(train, 'train', lambda config, *_: trained.append(config.model.name))
  before = {file: (made / file).read_bytes() for file in ('table.csv', 'table.md', 'differences.json')}
  make(made, data_dir)
  assert not trained
  assert {file: (made / file).read_bytes() for file in before} == before
  with pytest.raises(UserError, match=r'resunet-seed3 holds a run with another config: train.learning_rate'):
    make(made, data_dir, **{'train.learning_rate': 0.1})


@pytest.mark.slow
def test_only_seeds_of_both_models_are_compared(made, tmp_path):
  """The study stopped before the last run: one seed is compared, and the caption names the missing run."""
  workdir = tmp_path / 'study'
  shutil.copytree(made, workdir)
  (workdir / 'fusa_resunet-seed4' / 'test' / 'metrics.json').unlink()
  text = study_table.write(protocol(), PAIR, SEEDS, workdir, jobs.Machine('gpu', 'H100', 4), 4)
  (found,) = json.loads((workdir / 'differences.json').read_text())
  assert found['seeds'] == [3]
  assert found['per_patient'] == json.loads((made / 'differences.json').read_text())[1]['per_patient']
  assert 'Unfinished: fusa_resunet 1 of 2 seeds.' in text
  assert 'in training, on 4 x H100 shared by 4 runs at a time.' in text


@pytest.mark.slow
def test_recipes_are_compared_per_patient(made, tmp_path):
  """Two studies of one model and seed, which are in truth two seeds. Every number follows from slices.csv and logs."""
  for name, seed in (('paper', 3), ('other', 4)):
    run = tmp_path / name / 'resunet-seed3'
    shutil.copytree(made / f'resunet-seed{seed}', run)
    config = json.loads((run / 'config.json').read_text())
    config['seed'], config['train']['clip_norm'] = 3, 12.0 if name == 'other' else None
    (run / 'config.json').write_text(json.dumps(config))
  lines = ablation.table([ablation.load_study(tmp_path / name) for name in ('paper', 'other')]).splitlines()
  assert lines[-1] == '- other: train.clip_norm=12.0'
  for row, seed in zip(lines[2:4], (3, 4), strict=True):
    of_patient = dice_of_patients(made / f'resunet-seed{seed}')
    cells = [cell.strip() for cell in row.strip('|').split('|')]
    assert cells[:3] == ['resunet', 'paper' if seed == 3 else 'other', '1']
    assert cells[4] == f'{statistics.mean(of_patient.values()):.4f}'
    entries = map(json.loads, (made / f'resunet-seed{seed}' / 'log.jsonl').read_text().splitlines())
    step = numbers(made / f'resunet-seed{seed}')['step']
    (validated,) = [e['validation/dice_per_patient'] for e in entries if e['step'] == step and 'validation/dice' in e]
    assert cells[3] == f'{validated:.4f}'
  first, second = (dice_of_patients(made / f'resunet-seed{seed}') for seed in (3, 4))
  gain = statistics.mean(second[patient] - first[patient] for patient in first.keys() & second.keys())
  assert f'| Dice: {gain:.4f} [' in lines[3]
  with pytest.raises(UserError, match='has no finished run of a study'):
    ablation.load_study(tmp_path)


@pytest.mark.slow
def test_a_split_by_slice_is_reported(made, tmp_path):
  workdir = tmp_path / 'study'
  shutil.copytree(made, workdir)
  for split, caption in (('by patient', ', fold 0: 32'), ('by slice', ', fold 0 (split by slice): 32')):
    for path in workdir.glob('*/test/metrics.json'):
      record = own_files.read_record(path)
      own_files.write_record(path, record | {'split': split}, record['files'])
    assert caption in study_table.write(protocol(), PAIR, SEEDS, workdir, jobs.machine(), 1)


@pytest.mark.slow
def test_labels_of_patients_give_no_comparison_of_slices(made, tmp_path):
  workdir = tmp_path / 'study'
  shutil.copytree(made, workdir)
  for path in workdir.glob('*/test/metrics.json'):
    record = own_files.read_record(path)
    own_files.write_record(path, record | {'labels': results.LABELS_OF_PATIENTS}, record['files'])
  assert 'minus' not in study_table.write(protocol(), PAIR, SEEDS, workdir, jobs.machine(), 1)
  assert json.loads((workdir / 'differences.json').read_text()) == []
  with pytest.raises(UserError, match='resunet-seed3 has labels of patients, so its slices have no scores to compare'):
    ablation.load_study(workdir)


@pytest.fixture(scope='module')
def command(data_dir, tmp_path_factory):
  """The command of a study of both models on all folds, two runs at a time."""
  if len(jobs._cores()) < 2:
    pytest.skip('each job has a core of its own')
  return [
    *(sys.executable, '-m', 'benchmarks.study', '--config=configs/seg.py:demo', '--models=resunet,fusa_resunet'),
    *('--folds=all', '--jobs=2', f'--workdir={tmp_path_factory.mktemp("folds")}', f'--config.data.dir={data_dir}'),
    *('--config.model.width=4', '--config.model.multiples=(1,2)', f'--config.data.image_size={SIZE}'),
    *('--config.train.steps=2', '--config.train.batch_size=8', '--config.train.warmup_steps=1'),
    *('--config.train.log_every=1', '--config.evaluate.num_overlays=1'),
  ]


@pytest.fixture(scope='module')
def all_folds(command):
  """The folder of that study, and what the command printed."""
  done = subprocess.run(command, capture_output=True, text=True, env=os.environ, timeout=600)
  assert done.returncode == 0, done.stderr
  (workdir,) = (flag.removeprefix('--workdir=') for flag in command if flag.startswith('--workdir='))
  return pathlib.Path(workdir), done.stderr


@pytest.mark.slow
def test_two_jobs_at_a_time_from_the_command_line(command, all_folds):
  """Two workers run both models on all folds; the pooled results are complete, and a second call has nothing to do."""
  workdir, printed = all_folds
  ends = [line for line in printed.splitlines() if line.startswith('[')]
  assert [line.split(']')[0] for line in ends if 'all folds' not in line] == [f'[{k}/10' for k in range(1, 11)]
  assert sum('all folds: ' in line for line in ends) == 2
  assert 'Training' not in printed and 'compiled' not in printed and 'leaked' not in printed
  tables = []
  for name in ('fusa_resunet', 'resunet'):
    run = workdir / f'{name}-seed0'
    tables.append(one_class.part(run).table)
    assert len(metrics.by_patient(tables[-1])) == PATIENTS
    assert all(result_files.is_complete(run / f'fold{k}' / 'test') for k in range(5))
  (found,) = json.loads((workdir / 'differences.json').read_text())
  expected = compare.paired(SEGMENTATION, *([table] for table in tables))
  assert found == {'run': 'fusa_resunet', 'against': 'resunet', 'fold': 'all', 'seeds': [0], **expected}
  assert 'shared by 2 runs at a time' in (workdir / 'table.md').read_text()
  again = subprocess.run(command, capture_output=True, text=True, env=os.environ, timeout=600)
  assert again.returncode == 0, again.stderr
  assert again.stderr == '10 of 10 runs are finished\n'


@pytest.mark.slow
def test_all_folds_are_a_cross_validation(all_folds, data_dir):
  workdir, _ = all_folds
  run = workdir / 'resunet-seed0'
  with (run / 'test' / 'slices.csv').open(newline='') as file:
    rows = list(csv.DictReader(file))
  assert len({(row['patient'], row['slice']) for row in rows}) == len(rows) == PATIENTS * SLICES
  assert all((folder / 'test' / 'report.html').exists() for folder in (run, *(run / f'fold{k}' for k in range(5))))
  row, _ = csv.DictReader((workdir / 'table.csv').open())
  assert (row['name'], float(row['Dice'])) == ('resunet', numbers(run)['dice'])
  text = (workdir / 'table.md').read_text()
  assert f'all folds, each patient tested once: {PATIENTS * SLICES} test slices of {PATIENTS} patients' in text
  # With the same config, launch.py has nothing to do.
  before = (run / 'test' / 'metrics.json').read_bytes()
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(train, 'train', None)
    cross_validation.cross_validate(run_config.load_config(run), run, data_dir)
  assert (run / 'test' / 'metrics.json').read_bytes() == before


@pytest.mark.slow
def test_unfinished_folds_are_resumed(all_folds, data_dir, tmp_path, monkeypatch):
  """One fold is not tested: only this fold is run, then all are pooled. The old pooled results are removed before."""
  workdir = tmp_path / 'study'
  shutil.copytree(all_folds[0], workdir)
  run, done, original = workdir / 'resunet-seed0', [], train.train
  (run / 'fold2' / 'test' / 'metrics.json').unlink()

  def note(config, *rest):
    done.append((config.data.fold, result_files.is_complete(run / 'test')))
    original(config, *rest)

  monkeypatch.setattr(train, 'train', note)
  config = run_config.load_config(run)
  study.make(config, ['resunet'], [0], workdir, data_dir, jobs.machine(), [])
  assert done == [(2, True)]  # the old pooled results stay until the new ones
  without_commit = lambda folder: {key: value for key, value in numbers(folder).items() if key != 'commit'}
  assert without_commit(run) == without_commit(all_folds[0] / 'resunet-seed0')
  config.data.fold = 1
  with pytest.raises(UserError, match=r'resunet-seed0 holds a run with another config: data.fold \(all -> 1\)'):
    study.make(config, ['resunet'], [0], workdir, data_dir, jobs.machine(), [])


def refused(*arguments):
  """Runs a study with invalid flags and returns its one-line error."""
  command = [sys.executable, '-m', 'benchmarks.study', '--config=configs/seg.py:demo', *arguments]
  done = subprocess.run(command, capture_output=True, text=True, env=os.environ, timeout=300)
  assert done.returncode == 2
  (line,) = done.stderr.splitlines()
  return line


@pytest.mark.slow
def test_jobs_and_folds_are_checked_before_anything_is_drawn_or_trained():
  there = len(jobs._cores())
  assert refused(f'--jobs={there + 1}') == (
    f'error: --jobs: {there + 1}, but there are {there} CPU cores; give --jobs={there} or fewer'
  )
  assert refused('--folds=all', '--config.data.fold=1') == (
    'error: --folds: all, but --config.data.fold is 1; give only one of them'
  )


@pytest.mark.parametrize('seeds', [['one'], ['1', ''], [], ['-1']])
def test_seeds_are_whole_numbers(seeds):
  with pytest.raises(UserError, match='--seeds: .* give --seeds=0,1,2'):
    study.read_seeds(seeds)


def test_models_and_seeds_are_named_once_and_fit_the_task():
  assert study.read_models(None, 'segmentation') == list(study_table.ROWS['segmentation'].values())
  assert study.read_models(['fusa_linknet', 'linknet'], 'segmentation') == ['fusa_linknet', 'linknet']
  for names, reason in (
    (['resunet', 'unet'], "'unet' is not a segmentation model; choose from deeplabv3, "),
    (['resnet18'], "'resnet18' is not a segmentation model; choose from deeplabv3, "),
    ([], "'' is not a segmentation model; choose from deeplabv3, "),
    (['resunet', 'linknet', 'resunet'], 'resunet is given more than once; name each once'),
  ):
    with pytest.raises(UserError) as error:
      study.read_models(names, 'segmentation')
    assert str(error.value).startswith(f'--models: {reason}')
  with pytest.raises(UserError, match='^--seeds: 1 is given more than once; name each once$'):
    study.read_seeds(['0', '1', '01'])


def test_folds_are_all_or_one():
  assert [study.read_fold(text, None) for text in ('all', '0', '3')] == ['all', 0, 3]
  assert (study.read_fold('all', 'all'), study.read_fold('2', 2)) == ('all', 2)
  for text in ('0,1', 'some', '-1', ''):
    with pytest.raises(UserError, match=f"^--folds: '{text}' must be 'all' or one fold number; for example"):
      study.read_fold(text, None)


def test_power_of_a_study(tmp_path):
  """The plan of a study of two seeds: its own design, and the patients that other designs need."""
  effects = {'seed': 0.0, 'patient': 0.05**2, 'rest': 0.0}
  of_patients = {'score': 'Dice', 'patients': 17, 'with_other_runs': {'variances': effects, 'detectable': 0.0372}}
  one = {'run': 'fusa_resunet', 'against': 'resunet', 'seeds': [0, 1], 'per_patient': of_patients}
  single = {**one, 'seeds': [0], 'per_patient': {'score': 'Dice', 'patients': 17}}
  (tmp_path / 'differences.json').write_text(json.dumps([one, single]))
  (found,) = power.compared(tmp_path)
  *_, row = power.table(found, [0.011], [5]).splitlines()
  # A t-test of 165 patients has 80% power to find 0.22 standard deviations (Cohen 1988: 163 to 165).
  seeds, _, needed = (cell.strip() for cell in row.strip('|').split('|'))
  assert (seeds, int(needed)) == ('5', pytest.approx(165, abs=2))
  (tmp_path / 'differences.json').write_text(json.dumps([single]))
  with pytest.raises(UserError, match='no comparison over several seeds'):
    power.compared(tmp_path)
