"""The PyTorch originals of all models: the reference for tests and for speed.

The baselines come from torchvision and segmentation_models_pytorch (smp). The authors of the paper published no code.
FUSA, FUSA-ResNet and FUSA-ResUnet are therefore written here from the paper's text, with the H x W x 2C concatenation.
`fusa_jax.torch_weights.from_torch` takes the state dict of each model.
"""

import importlib.util
import pathlib
import re

import torch
import torch.nn.functional as F
from torch import nn

from fusa_jax.system.errors import UserError


def _import_torchvision():
  """Imports torchvision even if its compiled operators do not load, for example with a PyTorch of another build.

  Its models need none of the operators. But the import registers their shapes, which fails if they do not exist. This
  function therefore declares the operators by name; nothing calls them. A build that belongs to PyTorch loads them.
  """
  spec = importlib.util.find_spec('torchvision')
  if spec is None:
    raise ModuleNotFoundError("No module named 'torchvision'", name='torchvision')
  folder = pathlib.Path(spec.origin).parent
  library = torch.library.Library('torchvision', 'FRAGMENT')
  try:
    import torchvision.extension

    loaded = torchvision.extension._has_ops()
  except RuntimeError:
    loaded = False
  if not loaded:
    source = (folder / '_meta_registrations.py').read_text()
    for name in sorted(set(re.findall(r'(?:register_meta\(|register_fake\()"(?:torchvision::)?(\w+)"', source))):
      library.define(f'{name}(Tensor x) -> Tensor')
  import torchvision

  return torchvision, library


torchvision, _LIBRARY = _import_torchvision()


class FUSA(nn.Module):
  """The paper's section II-A, step by step: x [B, C, H, W] -> x * A."""

  def __init__(self, channels: int):
    super().__init__()
    self.channel = nn.Linear(2 * channels, channels)
    self.spatial = nn.Conv2d(2, 1, 1)
    self.fuse = nn.Conv2d(2 * channels, channels, 1)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    channel = self.channel(torch.cat([x.amax((2, 3)), x.mean((2, 3))], dim=1))
    spatial = self.spatial(torch.cat([x.amax(1, keepdim=True), x.mean(1, keepdim=True)], dim=1))
    both = torch.cat([channel[:, :, None, None].expand_as(x), spatial.expand_as(x)], dim=1)
    return x * torch.sigmoid(self.fuse(both))


class _FUSABasicBlock(torchvision.models.resnet.BasicBlock):
  """torchvision's block with FUSA at the end of its branch (section II-B)."""

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    y = F.relu(self.bn1(self.conv1(x)))
    y = self.attention(self.bn2(self.conv2(y)))
    return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class _FUSABottleneck(torchvision.models.resnet.Bottleneck):
  """torchvision's bottleneck with FUSA at the end of its branch (section II-B)."""

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    y = F.relu(self.bn1(self.conv1(x)))
    y = F.relu(self.bn2(self.conv2(y)))
    y = self.attention(self.bn3(self.conv3(y)))
    return F.relu(y + (x if self.downsample is None else self.downsample(x)))


def _with_fusa(model: nn.Module) -> nn.Module:
  """Adds FUSA to each torchvision residual block of the model, also in smp's encoders; returns the model.

  This changes the class of the blocks. A hook after the last norm would be shorter, but `torch.compile` ignores hooks.
  """
  for block in list(model.modules()):
    if isinstance(block, torchvision.models.resnet.BasicBlock):
      block.attention = FUSA(block.bn2.num_features)
      block.__class__ = _FUSABasicBlock
    elif isinstance(block, torchvision.models.resnet.Bottleneck):
      block.attention = FUSA(block.bn3.num_features)
      block.__class__ = _FUSABottleneck
  return model


class _UNetBlock(nn.Module):
  """Two 3x3 convolutions with norms, optional FUSA, and the sum with a projected shortcut."""

  def __init__(self, inputs: int, features: int, fusa: bool):
    super().__init__()
    self.conv1 = nn.Conv2d(inputs, features, 3, padding=1, bias=False)
    self.bn1 = nn.BatchNorm2d(features)
    self.conv2 = nn.Conv2d(features, features, 3, padding=1, bias=False)
    self.bn2 = nn.BatchNorm2d(features)
    self.attention = FUSA(features) if fusa else nn.Identity()
    self.downsample = nn.Sequential(nn.Conv2d(inputs, features, 1, bias=False), nn.BatchNorm2d(features))

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
    return F.relu(self.attention(y) + self.downsample(x))


class ResUNet(nn.Module):
  """Section II-C: a residual module, four with FUSA on the way down, four on the way up."""

  def __init__(self, num_classes: int, in_channels: int, width: int, fusa: bool):
    super().__init__()
    features = [width * 2**level for level in range(5)]
    self.stem = _UNetBlock(in_channels, width, fusa=False)
    for level in range(1, 5):
      self.add_module(f'down{level}', _UNetBlock(features[level - 1], features[level], fusa))
    for level in reversed(range(4)):
      self.add_module(f'up{level}_conv', nn.ConvTranspose2d(features[level + 1], features[level], 2, stride=2))
      self.add_module(f'up{level}', _UNetBlock(2 * features[level], features[level], fusa))
    self.head = nn.Conv2d(width, num_classes, 1)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    skips = [self.stem(x)]
    for level in range(1, 5):
      skips.append(self.get_submodule(f'down{level}')(F.max_pool2d(skips[-1], 2)))
    x = skips.pop()
    for level in reversed(range(4)):
      x = self.get_submodule(f'up{level}_conv')(x)
      x = self.get_submodule(f'up{level}')(torch.cat([skips.pop(), x], dim=1))
    return self.head(x)


def create(
  name: str, num_classes: int = 1, in_channels: int = 1, encoder: str | None = None, width: int = 64, dropout=None
) -> nn.Module:
  """Returns the PyTorch original of a model, with random weights; images [B, C, H, W] -> logits.

  Args:
    name: one of `fusa_jax.models.NAMES`.
    num_classes: number of outputs of the last layer.
    in_channels: number of input channels of the first layer.
    encoder: encoder of linknet, pspnet and deeplabv3; None: the default of our model.
    width: width of resunet; the other models exist at full width only.
    dropout: dropout rate that replaces the model's own, if it has one.
  """
  plain = name.removeprefix('fusa_')
  if plain == 'resunet':
    return ResUNet(num_classes, in_channels, width, fusa=name != plain)
  model = _baseline(plain, num_classes, in_channels, encoder)
  if dropout is not None:
    for module in model.modules():
      if isinstance(module, nn.Dropout | nn.Dropout2d):
        module.p = dropout
  return model if name == plain else _with_fusa(model)


def _baseline(name, num_classes, in_channels, encoder):
  if name in ('linknet', 'pspnet', 'deeplabv3'):
    try:
      import segmentation_models_pytorch as smp
    except ModuleNotFoundError as error:
      raise UserError(
        f'{error.name}: not installed, and the PyTorch original of {name} needs it; '
        'pip install segmentation-models-pytorch, or leave the model out'
      ) from None
    architecture, default = {
      'linknet': (smp.Linknet, 'resnet18'),
      'pspnet': (smp.PSPNet, 'resnet50'),
      'deeplabv3': (smp.DeepLabV3, 'resnet50'),
    }[name]
    return architecture(encoder or default, encoder_weights=None, in_channels=in_channels, classes=num_classes)
  model = torchvision.models.get_model('vgg16_bn' if name == 'vgg16' else name, num_classes=num_classes)
  # torchvision's models take three channels: replace the first layer by one for `in_channels`.
  parent, key, first = next(
    (parent, key, layer)
    for parent in model.modules()
    for key, layer in parent.named_children()
    if isinstance(layer, nn.Conv2d)
  )
  options = {option: getattr(first, option) for option in ('kernel_size', 'stride', 'padding')}
  setattr(parent, key, nn.Conv2d(in_channels, first.out_channels, bias=first.bias is not None, **options))
  return model
