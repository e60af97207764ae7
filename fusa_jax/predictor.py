"""A trained run as a function of one scan, or of pictures: probabilities, mask and numbers."""

import pathlib
from collections.abc import Sequence

import jax
import ml_collections
import numpy as np

from fusa_jax import checkpoint, ct, dicom, operating_point, pictures, sharding, tasks


def read(path: pathlib.Path | dicom.Series, kind: str) -> ct.Scan | np.ndarray:
  """A scan, or a picture's values [H, W]; raises UserError as `ct.read`, `dicom.read` and `pictures.read`."""
  if isinstance(path, dicom.Series):
    return dicom.read(path, kind)
  return pictures.read(path) if isinstance(path, pathlib.Path) and pictures.is_picture(path) else ct.read(path, kind)


def load_variables(config, task: tasks.Task, workdir: pathlib.Path, mesh) -> tuple[int, dict]:
  """The best checkpoint's step and variables, on all devices of the mesh.

  Raises:
    UserError: the run has no checkpoint.
  """
  init = lambda: task.init(jax.random.key(0), config.data.image_size)
  like = checkpoint.shapes(jax.eval_shape(init), sharding.replicated(mesh))
  with checkpoint.Checkpoints(workdir) as checkpoints:
    step = checkpoints.best()
    return step, checkpoints.restore(step, variables=like)['variables']


class Predictor:
  """A checkpoint at an operating point, as a function of one scan, or of pictures."""

  def __init__(
    self,
    config: ml_collections.ConfigDict,
    task: tasks.Task,
    mesh,
    step: int,
    variables: dict,
    point: operating_point.OperatingPoint,
  ):
    self._config, self._mesh, self._step, self._variables, self._point = config, mesh, step, variables, point
    self._batch_size = sharding.fitting_batch(mesh, config.train.batch_size)
    sharding.check_divides(mesh, self._batch_size, config.data.image_size)
    run = lambda variables, slices: task.probabilities(variables, slices, point.temperature)
    self._probabilities = sharding.compiled_together(jax.jit(run, out_shardings=sharding.replicated(mesh)))

  def __call__(self, scan: ct.Scan) -> tuple[dict, dict[str, np.ndarray]]:
    """What `result` gives of a scan and its probabilities."""
    return self.result(scan, self.probabilities(self.prepare([scan])))

  def prepare(self, images: Sequence[ct.Scan | np.ndarray]) -> np.ndarray:
    """The slices of one scan, or pictures [H, W] of grey values, as the network sees them: int16 [S, size, size]."""
    slices = images[0].values if isinstance(images[0], ct.Scan) else images  # a scan is a part of its own
    return ct.network_slices(slices, self._config.data.image_size)

  def probabilities(self, images: np.ndarray) -> np.ndarray:
    """Of what `prepare` gives: float32 [S], or [S, size, size]. All processes of a run call it in the same order."""
    size, out = self._batch_size, []
    rows = sharding.local_rows(self._mesh, size)
    for start in range(0, len(images), size):
      part = images[start : start + size]
      batch = np.zeros((size, *part.shape[1:]), part.dtype)
      batch[: len(part)] = part
      put = sharding.to_devices(self._mesh, size, rows, batch[rows])
      out.append(self._probabilities(self._variables, put))
      if len(out) > 1:  # fetched while the devices work on the next batch
        out[-2] = np.asarray(out[-2])
    return np.concatenate(out)[: len(images)]

  def result(self, image: ct.Scan | np.ndarray, probability: np.ndarray) -> tuple[dict, dict[str, np.ndarray]]:
    """What NAME.json holds of a scan or picture, and 'mask' and 'probability' in its shape (none for classification).

    Args:
      image: a scan, or a picture [H, W].
      probability: its own of `probabilities`: of each slice of a scan, of the one of a picture.
    """
    about = {'model': self._config.model.name, 'step': self._step, **self._point.about()}
    of_kind = self._of_scan if isinstance(image, ct.Scan) else self._of_picture
    result, volumes = of_kind(image, probability)
    return about | result, volumes

  def _of_scan(self, scan, probability):
    result, volumes = {'num_slices': len(scan.values)}, {}
    if probability.ndim == 1:
      positive, scores = probability >= self._point.threshold, probability
    else:
      probability = ct.resize(probability, scan.values.shape[1:])
      mask = (probability >= self._point.threshold).astype(np.uint8)
      volumes = {'mask': mask, 'probability': probability}
      positive, scores = mask.any(axis=(1, 2)), probability.max(axis=(1, 2))
      result['lesion_ml'] = float(mask.sum(dtype=np.int64) * scan.voxel_ml)
    # 0 is the most inferior slice, however the file is stored.
    result['positive_slices'] = [int(index) for index in np.flatnonzero(positive)]
    result['slice_scores'] = [round(float(score), 4) for score in scores]
    return result, volumes

  def _of_picture(self, image, probability):
    masks, lesion = {}, {}
    if probability.ndim:
      (probability,) = ct.resize([probability], image.shape)
      mask = (probability >= self._point.threshold).astype(np.uint8)
      masks, lesion = {'mask': mask, 'probability': probability}, {'lesion_pixels': int(mask.sum())}
    score = float(probability.max())
    return {**lesion, 'positive': score >= self._point.threshold, 'score': round(score, 4)}, masks
