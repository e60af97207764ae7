"""PyTorch state dicts that fit a model, almost fit, or do not fit; their files; and training from them.

models/test_against_torch.py tests that converted models compute the same as their originals.
"""

import logging
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from conftest import final_state, tiny

from configs import cls, seg
from fusa_jax import models, torch_weights
from fusa_jax.system.errors import UserError
from fusa_jax.training import train

torch = pytest.importorskip('torch')
from benchmarks import torch_reference  # noqa: E402 (needs torch)


@pytest.fixture(scope='session')
def state_dicts():
  """State dicts of the original models with three input channels, each made once."""
  made = {}

  def get(name, num_classes=1000, **options):
    key = (name, num_classes, *options.items())
    if key not in made:
      torch.manual_seed(0)
      made[key] = torch_reference.create(name, num_classes, in_channels=3, **options).state_dict()
    return dict(made[key])

  return get


def shapes(name, channels=1, **options):
  module = models.create(name, **options)
  return jax.eval_shape(lambda key: module.init(key, jnp.zeros((1, 64, 64, channels)), train=False), jax.random.key(0))


def save(state, path):
  torch.save(state, path)
  return path


@pytest.mark.slow
@pytest.mark.parametrize('name', models.NAMES)
def test_missing_extra_and_misshapen_tensors_are_refused_by_name(name, state_dicts):
  """Tries tensors from the beginning, the middle and the end of the model."""
  whole = state_dicts(name, num_classes=2)
  keys = [k for k in whole if 'num_batches' not in k and not (name.endswith('pspnet') and 'layer' in k)]
  for key in (keys[0], keys[len(keys) // 2], keys[-1]):
    refused = lambda state, name=name: pytest.raises(UserError, match=state)
    with refused(f'does not fit {name}: {key} is missing'):
      torch_weights.from_torch(name, {k: v for k, v in whole.items() if k != key})
    with refused(f'{key} has shape .*, not '):
      torch_weights.from_torch(name, whole | {key: torch.zeros([n + 1 for n in whole[key].shape])}, num_classes=2)
  with pytest.raises(UserError, match='layer9.0.conv1.weight is left over; give the weights of this architecture'):
    torch_weights.from_torch(name, whole | {'layer9.0.conv1.weight': torch.zeros(3)})
  with pytest.raises(UserError, match=r'has shape \(2.*, not \(5'):
    torch_weights.from_torch(name, whole, num_classes=5)


def test_every_tensor_is_used_exactly_once(state_dicts):
  """Each tensor is filled with its own number. All numbers arrive in arrays of the same sizes."""
  whole = state_dicts('fusa_resnet18')
  whole = {k: np.full(v.shape, i, np.float32) for i, (k, v) in enumerate(whole.items()) if 'num_batches' not in k}
  leaves = jax.tree.leaves(torch_weights.from_torch('fusa_resnet18', whole))
  sizes = lambda arrays: sorted((int(a.flat[0]), a.size) for a in arrays)
  assert all((leaf == leaf.flat[0]).all() for leaf in leaves)
  assert len({number for number, _ in sizes(leaves)}) == len(whole)
  assert sizes(leaves) == sizes(whole.values())


def test_converted_weights_are_a_copy(state_dicts):
  whole = state_dicts('resnet18')
  variables = torch_weights.from_torch('resnet18', whole)
  before = variables['batch_stats']['encoder']['norm1']['mean'].copy()
  changed = whole['bn1.running_mean']
  changed.add_(1)
  np.testing.assert_array_equal(variables['batch_stats']['encoder']['norm1']['mean'], before)
  changed.sub_(1)


def test_older_names_are_read(state_dicts):
  """torchvision's DenseNet file has `denselayer1.norm.1`; older DeepLabV3 files of smp have numbered decoder parts."""
  for name, renames in {
    'densenet121': [(f'{kind}{n}.', f'{kind}.{n}.') for kind in ('norm', 'conv') for n in (1, 2)],
    'deeplabv3': [('decoder.aspp.', 'decoder.0.'), ('decoder.conv.', 'decoder.1.'), ('decoder.bn.', 'decoder.2.')],
  }.items():
    whole, older = state_dicts(name, num_classes=2), {}
    for key, value in whole.items():
      old = key
      for new_part, old_part in renames:
        if name != 'densenet121' or 'denselayer' in key:
          old = old.replace(new_part, old_part)
      older[old] = value
    assert older.keys() != whole.keys()
    jax.tree.map(
      np.testing.assert_array_equal, torch_weights.from_torch(name, older), torch_weights.from_torch(name, whole)
    )


@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
def test_rgb_weights_are_summed_for_grey_images(suffix, state_dicts, tmp_path):
  """Compares weights of an RGB model, loaded for one channel, with the original on grey images."""
  torch.manual_seed(0)
  theirs = torch_reference.create('resnet18', 1, in_channels=3).eval()
  path = tmp_path / f'weights{suffix}'
  if suffix == '.pth':
    save({'state_dict': theirs.state_dict(), 'epoch': 3}, path)
  else:
    safetensors.numpy.save_file({k: v.numpy() for k, v in theirs.state_dict().items()}, path)
  variables, notes = torch_weights.initial(path, 'resnet18', shapes('resnet18'))
  assert notes == ['conv1.weight: summed over its 3 input channels, for grey images']
  grey = np.random.default_rng(0).normal(size=(2, 64, 64, 1)).astype(np.float32)
  with torch.no_grad():
    expected = theirs(torch.tensor(grey).permute(0, 3, 1, 2).expand(-1, 3, -1, -1)).numpy()
  got = models.create('resnet18').apply(variables, grey, train=False)
  np.testing.assert_allclose(got, expected, rtol=1e-4)


@pytest.mark.parametrize('channels', [3, 5])
def test_rgb_weights_of_several_slices(channels, tmp_path):
  """Three slices take the place of red, green and blue. Five equal slices give the result of a grey image."""
  torch.manual_seed(0)
  theirs = torch_reference.create('resnet18', 1, in_channels=3).eval()
  path = save(theirs.state_dict(), tmp_path / 'weights.pth')
  variables, notes = torch_weights.initial(path, 'resnet18', shapes('resnet18', channels))
  images = np.random.default_rng(0).normal(size=(2, 64, 64, channels if channels == 3 else 1)).astype(np.float32)
  with torch.no_grad():
    expected = theirs(torch.tensor(images).permute(0, 3, 1, 2).expand(-1, 3, -1, -1)).numpy()
  got = models.create('resnet18').apply(variables, np.broadcast_to(images, (2, 64, 64, channels)), train=False)
  np.testing.assert_allclose(got, expected, rtol=1e-4)
  kernel = variables['params']['encoder']['conv1']['kernel']
  if channels == 3:
    np.testing.assert_array_equal(kernel, theirs.conv1.weight.detach().permute(2, 3, 1, 0))
    assert notes == []
  else:
    assert notes == [
      'conv1.weight: summed over its 3 input channels, for 5 slices, each with an equal share of the sum'
    ]


def test_half_precision_files_are_read_as_float32(state_dicts, tmp_path):
  whole = state_dicts('mobilenet_v2', num_classes=1)
  for dtype in (torch.float16, torch.bfloat16):
    path = save({k: v.to(dtype) for k, v in whole.items()}, tmp_path / 'half.pth')
    variables, _ = torch_weights.initial(path, 'mobilenet_v2', shapes('mobilenet_v2'))
    kernel = variables['params']['head']['kernel']
    assert kernel.dtype == np.float32
    np.testing.assert_allclose(kernel, whole['classifier.1.weight'].numpy().T, rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize('name', ['vgg16', 'densenet121', 'mobilenet_v2', 'resnet50'])
def test_imagenet_classifier_is_loaded_without_its_head(name, state_dicts, tmp_path):
  path = save(state_dicts(name), tmp_path / 'imagenet.pth')
  expected = shapes(name)
  variables, notes = torch_weights.initial(path, name, expected)
  assert notes[0] == 'head: dropped, as it has 1000 classes; the head for 1 starts untrained'
  assert 'summed over its 3 input channels' in notes[1]
  assert 'head' not in variables['params']
  missing = expected['params'].keys() - variables['params'].keys()
  assert missing == {'head'}
  assert jax.tree.map(np.shape, variables['batch_stats']) == jax.tree.map(np.shape, expected['batch_stats'])


def test_classifier_weights_initialise_the_encoder_of_a_segmenter(state_dicts, tmp_path):
  path = save(state_dicts('resnet50'), tmp_path / 'resnet50.pth')
  whole = torch_weights.from_torch('resnet50', state_dicts('resnet50'))
  for name, options in (('deeplabv3', {}), ('pspnet', {}), ('linknet', {'encoder': 'resnet50'})):
    variables, notes = torch_weights.initial(path, name, shapes(name, **options))
    assert notes[0].startswith('a classifier: the encoder takes its weights')
    assert variables['params'].keys() == {'encoder'}
    last = 'stage2_3' if name == 'pspnet' else 'stage4_2'
    for collection in ('params', 'batch_stats'):
      ours, theirs = variables[collection]['encoder'], whole[collection]['encoder']
      jax.tree.map(np.testing.assert_array_equal, ours[last], theirs[last])


def test_weights_without_fusa_initialise_a_fusa_model(state_dicts, tmp_path):
  path = save(state_dicts('resnet18'), tmp_path / 'resnet18.pth')
  expected = shapes('fusa_resnet18')
  variables, notes = torch_weights.initial(path, 'fusa_resnet18', expected)
  assert 'no FUSA: the parameters of FUSA start untrained' in notes
  block = variables['params']['encoder']['stage1_0']
  assert 'attention' in expected['params']['encoder']['stage1_0']
  assert 'attention' not in block and 'conv1' in block


def test_incomplete_fusa_weights_are_refused(state_dicts, tmp_path):
  whole = state_dicts('fusa_resnet18')
  del whole['layer1.0.attention.fuse.bias']
  with pytest.raises(UserError, match=r'layer1.0.attention.fuse.bias is missing'):
    torch_weights.initial(save(whole, tmp_path / 'w.pth'), 'fusa_resnet18', shapes('fusa_resnet18'))


def test_another_architecture_is_refused_in_one_line(state_dicts, tmp_path):
  path = save(state_dicts('resnet18'), tmp_path / 'resnet18.pth')
  with pytest.raises(UserError) as caught:
    torch_weights.initial(path, 'resnet50', shapes('resnet50'))
  assert 'resnet18.pth does not fit resnet50: ' in str(caught.value)
  assert 'more; give the weights of this architecture' in str(caught.value)
  assert '\n' not in str(caught.value)


class Code:
  def __reduce__(self):
    return (print, ('a pickle that runs code',))


@pytest.mark.parametrize(
  ('name', 'content', 'reason'),
  [
    ('none.pth', None, 'does not exist; give a .safetensors or .pth file'),
    ('weights.onnx', b'x', 'is not a .safetensors, .pth or .pt file'),
    ('cut.pth', b'PK\x03\x04', 'cannot be opened'),
    ('cut.safetensors', b'\x00\x01', 'is not valid safetensors'),
    ('code.pth', Code(), 'cannot be opened'),
    ('list.pth', [1, 2], 'holds no state dict'),
    ('numbers.pth', {'epoch': 3}, 'holds no state dict'),
  ],
)
def test_files_without_a_state_dict_are_refused(name, content, reason, tmp_path, capsys):
  path = tmp_path / name
  if isinstance(content, bytes):
    path.write_bytes(content)
  elif content is not None:
    save(content, path)
  with pytest.raises(UserError, match=reason) as caught:
    torch_weights.read(path)
  assert str(caught.value).startswith(f'model.init_from: {path}')
  assert '\n' not in str(caught.value)
  assert 'runs code' not in capsys.readouterr().out


def test_pth_without_pytorch_says_so(tmp_path, monkeypatch):
  path = save({'w': torch.zeros(2)}, tmp_path / 'w.pth')
  monkeypatch.setitem(sys.modules, 'torch', None)
  with pytest.raises(UserError, match='opening .* needs PyTorch; pip install torch, or save it as .safetensors'):
    torch_weights.read(path)


def test_training_starts_from_the_file_and_resuming_does_not_read_it(data_dir, tmp_path, caplog, state_dicts):
  """The learning rate is almost zero: the parameters after training equal the initial ones."""
  state = state_dicts('resunet', num_classes=1, width=4)
  path = save(state, tmp_path / 'resunet.pth')
  settings = {'model.name': 'resunet', 'model.multiples': None, 'model.init_from': str(path)}
  config = tiny(seg, **settings, **{'train.learning_rate': 1e-12, 'train.steps': 2})
  with caplog.at_level(logging.INFO):
    train.train(config, tmp_path / 'run', data_dir)
  assert f'weights from {path}' in caplog.text
  assert 'stem.conv1.weight: summed over its 3 input channels' in caplog.text
  assert 'stem.downsample.0.weight: summed over its 3 input channels' in caplog.text
  _, items = final_state(config, tmp_path / 'run')
  expected = torch_weights.from_torch('resunet', state, width=4)['params']
  np.testing.assert_allclose(
    items['variables']['params']['up3']['conv1']['kernel'], expected['up3']['conv1']['kernel'], atol=1e-9
  )
  np.testing.assert_allclose(
    items['variables']['params']['stem']['conv1']['kernel'],
    expected['stem']['conv1']['kernel'].sum(axis=2, keepdims=True),
    atol=1e-7,
  )
  path.unlink()
  train.train(config, tmp_path / 'run', data_dir)


def test_weights_that_do_not_fit_leave_no_workdir(data_dir, tmp_path, state_dicts):
  path = save(state_dicts('mobilenet_v2'), tmp_path / 'w.pth')
  config = tiny(cls, **{'model.init_from': str(path)})
  with pytest.raises(UserError, match='does not fit fusa_resnet18'):
    train.train(config, tmp_path / 'run', data_dir)
  assert not (tmp_path / 'run').exists()
