"""Lesion segmentation (paper, section III-D and Table II)."""

import ml_collections

from configs import base

PRESETS = ('paper', 'demo')


def get_config(preset: str = 'paper') -> ml_collections.ConfigDict:
  """paper: FUSA-ResUnet on 512 x 512 slices. demo: a narrow one at a size for two CPU cores."""
  if preset not in PRESETS:
    raise ValueError(f'configs/seg.py has no preset {preset!r}; one of {", ".join(PRESETS)}')
  config = base.paper()
  config.task = 'segmentation'
  config.model.name = 'fusa_resunet'
  if preset == 'demo':
    base.demo(config)
  return config
