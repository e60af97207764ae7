"""Lesion segmentation (paper, section III-D and Table II)."""

import ml_collections

from configs import base
from fusa_jax import models


def get_config(preset: str = 'paper') -> ml_collections.ConfigDict:
  """Returns the config of a preset.

  `paper` is FUSA-ResUnet on 512 x 512 slices. `demo` is a narrow FUSA-ResUnet, small enough for two CPU cores.
  The name of another model, for example `resunet`, trains that model as in `paper`; `demo-resunet` as in `demo`.
  """
  is_demo, name = base.read_preset(preset, 'configs/seg.py', models.SEGMENTERS)
  config = base.paper()
  config.task = 'segmentation'
  config.train.loss = 'cross_entropy_dice'
  config.model.name = name or 'fusa_resunet'
  if is_demo:
    base.demo(config)
  return config
