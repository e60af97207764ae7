"""The registry of models, by name."""

import functools

import flax.linen as nn

from fusa_jax.fusa import FUSA
from fusa_jax.models import deeplabv3, densenet, linknet, mobilenet, pspnet, resnet, resunet, vgg
from fusa_jax.system.errors import UserError


def _and_with_fusa(models):
  return models | {f'fusa_{name}': functools.partial(model, attention=FUSA) for name, model in models.items()}


_CLASSIFIERS = {
  'vgg16': vgg.VGG16,
  'densenet121': densenet.DenseNet121,
  'mobilenet_v2': mobilenet.MobileNetV2,
  **_and_with_fusa({'resnet18': resnet.ResNet18, 'resnet34': resnet.ResNet34, 'resnet50': resnet.ResNet50}),
}
_SEGMENTERS = _and_with_fusa(
  {
    'resunet': resunet.ResUNet,
    'linknet': linknet.LinkNet,
    'pspnet': pspnet.PSPNet,
    'deeplabv3': deeplabv3.DeepLabV3,
  }
)
_MODELS = _CLASSIFIERS | _SEGMENTERS

CLASSIFIERS = tuple(sorted(_CLASSIFIERS))
SEGMENTERS = tuple(sorted(_SEGMENTERS))
NAMES = CLASSIFIERS + SEGMENTERS


# Models with `packed`, a form for TPUs.
PACKED = ('resunet', 'fusa_resunet')


def create(name: str, num_classes: int = 1, dtype=None, **options) -> nn.Module:
  """Creates a model by name; `module.apply(variables, images [B, H, W, C], train=...)` returns float32 logits.

  Args:
    name: one of NAMES. `fusa_NAME` is the class of NAME with `attention=FUSA`.
    num_classes: number of logits per image (classification) or per pixel (segmentation).
    dtype: dtype of the activations (bfloat16 on accelerators). Parameters, statistics and logits are always float32.
    **options: options of the model's class: `width`, `encoder`, and the others that it documents.

  In training, a model with dropout needs `rngs={'dropout': key}`.

  Raises:
    UserError: the name is not in NAMES, or the model does not have an option.
  """
  if name not in _MODELS:
    raise UserError(f'model.name: {name!r} is unknown; give one of {", ".join(NAMES)}')
  try:
    return _MODELS[name](num_classes=num_classes, dtype=dtype, **options)
  except TypeError as error:
    raise UserError(f'model: {name} does not accept the options {options} ({error}); remove the unknown ones') from None
