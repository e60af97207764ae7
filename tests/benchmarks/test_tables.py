"""The paper's tables: their rows, what is written of a row, and that the command is a study of all models."""

import os
import subprocess
import sys

from conftest import tiny

from benchmarks import study_table
from configs import cls
from fusa_jax import models


def test_the_tables_have_the_papers_rows():
  assert len(study_table.ROWS['classification']) == 7
  assert len(study_table.ROWS['segmentation']) == 5
  assert set(study_table.ROWS['classification'].values()) <= set(models.CLASSIFIERS)
  assert set(study_table.ROWS['segmentation'].values()) <= set(models.SEGMENTERS)


def test_rows_differ_in_the_model_and_its_width_alone():
  config = tiny(cls)
  config.model.width = 16
  before = config.to_dict()
  for name, width in (('mobilenet_v2', 8), ('vgg16', 16), ('fusa_resnet50', 16)):
    row = study_table.row_config(config, name, seed=7).to_dict()
    assert (row['seed'], row['model']['name'], row['model']['width']) == (7, name, width)
    row['seed'], row['model'] = before['seed'], before['model']
    assert row == before


def test_undefined_scores_are_said_to_be():
  undefined = {f'{column}{part}': None for column in ('F1', 'AUC', 'Acc') for part in ('', ' sd', ' low', ' high')}
  record = undefined | {'AUC': 0.91234, 'AUC low': 0.871, 'AUC high': 0.95, 'Acc': 0.8817, 'Acc sd': 0.012}
  assert study_table.cell(record, 'F1') == 'undefined'
  assert study_table.cell(record, 'AUC') == '0.912 [0.871, 0.950]'
  assert study_table.cell(record, 'Acc') == '88.17% ± 1.20'


def test_a_table_has_all_models():
  """Some of them are a study's; refused before anything is drawn or trained."""
  command = [sys.executable, '-m', 'benchmarks.tables', '--config=configs/seg.py', '--models=resunet']
  done = subprocess.run(command, capture_output=True, text=True, env=os.environ, timeout=300)
  assert done.returncode == 2
  assert done.stderr == "error: --models: a table has all of the paper's; python -m benchmarks.study takes some\n"
