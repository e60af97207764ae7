"""No model's step and inference have grown since docs/step_counts.json was written."""

import functools
import json
import pathlib

import pytest

from benchmarks import step_counts
from benchmarks.settings import Settings
from fusa_jax import FUSA, models

WRITTEN = json.loads(pathlib.Path('docs/step_counts.json').read_text())
# The rest, which take from 2 to 10 s each, are slow together.
QUICK = ('resnet18', 'fusa_resnet18', 'vgg16', 'resunet')
ADVICE = 'if this was meant, write docs/step_counts.json anew: python -m benchmarks.step_counts'


def check(now, before, kind):
  found = step_counts.grown(now, before, step_counts.MARGINS[kind])
  assert not found, f'{"; ".join(found)}; {ADVICE}'


def test_the_file_is_of_every_model_at_the_size_that_is_counted():
  size = {key: WRITTEN[key] for key in ('image_size', 'batch_size', 'width')}
  assert Settings(**size) == step_counts.SETTINGS
  assert set(WRITTEN['lowered']) == set(models.NAMES)
  every = [*WRITTEN['lowered'].values(), *(one for found in WRITTEN['compiled'].values() for one in found.values())]
  for counts in every:
    assert set(counts) == {'train', 'inference'}
    for kind in ('flops', 'bytes'):
      assert 0 < 1.5 * counts['inference'][kind] < counts['train'][kind]
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


def test_more_work_is_seen():
  """The literal form, which computes the same, has more products; unfused, it has fewer elementwise operations."""
  literal = step_counts.lowered('fusa_resnet18', attention=functools.partial(FUSA, literal=True))
  found = step_counts.grown(literal, WRITTEN['lowered']['fusa_resnet18'], step_counts.MARGINS['lowered'])
  assert {line.split(':')[0] for line in found} == {'train flops', 'train dots', 'inference flops', 'inference dots'}


def test_growth_is_what_exceeds_the_margin():
  before = {'train': {'flops': 1000, 'dots': 10}, 'inference': {'flops': 100, 'dots': 0}}
  now = {'train': {'flops': 1010, 'dots': 9}, 'inference': {'flops': 102, 'dots': 1}}
  assert step_counts.grown(now, before, 0.01) == ['inference flops: 100 -> 102', 'inference dots: 0 -> 1']
  assert step_counts.grown(before, before, 0.0) == []
