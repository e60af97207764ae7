"""Scans and pictures in, masks and numbers out, on each one's grid. Config and weights come from the workdir alone."""

import dataclasses
import logging
import pathlib
from collections.abc import Sequence

import jax
import ml_collections
import numpy as np
import tqdm

from fusa_jax import checkpoint, ct, operating_point, pictures, run_config, sharding, tasks
from fusa_jax.errors import UserError
from fusa_jax.files import write_json

# Pictures that are read and predicted before the first of them is written.
_TOGETHER = 64


def predict(
  workdir: pathlib.Path,
  source: pathlib.Path,
  output: pathlib.Path,
  probabilities: bool = False,
  threshold: float | None = None,
  mesh=None,
) -> None:
  """Marks the lesions of one scan or picture of a slice, or of all in a folder.

  For `NAME.nii.gz` a segmentation model writes `NAME_mask.nii.gz` (uint8, on the scan's grid, with its affines and
  their codes) and, on request, `NAME_probability.nii.gz` (float32). Every model writes `NAME.json`: positive slices and
  their scores, and the lesion's volume where there is a mask. For a picture, NAME.png or NAME.jpg, which only a model
  of grey values reads, the mask is a PNG of 0 and 255, in the picture's size, and the probability one of 0 to 255.

  Args:
    workdir: of a trained run.
    source: a .nii, .nii.gz, .png or .jpg file, or a folder of them (`*_seg`, `*_mask`, `*_probability` are left out).
    output: a folder; made where it is missing.
    probabilities: write them too.
    threshold: from which probability on something is a lesion; None: the run's own operating point.
    mesh: to predict on; None: all devices there are, however many it was trained on, each with slices of its own.

  Raises:
    UserError: no run; a threshold that is no probability; a mesh that cannot share its images; no scans, or scans that
      are refused, as of the other kind of values (all of them named before the first one is predicted).
  """
  config = run_config.load(workdir)
  if config.data.fold == 'all':
    raise UserError(f'--workdir: {workdir} is a cross-validation; name the folder of one fold, {workdir / "fold0"}')
  if threshold is not None and not 0 <= threshold <= 1:
    raise UserError(f'--threshold: {threshold} is no probability; give one from 0 to 1')
  kind = config.data['values']
  paths = find_images(source, kind)
  problems = []
  for path in paths if len(paths) > 1 else ():
    try:
      read(path, kind)
    except UserError as error:
      problems.append(str(error))
  if problems:
    raise UserError('\n'.join(problems))

  task, mesh = tasks.create(config), mesh or sharding.create_mesh()
  step, variables = load_variables(config, task, workdir, mesh)
  point = operating_point.load(workdir)
  if point.step != step:
    point = operating_point.OperatingPoint()
    if threshold is None:
      logging.warning(
        '%s: no operating point for step %d, so the threshold is 0.5; --mode=evaluate chooses one', workdir, step
      )
  if threshold is not None:
    point = dataclasses.replace(point, threshold=threshold, chosen_by='--threshold')
  run = Predictor(config, task, mesh, step, variables, point)
  drawn = [path for path in paths if pictures.is_picture(path)]
  # A scan fills batches of its own; pictures share them.
  parts = [[path] for path in paths if not pictures.is_picture(path)]
  parts += [drawn[start : start + _TOGETHER] for start in range(0, len(drawn), _TOGETHER)]
  with tqdm.tqdm(total=len(paths), desc='Predicting', disable=len(paths) == 1 or not sharding.is_main()) as bar:
    for part in parts:
      images = [read(path, kind) for path in part]
      results = run.pictures(images) if pictures.is_picture(part[0]) else [run(images[0])]
      for path, image, (result, found) in zip(part, images, results, strict=True):
        if sharding.is_main():
          _write(output, path, image, result, found, probabilities)
      bar.update(len(part))


def read(path: pathlib.Path, kind: str) -> ct.Scan | np.ndarray:
  """A scan, or a picture's values [H, W]; raises UserError as `ct.read` and `pictures.read`."""
  return pictures.read(path) if pictures.is_picture(path) else ct.read(path, kind)


def _write(output, path, image, result, found, probabilities):
  """Of a scan or a picture: its mask, its probabilities on request, and its numbers last."""
  name = _stem(path)
  result = {'picture' if pictures.is_picture(path) else 'scan': path.name, **result}
  for kind, values in found.items():
    if kind == 'probability' and not probabilities:
      continue
    if pictures.is_picture(path):
      pictures.write(output / f'{name}_{kind}.png', np.rint(values * 255).astype(np.uint8))
    else:
      ct.write(output / f'{name}_{kind}.nii.gz', values, image)
  write_json(output / f'{name}.json', result)
  logging.info('%s: %s', path.name, _one_line(result))


def _stem(path):
  return path.stem if pictures.is_picture(path) else ct.stem(path)


def find_images(source: pathlib.Path, kind: str) -> list[pathlib.Path]:
  """The scans and, for grey values, the pictures that `source` names.

  Raises:
    UserError: there is none; there are only pictures, and the values wanted are HU; two have one name.
  """
  if not source.exists():
    raise UserError(
      f'--input: {source} does not exist; give a scan (.nii, .nii.gz; of grey values also .png, .jpg), or a folder'
    )
  paths = [source]
  if source.is_dir():
    paths = sorted(path for path in source.iterdir() if ct.is_nifti(path) or pictures.is_picture(path))
    paths = [path for path in paths if not _stem(path).endswith(('_seg', '_mask', '_probability'))]
  scans = [path for path in paths if not pictures.is_picture(path)]
  if kind == 'hu':
    if paths and not scans:
      raise UserError(
        f'--input: {paths[0]} is a picture of grey values, and this run was trained on HU; give scans in HU, or a run '
        'trained with data.values=grey'
      )
    paths = scans
  if not paths:
    what = 'scan' if kind == 'hu' else 'scan or .png or .jpg picture'
    raise UserError(f'--input: no .nii or .nii.gz {what} in {source}; give a scan, or a folder of scans')
  known = {}
  for path in paths:
    if known.setdefault(_stem(path), path) != path:
      raise UserError(f'--input: {path} and {known[_stem(path)].name} would be written under one name; rename one')
  return paths


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
    """What NAME.json holds, and the volumes 'mask' and 'probability' [S, H, W] (none for classification)."""
    probability = self._run(scan.values)
    result = {**self._about(), 'num_slices': len(scan.values)}
    if probability.ndim == 1:
      positive = probability >= self._point.threshold
      scores, volumes = probability, {}
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

  def pictures(self, images: Sequence[np.ndarray]) -> list[tuple[dict, dict[str, np.ndarray]]]:
    """Of each image [H, W] of grey values, what `__call__` gives of a scan; 'mask' and 'probability' are [H, W]."""
    found = []
    for image, probability in zip(images, self._run(images), strict=True):
      masks, lesion = {}, {}
      if probability.ndim:
        (probability,) = ct.resize([probability], image.shape)
        mask = (probability >= self._point.threshold).astype(np.uint8)
        masks, lesion = {'mask': mask, 'probability': probability}, {'lesion_pixels': int(mask.sum())}
      score = float(probability.max())
      numbers = {**lesion, 'positive': score >= self._point.threshold, 'score': round(score, 4)}
      found.append(({**self._about(), **numbers}, masks))
    return found

  def _about(self):
    return {'model': self._config.model.name, 'step': self._step, **self._point.about()}

  def _run(self, slices):
    """Probabilities of slices, each [H, W]: [S], or [S, size, size]."""
    images = ct.network_slices(slices, self._config.data.image_size)
    size, out = self._batch_size, []
    rows = sharding.local_rows(self._mesh, size)
    for start in range(0, len(images), size):
      part = images[start : start + size]
      batch = np.zeros((size, *part.shape[1:]), part.dtype)
      batch[: len(part)] = part
      put = sharding.to_devices(self._mesh, size, rows, batch[rows])
      out.append(np.asarray(self._probabilities(self._variables, put))[: len(part)])
    return np.concatenate(out)


def _one_line(result):
  if 'picture' in result:
    pixels = f', {result["lesion_pixels"]} pixels' if 'lesion_pixels' in result else ''
    return f'{"lesion" if result["positive"] else "no lesion"} (score {result["score"]}){pixels}'
  volume = f'{result["lesion_ml"]:.1f} mL of lesion, ' if 'lesion_ml' in result else ''
  return f'{volume}{len(result["positive_slices"])} of {result["num_slices"]} slices positive'
