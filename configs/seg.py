"""Lesion segmentation (paper, section III-D and Table II)."""

import ml_collections

from configs import base
from fusa_jax import models


def get_config(preset: str = 'paper') -> ml_collections.ConfigDict:
  """Returns the config of a preset.

  `paper` is FUSA-ResUnet on 512 x 512 slices. `demo` is a narrow FUSA-ResUnet, small enough for two CPU cores.
  `strong` is the paper's network under a modern recipe (docs/recipe.md); `demo-strong` has demo size,
  and three times as many steps as `demo`.
  The name of another model, for example `resunet`, trains that model as in `paper`; `demo-resunet`, `strong-resunet`
  and `demo-strong-resunet` as in those presets. `demo-classes` is the demo with two classes of lesions.
  """
  is_demo, is_strong, has_classes, name = base.read_preset(preset, 'configs/seg.py', models.SEGMENTERS, classes=True)
  config = base.paper()
  config.task = 'segmentation'
  config.train.loss = 'cross_entropy_dice'
  config.model.name = name or 'fusa_resunet'
  if is_demo:
    base.demo(config)
  if has_classes:
    config.data.phantom.kinds = True
    config.data.classes = (('ground glass', (1,)), ('consolidation', (2,)))
  if is_strong:
    base.strong(config)
    config.train.deep_supervision = config.model.name.endswith('resunet')
    if is_demo:  # strong augmentation needs a longer training (docs/recipe.md)
      config.train.steps *= 3
    else:  # the training of the demo is too short for crops
      # The paper's smallest crops show 64 of 512 pixels, enlarged; the slices of a test are never enlarged.
      config.augment.crop_probability = 0.3
      config.augment.crop_fractions = (3 / 4, 1 / 2)
  return config
