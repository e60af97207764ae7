"""The command that makes a table: what it writes, what it keeps, what it refuses."""

import csv
import json
import statistics

import pytest
from conftest import tiny

from benchmarks import tables
from configs import cls, seg
from fusa_jax import models, train
from fusa_jax.errors import UserError


def protocol(**overrides):
  return tiny(seg, **{'model.encoder': 'resnet18', 'train.steps': 2, **overrides})


@pytest.fixture(scope='module')
def made(data_dir, tmp_path_factory):
  """A table of one model and two seeds."""
  workdir = tmp_path_factory.mktemp('table')
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(tables.ROWS, 'segmentation', {'PSPNet': 'pspnet'})
    patch.setitem(tables.PAIRS, 'segmentation', [('pspnet', 'pspnet')])
    tables.make_table(protocol(), [3, 4], workdir, data_dir)
  return workdir


@pytest.mark.slow
def test_a_row_is_the_mean_and_spread_of_its_seeds(made):
  rows = list(csv.DictReader((made / 'table.csv').open()))
  assert [row['model'] for row in rows] == ['PSPNet']
  for row in rows:
    runs = [json.loads((made / f'{row["name"]}-seed{s}' / 'test' / 'metrics.json').read_text()) for s in (3, 4)]
    assert row['seeds'] == '2'
    for column, key in {
      'Dice': 'dice',
      'Precision': 'precision',
      'Recall': 'recall',
      'Macro Dice': 'dice_macro',
    }.items():
      values = [run[key] for run in runs if run[key] is not None]
      assert float(row[column]) == pytest.approx(statistics.mean(values))
      if len(values) == 2:
        # Half the distance of two values, times the square root of two.
        assert float(row[f'{column} sd']) == pytest.approx(abs(values[0] - values[1]) / 2**0.5)
    logs = [(made / f'{row["name"]}-seed{s}' / 'config.json').read_text() for s in (3, 4)]
    assert [json.loads(text)['seed'] for text in logs] == [3, 4]
  text = (made / 'table.md').read_text()
  assert text.startswith('| Model | Dice | Precision | Recall | Macro Dice | Parameters | GFLOPs | slices/s |\n')
  for row in rows:
    (line,) = [line for line in text.splitlines() if line.startswith(f'| {row["model"]} ')]
    assert f'{float(row["Dice"]) * 100:.2f}% ± ' in line
  assert '2 steps of 8 slices, seeds 3, 4.' in text
  assert 'pspnet minus pspnet, seed 3: Dice: 0.0000 [+0.0000, +0.0000], sign-flip p 1.0000 (2 patients' in text


@pytest.mark.slow
def test_finished_rows_are_kept_and_another_protocol_is_refused(made, data_dir, monkeypatch):
  trained = []
  monkeypatch.setitem(tables.ROWS, 'segmentation', {'PSPNet': 'pspnet'})
  monkeypatch.setattr(train, 'train', lambda config, *_: trained.append(config.model.name))
  before = (made / 'table.csv').read_bytes()
  tables.make_table(protocol(), [3, 4], made, data_dir)
  assert not trained
  assert (made / 'table.csv').read_bytes() == before
  with pytest.raises(UserError, match=r'pspnet-seed3 holds a run of another config: train.learning_rate'):
    tables.make_table(protocol(**{'train.learning_rate': 0.1}), [3, 4], made, data_dir)


def test_the_tables_have_the_papers_rows():
  assert len(tables.ROWS['classification']) == 7
  assert len(tables.ROWS['segmentation']) == 5
  assert set(tables.ROWS['classification'].values()) <= set(models.CLASSIFIERS)
  assert set(tables.ROWS['segmentation'].values()) <= set(models.SEGMENTERS)


def test_rows_differ_in_the_model_and_its_width_alone():
  config = tiny(cls)
  config.model.width = 16
  before = config.to_dict()
  for name, width in (('mobilenet_v2', 8), ('vgg16', 16), ('fusa_resnet50', 16)):
    row = tables.row_config(config, name, seed=7).to_dict()
    assert (row['seed'], row['model']['name'], row['model']['width']) == (7, name, width)
    row['seed'], row['model'] = before['seed'], before['model']
    assert row == before


def test_undefined_scores_are_said_to_be():
  undefined = {f'{column}{part}': None for column in ('F1', 'AUC', 'Acc') for part in ('', ' sd', ' low', ' high')}
  record = undefined | {'AUC': 0.91234, 'AUC low': 0.871, 'AUC high': 0.95, 'Acc': 0.8817, 'Acc sd': 0.012}
  assert tables._cell(record, 'F1') == 'undefined'
  assert tables._cell(record, 'AUC') == '0.912 [0.871, 0.950]'
  assert tables._cell(record, 'Acc') == '88.17% ± 1.20'


@pytest.mark.parametrize('seeds', [['one'], ['1', ''], [], ['-1']])
def test_seeds_are_whole_numbers(seeds):
  with pytest.raises(UserError, match='--seeds: .* give --seeds=0,1,2'):
    tables.read_seeds(seeds)
