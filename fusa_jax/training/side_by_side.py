"""Draws the masks of two segmentation runs side by side, as in the paper's Fig. 4."""

import functools
import pathlib
from collections.abc import Callable

import numpy as np

from fusa_jax import tasks
from fusa_jax.inference import trained
from fusa_jax.inference.predictor import Predictor
from fusa_jax.runs import figures, result_files, run_config
from fusa_jax.scans.classes import of_class
from fusa_jax.scans.neighbours import middle
from fusa_jax.system import meshes
from fusa_jax.system.errors import UserError
from fusa_jax.tasks import window
from fusa_jax.training import datasets


def pictures(
  workdir: pathlib.Path, against: pathlib.Path, data_dir: pathlib.Path, most: int
) -> dict[str, Callable[[pathlib.Path], None]]:
  """Returns functions that draw the slices on which two runs differ most, one slice per patient, as PNG files, by name.

  Args:
    workdir: the folder of a run or cross-validation.
    against: the folder of another one, which `compare.compare` can compare with the first.
    data_dir: the folder of the prepared dataset that both were tested on.
    most: the largest number of slices.

  Raises:
    UserError: the runs have no masks, or differ in image size, intensity, fold, classes or neighbours (data.context).
  """
  config, other = (run_config.load_config(one) for one in (workdir, against))
  if not tasks.type_of(config.task).has_masks:
    raise UserError('overlays: applies to masks only, and these runs give none; leave it out')
  for key in ('image_size', 'intensity', 'fold', 'context', *(['context_mm'] if config.data.context else [])):
    if config.data[key] != other.data[key]:
      raise UserError(f'overlays: the runs differ in data.{key} ({config.data[key]}, {other.data[key]}); leave it out')
  classes = [tasks.classes_of(one).names for one in (config, other)]
  if classes[0] != classes[1]:
    raise UserError('overlays: the runs differ in data.classes; leave it out')
  parts = [result_files.read_parts(one, classes[0]) for one in (workdir, against)]
  chosen = {name: slices_that_differ(*(of_run[name].table for of_run in parts), most) for name in classes[0]}
  names = [f'{number} {one.resolve().name}' for number, one in enumerate((workdir, against), 1)]
  shown = window.black_and_white(config.data.intensity, config.data.window)
  writers = {}
  folds = zip(*map(trained.runs, (workdir, against)), strict=True)
  for runs in folds:
    fold = run_config.load_config(runs[0]).data.fold
    split = datasets.load_dataset(data_dir, fold, config.data.image_size, tasks.context_of(config)).test
    keys, wanted = _keys({'patient': split.patient, 'slice': split.slice}), set().union(*chosen.values())
    rows = [row for row, key in enumerate(keys) if key in wanted]
    if not rows:
      continue
    examples = [split.source[row] for row in rows]
    images = np.stack([example['image'] for example in examples])
    masks = [_masks(run, images) for run in runs]
    for k, (row, example) in enumerate(zip(rows, examples, strict=True)):
      patient, number = keys[row]
      for which, name in enumerate(classes[0]):
        if keys[row] not in chosen[name]:
          continue
        folder = result_files.folder_of(pathlib.PurePosixPath(), name, classes[0])
        writers[str(folder / f'{patient}_{number:03d}.png')] = functools.partial(
          figures.write_overlay,
          values=middle(example['image']),
          mask=of_class(example['mask'], which),
          predictions={run: mask[k, ..., which] for run, mask in zip(names, masks, strict=True)},
          black_and_white=shown,
          intensity=config.data.intensity,
          title=f'patient {patient}, slice {number}{f", {name}" if len(classes[0]) > 1 else ""}',
        )
  return writers


def slices_that_differ(one: dict[str, np.ndarray], other: dict[str, np.ndarray], most: int) -> set[tuple[str, int]]:
  """Returns (patient, slice) of the slices on which two runs differ most in errors: one per patient, up to `most`.

  The errors of a slice are its false positives and false negatives at each run's own operating point.
  """
  errors = [dict(zip(_keys(table), table['fp_chosen'] + table['fn_chosen'], strict=True)) for table in (one, other)]
  differ = sorted(errors[0], key=lambda key: -abs(int(errors[0][key]) - int(errors[1][key])))
  largest_of = {}
  for patient, number in differ:
    largest_of.setdefault(patient, (patient, number))
  return set(list(largest_of.values())[:most])


def _keys(table):
  """Returns (patient, slice) of each row."""
  return list(zip(table['patient'].tolist(), table['slice'].tolist(), strict=True))


def _masks(run, images):
  """Returns the masks of a run for slices of a prepared dataset, at the run's operating points: bool [B, H, W, C]."""
  mesh = meshes.create_mesh()
  model, points = trained.load_model([run], mesh)
  thresholds = np.array([point.threshold for point in points.values()])
  probability = Predictor(model, points, mesh).probabilities(images)
  return probability.reshape(*images.shape[:3], len(points)) >= thresholds
