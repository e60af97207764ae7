"""Applies a trained run to one scan or to pictures: returns probabilities, mask and numbers."""

import functools
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from fusa_jax import tasks
from fusa_jax.inference import bundle, explanation, postprocessing, trained
from fusa_jax.measures import patients
from fusa_jax.runs import operating_point, patient_rule
from fusa_jax.scans import neighbours, volumes
from fusa_jax.scans.archives import unpacking
from fusa_jax.scans.sources import find_sources
from fusa_jax.system import meshes, paths
from fusa_jax.system.errors import UserError
from fusa_jax.system.files import sha256

# Signs of the canonical axes (column, row, slice) in NIfTI's world coordinates: they run to the left, back and head.
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
  """Loads a trained run to predict scans: `load_predictor('runs/mine')('scan.nii.gz').mask`.

  Args:
    workdir: the folder of a run, a cross-validation or a bundle, also gs://BUCKET/FOLDER; or several runs. For a
      cross-validation or several runs it uses the mean probability.
    mesh: the mesh to compute on, of devices of this process. None: all of them, each with its own slices.
    threshold: lowest probability of a lesion. None, here and below: the value of the run's operating point.
    flips: whether to use the mean probability of each slice and its mirror image.
    lungs: whether to limit masks to the lungs, which it finds by their HU.
    smallest_ml: leave out lesions of a scan below this volume in mL.

  Raises:
    UserError: as `paths.to_path`, `trained.load_model`, `bundle.load_bundle` and `OperatingPoint.for_model`; several
      folders of which one is a bundle; or a mesh that cannot split the run's images.
  """
  mesh = mesh or meshes.create_mesh(devices=jax.local_devices())
  folders = [workdir] if isinstance(workdir, (str, os.PathLike)) else workdir
  folders = [paths.to_path(folder) for folder in folders]
  bundles = [folder for folder in folders if bundle.is_bundle(folder)]
  if bundles and len(folders) > 1:
    raise UserError(
      f'workdir: {bundles[0]} is a bundle and cannot be combined; give it alone, or export the runs together'
    )
  model, point = (
    bundle.load_bundle(bundles[0], mesh, flips) if bundles else trained.load_model(folders, mesh, flips, lungs)
  )
  point = point.for_model(model.task, model.values, threshold=threshold, lungs=lungs, smallest_ml=smallest_ml)
  return Predictor(model, point, mesh, operating_point.NO_RULE_IN_BUNDLE if bundles else operating_point.NO_RULE)


class Prediction(NamedTuple):
  """The result for a scan or a picture.

  Attributes:
    numbers: the results that NAME.json holds.
    mask: uint8 {0, 1} in the image's shape; None if the model predicts no masks.
    probability: float32 in the image's shape; None if the model predicts no masks.
    maps: the output of `Predictor.maps` for a scan or picture, if asked for.
  """

  numbers: dict
  mask: np.ndarray | None = None
  probability: np.ndarray | None = None
  maps: dict[str, np.ndarray] | None = None


class Predictor:
  """Applies a model at an operating point to one scan or to pictures.

  Attributes:
    model: computes the probabilities.
    point: the threshold and other settings that turn probabilities into masks.
  """

  def __init__(
    self, model: trained.Model, point: operating_point.OperatingPoint, mesh, no_rule: str = operating_point.NO_RULE
  ):
    self.model, self.point, self._mesh, self._no_rule = model, point, mesh, no_rule
    self._batch_size = meshes.fitting_batch(mesh, model.batch_size)
    meshes.check_divides(mesh, self._batch_size, model.image_size)
    self._probabilities = jax.jit(model.function, out_shardings=meshes.replicated(mesh))

  def __call__(
    self,
    image: str | pathlib.Path | volumes.Scan | np.ndarray,
    spacing: Sequence[float] | None = None,
    explain: bool = False,
  ) -> Prediction:
    """Predicts one scan or picture.

    Args:
      image: a file; a folder or .zip with one scan, for example a DICOM series; a `volumes.Scan`; or an array. An array
        has the axes of `volumes.Scan`, [S, H, W], and the values that the model takes (HU or 8-bit). An 8-bit array may
        also be one picture [H, W].
      spacing: for an array [S, H, W]: mm between slices, rows and columns. Without it a voxel counts as 1 mm³.
      explain: also compute the class-activation maps of a classifier.

    Raises:
      UserError: as `paths.check_local`, `find_sources`, `Source.read_image` and `volumes.from_volume`; the source holds
        several scans; the array has other dimensions; the operating point uses lungs or lesion volumes, or the model
        sees neighbouring slices, and the array has no spacing; `explain` is set and the model has no maps; or as
        `check_picture`.
    """
    if explain:
      self.check_explains()
    name, is_array = image if isinstance(image, (str, pathlib.Path)) else 'array', isinstance(image, np.ndarray)
    if isinstance(image, (str, pathlib.Path)):
      paths.check_local('image', image)
      image = self._read(pathlib.Path(image))
    elif is_array:
      image = self._from_array(image, spacing)
    is_scan = isinstance(image, volumes.Scan)
    if not is_scan:
      self.check_picture(name)
    prepared, between = self.prepare([image]), image.spacing[0] if is_scan else None
    probability = self.probabilities(prepared, between)
    maps = self.maps(prepared, between) if explain else None
    prediction = self.result(image, probability if is_scan else probability[0], maps)
    if is_scan and is_array and spacing is None and self._calls_by_mask:
      prediction.numbers['patient'] = patient_rule.no_answer(
        'the array has no spacing, so the volume of its mask is unknown; give it in mm'
      )
    return prediction

  @property
  def _calls_by_mask(self):
    rule = self.point.patient
    return rule is not None and rule.score_name in patients.OF_MASKS

  def _read(self, path):
    with unpacking() as unpacked:
      sources = find_sources(path, self.model.values, unpacked)
      if len(sources) > 1:
        raise UserError(f'{path}: holds {len(sources)} scans or pictures; give one, or use --mode=predict for all')
      return sources[0].read_image(self.model.values)

  def _from_array(self, array, spacing):
    if array.ndim == 2 and self.model.values == 'grey':
      volumes.check_grey(array, 'array')
      return array
    if array.ndim != 3:
      pictures = ', or a picture [H, W]' if self.model.values == 'grey' else ''
      raise UserError(f'array: has {array.ndim} dimensions; give slices [S, H, W]{pictures}')
    if spacing is None and (self.point.smallest_ml or self.point.lungs):
      raise UserError('spacing: missing, but needed to remove small lesions or limit masks to the lungs; give it in mm')
    if spacing is None and self.model.context.slices:
      raise UserError('spacing: missing, but needed to tell which slices are neighbours; give it in mm')
    affine = np.diag([*np.multiply(_CANONICAL, (1, 1, 1) if spacing is None else spacing[::-1]), 1.0])
    return volumes.from_volume(array.transpose(2, 1, 0), affine, pathlib.Path('array'), self.model.values)

  def prepare(self, images: Sequence[volumes.Scan | np.ndarray]) -> np.ndarray:
    """Resizes the slices of one scan, or 8-bit pictures [H, W], for the network: int16 [S, size, size]."""
    slices = images[0].values if isinstance(images[0], volumes.Scan) else images  # a scan is alone in `images`
    return volumes.network_slices(slices, self.model.image_size)

  def check_picture(self, name: Any) -> None:
    """Raises a UserError about the picture `name` if the model sees neighbouring slices, which a picture lacks."""
    if self.model.context.slices:
      count = self.model.context.channels
      raise UserError(
        f'{name}: a single picture, but the model sees {count} neighbouring slices at once (data.context); give a scan'
      )

  def probabilities(self, images: np.ndarray, spacing: float | None = None) -> np.ndarray:
    """Probabilities for the output of `prepare`: float32 [S] or [S, size, size].

    Args:
      images: the slices. For a model that sees neighbours: all slices of one scan, or slices with their neighbours
        [S, size, size, C].
      spacing: the distance between the slices of a scan in mm, for the neighbours.
    """
    return self._in_batches(self._probabilities, images, spacing)

  def check_explains(self) -> None:
    """Raises a UserError if the model has no class-activation maps."""
    if self.model.explainer is not None:
      return
    if tasks.type_of(self.model.task).has_masks:
      raise UserError('explain: applies to classification only, and this model gives masks; leave it out')
    raise UserError(
      'explain: needs the features inside the network, and a bundle gives only its output; give the folder of the run '
      'that was exported'
    )

  def maps(self, images: np.ndarray, spacing: float | None = None) -> dict[str, np.ndarray]:
    """Class-activation maps for the output of `prepare`: {name of explanation.MAPS: float32 [S, h, w]}.

    The maps are coarse; `volumes.resize` brings them to the size of the image, as their pictures and volumes have it.

    Args:
      images, spacing: as in `probabilities`.
    """
    maps = self._in_batches(self._maps, images, spacing)
    return {name: maps[name] for name in explanation.MAPS if name in maps}  # jit sorts the names

  @functools.cached_property
  def _maps(self):
    return jax.jit(self.model.explainer.function, out_shardings=meshes.replicated(self._mesh))

  @functools.cached_property
  def map_names(self) -> list[str]:
    """The names of the maps that `maps` returns."""
    slices = jax.ShapeDtypeStruct((1, *self.model.context.shape(self.model.image_size)), np.int16)
    shapes = jax.eval_shape(self.model.explainer.function, self.model.variables, slices)
    return [name for name in explanation.MAPS if name in shapes]

  def _in_batches(self, function, images, spacing):
    """Applies a jitted function to all images, in batches; returns its arrays on the host."""
    context, size, out = self.model.context, self._batch_size, []
    rows = meshes.local_rows(self._mesh, size)
    indices = context.indices(len(images), spacing) if context.slices and images.ndim == 3 else None
    for start in range(0, len(images), size):
      span = slice(start, start + size)
      part = images[span] if indices is None else neighbours.stacked(images, indices[span])
      batch = np.zeros((size, *part.shape[1:]), part.dtype)
      batch[: len(part)] = part
      put = meshes.to_devices(self._mesh, size, rows, batch[rows])
      out.append(function(self.model.variables, put))
      if len(out) > 1:  # fetch the last result while the devices compute the next one
        out[-2] = jax.tree.map(np.asarray, out[-2])
    return jax.tree.map(lambda *parts: np.concatenate(parts)[: len(images)], *out)

  def sha256(self) -> str:
    """The digest of all that decides a result beside the input: the model, and the operating point."""
    point = {key: value for key, value in self.point.about().items() if key != 'chosen_by'}
    model = self.model
    context = [list(model.context)] if model.context.slices else []
    return sha256(json.dumps([model.sha256, model.values, model.image_size, point, *context]).encode())

  def result(
    self, image: volumes.Scan | np.ndarray, probability: np.ndarray, maps: dict[str, np.ndarray] | None = None
  ) -> Prediction:
    """Makes the mask and the numbers of a scan or picture from its probabilities.

    Args:
      image: a scan, or a picture [H, W].
      probability: the output of `probabilities` for the image: all slices of a scan, or the one slice of a picture.
      maps: the output of `maps` for the image. The numbers then have `explanation`.
    """
    about = {'model': self.model.name, 'step': self.model.step, 'values': self.model.values, **self.point.about()}
    about.pop('patient', None)  # the answer for the patient repeats the rule
    if self.model.context.slices:
      about |= {'context': self.model.context.slices, 'context_mm': self.model.context.mm}
    if isinstance(image, volumes.Scan):
      prediction = self._predict_scan(image, probability)
    else:
      prediction = self._predict_picture(image, probability)
      del about['lungs'], about['smallest_ml']  # these settings apply to scans only
    numbers = about | prediction.numbers
    if maps is not None:
      numbers['explanation'] = explanation.about(maps, np.atleast_1d(probability), self.point.threshold)
    return prediction._replace(numbers=numbers, maps=maps)

  def _predict_scan(self, scan, probability):
    numbers, mask = {'num_slices': len(scan.values)}, None
    highest = probability.reshape(len(probability), -1).max(axis=1)  # in the network's size, as for the choice
    if probability.ndim == 1:
      positive, scores, probability = probability >= self.point.threshold, probability, None
    else:
      probability = volumes.resize(probability, scan.values.shape[1:])
      mask = postprocessing.refine(
        (probability >= self.point.threshold).astype(np.uint8), scan, self.point.lungs, self.point.smallest_ml
      )
      positive, scores = mask.any(axis=(1, 2)), probability.max(axis=(1, 2))
      numbers['lesion_ml'] = float(mask.sum(dtype=np.int64) * scan.voxel_ml)
    # Slice 0 is the most inferior one, for any order of slices in the file.
    numbers['positive_slices'] = [int(index) for index in np.flatnonzero(positive)]
    numbers['slice_scores'] = [round(float(score), 4) for score in scores]
    numbers['patient'] = self._answer(scan, highest, mask)
    return Prediction(numbers, mask, probability)

  def _answer(self, scan, highest, mask):
    """Returns the score and the call of a scan's patient (`PatientRule.answer`)."""
    rule = self.point.patient
    if rule is None:
      return patient_rule.no_answer(self._no_rule)
    of_mask = postprocessing.score_of_mask(mask, scan, rule.score_name) if self._calls_by_mask else None
    return rule.answer(highest, of_mask)

  def _predict_picture(self, image, probability):
    score = float(probability.max())
    numbers = {'positive': score >= self.point.threshold, 'score': round(score, 4)}
    if not probability.ndim:
      return Prediction(numbers)
    (probability,) = volumes.resize([probability], image.shape)
    mask = (probability >= self.point.threshold).astype(np.uint8)
    return Prediction({'lesion_pixels': int(mask.sum()), **numbers}, mask, probability)
