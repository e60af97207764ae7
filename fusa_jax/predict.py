"""Scans in, masks and numbers out, on each scan's own grid. Config and weights come from the workdir alone."""

import dataclasses
import logging
import pathlib

import jax
import ml_collections
import numpy as np
import tqdm

from fusa_jax import checkpoint, ct, operating_point, run_config, sharding, tasks
from fusa_jax.errors import UserError
from fusa_jax.files import write_json


def predict(
  workdir: pathlib.Path,
  source: pathlib.Path,
  output: pathlib.Path,
  probabilities: bool = False,
  threshold: float | None = None,
  mesh=None,
) -> None:
  """Marks the lesions of one scan, or of every scan in a folder.

  For `NAME.nii.gz` a segmentation model writes `NAME_mask.nii.gz` (uint8, on the scan's grid, with its affines and
  their codes) and, on request, `NAME_probability.nii.gz` (float32). Every model writes `NAME.json`: positive slices and
  their scores, and the lesion's volume where there is a mask.

  Args:
    workdir: of a trained run.
    source: a .nii or .nii.gz file, or a folder of them (masks, `*_seg.nii*`, are left out).
    output: a folder; made where it is missing.
    probabilities: write them too.
    threshold: from which probability on something is a lesion; None: the run's own operating point.
    mesh: to predict on; None: all devices there are, however many it was trained on, each with slices of its own.

  Raises:
    UserError: no run; a threshold that is no probability; a mesh that cannot share its images; no scans, or scans that
      are refused (all of them named before the first one is predicted).
  """
  config = run_config.load(workdir)
  if config.data.fold == 'all':
    raise UserError(f'--workdir: {workdir} is a cross-validation; name the folder of one fold, {workdir / "fold0"}')
  if threshold is not None and not 0 <= threshold <= 1:
    raise UserError(f'--threshold: {threshold} is no probability; give one from 0 to 1')
  paths = find_scans(source)
  problems = []
  for path in paths if len(paths) > 1 else ():
    try:
      ct.read(path)
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
  for path in tqdm.tqdm(paths, desc='Predicting', unit='scan', disable=len(paths) == 1 or not sharding.is_main()):
    scan = ct.read(path)
    result, volumes = run(scan)
    if not sharding.is_main():
      continue
    for kind, volume in volumes.items():
      if kind == 'mask' or probabilities:
        ct.write(output / f'{ct.stem(path)}_{kind}.nii.gz', volume, scan)
    write_json(output / f'{ct.stem(path)}.json', result)
    logging.info('%s: %s', path.name, _one_line(result))


def find_scans(source: pathlib.Path) -> list[pathlib.Path]:
  """The scans that `source` names.

  Raises:
    UserError: there is none.
  """
  if source.is_dir():
    paths = sorted(p for p in source.iterdir() if ct.is_nifti(p) and not ct.stem(p).endswith('_seg'))
    if not paths:
      raise UserError(f'--input: no .nii or .nii.gz scan in {source}; give a scan, or a folder of scans')
    return paths
  if not source.is_file():
    raise UserError(f'--input: {source} does not exist; give a scan (.nii, .nii.gz), or a folder of scans')
  return [source]


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
  """A checkpoint at an operating point, as a function of one scan."""

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
    run = lambda variables, hu: task.probabilities(variables, hu, point.temperature)
    self._probabilities = sharding.compiled_together(jax.jit(run, out_shardings=sharding.replicated(mesh)))

  def __call__(self, scan: ct.Scan) -> tuple[dict, dict[str, np.ndarray]]:
    """What NAME.json holds, and the volumes 'mask' and 'probability' [S, H, W] (none for classification)."""
    probability = self._run(ct.network_slices(scan.values, self._config.data.image_size))
    result = {
      'scan': scan.path.name,
      'model': self._config.model.name,
      'step': self._step,
      **self._point.about(),
      'num_slices': len(scan.values),
    }
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

  def _run(self, images):
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
  volume = f'{result["lesion_ml"]:.1f} mL of lesion, ' if 'lesion_ml' in result else ''
  return f'{volume}{len(result["positive_slices"])} of {result["num_slices"]} slices positive'
