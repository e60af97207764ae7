"""Classification of slices (paper, section III-C and Table I)."""

import ml_collections

from configs import base
from fusa_jax import models


def get_config(preset: str = 'paper') -> ml_collections.ConfigDict:
  """paper: FUSA-ResNet-50 on 512 x 512 slices. demo: a narrow FUSA-ResNet-18 at a size for two CPU cores.

  A model's name is the paper's experiment with that model, `demo-` and a name the demo with it.
  """
  is_demo, name = base.read_preset(preset, 'configs/cls.py', models.CLASSIFIERS)
  config = base.paper()
  config.task = 'classification'
  config.train.loss = 'cross_entropy'
  config.model.name = name or ('fusa_resnet18' if is_demo else 'fusa_resnet50')
  if is_demo:
    base.demo(config)
    config.model.width = 16
    # A slice has one label where it has thousands of pixels: more slices to a step, each far cheaper.
    config.train.batch_size = 16
    config.train.steps = 1000
    config.train.evaluate_every = 250  # the best checkpoint comes early
    config.train.weight_decay = 0.05
  # The paper describes its crops for the segmentation task only.
  config.augment.crop_probability = 0.0
  return config
