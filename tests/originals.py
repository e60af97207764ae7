"""PyTorch originals with random tensors, for comparisons; needs PyTorch."""

import numpy as np
import torch

from benchmarks import torch_reference

CLASSES, CHANNELS = 3, 3


def original(name, num_classes=CLASSES, in_channels=CHANNELS, **options):
  """Returns a PyTorch model with random tensors, including biases and the scales and statistics of norms."""
  torch.manual_seed(0)
  model = torch_reference.create(name, num_classes, in_channels, **options)
  with torch.no_grad():
    for key, buffer in model.named_buffers():
      if key.endswith('running_mean'):
        buffer.normal_(0, 0.1)
      if key.endswith('running_var'):
        buffer.uniform_(0.5, 1.5)
    for parameter in model.parameters():
      if parameter.ndim == 1:
        parameter.add_(torch.randn_like(parameter) * 0.1)
  return model


def as_torch(array):
  return torch.tensor(np.moveaxis(array, -1, 1)) if array.ndim == 4 else torch.tensor(array)
