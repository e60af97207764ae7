"""The command line as a user types it: exit codes, one-line errors, and the first lines of the output."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from commands import ROOT, launch
from conftest import SIZE

TINY = [
  '--config.model.width=4',
  '--config.model.multiples=(1,2)',
  f'--config.data.image_size={SIZE}',
  '--config.data.phantom.patients=5',
  '--config.data.phantom.slices=16',
  '--config.train.steps=2',
  '--config.train.batch_size=8',
  '--config.train.warmup_steps=1',
  '--config.train.evaluate_every=2',
  '--config.evaluate.num_overlays=1',
]


@pytest.mark.parametrize(
  ('arguments', 'reason'),
  [
    ([], '--config: missing; give --config=configs/seg.py or --config=configs/cls.py'),
    (['--config=configs/none.py'], 'error: --config: configs/none.py does not exist; give configs/seg.py'),
    (['--config=configs/seg.py:huge'], "error: --config: configs/seg.py has no preset 'huge'; give paper, demo, "),
    (
      ['--config=configs/seg.py', '--config.train.stepz=3'],
      'error: --config: no key \'stepz\' (Did you mean "steps" instead',
    ),
    (['--config=README.md'], 'error: --config: is not valid Python ('),
    (['--config=configs/seg.py', '--config.step=3'], "error: --config: no key 'step'; see"),
    (['--config=configs/seg.py', '--config.train.steps=three'], 'three'),
    (['--colour=red'], 'colour'),
    (['--mode=dance'], 'dance'),
    (['--config=configs/seg.py', 'stray'], "'stray' is not a flag"),
    (['--config=configs/seg.py', '--config.data.raw_dir=nowhere'], 'data.raw_dir: nowhere is not a folder'),
    (
      ['--config=configs/seg.py', '--config.data.raw_dir=.', '--config.data.intensity=gray'],
      "'gray' is unknown; give one of hu",
    ),
    (['--config=configs/seg.py', '--config.data.dir=nowhere'], 'data.dir: nowhere is not a folder'),
    (['--mode=predict'], '--workdir: missing; --mode=predict needs it'),
    (['--mode=predict', '--workdir=nowhere', '--input=x', '--output=y'], 'nowhere: no run in it'),
    (['--mode=evaluate', '--workdir=nowhere'], 'nowhere: no run in it'),
    (
      ['--mode=evaluate', '--workdir=nowhere', '--tta'],
      'error: --tta: applies to --mode=predict, export, not to evaluate; in evaluate use --config.evaluate.flips',
    ),
    (
      ['--mode=predict', '--workdir=x', '--input=x', '--output=y', '--truth=z'],
      'error: --truth: applies to --mode=score, not to predict; leave it out',
    ),
    (['--mode=score', '--config=configs/seg.py'], 'error: --config: applies to --mode=train, evaluate, predict, prepa'),
    (['--mode=export', '--num_processes=2'], 'error: --num_processes: applies to --mode=train, evaluate, predict, pre'),
    (['--config', 'nowhere/config.json'], 'error: --config: nowhere/config.json does not exist; give'),
    (['--config=tests'], 'error: --config: tests/config.json does not exist; give'),
    (
      ['--mode=evaluate', '--workdir=x', '--config.evaluate.flips=True'],
      'error: --config.evaluate.flips: needs --config, which is missing; give --config=configs/seg.py',
    ),
    (
      ['--config=configs/seg.py', '--config.train.loss=x'],
      "'x' is unknown; give one of cross_entropy, cross_entropy_dice",
    ),
    (['--mode=doctor', '--workdir=x'], 'error: --workdir: applies to --mode=train, evaluate, predict, export, compare'),
    (['--config=nowhere/config.json'], 'error: --config: nowhere/config.json does not exist; give'),
    (['--mode=export', '--workdir=nowhere', '--output=y'], 'nowhere: no run in it'),
    (['--mode=compare', '--workdir=nowhere', '--against=here'], 'nowhere: no run in it'),
    (
      ['--config=configs/seg.py', '--config.data.raw_dir=.', "--config.data.classes={'a': (1,), 'b': (1,)}"],
      "error: data.classes: 'a' and 'b' have the same mask values; leave one out",
    ),
    (
      ['--mode=score', '--input=x', '--truth=y', '--output=z', '--ignore_label=255'],
      'error: --ignore_label: needs --classes; for example --classes="{',
    ),
    (['--mode=score', '--input=nowhere', '--output=y'], '--truth: missing; --mode=score needs it'),
    (['--mode=score', '--input=nowhere', '--truth=x', '--output=y'], '--input: nowhere does not exist'),
  ],
)
def test_errors_are_one_line_and_exit_code_2(arguments, reason):
  result = launch(*arguments)
  assert result.returncode == 2, result.stderr
  (line,) = [line for line in result.stderr.splitlines() if line]
  assert line.startswith('error: ')
  assert reason in line


@pytest.mark.parametrize(
  ('flag', 'arguments'),
  [
    ('--workdir', ['--config=configs/seg.py', '--workdir=s3://bucket/run']),
    ('--workdir', ['--mode=predict', '--workdir=run,s3://bucket/run', '--input=x', '--output=y']),
    ('--workdir', ['--mode=compare', '--workdir=gs://bucket/run', '--against=x']),
    ('--input', ['--mode=predict', '--workdir=x', '--input=gs://bucket/run', '--output=y']),
    ('--output', ['--mode=export', '--workdir=x', '--output=gs://bucket/run']),
    ('--truth', ['--mode=score', '--input=x', '--truth=gs://bucket/run', '--output=y']),
    ('--against', ['--mode=compare', '--workdir=x', '--against=gs://bucket/run']),
    ('--config', ['--config=gs://bucket/run']),
    ('--config.data.raw_dir', ['--config=configs/seg.py', '--config.data.raw_dir=gs://bucket/run']),
    ('--config.data.dir', ['--config=configs/seg.py', '--config.data.dir', 'gs://bucket/run']),
    ('--config.model.init_from', ['--config=configs/seg.py', '--config.model.init_from=gs://bucket/run']),
  ],
)
def test_addresses_are_refused_and_nothing_is_written(flag, arguments, tmp_path):
  """pathlib would turn `gs://bucket/run` into the local folder `gs:/bucket/run`."""
  result = launch(*arguments, folder=tmp_path, home=tmp_path)
  assert result.returncode == 2, result.stderr
  address = re.search('(gs|s3)://bucket/run', ' '.join(arguments))[0]
  assert result.stderr == (
    f'error: {flag}: {address} is an address, not a path on this machine; mount the bucket as a folder '
    '(docs/pods.md), or copy the files here, and give that path\n'
  )
  assert result.stdout == '' and not any(tmp_path.iterdir())


def test_configs_are_found_from_any_folder(tmp_path):
  """The configs beside launch.py are used unless the current folder has its own."""
  for own, reason in ((False, "configs/seg.py has no preset 'huge'"), (True, 'of my own')):
    if own:
      (tmp_path / 'configs').mkdir()
      (tmp_path / 'configs' / 'seg.py').write_text("raise ValueError('of my own')")
    result = launch('--config', 'configs/seg.py:huge', folder=tmp_path)
    assert result.returncode == 2 and reason in result.stderr, result.stderr


@pytest.mark.slow
def test_demo_without_data(tmp_path):
  """Without data: says so, draws phantoms, trains, evaluates. The run folder suffices to repeat and evaluate it."""
  command = ['--config', 'configs/seg.py', f'--workdir={tmp_path / "run"}', *TINY]
  first = launch(*command, home=tmp_path)
  assert first.returncode == 0, first.stderr
  lines = first.stdout.splitlines()
  assert lines[0].startswith('No data given: this is the demo')
  assert '--config.data.raw_dir=' in lines[1]
  assert 'report:' in first.stderr and 'predict: python launch.py --mode=predict' in first.stderr
  result = json.loads((tmp_path / 'run' / 'test' / 'metrics.json').read_text())
  assert result['step'] == 2
  assert re.fullmatch(rf'covid_ct/phantom_{SIZE}/1.6.0-[0-9a-f]{{12}}', result['dataset'])
  assert 'compiled the training step' in first.stderr
  page = (tmp_path / 'run' / 'test' / 'report.html').read_text()
  assert f'--config={tmp_path / "run"}/config.json' in page
  repeated = launch(f'--config={tmp_path / "run"}/config.json', f'--workdir={tmp_path / "repeated"}', home=tmp_path)
  assert repeated.returncode == 0, repeated.stderr
  assert json.loads((tmp_path / 'repeated' / 'test' / 'metrics.json').read_text()) == result
  again = launch('--mode=evaluate', f'--workdir={tmp_path / "run"}', home=tmp_path)
  assert again.returncode == 0, again.stderr
  assert 'compiled the training step' not in again.stderr
  assert json.loads((tmp_path / 'run' / 'test' / 'metrics.json').read_text()) == result


@pytest.mark.slow
def test_masks_and_runs_are_compared(runs, raw_dir, tmp_path):
  """Scores the masks of a cohort against themselves, and compares a run with itself."""
  scored = launch('--mode=score', f'--input={raw_dir}', f'--truth={raw_dir}', f'--output={tmp_path}')
  assert scored.returncode == 0, scored.stderr
  assert json.loads((tmp_path / 'scores.json').read_text())['measures']['dice']['mean'] == 1
  output = tmp_path / 'difference.json'
  compared = launch('--mode=compare', f'--workdir={runs["seg"]}', f'--against={runs["seg"]}', f'--output={output}')
  assert compared.returncode == 0, compared.stderr
  assert json.loads(output.read_text())['per_patient']['p'] == 1


@pytest.mark.slow
def test_the_exit_code_of_predict_says_whether_all_inputs_were_used(runs, raw_dir, tmp_path):
  """~ is the home folder also after `--output=`, where the shell does not expand it."""
  scan = raw_dir / 'volume-phantom-A-0001_ct.nii.gz'
  (tmp_path / 'in').mkdir()
  shutil.copy(scan, tmp_path / 'in' / 'good.NII.GZ')
  command = ['--mode=predict', f'--workdir={runs["seg"]}', '--input=~/in', '--output=~/out']
  run = lambda: launch(*command, home=tmp_path)
  result = run()
  assert result.returncode == 0 and result.stderr.splitlines()[-1] == '1 predicted', result.stderr
  assert (tmp_path / 'out' / 'good_mask.nii.gz').exists()
  (tmp_path / 'in' / 'bad.nii.gz').write_bytes(scan.read_bytes()[:-100])
  result = run()
  assert result.returncode == 4 and result.stderr.splitlines()[-1] == '1 predicted, 1 refused', result.stderr
  (tmp_path / 'in' / 'good.NII.GZ').unlink()
  result = run()
  assert result.returncode == 2 and 'bad.nii.gz: truncated' in result.stderr.splitlines()[-1], result.stderr
  (tmp_path / 'out' / 'bad.json').write_text('{"KVP": 120}')
  result = run()
  assert result.returncode == 2 and 'bad.json: exists, and this program' in result.stderr.splitlines()[-1]
  assert not (ROOT / '~').exists()


@pytest.mark.skipif(sys.platform != 'linux', reason='glibc only')
def test_a_process_restarts_once_with_malloc_tunables(tmp_path):
  script = tmp_path / 'script.py'
  script.write_text(
    'import os\nfrom fusa_jax.system import memory\nmemory.restart_with_malloc_tunables()\n'
    "print(os.environ.get('GLIBC_TUNABLES'))\n"
  )
  outside = {key: value for key, value in os.environ.items() if key != 'GLIBC_TUNABLES'} | {'PYTHONPATH': str(ROOT)}

  def output_of(command, environment, **options):
    command = [sys.executable, *command]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True, **options).stdout

  assert 'glibc.malloc.hugetlb=1' in output_of([script], outside)
  assert output_of([script], outside | {'GLIBC_TUNABLES': ''}) == '\n'  # the user's setting stays
  assert output_of(['-'], outside, input=script.read_text()) == 'None\n'  # a restart would lose a script from stdin


def test_help_names_each_mode_and_flag():
  result = launch('--help')
  assert result.returncode == 0
  assert '--mode=predict: marks lesions in new scans\n    --workdir --input --output [--config]' in result.stdout
  assert '\n--smallest_ml: remove lesions smaller than this volume in mL' in result.stdout
