"""The step and inference of each model have not grown since docs/step_counts.json was written."""

import functools
import json
import pathlib

import pytest

from benchmarks import step_counts
from benchmarks.settings import Settings
from fusa_jax import FUSA, models

WRITTEN = json.loads(pathlib.Path('docs/step_counts.json').read_text())
# The other models take 2 to 10 s each.
QUICK = ('fusa_resnet18', 'resunet')
ADVICE = 'if this change is intended, update docs/step_counts.json: python -m benchmarks.step_counts'


def check(now, before, stage):
  growth = step_counts.grown(now, before, step_counts.MARGINS[stage])
  assert not growth, f'{"; ".join(growth)}; {ADVICE}'


def test_the_file_has_every_model_at_the_counted_size():
  size = {key: WRITTEN[key] for key in ('image_size', 'batch_size', 'width')}
  assert Settings(**size) == step_counts.SETTINGS
  assert set(WRITTEN['lowered']) == set(models.NAMES)
  every = [*WRITTEN['lowered'].values(), *(one for release in WRITTEN['compiled'].values() for one in release.values())]
  for counts in every:
    assert set(counts) == {'train', 'inference'}
    for unit in ('flops', 'bytes'):
      assert 0 < 1.5 * counts['inference'][unit] < counts['train'][unit]
    for program in counts.values():
      assert program['convolutions'] + program['dots'] > 10


@pytest.mark.parametrize(
  'name', [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in models.NAMES]
)
def test_no_program_has_grown(name):
  check(step_counts.lowered(name), WRITTEN['lowered'][name], 'lowered')


@pytest.mark.slow
@pytest.mark.parametrize('name', step_counts.COMPILED)
def test_no_compiled_program_has_grown(name):
  if step_counts.series() not in WRITTEN['compiled']:
    pytest.skip(f'nothing was compiled with jax {step_counts.series()}; {ADVICE}')
  check(step_counts.compiled(name), WRITTEN['compiled'][step_counts.series()][name], 'compiled')


def test_more_work_is_detected():
  """The literal form of FUSA has more products. Before XLA fuses operations, it has fewer elementwise ones."""
  literal = step_counts.lowered('fusa_resnet18', attention=functools.partial(FUSA, literal=True))
  growth = step_counts.grown(literal, WRITTEN['lowered']['fusa_resnet18'], step_counts.MARGINS['lowered'])
  assert {line.split(':')[0] for line in growth} == {'train flops', 'train dots', 'inference flops', 'inference dots'}


def test_growth_within_the_margin_is_ignored():
  before = {'train': {'flops': 1000, 'dots': 10}, 'inference': {'flops': 100, 'dots': 0}}
  now = {'train': {'flops': 1010, 'dots': 9}, 'inference': {'flops': 102, 'dots': 1}}
  assert step_counts.grown(now, before, 0.01) == ['inference flops: 100 -> 102', 'inference dots: 0 -> 1']
  assert step_counts.grown(before, before, 0.0) == []
