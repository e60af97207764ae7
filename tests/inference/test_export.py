"""A bundle predicts the same as its run, does not need the run, and contains no name of its data or paths."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import SIZE, SLICES, tiny

from configs import cls, seg
from fusa_jax import models, tasks
from fusa_jax.inference import bundle, export, predict, predictor, trained
from fusa_jax.runs import checkpoint, run_config, split
from fusa_jax.scans import volumes
from fusa_jax.system import meshes, provenance
from fusa_jax.system.errors import UserError

SCAN = 'volume-phantom-A-0001_ct.nii.gz'


@pytest.fixture(scope='module')
def bundles(runs, tmp_path_factory):
  """Bundles of both runs ('seg', 'cls'), and 'both': the mean, with flips, of 'seg' and of an untested network."""
  folder = tmp_path_factory.mktemp('bundles')
  config = tiny(seg, **{'model.name': 'resunet', 'model.init_from': 'a_patients_name.pth'})
  other = folder / 'a_patients_name'
  run_config.save_config(other, config)
  variables = jax.jit(lambda key: tasks.create(config).init(key, SIZE))(jax.random.key(1))
  with checkpoint.Checkpoints(other) as checkpoints:
    checkpoints.save(0, variables, {'count': jnp.zeros(1)}, None)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(provenance, 'commit', lambda: '0123abc')
    for name, workdir in runs.items():
      export.write_bundle([workdir], folder / name, licence='CC-BY-4.0')
  export.write_bundle([runs['seg'], other], folder / 'both', flips=True, lungs=False, threshold=0.25, smallest_ml=0.5)
  return {name: folder / name for name in ('seg', 'cls', 'both')} | {'other': other}


def slices_of(shape, seed=0):
  return np.random.default_rng(seed).integers(-1000, 300, shape).astype(np.int16)


def run_bundle(folder, slices):
  run = predictor.load_predictor(folder)
  return np.asarray(jax.jit(run.model.function)(run.model.variables, slices))


def test_a_bundle_predicts_the_same_as_its_run(bundles, predictors, raw_dir):
  """Predicts a whole scan on eight devices that share its batches."""
  bundle = predictor.load_predictor(bundles['seg'])
  prediction, expected = (run(raw_dir / SCAN) for run in (bundle, predictors['seg']))
  np.testing.assert_allclose(prediction.probability, expected.probability, atol=1e-5)
  np.testing.assert_array_equal(prediction.mask, expected.mask)
  assert prediction.numbers == expected.numbers and prediction.numbers['patient']['positive'] is not None
  assert np.ptp(prediction.probability) > 0.01
  scored, other = (run(raw_dir / SCAN).numbers for run in (predictor.load_predictor(bundles['cls']), predictors['cls']))
  np.testing.assert_allclose(scored.pop('slice_scores'), other.pop('slice_scores'), atol=1.01e-4)  # scores are rounded
  calls = [numbers.pop('patient') for numbers in (scored, other)]
  assert calls[0].pop('score') == pytest.approx(calls[1].pop('score'), abs=1e-5)
  assert calls[0] == calls[1] and calls[0]['positive'] is not None
  assert scored == other


def test_a_bundle_without_a_rule_gives_no_answer_for_patients(bundles, raw_dir, tmp_path):
  """As bundles of earlier versions, which have no rule."""
  old = tmp_path / 'old'
  shutil.copytree(bundles['cls'], old)
  about = json.loads((old / 'bundle.json').read_text())
  del about['operating_point']['patient']
  (old / 'bundle.json').write_text(json.dumps(about))
  numbers = predictor.load_predictor(old)(raw_dir / SCAN).numbers
  reason = 'the bundle has no rule for patients; choose one with --mode=evaluate and export the run again'
  assert numbers['patient'] == {'score': None, 'positive': None, 'reason': reason}
  assert numbers['slice_scores']


def test_the_mean_of_networks_and_flips(bundles, runs, raw_dir):
  options = {'flips': True, 'threshold': 0.25, 'smallest_ml': 0.5, 'lungs': False}
  run = predictor.load_predictor([runs['seg'], bundles['other']], **options)
  bundle = predictor.load_predictor(bundles['both'], meshes.create_mesh(4, 2))  # two devices share an image
  prediction, expected = bundle(raw_dir / SCAN), run(raw_dir / SCAN)
  np.testing.assert_allclose(prediction.probability, expected.probability, atol=1e-5)
  assert np.ptp(prediction.probability) > 0.01
  for key in ('threshold', 'flips', 'smallest_ml', 'chosen_by', 'model', 'step'):
    assert prediction.numbers[key] == expected.numbers[key]
  assert bundle.points['lesion'].flips and bundle.points['lesion'].threshold == 0.25


@pytest.mark.parametrize(('count', 'height', 'width'), [(1, 70, 90), (3, 40, 53)])
def test_slices_in_the_size_of_their_scan(bundles, predictors, count, height, width):
  """The program resizes as Pillow does, in both directions; padding outside the field of view counts as air.

  float32 sums in another order round a few values differently (measured: 3 of 3072, probabilities 5e-5 apart).
  """
  slices = slices_of((count, height, width))
  slices[:, :9] = -3024
  run = predictors['seg']
  expected = volumes.resize(run.probabilities(run.prepare(list(slices.clip(volumes.AIR)))), (height, width))
  assert np.ptp(expected) > 0.01
  np.testing.assert_allclose(run_bundle(bundles['seg'], slices), expected, atol=1e-3)


@pytest.mark.parametrize(('source', 'target'), [((512, 512), (96, 96)), ((40, 53), (32, 64)), ((7, 96), (512, 100))])
def test_resize_equals_pillows(source, target):
  slices = slices_of((2, *source)) * 2
  resized, expected = np.asarray(export.resize(slices, *target)), volumes.resize(slices, target)
  np.testing.assert_allclose(resized, expected, atol=1e-3)
  assert (np.rint(resized) != np.rint(expected)).mean() < 5e-3  # values halfway between whole numbers


def test_resize_to_its_own_size_changes_nothing():
  hu, probability = slices_of((1, 50, 60)), np.random.default_rng(0).random((1, 50, 60), np.float32)
  np.testing.assert_array_equal(export.resize(hu, 50, 60), hu)
  np.testing.assert_array_equal(export.resize(probability, 50, 60), probability)


@pytest.mark.slow
@pytest.mark.parametrize('name', [name for name in models.NAMES if f'fusa_{name}' not in models.NAMES])
def test_every_model_can_be_exported(name):
  """Each program accepts any batch and image size on all three platforms, and uses the highest precision."""
  config = tiny(seg if name in models.SEGMENTERS else cls, **{'model.name': name, 'data.image_size': SIZE})
  config.data.intensity = 'grey'
  shapes = jax.eval_shape(lambda: tasks.create(config).init(jax.random.key(0), SIZE))
  variables = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), shapes)
  exported = export.program([trained.Network(config, 0, variables, (1.0,))], flips=False)
  assert exported.platforms == ('cpu', 'cuda', 'tpu')
  text = exported.mlir_module()
  assert 'HIGHEST' in text and 'DEFAULT' not in text
  # The shapes are symbolic: any size is accepted.
  assert [str(size) for size in exported.in_avals[-1].shape] == ['batch', 'height', 'width']
  assert str(exported.out_avals[0].shape[0]) == 'batch'


def test_bundles_contain_no_names_of_patients_or_paths(bundles, runs, raw_dir, data_dir):
  patients = list(split.load_split(runs['seg'])['patients'])
  root = pathlib.Path(__file__).parents[2]
  names = [*patients, 'a_patients_name', *map(str, (*runs.values(), bundles['other'].parent, raw_dir, data_dir, root))]
  for folder in (bundles['seg'], bundles['cls'], bundles['both']):
    files = {path.name: path.read_bytes() for path in folder.rglob('*')}
    assert files.keys() == {'bundle.json', *bundle.FILES}
    assert not [(file, name) for file, content in files.items() for name in names if name.encode() in content]
  saved = json.loads((bundles['seg'] / 'config.json').read_text())
  expected = run_config.plain(run_config.load_config(runs['seg'])).to_dict()
  expected['data'] |= {'raw_dir': '', 'dir': ''}
  assert saved == [expected]


def test_the_card(bundles, runs):
  result = json.loads((runs['seg'] / 'test' / 'metrics.json').read_text())
  card = (bundles['seg'] / 'README.md').read_text()
  low, high = result['intervals']['dice']
  assert f'{result["dice"]:.4f} [{low:.4f}, {high:.4f}]' in card
  assert f'| {result["operating_point"]["threshold"]:.4g} |' in card and f'| {result["num_slices"]} |' in card
  assert 'Licence: CC-BY-4.0' in card and 'commit 0123abc' in card and 'research only' in card.lower()
  assert f'Data: {result["dataset"]}.' in card
  assert (bundles['seg'] / 'run.py').read_text() in card
  both = (bundles['both'] / 'README.md').read_text()
  assert 'Network 1: not evaluated.' in both and 'single networks' in both and export.NO_LICENCE in both


def test_the_script_needs_only_jax_and_numpy(bundles, predictors, tmp_path):
  """Blocks other packages, except those that jax itself needs."""
  script = bundles['seg'] / 'run.py'
  assert len(script.read_text().splitlines()) <= 30
  slices = slices_of((11, SIZE, SIZE))
  np.save(tmp_path / 'slices.npy', slices.astype(np.float64))
  blocked = ('fusa_jax', 'flax', 'safetensors', 'orbax', 'optax', 'nibabel', 'PIL', 'ml_collections', 'absl')
  start = f'import runpy, sys; sys.modules |= dict.fromkeys({blocked}); sys.argv[:] = sys.argv[1:]; '
  command = [sys.executable, '-c', start + 'runpy.run_path(sys.argv[0], run_name="__main__")']
  run = lambda path: subprocess.run(
    [*command, str(path), 'slices.npy', 'out.npy'], cwd=tmp_path, env=os.environ, capture_output=True, text=True
  )
  done = run(script)
  assert done.returncode == 0, done.stderr
  np.testing.assert_allclose(np.load(tmp_path / 'out.npy'), predictors['seg'].probabilities(slices), atol=1e-5)
  shutil.copytree(bundles['seg'], tmp_path / 'damaged')
  damage(tmp_path / 'damaged' / 'weights.safetensors')
  refused = run(tmp_path / 'damaged' / 'run.py')
  assert refused.returncode == 1 and refused.stderr.startswith('error: weights.safetensors changed since the export')


def damage(path):
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(content)


def change(path, **values):
  path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
  ('act', 'reason'),
  [
    (lambda b: damage(b / 'weights.safetensors'), r'b/weights.safetensors: changed since the export'),
    (lambda b: damage(b / 'model.stablehlo'), r'b/model.stablehlo: changed since the export'),
    (lambda b: damage(b / 'README.md'), r'b/README.md: changed since the export'),
    (lambda b: (b / 'config.json').unlink(), r'b/config.json: cannot be read \(No such file'),
    (
      lambda b: (b / 'bundle.json').unlink(),
      r'b/bundle.json: missing, so the folder is not a bundle of fusa_jax; give a',
    ),
    (lambda b: (b / 'bundle.json').write_text('{'), r'b/bundle.json: not from a bundle of fusa_jax; give a folder'),
    (lambda b: (b / 'bundle.json').write_text('[1]'), r'b/bundle.json: not from a bundle of fusa_jax'),
    (lambda b: change(b / 'bundle.json', format='other'), r'b/bundle.json: not from a bundle of fusa_jax'),
    (lambda b: change(b / 'bundle.json', version=4), r'b/bundle.json: has format 4, but this fusa_jax reads 3'),
    (lambda b: change(b / 'bundle.json', operating_point={'curve': 1, 'new': 2}), r'b/bundle.json: damaged \(.*new'),
    (lambda b: change(b / 'bundle.json', sha256=['a']), r'b/bundle.json: damaged \('),
    (lambda b: change(b / 'bundle.json', version='1'), r'b/bundle.json: damaged \(parts'),
    (lambda b: change(b / 'bundle.json', version=2), r'b/bundle.json: damaged \(parts'),  # without its context
    (lambda b: change(b / 'bundle.json', version=3), r'b/bundle.json: damaged \(parts'),  # without its classes
    (lambda b: change(b / 'bundle.json', version=2, context={'mm': 'a', 'no': 1}), r'b/bundle.json: damaged \(.*no'),
    (lambda b: change(b / 'bundle.json', sha256={}), r'b/bundle.json: damaged \(parts are missing\)'),
    (
      lambda b: change(b / 'bundle.json', calling_convention_version=99, jax='9.9'),
      r'b/model.stablehlo: written by jax 9.9, which jax \S+ cannot read \(calling convention 99',
    ),
  ],
)
def test_damaged_and_foreign_bundles_are_refused(bundles, tmp_path, act, reason):
  shutil.copytree(bundles['cls'], tmp_path / 'b')
  act(tmp_path / 'b')
  with pytest.raises(UserError, match=reason) as error:
    predictor.load_predictor(tmp_path / 'b')
  assert len(str(error.value).splitlines()) == 1


def test_a_program_of_a_later_jax_is_refused(bundles, tmp_path):
  """The program is in a later form than this jax can read; its digest is correct."""
  shutil.copytree(bundles['cls'], tmp_path / 'b')
  (tmp_path / 'b' / 'model.stablehlo').write_bytes(b'of a later form')
  digests = json.loads((tmp_path / 'b' / 'bundle.json').read_text())['sha256']
  digests['model.stablehlo'] = export.sha256(b'of a later form')
  change(tmp_path / 'b' / 'bundle.json', sha256=digests)
  with pytest.raises(UserError, match=r'b/model.stablehlo: written by jax \S+, which jax \S+ cannot read'):
    predictor.load_predictor(tmp_path / 'b')


def test_invalid_uses_of_a_bundle_are_refused(bundles, runs, tmp_path):
  refused = lambda reason: pytest.raises(UserError, match=reason)
  with refused(r'workdir: .*seg is a bundle and cannot be combined; give it alone'):
    predictor.load_predictor([bundles['seg'], runs['seg']])
  with refused(r'flips: .*seg was exported without flips, and its program cannot change; leave'):
    predictor.load_predictor(bundles['seg'], flips=True)
  with refused(r'flips: .*both was exported with flips'):
    predictor.load_predictor(bundles['both'], flips=False)
  with refused(r'lungs: applies to masks only, and this model gives none'):
    predictor.load_predictor(bundles['cls'], lungs=True)
  with refused(r'smallest_ml: applies to masks only, and this model gives none'):
    export.write_bundle([runs['cls']], tmp_path / 'none', smallest_ml=1.0)
  with refused(r'workdir: .*seg is already a bundle; copy it'):
    export.write_bundle([bundles['seg']], tmp_path / 'none')
  with refused(r'seg/config.json: not the config of a run, but perhaps of a bundle; name the folder of a run'):
    run_config.load_config(bundles['seg'])
  with refused(r'cls: exists already; give a new folder, or delete this one'):
    export.write_bundle([runs['seg']], bundles['cls'])
  assert predictor.load_predictor(bundles['seg'], flips=False, threshold=0.9).points['lesion'].threshold == 0.9
  assert list(tmp_path.iterdir()) == []


def test_predict_takes_a_bundle(bundles, raw_dir, tmp_path):
  predict.predict(predictor.load_predictor([bundles['seg']]), raw_dir / SCAN, tmp_path)
  assert json.loads((tmp_path / SCAN.replace('.nii.gz', '.json')).read_text())['num_slices'] == SLICES


def test_a_bundle_does_not_explain(bundles, raw_dir, tmp_path):
  with pytest.raises(UserError, match=r'^explain: needs the features inside the network, and a bundle gives only'):
    predict.predict(predictor.load_predictor(bundles['cls']), raw_dir / SCAN, tmp_path / 'out', explain='overlays')
  assert not (tmp_path / 'out').exists()
