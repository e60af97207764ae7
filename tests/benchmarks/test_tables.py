"""The paper's tables: their rows, the text of their cells, and that the command takes all models."""

import os
import subprocess
import sys

from conftest import tiny

from benchmarks import study_table
from configs import cls
from fusa_jax import models


def test_tables_have_the_rows_of_the_paper():
  assert len(study_table.ROWS['classification']) == 7
  assert len(study_table.ROWS['segmentation']) == 5
  assert set(study_table.ROWS['classification'].values()) <= set(models.CLASSIFIERS)
  assert set(study_table.ROWS['segmentation'].values()) <= set(models.SEGMENTERS)


def test_rows_differ_only_in_model_and_width():
  config = tiny(cls)
  config.model.width = 16
  before = config.to_dict()
  for name, width in (('mobilenet_v2', 8), ('vgg16', 16), ('fusa_resnet50', 16)):
    row = study_table.row_config(config, name, seed=7).to_dict()
    assert (row['seed'], row['model']['name'], row['model']['width']) == (7, name, width)
    row['seed'], row['model'] = before['seed'], before['model']
    assert row == before


def test_undefined_scores_are_marked():
  undefined = {f'{column}{part}': None for column in ('F1', 'AUC', 'Acc') for part in ('', ' sd', ' low', ' high')}
  record = undefined | {'AUC': 0.91234, 'AUC low': 0.871, 'AUC high': 0.95, 'Acc': 0.8817, 'Acc sd': 0.012}
  assert study_table.cell(record, 'F1') == 'undefined'
  assert study_table.cell(record, 'AUC') == '0.912 [0.871, 0.950]'
  assert study_table.cell(record, 'Acc') == '88.17% ± 1.20'


def test_a_table_needs_all_models():
  """A table with some models is refused before anything is drawn or trained."""
  command = [sys.executable, '-m', 'benchmarks.tables', '--config=configs/seg.py', '--models=resunet']
  done = subprocess.run(command, capture_output=True, text=True, env=os.environ, timeout=300)
  assert done.returncode == 2
  assert done.stderr == (
    "error: --models: a table always has all of the paper's models; leave it out, or use python -m benchmarks.study\n"
  )
