"""Applies a trained run to one scan or to pictures: returns probabilities, mask and numbers."""

import functools
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from fusa_jax import tasks
from fusa_jax.inference import bundle, class_numbers, explanation, postprocessing, trained
from fusa_jax.measures import patients
from fusa_jax.runs import operating_point, patient_rule
from fusa_jax.scans import lungs, neighbours, volumes
from fusa_jax.scans.archives import unpacking
from fusa_jax.scans.classes import together
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
  threshold: float | Mapping[str, float] | None = None,
  flips: bool | None = None,
  lungs: bool | None = None,
  smallest_ml: float | Mapping[str, float] | None = None,
) -> 'Predictor':
  """Loads a trained run to predict scans: `load_predictor('runs/mine')('scan.nii.gz').mask`.

  Args:
    workdir: the folder of a run, a cross-validation or a bundle, also gs://BUCKET/FOLDER; or several runs. For a
      cross-validation or several runs it uses the mean probability.
    mesh: the mesh to compute on, of devices of this process. None: all of them, each with its own slices.
    threshold: lowest probability of a lesion; of several classes, the values of some by name. None, here and below: the
      value of the run's operating point.
    flips: whether to use the mean probability of each slice and its mirror image.
    lungs: whether to limit masks to the lungs, which it finds by their HU.
    smallest_ml: leave out lesions of a scan below this volume in mL; of several classes, the values of some by name.

  Raises:
    UserError: as `paths.to_path`, `trained.load_model`, `bundle.load_bundle` and `operating_point.for_model`; several
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
  model, points = (
    bundle.load_bundle(bundles[0], mesh, flips) if bundles else trained.load_model(folders, mesh, flips, lungs)
  )
  points = operating_point.for_model(
    points, model.task, model.values, threshold=threshold, lungs=lungs, smallest_ml=smallest_ml
  )
  return Predictor(model, points, mesh, operating_point.NO_RULE_IN_BUNDLE if bundles else operating_point.NO_RULE)


class Prediction(NamedTuple):
  """The result for a scan or a picture.

  Attributes:
    numbers: the results that NAME.json holds.
    mask: the mask as it is written, in the image's shape: uint8 {0, 1}, or the values of data.classes
      (`Classes.written`); None if the model predicts no masks.
    probability: float32 in the image's shape, of several classes with a last axis for these; None if the model predicts
      no masks.
    maps: the output of `Predictor.maps` for a scan or picture, if `explain` was set.
    masks: the mask of each class by its name, uint8 {0, 1}; None if the model predicts no masks.
  """

  numbers: dict
  mask: np.ndarray | None = None
  probability: np.ndarray | None = None
  maps: dict[str, np.ndarray] | None = None
  masks: dict[str, np.ndarray] | None = None


class Predictor:
  """Applies a model at its operating points to one scan or to pictures.

  Attributes:
    model: computes the probabilities.
    points: for each class, the threshold and other settings that turn probabilities into a mask.
  """

  def __init__(
    self, model: trained.Model, points: operating_point.Points, mesh, no_rule: str = operating_point.NO_RULE
  ):
    self.model, self.points, self._mesh, self._no_rule = model, points, mesh, no_rule
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
        several scans; the array has other dimensions; an operating point uses lungs or lesion volumes, or the model
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
    if is_scan and is_array and spacing is None:
      for name, numbers in class_numbers.by_class(prediction.numbers).items():
        if _calls_by_mask(self.points[name].patient):
          numbers['patient'] = patient_rule.no_answer(
            'the array has no spacing, so the volume of its mask is unknown; give it in mm'
          )
    return prediction

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
    if spacing is None and any(point.smallest_ml or point.lungs for point in self.points.values()):
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
    """Probabilities for the output of `prepare`: float32 [S] or [S, size, size]; of several classes [..., classes].

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

    Of several classes, maps that each class has for itself (`explanation.Map.of_class`) are [S, h, w, classes]. The
    maps are coarse; `volumes.resize` brings them to the size of the image, as their pictures and volumes have it.

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
    """The digest of all that decides a result beside the input: the model, and its operating points and classes."""
    points = {
      name: {key: value for key, value in point.about().items() if key != 'chosen_by'}
      for name, point in self.points.items()
    }
    model, classes = self.model, self.model.classes
    # Runs of the slice alone, and of one class without mask values of its own, keep their digest.
    others = [list(model.context)] if model.context.slices else []
    others += [{'classes': classes.names, 'values': classes.values}] if classes.are_given else []
    of_points = points if len(points) > 1 else points[classes.names[0]]
    return sha256(json.dumps([model.sha256, model.values, model.image_size, of_points, *others]).encode())

  def result(
    self, image: volumes.Scan | np.ndarray, probability: np.ndarray, maps: dict[str, np.ndarray] | None = None
  ) -> Prediction:
    """Makes the mask and the numbers of a scan or picture from its probabilities.

    Args:
      image: a scan, or a picture [H, W].
      probability: the output of `probabilities` for the image: all slices of a scan, or the one slice of a picture.
      maps: the output of `maps` for the image. The numbers then have `explanation`.
    """
    is_scan, model = isinstance(image, volumes.Scan), self.model
    options = {name: point.about() for name, point in self.points.items()}
    for each in options.values():
      each.pop('patient', None)  # the answer for the patient repeats the rule
      if not is_scan:
        del each['lungs'], each['smallest_ml']  # these settings apply to scans only
    head = {'model': model.name, 'step': model.step, 'values': model.values}
    tail = {'context': model.context.slices, 'context_mm': model.context.mm} if model.context.slices else {}
    if is_scan:
      tail['num_slices'] = len(image.values)
    field = functools.cache(lambda: lungs.field(image))
    resized, masks = self._masks(image, probability, field)
    bits = together(masks.values()) if masks else None
    if is_scan:
      results = self._results_of_scan(image, probability, resized, masks, field)
    else:
      results = self._results_of_picture(probability, masks)
    if maps is not None:
      self._explain(results, probability, maps)
    if masks and len(masks) > 1:
      name, unit = ('file_ml', image.voxel_ml) if is_scan else ('file_pixels', 1)
      for each, count in zip(results.values(), model.classes.shown(bits), strict=True):
        each[name] = count * unit
    numbers = class_numbers.combined(model.classes, head, options, tail, results)
    if model.classes.exclusive:
      numbers |= _highest(model.classes.names, probability)
    if masks is None:
      return Prediction(numbers, maps=maps)
    return Prediction(numbers, model.classes.labels(bits), resized if len(masks) > 1 else resized[..., 0], maps, masks)

  def _by_class(self, probability):
    """The probabilities of each class, without an axis of classes."""
    names = self.model.classes.names
    return {name: probability[..., k] for k, name in enumerate(names)} if len(names) > 1 else {names[0]: probability}

  def _masks(self, image, probability, field):
    """Returns the probabilities in the size of a scan or picture, [..., H, W, classes], and the mask of each class."""
    if not tasks.type_of(self.model.task).has_masks:
      return None, None
    is_scan, of_each = isinstance(image, volumes.Scan), self._by_class(probability)
    shape = image.values.shape if is_scan else image.shape
    resize = lambda each: volumes.resize(each, shape[1:]) if is_scan else volumes.resize([each], shape)[0]
    resized = [resize(each) for each in of_each.values()]
    resized = np.stack(resized) if len(resized) > 1 else resized[0][None]
    masks = {
      name: (each >= self.points[name].threshold).astype(np.uint8) for name, each in zip(of_each, resized, strict=True)
    }
    if is_scan:
      has_lesion = operating_point.shared(self.points).lungs and any(mask.any() for mask in masks.values())
      for name, point in self.points.items():
        in_lungs = field() if has_lesion else None
        masks[name] = postprocessing.refine(masks[name], image, point.lungs, point.smallest_ml, in_lungs)
    return np.moveaxis(resized, 0, -1), masks

  def _results_of_scan(self, scan, probability, resized, masks, field):
    """Returns the results by class."""
    results = {}
    for number, (name, each) in enumerate(self._by_class(probability).items()):
      highest = each.reshape(len(each), -1).max(axis=1)  # in the network's size, as for the choice
      numbers, mask = {}, None
      if masks is None:
        positive, scores = each >= self.points[name].threshold, each
      else:
        mask = masks[name]
        positive, scores = mask.any(axis=(1, 2)), resized[..., number].max(axis=(1, 2))
        numbers['lesion_ml'] = float(mask.sum(dtype=np.int64) * scan.voxel_ml)
      # Slice 0 is the most inferior one, for any order of slices in the file.
      numbers['positive_slices'] = [int(index) for index in np.flatnonzero(positive)]
      numbers['slice_scores'] = [round(float(score), 4) for score in scores]
      numbers['patient'] = self._answer(self.points[name].patient, scan, highest, mask, field)
      results[name] = numbers
    return results

  def _answer(self, rule, scan, highest, mask, field):
    """Returns the score and the call of a scan's patient (`PatientRule.answer`)."""
    if rule is None:
      return patient_rule.no_answer(self._no_rule)
    of_mask = None
    if _calls_by_mask(rule):
      in_lungs = field() if rule.score_name == 'lung_share' else None
      of_mask = postprocessing.score_of_mask(mask, scan, rule.score_name, in_lungs)
    return rule.answer(highest, of_mask)

  def _explain(self, results, probability, maps):
    """Adds to the results of each class what they say of its maps."""
    called = np.atleast_2d(probability).argmax(axis=1) if self.model.classes.exclusive else None
    for number, (name, each) in enumerate(self._by_class(probability).items()):
      scores = np.atleast_1d(each)
      positive = scores >= self.points[name].threshold if called is None else called == number
      results[name]['explanation'] = explanation.about(explanation.of_class(maps, number), scores, positive)

  def _results_of_picture(self, probability, masks):
    """Returns the results by class."""
    results = {}
    for name, each in self._by_class(probability).items():
      score = float(each.max())
      numbers = {} if masks is None else {'lesion_pixels': int(masks[name].sum())}
      results[name] = numbers | {'positive': score >= self.points[name].threshold, 'score': round(score, 4)}
    return results


def _highest(names, probability):
  """Returns the exclusive class with the highest probability: of each slice [S, K] and their mean, or of a picture [K].

  That of a scan is the class of `measures.exclusive.of_patients`, for a patient with one scan.
  """
  mean = np.atleast_2d(probability).mean(axis=0, dtype=np.float64)
  probabilities = dict(zip(names, mean.round(4).tolist(), strict=True))
  found = {'predicted_class': names[int(mean.argmax())], 'probabilities': probabilities}
  if probability.ndim == 1:
    return found
  return found | {'slice_classes': [names[number] for number in probability.argmax(axis=1).tolist()]}


def _calls_by_mask(rule):
  return rule is not None and rule.score_name in patients.OF_MASKS
