"""Lesion segmentation (paper, section III-D and Table II)."""

import ml_collections

from configs import base
from fusa_jax import models


def get_config(preset: str = 'paper') -> ml_collections.ConfigDict:
  """paper: FUSA-ResUnet on 512 x 512 slices. demo: a narrow one at a size for two CPU cores.

  A model's name is the paper's experiment with that model, `demo-` and a name the demo with it.
  """
  is_demo, name = base.read_preset(preset, 'configs/seg.py', models.SEGMENTERS)
  config = base.paper()
  config.task = 'segmentation'
  config.train.loss = 'cross_entropy_dice'
  config.model.name = name or 'fusa_resunet'
  if is_demo:
    base.demo(config)
  return config
