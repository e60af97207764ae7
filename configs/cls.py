"""Classification of slices (paper, section III-C and Table I)."""

import ml_collections

from configs import base
from fusa_jax import models


def get_config(preset: str = 'paper') -> ml_collections.ConfigDict:
  """Returns the config of a preset.

  `paper` is FUSA-ResNet-50 on 512 x 512 slices. `demo` is a narrow FUSA-ResNet-18, small enough for two CPU cores.
  `strong` is the paper's network under a modern recipe (docs/recipe.md); `demo-strong` has demo size.
  The name of another model, for example `vgg16`, trains that model as in `paper`; `demo-vgg16`, `strong-vgg16` and
  `demo-strong-vgg16` as in those presets.
  """
  is_demo, is_strong, _, name = base.read_preset(preset, 'configs/cls.py', models.CLASSIFIERS)
  config = base.paper()
  config.task = 'classification'
  config.train.loss = 'cross_entropy'
  config.data.classes = 'auto'
  config.model.name = name or ('fusa_resnet18' if is_demo else 'fusa_resnet50')
  if is_demo:
    base.demo(config)
    config.model.width = 16
    # Each slice gives one label instead of thousands of pixels, and is much cheaper: use larger slices, and more per
    # step.
    config.data.image_size = 96
    config.augment.hu_shift = 30.0
    config.augment.hu_scale = 0.05
    config.train.batch_size = 16
    config.train.steps = 1000
    config.train.evaluate_every = 250  # validate often: the best checkpoint comes early
    config.train.weight_decay = 0.05
  if is_strong:
    base.strong(config)
    # A lesion at the edge of an enlarged slice would leave it, while its label stays.
    config.augment.scaling = (0.8, 1.1)
  # The paper describes crops for segmentation only.
  config.augment.crop_probability = 0.0
  return config
