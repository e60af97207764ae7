"""Class-activation maps equal those of PyTorch by hooks, and predict writes them as explanations, not as masks."""

import dataclasses
import gzip
import json
import shutil

import dicom_series
import jax
import nibabel as nib
import numpy as np
import pytest
from commands import launch
from conftest import SIZE, tiny
from PIL import Image

from configs import cls
from fusa_jax import tasks
from fusa_jax.inference import explanation, predict, predictor, trained
from fusa_jax.models.resnet import BasicBlock, Encoder
from fusa_jax.runs import figures, operating_point
from fusa_jax.scans import volume_files, volumes
from fusa_jax.system import meshes
from fusa_jax.system.errors import UserError

SCAN = 'volume-phantom-A-0001_ct.nii.gz'
STEM = SCAN.removesuffix('.nii.gz')
GRADCAM = '_gradcam_explanation.nii.gz'


def slices_of(shape, seed=0):
  return np.random.default_rng(seed).integers(-1000, 300, shape).astype(np.int16)


def listed(folder):
  """The names of the results in a folder, without predictions.csv."""
  return sorted(path.name for path in folder.iterdir() if 'predictions.' not in path.name)


def with_weights(task, seed):
  """Variables without the zeros of a fresh network, in which no block would contribute."""
  variables = jax.jit(lambda key: task.init(key, SIZE))(jax.random.key(seed))
  return jax.tree.map(lambda x: x + 0.1 * np.random.default_rng(x.size).uniform(size=x.shape), variables)


# The module of each PyTorch original whose output is the last level.
LAST = {
  'resnet18': 'layer4',
  'fusa_resnet18': 'layer4',
  'vgg16': 'features.42',
  'densenet121': 'features',
  'mobilenet_v2': 'features',
}
QUICK = 'fusa_resnet18'  # the others take 5 to 20 s each


@pytest.mark.parametrize('name', [pytest.param(name, marks=() if name == QUICK else pytest.mark.slow) for name in LAST])
def test_maps_equal_pytorchs(name):
  """Grad-CAM by PyTorch's own hooks and gradients, and FUSA's attention written from the paper's text, in float64.

  Of exclusive classes, the gradient is that of the logit of each class, before the softmax.
  """
  torch = pytest.importorskip('torch')
  from originals import as_torch, original

  from fusa_jax.torch_weights import from_torch

  theirs = original(name, num_classes=3, in_channels=1).double().eval()
  variables, slices = from_torch(name, theirs.state_dict()), slices_of((2, 64, 96))
  with jax.enable_x64(True):
    config = cls.get_config(name)
    config.model.dtype, config.data.classes = 'float64', ('normal', 'ground glass', 'mass')
    task = tasks.create(config)
    assert task.exclusive
    x = np.asarray(task.inputs(slices), np.float64)
    run = jax.jit(lambda variables, slices: explanation.activation_maps(task, variables, slices))
    got = {key: np.asarray(value) for key, value in run(variables, slices).items()}

  kept = {}

  def keep_features(module, inputs, output):
    if name == 'densenet121':
      output = torch.relu(output)  # torchvision applies it in place, within its forward
    kept['features'] = output
    output.register_hook(lambda gradient: kept.update(gradient=gradient))
    return output

  theirs.get_submodule(LAST[name]).register_forward_hook(keep_features)
  if name == 'densenet121':
    features = theirs.features(as_torch(x))
    logits = theirs.classifier(features.mean((2, 3)))
  else:
    logits = theirs(as_torch(x))
  expected = []
  for number in range(3):
    logits[:, number].sum().backward(retain_graph=True)
    weights = kept['gradient'].mean((2, 3), keepdim=True)
    expected.append(torch.relu((weights * kept['features']).sum(1)).detach().numpy())
  expected = np.stack(expected, axis=-1)
  assert got['gradcam'].shape == expected.shape
  assert (expected.max(axis=(0, 1, 2)) > 0).sum() >= 2  # a relu may leave nothing of a class
  np.testing.assert_allclose(got['gradcam'], expected, rtol=1e-7, atol=1e-9 * expected.max())

  assert ('fusa' in got) == name.startswith('fusa_')
  if 'fusa' in got:
    theirs.layer4[-1].attention.fuse.register_forward_hook(lambda m, i, out: kept.update(attention=out.sigmoid()))
    theirs(as_torch(x))
    expected = kept['attention'].mean(1).detach().numpy()
    assert np.ptp(expected, axis=(1, 2)).min() > 1e-6
    np.testing.assert_allclose(got['fusa'], expected, rtol=1e-7)


def test_the_cells_add_up_to_the_logit():
  """For a head of mean and dense layer: map = relu(F w) / cells, and without relu its sum is logit - bias (float64).

  So is the map of each of several logits, divided by the temperature of its class.
  """
  slices, temperatures = slices_of((3, SIZE, SIZE)), np.array([1.0, 4.0])
  with jax.enable_x64(True):
    task = tasks.create(tiny(cls, **{'model.dtype': 'float64'}))
    task = dataclasses.replace(task, model=task.model.clone(num_classes=2))
    variables = with_weights(task, 0)
    variables['params']['head']['kernel'] = np.random.default_rng(1).normal(size=(4, 1)) * (1, -2)
    got = np.asarray(explanation.activation_maps(task, variables, slices, temperatures)['gradcam'])
    only = jax.tree.map(lambda x: x, variables)
    only['params']['head'] = jax.tree.map(lambda x: x[..., :1], variables['params']['head'])
    one = dataclasses.replace(task, model=task.model.clone(num_classes=1))
    of_one = np.asarray(explanation.activation_maps(one, only, slices)['gradcam'])
    encoder = Encoder((1,), BasicBlock, 4, task.model.attention, dtype=np.float64)
    of_encoder = {name: tree['encoder'] for name, tree in variables.items()}
    features = np.asarray(encoder.apply(of_encoder, task.inputs(slices), False)[-1])
    logits = np.asarray(task.logits(variables, slices))
  head = {name: np.asarray(value, np.float64) for name, value in variables['params']['head'].items()}
  cells = features.shape[1] * features.shape[2]
  for number in (0, 1):
    signed = features @ head['kernel'][:, number] / cells
    assert signed.min() < 0 < signed.max()
    expected = np.maximum(signed, 0)
    np.testing.assert_allclose(got[..., number] * temperatures[number], expected, rtol=1e-9, atol=1e-12)
    if number == 0:
      np.testing.assert_allclose(of_one, expected, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(signed.sum((1, 2)) + head['bias'][number], logits[:, number], rtol=1e-6)


def test_the_mean_of_networks_and_flips():
  """As the score: of each slice and its mirror image, then of the networks, each divided by its temperature."""
  slices, networks, expected = slices_of((2, SIZE, SIZE)), [], []
  for number, (name, temperature) in enumerate([('fusa_resnet18', 1.0), ('resnet18', 0.5), ('fusa_resnet18', 2.0)]):
    config = tiny(cls, **{'model.name': name})
    config.model.stage_sizes = (1, 1) if name == 'resnet18' else (1,)
    task = tasks.create(config)
    variables = with_weights(task, number)
    networks.append(trained.Network(config, number, variables, (temperature,)))
    maps = jax.jit(lambda variables, slices, task=task: explanation.activation_maps(task, variables, slices))
    plain, mirrored = (
      {key: np.asarray(value, np.float64) for key, value in maps(variables, x).items()}
      for x in (slices, slices[:, :, ::-1])
    )
    both = {key: (plain[key] + mirrored[key][:, :, ::-1]) / 2 for key in plain}
    expected.append({**both, 'gradcam': both['gradcam'] / temperature})
  (fine, coarse), size = (expected[k]['gradcam'].shape[1:] for k in (0, 1)), expected[0]['gradcam'].shape[1:]
  assert fine > coarse
  mean = np.mean([volumes.resize(each['gradcam'], size) for each in expected], axis=0)
  assert mean.max() > 0
  for chosen, names in ((networks, ['gradcam']), (networks[::2], ['fusa', 'gradcam'])):
    model = trained.create(chosen, flips=True)
    got = jax.jit(model.explainer.function)(model.variables, slices)
    assert sorted(got) == names
    if chosen is networks:
      np.testing.assert_allclose(got['gradcam'], mean, rtol=1e-4, atol=1e-6 * mean.max())
    else:
      np.testing.assert_allclose(got['fusa'], (expected[0]['fusa'] + expected[2]['fusa']) / 2, rtol=1e-5)


def test_a_slice_with_its_neighbours_is_mirrored_along_its_columns():
  """With flips, a stack and its mirror image have mirrored maps; a mirrored order of the neighbours would not."""
  config = tiny(cls, **{'model.name': QUICK, 'data.context': 1, 'data.context_mm': 30.0})
  task = tasks.create(config)
  model = trained.create([trained.Network(config, 0, with_weights(task, 0), (1.0,))], flips=True)
  maps, slices = jax.jit(model.explainer.function), slices_of((2, SIZE, SIZE, 3))
  one, other = maps(model.variables, slices), maps(model.variables, slices[:, :, ::-1])
  for name, values in one.items():
    assert values.max() > 0
    np.testing.assert_allclose(other[name], values[:, :, ::-1], rtol=1e-4, atol=1e-6 * float(values.max()))
  reversed_order = maps(model.variables, slices[..., ::-1])
  assert np.abs(reversed_order['gradcam'] - one['gradcam']).max() > 1e-4 * float(one['gradcam'].max())


@pytest.fixture
def rows(monkeypatch):
  """The rows and scales of the pictures that are drawn."""
  drawn, write = [], figures.write_explanation

  def writing(path, title, rows, scales, black_and_white):
    drawn.append((title, rows, scales))
    write(path, title, rows, scales, black_and_white)

  monkeypatch.setattr(figures, 'write_explanation', writing)
  return drawn


def test_files_of_an_explanation(predictors, raw_dir, tmp_path, rows):
  """On the scan's own grid, named and described as explanations; the other results do not change."""
  scan, run = volume_files.read_scan(raw_dir / SCAN), predictors['cls']
  predict.predict(run, raw_dir / SCAN, tmp_path, explain='volumes')
  names = [f'{STEM}{end}' for end in ('.json', '_explanation.png', '_fusa_explanation.nii.gz')]
  assert listed(tmp_path) == [*names, f'{STEM}_gradcam_explanation.nii.gz']
  record = json.loads((tmp_path / names[0]).read_text())
  assert sorted(record['files']) == listed(tmp_path)[1:]
  maps = run.maps(run.prepare([scan]))
  source = nib.load(raw_dir / SCAN)
  for name, title in (('gradcam', 'Grad-CAM'), ('fusa', 'attention of the last FUSA module')):
    image = nib.load(tmp_path / f'{STEM}_{name}_explanation.nii.gz')
    np.testing.assert_array_equal(image.affine, source.affine)
    assert image.header['descrip'].item().decode() == f'{title}: an explanation of the score, not a mask'
    assert image.get_data_dtype() == np.float32
    expected = volumes.to_own_axes(volumes.resize(maps[name], scan.values.shape[1:]), scan)
    np.testing.assert_allclose(image.get_fdata(), expected, rtol=1e-5, atol=1e-6)
  ((title, drawn, scales),) = rows
  assert 'an explanation of the score, not a mask' in title
  assert Image.open(tmp_path / names[1]).text['Title'] == title
  about = record['explanation']
  assert about['meaning'] == 'an explanation of the score, not a mask'
  scores = np.array(record['slice_scores'])
  best = [k for k in np.argsort(-scores, kind='stable')[:4] if k in record['positive_slices']]
  assert best and sorted(about['slices']) == sorted(best)
  assert [text.split(',')[0] for text, *_ in drawn] == [f'slice {k}' for k in about['slices']]
  # One scale for all slices of the scan.
  assert [limits for _, limits in scales] == [about['maps'][name]['limits'] for name in ('gradcam', 'fusa')]
  np.testing.assert_allclose(about['maps']['gradcam']['limits'], [0, maps['gradcam'].max()], rtol=1e-5)
  assert about['maps']['fusa']['limits'] == [0, 1]

  predict.predict(run, raw_dir / SCAN, tmp_path / 'plain')
  plain = json.loads((tmp_path / 'plain' / names[0]).read_text())
  assert {**plain, 'explanation': about, 'files': 0, 'sha256_of_this_record': 0} == {
    **record,
    'files': 0,
    'sha256_of_this_record': 0,
  }


@pytest.mark.parametrize('is_exclusive', [False, True], ids=['a question per class', 'exclusive'])
def test_files_of_several_classes(raw_dir, tmp_path, rows, is_exclusive):
  """A picture and a volume of Grad-CAM per class; the attention does not depend on the class and is written once."""
  names, config = ('ground glass', 'mass'), tiny(cls)
  config.data.classes = names if is_exclusive else (('ground glass', (1,)), ('mass', (2,)))
  task = tasks.create(config)
  variables, scan = with_weights(task, 0), volume_files.read_scan(raw_dir / SCAN)
  variables['params']['head']['kernel'] = np.random.default_rng(1).normal(size=(4, 1)) * (1, -2)
  logits = np.asarray(jax.jit(task.logits)(variables, scan.values), np.float64)
  variables['params']['head']['bias'] = -np.median(logits, axis=0) * (1, 0 if is_exclusive else 1)
  probability = np.asarray(jax.jit(task.probabilities)(variables, scan.values), np.float64)
  model = trained.create([trained.Network(config, 0, variables, (1.0, 1.0))], False, 'digest')
  points = dict.fromkeys(names, operating_point.OperatingPoint(threshold=0.5))
  run = predictor.Predictor(model, points, meshes.create_mesh())
  predict.predict(run, raw_dir / SCAN, tmp_path, explain='volumes')
  endings = ['.json', '_fusa_explanation.nii.gz']
  endings += [f'_{name}{end}' for name in ('ground_glass', 'mass') for end in ('_explanation.png', GRADCAM)]
  assert listed(tmp_path) == sorted(f'{STEM}{end}' for end in endings)
  record, maps = json.loads((tmp_path / f'{STEM}.json').read_text()), run(scan, explain=True).maps
  assert maps['gradcam'].shape == (*maps['fusa'].shape, 2)
  for k, (name, in_files) in enumerate(zip(names, ('ground_glass', 'mass'), strict=True)):
    image = nib.load(tmp_path / f'{STEM}_{in_files}{GRADCAM}')
    assert image.header['descrip'].item().decode() == f'Grad-CAM of {name}: an explanation of the score, not a mask'
    expected = volumes.to_own_axes(volumes.resize(maps['gradcam'][..., k], scan.values.shape[1:]), scan)
    np.testing.assert_allclose(image.get_fdata(), expected, rtol=1e-5, atol=1e-6)
    about = record['classes'][name]['explanation']
    positive = probability.argmax(axis=1) == k if is_exclusive else probability[:, k] >= 0.5
    best = [index for index in np.argsort(-probability[:, k], kind='stable') if positive[index]][:4]
    assert best and sorted(about['slices']) == sorted(best)
    np.testing.assert_allclose(about['maps']['gradcam']['limits'], [0, maps['gradcam'][..., k].max()], rtol=1e-5)
    title, drawn, _ = rows[k]
    count = f'{len(best)} of {positive.sum()} '
    which = f'{count}slices called {name}' if is_exclusive else f'{count}positive slices, threshold 0.500'
    assert title.startswith(f'{SCAN}, {name}: an explanation of the score, not a mask\n{which}; maps of')
    for index, (_, _, shown) in zip(about['slices'], drawn, strict=True):
      of_slice = volumes.resize(maps['gradcam'][[index], ..., k], scan.values.shape[1:])[0]
      np.testing.assert_allclose(shown[0], of_slice, rtol=1e-5, atol=1e-6)
  assert 'explanation' not in record and len(explanation.description('gradcam', 'ü' * 64).encode()) == 79


def test_another_choice_replaces_only_own_files(predictors, raw_dir, tmp_path):
  run = predictors['cls']
  (tmp_path / 'in').mkdir()
  shutil.copy(raw_dir / SCAN, tmp_path / 'in')
  out = tmp_path / 'in'  # results among the scans are not taken for scans
  for explain, ends in (
    ('volumes', ['.json', '_explanation.png', '_fusa_explanation.nii.gz', '_gradcam_explanation.nii.gz']),
    ('overlays', ['.json', '_explanation.png']),
    (None, ['.json']),
  ):
    assert predict.predict(run, out, out, explain=explain) == (1, 0, 0)
    assert listed(out) == sorted([SCAN, *(f'{STEM}{end}' for end in ends)])
  (out / f'{STEM}_explanation.png').write_bytes(b'mine')
  with pytest.raises(UserError, match=r'_explanation.png: exists, and this program did not'):
    predict.predict(run, out, out, explain='overlays')
  assert (out / f'{STEM}_explanation.png').read_bytes() == b'mine'
  assert 'explanation' not in json.loads((out / f'{STEM}.json').read_text())


def test_a_scan_without_positive_slice_has_no_colours(runs, raw_dir, tmp_path, rows):
  predict.predict(predictor.load_predictor(runs['cls'], threshold=1.0), raw_dir / SCAN, tmp_path, explain='overlays')
  ((title, ((text, _, maps),), scales),) = rows
  record = json.loads((tmp_path / f'{STEM}.json').read_text())
  highest = int(np.argmax(record['slice_scores']))
  assert record['explanation']['slices'] == maps == scales == []
  assert text.startswith(f'slice {highest}, score ') and text.endswith(': below the threshold')
  assert 'no positive slice, threshold 1.000; no map' in title


def test_colours_follow_the_value_not_the_slice():
  """At the lower end of its scale a map is transparent, also in a slice where it is constant."""
  plain = np.full((2, 2, 3), 0.25)
  drawn = figures._under_map(plain, np.array([[0.0, 0.2], [0.5, 2.0]]), (0.0, 1.0))
  np.testing.assert_array_equal(drawn[0, 0], plain[0, 0])
  np.testing.assert_allclose(drawn[1, 1], 0.4 * 0.25 + 0.6 * np.array([0.940015, 0.975158, 0.131326]), atol=1e-5)
  np.testing.assert_array_equal(figures._under_map(plain, np.zeros((2, 2)), (0.0, 3.0)), plain)
  about = explanation.about({'gradcam': np.zeros((1, 2, 2))}, np.ones(1), np.ones(1, bool))
  assert about['maps']['gradcam']['limits'] == [0, 1]


def test_pictures_have_overlays_but_no_volumes(tmp_path, rows):
  """Two pictures of different sizes and scores, predicted together: each has its own maps."""
  config = tiny(cls, **{'data.intensity': 'grey'})
  task = tasks.create(config)
  networks = [trained.Network(config, 3, with_weights(task, 0), (1.0,))]
  point = operating_point.OperatingPoint(threshold=0.0)
  run = predictor.Predictor(trained.create(networks, False, 'digest'), {'lesion': point}, meshes.create_mesh())
  for name, shape in (('a', (40, 50)), ('b', (SIZE, SIZE))):
    values = np.random.default_rng(len(rows)).integers(0, 256, shape).astype(np.uint8)
    Image.fromarray(values).save(tmp_path / f'{name}.png')
  with pytest.raises(UserError, match=r'^explain: .*a.png is a picture and has no volume; give --explain=overlays$'):
    predict.predict(run, tmp_path, tmp_path / 'out', explain='volumes')
  assert not (tmp_path / 'out').exists()
  predict.predict(run, tmp_path, tmp_path / 'out', explain='overlays')
  assert listed(tmp_path / 'out') == ['a.json', 'a_explanation.png', 'b.json', 'b_explanation.png']
  for name, (_, ((text, values, maps),), _) in zip('ab', rows, strict=True):
    image = np.asarray(Image.open(tmp_path / f'{name}.png'))
    alone = run(image, explain=True)
    np.testing.assert_array_equal(values, image)
    assert text == f'score {alone.numbers["score"]:.3f}'
    np.testing.assert_allclose(maps[0], volumes.resize(alone.maps['gradcam'], image.shape)[0], rtol=1e-5, atol=1e-6)


def test_a_dicom_series_gets_the_same_maps_and_nothing_names_the_patient(predictors, raw_dir, tmp_path):
  image = nib.load(raw_dir / SCAN)
  dicom_series.save(tmp_path / 'in', dicom_series.slices(np.asarray(image.dataobj), image.affine, 3))
  for source, out in ((tmp_path / 'in', 'dicom'), (raw_dir / SCAN, 'nifti')):
    predict.predict(predictors['cls'], source, tmp_path / out, explain='volumes')
  for name in ('gradcam', 'fusa'):
    of_dicom, of_nifti = (
      nib.as_closest_canonical(nib.load(next((tmp_path / out).glob(f'*_{name}_explanation.nii.gz'))))
      for out in ('dicom', 'nifti')
    )
    np.testing.assert_allclose(of_dicom.affine, of_nifti.affine, atol=1e-4)
    np.testing.assert_array_equal(of_dicom.get_fdata(), of_nifti.get_fdata())
  files = list((tmp_path / 'dicom').iterdir())
  contents = [gzip.decompress(path.read_bytes()) if path.suffix == '.gz' else path.read_bytes() for path in files]
  (picture,) = (Image.open(path) for path in files if path.suffix == '.png')
  everything = b'\n'.join([*contents, *(path.name.encode() for path in files), picture.text['Title'].encode()]).lower()
  assert b'series3' in everything
  for value in dicom_series.PERSONAL.values():
    assert not any(part.encode() in everything for part in value.lower().split('^'))


def test_a_model_with_masks_is_refused_first(predictors, runs, raw_dir, tmp_path):
  reason = 'explain: applies to classification only, and this model gives masks; leave it out'
  with pytest.raises(UserError, match=f'^{reason}$'):
    predictors['seg'](raw_dir / SCAN, explain=True)
  out = tmp_path / 'out'
  command = [f'--workdir={runs["seg"]}', f'--input={raw_dir / SCAN}', f'--output={out}', '--explain=overlays']
  result = launch('--mode=predict', *command)
  assert (result.returncode, result.stderr) == (2, f'error: --{reason}\n')
  assert not out.exists()
