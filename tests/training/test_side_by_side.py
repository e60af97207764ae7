"""Two runs side by side: the coloured pixels equal the counts that each evaluation saved."""

import shutil

import numpy as np
import one_class
import pytest
from PIL import Image

from fusa_jax.runs import run_config
from fusa_jax.system.errors import UserError
from fusa_jax.training import evaluate, side_by_side

COLOURS = {'tp': (0.1, 0.35, 1.0), 'fp': (0.1, 0.8, 0.2), 'fn': (0.95, 0.1, 0.1)}


def test_coloured_pixels_equal_the_saved_counts(runs, data_dir, tmp_path):
  """One run is evaluated at two thresholds; the coloured pixels must equal the counts of each evaluation."""
  tables, workdirs = [], [runs['seg'], tmp_path / 'other']
  shutil.copytree(runs['seg'], workdirs[1])
  point = one_class.point(workdirs[1])
  config = run_config.load_config(workdirs[1])
  config.evaluate.target_sensitivity = 0.2
  evaluate.evaluate(config, workdirs[1], data_dir)
  assert one_class.point(workdirs[1]).threshold != point.threshold
  tables = [one_class.part(workdir).table for workdir in workdirs]
  (tmp_path / 'pictures').mkdir()
  for name, write in side_by_side.pictures(*workdirs, data_dir, 2).items():
    write(tmp_path / 'pictures' / name)
  pictures = sorted((tmp_path / 'pictures').iterdir())
  assert len(pictures) == 2 and len({path.name.rpartition('_')[0] for path in pictures}) == 2
  for path in pictures:
    pixels = np.asarray(Image.open(path).convert('RGB')).astype(float) / 255
    times = 384 // 32
    panels = [pixels[44 : 44 + 384, k * (384 + 8) : k * (384 + 8) + 384][::times, ::times] for k in range(3)]
    grey = panels[0].mean(axis=-1, keepdims=True)
    patient, number = path.stem.rpartition('_')[::2]
    for table, panel in zip(tables, panels[1:], strict=True):
      (row,) = np.flatnonzero((table['patient'] == patient) & (table['slice'] == int(number)))
      for key, colour in COLOURS.items():
        coloured = np.abs(panel - 0.5 * grey - 0.5 * np.array(colour)).max(axis=-1) < 0.02
        assert coloured.sum() == table[f'{key}_chosen'][row], (path.name, key)


def test_slices_with_the_largest_differences_are_chosen():
  one = {'patient': np.array(['a', 'a', 'b', 'c']), 'slice': np.array([0, 1, 0, 3])}
  zeros = np.zeros(4, int)
  first = one | {'fp_chosen': np.array([1, 9, 3, 0]), 'fn_chosen': zeros}
  other = one | {'fp_chosen': zeros, 'fn_chosen': np.array([0, 2, 0, 9])}
  assert side_by_side.slices_that_differ(first, other, 2) == {('c', 3), ('a', 1)}
  assert side_by_side.slices_that_differ(first, other, 5) == {('c', 3), ('a', 1), ('b', 0)}


def test_runs_without_masks_are_refused(runs, data_dir, tmp_path):
  with pytest.raises(UserError, match='overlays: applies to masks only, and these runs give none; leave it out'):
    side_by_side.pictures(runs['cls'], runs['cls'], data_dir, 2)
