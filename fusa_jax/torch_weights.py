"""Converts PyTorch state dicts of torchvision and segmentation_models_pytorch (smp); uses each tensor exactly once.

The models match layer by layer, so each tensor needs only a new name and layout. Names: the rules of a model family
turn a Flax path into PyTorch's name. Layouts: PyTorch stores convolutions as [out, in, h, w], Flax as [h, w, in, out].
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

# ---- names: pairs (pattern in the Flax path, replacement), applied one after the other

_LEAVES = [('/kernel$', '/weight'), ('/scale$', '/weight'), ('/mean$', '/running_mean'), ('/var$', '/running_var')]
_BLOCK = [(r'/norm(\d)', r'/bn\1'), ('/shortcut_conv', '/downsample/0'), ('/shortcut_norm', '/downsample/1')]
_RESNET = [('^encoder/', '/'), (r'/stage(\d)_(\d+)', r'/layer\1/\2'), *_BLOCK, ('^/', ''), ('^head', 'fc')]
_SMP = [(r'/stage(\d)_(\d+)', r'/layer\1/\2'), *_BLOCK, ('^head', 'segmentation_head/0')]


def _vgg_index(match):
  """Position in torchvision's `features`: each convolution, norm, ReLU and pool takes one place."""
  layer, stage, index = match[1], int(match[2]), int(match[3])
  before = sum(count for count, _ in STAGES[: stage - 1]) + index - 1
  return f'features/{3 * before + (stage - 1) + (layer == "norm")}'


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
    # The first block has no expansion, so its parts are one place earlier.
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
  'resunet': _BLOCK,  # names as in benchmarks/torch_reference.py
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

# Names in files of older releases: torchvision's DenseNet, smp's DeepLabV3.
_OLDER = [
  (r'(denselayer\d+\.(?:norm|conv))\.([12]\.)', r'\1\2'),
  (r'^decoder\.0\.', 'decoder.aspp.'),
  (r'^decoder\.1\.', 'decoder.conv.'),
  (r'^decoder\.2\.', 'decoder.bn.'),
]
# Tensors that no computation uses: encoder stages that smp's PSPNet holds but skips, and a counter in PyTorch's norms.
_UNUSED = {'pspnet': re.compile(r'encoder\.layer[34]\.')}
_COUNTER = 'num_batches_tracked'

# Kernels of the first layers; their shapes give the number of input channels.
_FIRST = [f'params/{layer}/kernel' for layer in ('encoder/conv1', 'conv1_1', 'conv0', 'stem_conv', 'stem/conv1')]


def from_torch(name: str, state_dict: Mapping[str, Any], **options) -> dict:
  """Returns the variables of a model with the weights of its PyTorch original.

  Args:
    name: model name, one of `models.NAMES`.
    state_dict: tensors of PyTorch or NumPy, with the names of torchvision, smp or benchmarks/torch_reference.py.
    **options: options of `models.create`. Default of `num_classes`: the number of classes in the state dict.

  Returns:
    {'params', 'batch_stats'} as NumPy arrays in the state dict's dtype, with its number of input channels.

  Raises:
    UserError: a tensor is missing, left over, or has another shape; the message names it.
  """
  tensors, rules = _canonical(name, state_dict), _rules(name)
  first = next((tensors[_torch_name(key, rules)] for key in _FIRST if _torch_name(key, rules) in tensors), None)
  head = tensors.get(_torch_name('params/head/bias', rules))
  if head is not None:
    options.setdefault('num_classes', len(head))
  module = models.create(name, **options)
  images = jnp.zeros((1, 64, 64, 1 if first is None else first.shape[1]))
  shapes = jax.eval_shape(functools.partial(module.init, train=False), jax.random.key(0), images)
  arrays, problems = _match(_flat(shapes), tensors, rules)
  _refuse(problems, f'state dict does not fit {name}')
  return _nested(arrays)


def initial(path: str | pathlib.Path, name: str, shapes: dict) -> tuple[dict, list[str]]:
  """Reads a file of PyTorch weights to start the training of a model from.

  It takes a complete state dict of the model. It also takes weights that differ in these ways:
  - another number of classes: it leaves out the head.
  - three input channels instead of C: it sums the kernels of the first layer over them, and divides the sum evenly
    among the C channels. On a grey image, or on C equal slices, the result is the same. A model of three channels
    (data.context=1) takes the kernels as they are.
  - no FUSA: it leaves out the parameters of FUSA.
  - a classifier that is the encoder of this model: it leaves out the decoder.

  Args:
    path: a .safetensors file, or a .pth or .pt file (opening these needs PyTorch).
    name: model name.
    shapes: {'params', 'batch_stats'} of the model, as arrays or as shapes.

  Returns:
    (variables, notes). `variables` are the NumPy arrays that the file provides, nested as in `shapes`. Each note is one
    line about something left out or changed.

  Raises:
    UserError: the file cannot be read or does not fit the model; the message names the tensors.
  """
  tensors, rules, notes = _canonical(name, read(path)), _rules(name), []
  needed = _flat(shapes)

  is_encoders = lambda key: '/encoder/' in key
  if name in models.SEGMENTERS and any(map(is_encoders, needed)) and not any(k.startswith('encoder.') for k in tensors):
    tensors = _canonical(name, {f'encoder.{key}': tensors[key] for key in tensors if not key.startswith('fc.')})
    needed = {key: value for key, value in needed.items() if is_encoders(key)}
    notes.append('a classifier: the encoder takes its weights, without its head; the decoder starts untrained')

  head = tensors.get(_torch_name('params/head/bias', rules))
  if 'params/head/bias' in needed and head is not None and len(head) != needed['params/head/bias'].size:
    classes = needed['params/head/bias'].size
    notes.append(f'head: dropped, as it has {len(head)} classes; the head for {classes} starts untrained')
    for key in ('params/head/kernel', 'params/head/bias'):
      del needed[key]
      tensors.pop(_torch_name(key, rules), None)

  is_attentions = lambda key: '/attention/' in key
  if any(map(is_attentions, needed)) and not any('.attention.' in key for key in tensors):
    needed = {key: value for key, value in needed.items() if not is_attentions(key)}
    notes.append('no FUSA: the parameters of FUSA start untrained')

  for key, value in needed.items():
    torch_name, shape = _torch_name(key, rules), _torch_shape(key, value.shape)
    tensor = tensors.get(torch_name)
    channels = shape[1] if len(shape) == 4 else 3
    if channels != 3 and tensor is not None and tensor.shape == (shape[0], 3, *shape[2:]):
      tensors[torch_name] = np.repeat(tensor.sum(axis=1, keepdims=True) / channels, channels, axis=1)
      purpose = 'grey images' if channels == 1 else f'{channels} slices, each with an equal share of the sum'
      notes.append(f'{torch_name}: summed over its 3 input channels, for {purpose}')
  arrays, problems = _match(needed, tensors, rules)
  _refuse(problems, f'model.init_from: {path} does not fit {name}')
  return _nested(arrays), notes


def overlay(variables: dict, replacements: dict) -> dict:
  """Returns `variables` with the leaves in `replacements` replaced; keeps the dtypes and shardings of `variables`."""
  flat = _flat(variables)
  for key, value in _flat(replacements).items():
    flat[key] = jax.device_put(np.asarray(value, flat[key].dtype), flat[key].sharding)
  return _nested(flat)


def read(path: str | pathlib.Path) -> dict[str, Any]:
  """Reads the state dict in a .safetensors, .pth or .pt file.

  Raises:
    UserError: the file does not exist or holds no state dict, or opening it needs PyTorch and PyTorch is missing.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise UserError(f'model.init_from: {path} does not exist; give a .safetensors or .pth file')
  if path.suffix == '.safetensors':
    import safetensors.numpy

    try:
      return safetensors.numpy.load_file(path)
    except safetensors.SafetensorError as error:
      raise UserError(f'model.init_from: {path} is not valid safetensors ({error}); download it again') from None
  if path.suffix not in ('.pth', '.pt'):
    raise UserError(f'model.init_from: {path} is not a .safetensors, .pth or .pt file; give a PyTorch state dict')
  try:
    import torch
  except ImportError:
    raise UserError(
      f'model.init_from: opening {path} needs PyTorch; pip install torch, or save it as .safetensors'
    ) from None
  try:
    # weights_only, because a pickle can run any code.
    content = torch.load(path, map_location='cpu', weights_only=True)
  except Exception as error:  # torch raises many types here, also those of pickle and zip
    reason = str(error).strip().splitlines()[0]
    raise UserError(f'model.init_from: {path} cannot be opened ({reason}); give a PyTorch state dict') from None
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
  """Returns the tensors that computations use, as NumPy arrays under current names."""
  unused, tensors = _UNUSED.get(_plain(name)), {}
  for key, value in state_dict.items():
    for pattern, replacement in _OLDER:
      key = re.sub(pattern, replacement, key)
    if not key.endswith(_COUNTER) and not (unused and unused.match(key)):
      tensors[key] = _numpy(value)
  return tensors


def _numpy(tensor):
  """Returns a copy, because PyTorch changes the original in place (batch statistics with each step)."""
  if hasattr(tensor, 'detach'):  # a PyTorch tensor; NumPy does not know its bfloat16
    tensor = tensor.detach().cpu()
    tensor = (tensor.float() if tensor.element_size() < 4 else tensor).numpy()
  array = np.array(tensor)
  return array.astype(np.float32) if array.dtype.itemsize < 4 else array


# PyTorch stores a transposed convolution's kernel as the kernel of the convolution that it transposes. Flax stores that
# kernel mirrored, so `_ours` mirrors it.
def _axes(key, rank):
  """PyTorch's axes of a tensor in terms of Flax's, by rank."""
  if rank == 4:
    return (2, 3, 0, 1) if _is_transposed(key) else (3, 2, 0, 1)
  return tuple(reversed(range(rank)))


def _is_transposed(key):
  return re.search(r'/up\d*_conv/kernel$', key)


def _torch_shape(key, shape):
  if key == 'params/dense1/kernel':  # the first dense layer of VGG: see `_ours`
    return shape[::-1]
  return tuple(shape[axis] for axis in _axes(key, len(shape)))


def _ours(key, tensor):
  """Returns a PyTorch tensor in the layout of Flax."""
  if key == 'params/dense1/kernel':
    # PyTorch flattens 7 x 7 features as [C, 7, 7], Flax as [7, 7, C].
    units = len(tensor)
    return tensor.reshape(units, -1, 7, 7).transpose(2, 3, 1, 0).reshape(-1, units)
  array = tensor.transpose(np.argsort(_axes(key, tensor.ndim)))
  return array[::-1, ::-1] if _is_transposed(key) else array


def _match(needed, tensors, rules):
  """Takes each of `needed` from one of `tensors`; returns ({Flax key: array}, problems).

  A problem is one text about a tensor that is missing, left over, or has another shape.
  """
  arrays, problems, left = {}, [], dict(tensors)
  for key, value in needed.items():
    torch_name, shape = _torch_name(key, rules), _torch_shape(key, value.shape)
    tensor = left.pop(torch_name, None)
    if tensor is None:
      problems.append(f'{torch_name} is missing')
    elif tensor.shape != shape:
      problems.append(f'{torch_name} has shape {tensor.shape}, not {shape}')
    else:
      arrays[key] = _ours(key, tensor)
  return arrays, problems + [f'{torch_name} is left over' for torch_name in left]


def _refuse(problems, summary):
  if problems:
    more = f', and {len(problems) - 5} more' if len(problems) > 5 else ''
    raise UserError(f'{summary}: {", ".join(problems[:5])}{more}; give the weights of this architecture')


def _flat(tree):
  return flax.traverse_util.flatten_dict(flax.core.unfreeze(tree), sep='/')


def _nested(flat):
  return flax.traverse_util.unflatten_dict(flat, sep='/')
