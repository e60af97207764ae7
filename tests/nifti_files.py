"""Small volumes and their NIfTI files in any orientation, shared by the tests that read scans."""

import nibabel as nib
import numpy as np

SHAPE = (7, 6, 5)


def chest(shape=SHAPE, seed=0):
  """Returns plausible HU: about a third air, the rest tissue."""
  rng = np.random.default_rng(seed)
  hu = rng.integers(-150, 400, shape)
  return np.where(rng.random(shape) < 0.3, rng.integers(-1000, -600, shape), hu).astype(np.int16)


def save(path, data, codes='LPS', spacing=(0.7, 0.8, 5.0), oblique=0.0, sform=True, image_class=nib.Nifti1Image):
  """Saves `data` as NIfTI. `codes` names the directions of its axes (x, y, z)."""
  path.parent.mkdir(parents=True, exist_ok=True)
  signs = {'R': (0, 1), 'L': (0, -1), 'A': (1, 1), 'P': (1, -1), 'S': (2, 1), 'I': (2, -1)}
  affine = np.eye(4)
  affine[:3, :3] = 0
  for column, code in enumerate(codes):
    axis, sign = signs[code]
    affine[axis, column] = sign * spacing[column]
  turn = np.eye(4)
  turn[:2, :2] = [[np.cos(oblique), -np.sin(oblique)], [np.sin(oblique), np.cos(oblique)]]
  affine = turn @ affine
  affine[:3, 3] = [12.5, -40.25, 300]
  image = image_class(data, affine)
  image.set_qform(affine, 1)
  image.set_sform(affine if sform else None, 2 if sform else 0)
  nib.save(image, path)
  return path
