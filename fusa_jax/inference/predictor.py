"""A trained run as a function of one scan, or of pictures: probabilities, mask and numbers."""

import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from fusa_jax.inference import bundle, postprocessing, trained
from fusa_jax.runs import operating_point
from fusa_jax.scans import volumes
from fusa_jax.scans.archives import unpacking
from fusa_jax.scans.sources import find_sources
from fusa_jax.system import hosts, meshes
from fusa_jax.system.errors import UserError

# Signs of canonical axes (column, row, slice) in NIfTI's world: to the left, the back and the head.
_CANONICAL = (-1, -1, 1)


def load_predictor(
  workdir: str | pathlib.Path | Sequence[str | pathlib.Path],
  mesh=None,
  *,
  threshold: float | None = None,
  flips: bool | None = None,
  lungs: bool | None = None,
  smallest_ml: float | None = None,
) -> 'Predictor':
  """A trained run, ready for scans: `load_predictor('runs/mine')('scan.nii.gz').mask`.

  Args:
    workdir: of a run; of a cross-validation or several runs, of which the mean probability is taken; or a bundle that
      they were exported as.
    mesh: to compute on; None: all devices there are, however many it was trained on, each with slices of its own.
    threshold: from which probability on something is a lesion; None here and below: as the run's operating point says.
    flips: whether slices are also taken mirrored, and the mean of both.
    lungs: whether masks are limited to the lungs, which their HU tell.
    smallest_ml: lesions of a scan below so many mL are left out.

  Raises:
    UserError: as `trained.load_model`, `bundle.load_bundle` and `OperatingPoint.for_model`; a bundle among several; a
      mesh that cannot share the run's images.
  """
  mesh = mesh or meshes.create_mesh()
  folders = [workdir] if isinstance(workdir, (str, pathlib.Path)) else workdir
  folders = [pathlib.Path(folder) for folder in folders]
  bundles = [folder for folder in folders if bundle.is_bundle(folder)]
  if bundles and len(folders) > 1:
    raise UserError(
      f'workdir: {bundles[0]} is a bundle, and stands alone; for the mean of several runs export them together'
    )
  model, point = (
    bundle.load_bundle(bundles[0], mesh, flips) if bundles else trained.load_model(folders, mesh, flips, lungs)
  )
  point = point.for_model(model.task, model.values, threshold=threshold, lungs=lungs, smallest_ml=smallest_ml)
  return Predictor(model, point, mesh)


class Prediction(NamedTuple):
  """What was found in a scan or a picture.

  Attributes:
    numbers: what NAME.json holds of it.
    mask: uint8 {0, 1}, in the image's shape; None of a model that gives none.
    probability: float32, likewise.
  """

  numbers: dict
  mask: np.ndarray | None = None
  probability: np.ndarray | None = None


class Predictor:
  """A model at an operating point, as a function of one scan, or of pictures.

  Attributes:
    model: what computes the probabilities.
    point: what makes masks of them.
  """

  def __init__(self, model: trained.Model, point: operating_point.OperatingPoint, mesh):
    self.model, self.point, self._mesh = model, point, mesh
    self._batch_size = meshes.fitting_batch(mesh, model.batch_size)
    meshes.check_divides(mesh, self._batch_size, model.image_size)
    run = jax.jit(model.function, out_shardings=meshes.replicated(mesh))
    self._probabilities = hosts.compiled_together(run)

  def __call__(
    self, image: str | pathlib.Path | volumes.Scan | np.ndarray, spacing: Sequence[float] | None = None
  ) -> Prediction:
    """What is found in one scan or picture.

    Args:
      image: a file, or a folder or .zip that holds one scan, as a DICOM series; a scan; an array of HU or grey values,
        whichever the model takes, on the axes of `volumes.Scan` [S, H, W]; or a picture of grey values [H, W].
      spacing: of an array [S, H, W], mm between slices, rows and columns. Without it a voxel counts as 1 mm³.

    Raises:
      UserError: as `find_sources`, `Source.read_image` and `volumes.from_volume`; several scans; an array of other
        dimensions; lesions to be left out, or limited to the lungs, in an array without spacing.
    """
    if isinstance(image, (str, pathlib.Path)):
      image = self._read(pathlib.Path(image))
    elif isinstance(image, np.ndarray):
      image = self._from_array(image, spacing)
    found = self.probabilities(self.prepare([image]))
    return self.result(image, found if isinstance(image, volumes.Scan) else found[0])

  def _read(self, path):
    with unpacking() as unpacked:
      sources = find_sources(path, self.model.values, unpacked)
      if len(sources) > 1:
        raise UserError(f'{path}: holds {len(sources)} scans or pictures; give one, or all to --mode=predict')
      return sources[0].read_image(self.model.values)

  def _from_array(self, array, spacing):
    if array.ndim == 2 and self.model.values == 'grey':
      volumes.check_grey(array, 'array')
      return array
    if array.ndim != 3:
      pictures = ', or a picture [H, W]' if self.model.values == 'grey' else ''
      raise UserError(f'array: of {array.ndim} dimensions; give slices [S, H, W]{pictures}')
    if spacing is None and (self.point.smallest_ml or self.point.lungs):
      raise UserError('spacing: missing; this model leaves out what is too small, or outside of the lungs; give mm')
    affine = np.diag([*np.multiply(_CANONICAL, (1, 1, 1) if spacing is None else spacing[::-1]), 1.0])
    return volumes.from_volume(array.transpose(2, 1, 0), affine, pathlib.Path('array'), self.model.values)

  def prepare(self, images: Sequence[volumes.Scan | np.ndarray]) -> np.ndarray:
    """The slices of one scan, or pictures [H, W] of grey values, as the network sees them: int16 [S, size, size]."""
    slices = images[0].values if isinstance(images[0], volumes.Scan) else images  # a scan is a part of its own
    return volumes.network_slices(slices, self.model.image_size)

  def probabilities(self, images: np.ndarray) -> np.ndarray:
    """Of what `prepare` gives: float32 [S], or [S, size, size]. All processes of a run call it in the same order."""
    size, out = self._batch_size, []
    rows = meshes.local_rows(self._mesh, size)
    for start in range(0, len(images), size):
      part = images[start : start + size]
      batch = np.zeros((size, *part.shape[1:]), part.dtype)
      batch[: len(part)] = part
      put = meshes.to_devices(self._mesh, size, rows, batch[rows])
      out.append(self._probabilities(self.model.variables, put))
      if len(out) > 1:  # fetched while the devices work on the next batch
        out[-2] = np.asarray(out[-2])
    return np.concatenate(out)[: len(images)]

  def result(self, image: volumes.Scan | np.ndarray, probability: np.ndarray) -> Prediction:
    """What follows from the probabilities of a scan or picture.

    Args:
      image: a scan, or a picture [H, W].
      probability: its own of `probabilities`: of each slice of a scan, of the one of a picture.
    """
    about = {'model': self.model.name, 'step': self.model.step, 'values': self.model.values, **self.point.about()}
    if isinstance(image, volumes.Scan):
      found = self._of_scan(image, probability)
    else:
      found = self._of_picture(image, probability)
      del about['lungs'], about['smallest_ml']  # which are about volumes
    return found._replace(numbers=about | found.numbers)

  def _of_scan(self, scan, probability):
    numbers, mask = {'num_slices': len(scan.values)}, None
    if probability.ndim == 1:
      positive, scores, probability = probability >= self.point.threshold, probability, None
    else:
      probability = volumes.resize(probability, scan.values.shape[1:])
      mask = postprocessing.refine(
        (probability >= self.point.threshold).astype(np.uint8), scan, self.point.lungs, self.point.smallest_ml
      )
      positive, scores = mask.any(axis=(1, 2)), probability.max(axis=(1, 2))
      numbers['lesion_ml'] = float(mask.sum(dtype=np.int64) * scan.voxel_ml)
    # 0 is the most inferior slice, however the file is stored.
    numbers['positive_slices'] = [int(index) for index in np.flatnonzero(positive)]
    numbers['slice_scores'] = [round(float(score), 4) for score in scores]
    return Prediction(numbers, mask, probability)

  def _of_picture(self, image, probability):
    score = float(probability.max())
    said = {'positive': score >= self.point.threshold, 'score': round(score, 4)}
    if not probability.ndim:
      return Prediction(said)
    (probability,) = volumes.resize([probability], image.shape)
    mask = (probability >= self.point.threshold).astype(np.uint8)
    return Prediction({'lesion_pixels': int(mask.sum()), **said}, mask, probability)
