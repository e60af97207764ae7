"""PyTorch weights -> ours: torchvision's and segmentation_models_pytorch's (smp) state dicts, each tensor used once.

The models are layer for layer the same, so what is needed is a name and a layout for each tensor. Names: the rules of
a family turn our path into PyTorch's. Layouts: PyTorch has convolutions as [out, in, h, w], ours are [h, w, in, out].
"""

import functools
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np

from fusa_jax import models
from fusa_jax.models.vgg import STAGES
from fusa_jax.system.errors import UserError

# ---- names: (pattern in our path, replacement), applied in turn

_LEAVES = [('/kernel$', '/weight'), ('/scale$', '/weight'), ('/mean$', '/running_mean'), ('/var$', '/running_var')]
_BLOCK = [(r'/norm(\d)', r'/bn\1'), ('/shortcut_conv', '/downsample/0'), ('/shortcut_norm', '/downsample/1')]
_RESNET = [('^encoder/', '/'), (r'/stage(\d)_(\d+)', r'/layer\1/\2'), *_BLOCK, ('^/', ''), ('^head', 'fc')]
_SMP = [(r'/stage(\d)_(\d+)', r'/layer\1/\2'), *_BLOCK, ('^head', 'segmentation_head/0')]


def _vgg_index(match):
  """Position in torchvision's `features`: a convolution, its norm and its ReLU take a place each, a pool takes one."""
  kind, stage, index = match[1], int(match[2]), int(match[3])
  before = sum(count for count, _ in STAGES[: stage - 1]) + index - 1
  return f'features/{3 * before + (stage - 1) + (kind == "norm")}'


def _pspnet_block(match):
  return f'decoder/psp/blocks/{"1236".index(match[1])}/pool/1/{int(match[2] == "norm")}'


_FAMILIES = {
  'resnet': _RESNET,
  'vgg16': [
    (r'(conv|norm)(\d)_(\d)', _vgg_index),
    ('^dense1', 'classifier/0'),
    ('^dense2', 'classifier/3'),
    ('^head', 'classifier/6'),
  ],
  'densenet121': [
    (r'^(conv0|norm0|norm5)', r'features/\1'),
    (r'^block(\d)_layer(\d+)', r'features/denseblock\1/denselayer\2'),
    (r'^transition(\d)_(conv|norm)', r'features/transition\1/\2'),
    ('^head', 'classifier'),
  ],
  'mobilenet_v2': [
    ('^stem_conv', 'features/0/0'),
    ('^stem_norm', 'features/0/1'),
    ('^last_conv', 'features/18/0'),
    ('^last_norm', 'features/18/1'),
    # The first block has no expansion, so that its parts come one place earlier.
    ('^block1/depthwise_conv', 'features/1/conv/0/0'),
    ('^block1/depthwise_norm', 'features/1/conv/0/1'),
    ('^block1/project_conv', 'features/1/conv/1'),
    ('^block1/project_norm', 'features/1/conv/2'),
    (r'^block(\d+)/expand_conv', r'features/\1/conv/0/0'),
    (r'^block(\d+)/expand_norm', r'features/\1/conv/0/1'),
    (r'^block(\d+)/depthwise_conv', r'features/\1/conv/1/0'),
    (r'^block(\d+)/depthwise_norm', r'features/\1/conv/1/1'),
    (r'^block(\d+)/project_conv', r'features/\1/conv/2'),
    (r'^block(\d+)/project_norm', r'features/\1/conv/3'),
    ('^head', 'classifier/1'),
  ],
  'resunet': _BLOCK,  # named as benchmarks/torch_reference.py has it
  'linknet': [
    *_SMP,
    (r'^decoder(\d)/reduce_', r'decoder/blocks/\1/block/0/'),
    (r'^decoder(\d)/up_', r'decoder/blocks/\1/block/1/'),
    (r'^decoder(\d)/expand_', r'decoder/blocks/\1/block/2/'),
    (r'^(decoder/.*)/conv/', r'\1/0/'),
    (r'^(decoder/.*)/norm/', r'\1/1/'),
  ],
  'pspnet': [
    *_SMP,
    (r'^pool(\d)_(conv|norm)', _pspnet_block),
    ('^conv/', 'decoder/conv/0/'),
    ('^norm/', 'decoder/conv/1/'),
  ],
  'deeplabv3': [
    *_SMP,
    ('^aspp4_conv', 'decoder/aspp/convs/4/1'),
    ('^aspp4_norm', 'decoder/aspp/convs/4/2'),
    (r'^aspp(\d)_conv', r'decoder/aspp/convs/\1/0'),
    (r'^aspp(\d)_norm', r'decoder/aspp/convs/\1/1'),
    ('^project_conv', 'decoder/aspp/project/0'),
    ('^project_norm', 'decoder/aspp/project/1'),
    ('^conv/', 'decoder/conv/'),
    ('^norm/', 'decoder/bn/'),
  ],
}

# Names that older releases saved: torchvision's DenseNet files, smp's DeepLabV3.
_OLDER = [
  (r'(denselayer\d+\.(?:norm|conv))\.([12]\.)', r'\1\2'),
  (r'^decoder\.0\.', 'decoder.aspp.'),
  (r'^decoder\.1\.', 'decoder.conv.'),
  (r'^decoder\.2\.', 'decoder.bn.'),
]
# Tensors that no model computes with: a counter of PyTorch's norms; the stages that smp's PSPNet has and skips.
_UNUSED = {'pspnet': re.compile(r'encoder\.layer[34]\.')}
_COUNTER = 'num_batches_tracked'

# Our first layers, for the number of input channels.
_FIRST = [f'params/{layer}/kernel' for layer in ('encoder/conv1', 'conv1_1', 'conv0', 'stem_conv', 'stem/conv1')]


def from_torch(name: str, state_dict: Mapping[str, Any], **options) -> dict:
  """The variables of a model with the weights of its PyTorch original.

  Args:
    name: of the model, as in `models.NAMES`.
    state_dict: tensors (PyTorch's or NumPy's) named as torchvision, smp or benchmarks/torch_reference.py has them.
    **options: of `models.create`. Without `num_classes`, it is the state dict's own.

  Returns:
    {'params', 'batch_stats'} as NumPy arrays in the state dict's dtype, for as many input channels as it has.

  Raises:
    UserError: a tensor is missing, left over, or of another shape; names it.
  """
  tensors, rules = _canonical(name, state_dict), _rules(name)
  first = next((tensors[_torch_name(key, rules)] for key in _FIRST if _torch_name(key, rules) in tensors), None)
  head = tensors.get(_torch_name('params/head/bias', rules))
  if head is not None:
    options.setdefault('num_classes', len(head))
  module = models.create(name, **options)
  images = jnp.zeros((1, 64, 64, 1 if first is None else first.shape[1]))
  shapes = jax.eval_shape(functools.partial(module.init, train=False), jax.random.key(0), images)
  found, problems = _match(_flat(shapes), tensors, rules)
  _refuse(problems, f'state dict does not fit {name}')
  return _nested(found)


def initial(path: str | pathlib.Path, name: str, shapes: dict) -> tuple[dict, list[str]]:
  """What a file of PyTorch weights has to start the training of a model from.

  Beside the whole of a state dict of this very model it takes, of the same architecture:
  - another number of classes: the head is left out;
  - three input channels for one: a first layer's kernels are summed over them, which is the same function of a grey
    image;
  - no FUSA: its parameters are left out;
  - a classifier, for the model that has it as its encoder: the decoder is left out.

  Args:
    path: a .safetensors file, or a .pth or .pt file (which needs PyTorch to be opened).
    name: of the model.
    shapes: {'params', 'batch_stats'} of the model, as arrays or as shapes.

  Returns:
    (variables, notes): the variables found, NumPy arrays nested as in `shapes`; and what was left out or changed, a
    line each.

  Raises:
    UserError: the file cannot be read, or does not fit; names the tensors.
  """
  tensors, rules, notes = _canonical(name, read(path)), _rules(name), []
  needed = _flat(shapes)

  is_encoders = lambda key: '/encoder/' in key
  if name in models.SEGMENTERS and any(map(is_encoders, needed)) and not any(k.startswith('encoder.') for k in tensors):
    tensors = _canonical(name, {f'encoder.{key}': tensors[key] for key in tensors if not key.startswith('fc.')})
    needed = {key: value for key, value in needed.items() if is_encoders(key)}
    notes.append('a classifier: its weights start the encoder, without its head; the decoder starts anew')

  head = tensors.get(_torch_name('params/head/bias', rules))
  if 'params/head/bias' in needed and head is not None and len(head) != needed['params/head/bias'].size:
    notes.append(f'the head for {len(head)} classes is dropped; one for {needed["params/head/bias"].size} starts anew')
    for key in ('params/head/kernel', 'params/head/bias'):
      del needed[key]
      tensors.pop(_torch_name(key, rules), None)

  is_attentions = lambda key: '/attention/' in key
  if any(map(is_attentions, needed)) and not any('.attention.' in key for key in tensors):
    needed = {key: value for key, value in needed.items() if not is_attentions(key)}
    notes.append('no FUSA in it: its parameters start anew')

  for key, value in needed.items():
    torch_name, shape = _torch_name(key, rules), _torch_shape(key, value.shape)
    tensor = tensors.get(torch_name)
    if len(shape) == 4 and shape[1] == 1 and tensor is not None and tensor.shape == (shape[0], 3, *shape[2:]):
      tensors[torch_name] = tensor.sum(axis=1, keepdims=True)
      notes.append(f'{torch_name}: summed over its 3 input channels, for grey images')
  arrays, problems = _match(needed, tensors, rules)
  _refuse(problems, f'model.init_from: {path} does not fit {name}')
  return _nested(arrays), notes


def overlay(variables: dict, found: dict) -> dict:
  """`variables` with those of its leaves replaced that `found` has, in the variables' dtypes and shardings."""
  flat = _flat(variables)
  for key, value in _flat(found).items():
    flat[key] = jax.device_put(np.asarray(value, flat[key].dtype), flat[key].sharding)
  return _nested(flat)


def read(path: str | pathlib.Path) -> dict[str, Any]:
  """The state dict in a .safetensors, .pth or .pt file.

  Raises:
    UserError: no such file, no state dict in it, or PyTorch is needed and not there.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise UserError(f'model.init_from: {path} does not exist; give a .safetensors or .pth file')
  if path.suffix == '.safetensors':
    import safetensors.numpy

    try:
      return safetensors.numpy.load_file(path)
    except safetensors.SafetensorError as error:
      raise UserError(f'model.init_from: {path} is no .safetensors file ({error}); download it again') from None
  if path.suffix not in ('.pth', '.pt'):
    raise UserError(f'model.init_from: {path} is neither .safetensors nor .pth; give a PyTorch state dict')
  try:
    import torch
  except ImportError:
    raise UserError(
      f'model.init_from: {path} needs PyTorch to be opened; pip install torch, or save it as .safetensors'
    ) from None
  try:
    # weights_only: a pickle may run any code.
    content = torch.load(path, map_location='cpu', weights_only=True)
  except Exception as error:  # torch raises half a dozen kinds, of pickle and zip among them
    reason = str(error).strip().splitlines()[0]
    raise UserError(f'model.init_from: {path} cannot be opened ({reason}); give a state dict') from None
  for key in ('state_dict', 'model'):
    if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
      content = content[key]
  if not isinstance(content, Mapping) or not all(hasattr(value, 'shape') for value in content.values()):
    raise UserError(f'model.init_from: {path} holds no state dict; save model.state_dict()')
  return dict(content)


def _plain(name):
  return name.removeprefix('fusa_')


def _rules(name):
  plain = _plain(name)
  return [*_FAMILIES['resnet' if plain.startswith('resnet') else plain], *_LEAVES]


def _torch_name(key, rules):
  path = key.split('/', 1)[1]  # without `params` or `batch_stats`
  for pattern, replacement in rules:
    path = re.sub(pattern, replacement, path)
  return path.replace('/', '.')


def _canonical(name, state_dict):
  """The tensors that count, as NumPy arrays under today's names."""
  unused, tensors = _UNUSED.get(_plain(name)), {}
  for key, value in state_dict.items():
    for pattern, replacement in _OLDER:
      key = re.sub(pattern, replacement, key)
    if not key.endswith(_COUNTER) and not (unused and unused.match(key)):
      tensors[key] = _numpy(value)
  return tensors


def _numpy(tensor):
  """A copy: PyTorch would go on changing the original, batch statistics with each step."""
  if hasattr(tensor, 'detach'):  # PyTorch's; its bfloat16 is unknown to NumPy
    tensor = tensor.detach().cpu()
    tensor = (tensor.float() if tensor.element_size() < 4 else tensor).numpy()
  array = np.array(tensor)
  return array.astype(np.float32) if array.dtype.itemsize < 4 else array


# Layouts of kernels by rank: PyTorch's axes in terms of ours. A transposed convolution's kernel is mirrored as well:
# PyTorch's is the one of the convolution that it is the transpose of.
def _axes(key, rank):
  if rank == 4:
    return (2, 3, 0, 1) if _is_transposed(key) else (3, 2, 0, 1)
  return tuple(reversed(range(rank)))


def _is_transposed(key):
  return re.search(r'/up\d*_conv/kernel$', key)


def _torch_shape(key, shape):
  if key == 'params/dense1/kernel':  # VGG's, see _ours
    return shape[::-1]
  return tuple(shape[axis] for axis in _axes(key, len(shape)))


def _ours(key, tensor):
  """A tensor in our layout."""
  if key == 'params/dense1/kernel':
    # PyTorch flattens 7 x 7 features as [C, 7, 7], we as [7, 7, C].
    units = len(tensor)
    return tensor.reshape(units, -1, 7, 7).transpose(2, 3, 1, 0).reshape(-1, units)
  array = tensor.transpose(np.argsort(_axes(key, tensor.ndim)))
  return array[::-1, ::-1] if _is_transposed(key) else array


def _match(needed, tensors, rules):
  """({our key: array}, what is wrong): each of `needed` from one of `tensors`, and none of these left over."""
  found, problems, left = {}, [], dict(tensors)
  for key, value in needed.items():
    torch_name, shape = _torch_name(key, rules), _torch_shape(key, value.shape)
    tensor = left.pop(torch_name, None)
    if tensor is None:
      problems.append(f'{torch_name} is missing')
    elif tensor.shape != shape:
      problems.append(f'{torch_name} has shape {tensor.shape}, not {shape}')
    else:
      found[key] = _ours(key, tensor)
  return found, problems + [f'{torch_name} is left over' for torch_name in left]


def _refuse(problems, what):
  if problems:
    more = f', and {len(problems) - 5} more' if len(problems) > 5 else ''
    raise UserError(f'{what}: {", ".join(problems[:5])}{more}; give the weights of this architecture')


def _flat(tree):
  return flax.traverse_util.flatten_dict(flax.core.unfreeze(tree), sep='/')


def _nested(flat):
  return flax.traverse_util.unflatten_dict(flat, sep='/')
