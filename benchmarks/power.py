"""Prints what a study of FUSA could have detected, and the patients and seeds that a given difference needs.

  python -m benchmarks.study --config=configs/seg.py --models=resunet,fusa_resunet --folds=all --seeds=0,1,2
  python -m benchmarks.power --study=runs/study/seg --differences=0.011,0.019

It takes the variances of the differences between patients and seeds from the study's differences.json. The power is
80%, of a two-sided test at 5% (fusa_jax.measures.crossed).
"""

import datetime
import math
import pathlib

from absl import flags

from fusa_jax.measures import crossed
from fusa_jax.runs import arguments
from fusa_jax.system import provenance
from fusa_jax.system.errors import UserError
from fusa_jax.system.files import read_json

_STUDY = flags.DEFINE_string('study', None, 'workdir of benchmarks.study, with two or more seeds')
_DIFFERENCES = flags.DEFINE_list('differences', ['0.011', '0.0193'], 'differences to detect, above 0')
_SEEDS = flags.DEFINE_list('seeds', ['2', '3', '5', '10', '20', '50'], 'numbers of seeds to plan with, from 2')


def main(_):
  if not _STUDY.value:
    raise UserError('--study: is missing; name the workdir of a study with two or more seeds')
  try:
    differences, seeds = [float(text) for text in _DIFFERENCES.value], [int(text) for text in _SEEDS.value]
  except ValueError as error:
    raise UserError(f'--differences, --seeds: {error}; give numbers, with commas') from None
  if min(differences) <= 0 or min(seeds) < 2:
    raise UserError('--differences must be above 0, and --seeds at least 2; give other numbers')
  print('\n\n'.join(table(each, differences, seeds) for each in compared(pathlib.Path(_STUDY.value))))
  print(f'\n{datetime.date.today()}, commit {provenance.commit()}')


def compared(workdir: pathlib.Path) -> list[dict]:
  """Returns the comparisons of a study that have several seeds.

  Raises:
    UserError: differences.json is missing or damaged, or has none.
  """
  advice = 'run python -m benchmarks.study with two or more seeds first'
  path = workdir / 'differences.json'
  if not path.exists():
    raise UserError(f'{path}: is missing; {advice}')
  found = [each for each in read_json(path, advice) if 'with_other_runs' in each['per_patient']]
  if not found:
    raise UserError(f'{path}: has no comparison over several seeds; {advice}')
  return found


def table(each: dict, differences: list[float], seeds: list[int]) -> str:
  """Returns what a comparison detects with its own design, and a Markdown table of other designs."""
  of_patients, others = each['per_patient'], each['per_patient']['with_other_runs']
  effects, patients = crossed.Variances(**others['variances']), of_patients['patients']
  spread = ', '.join(f'{name} {math.sqrt(value):.4f}' for name, value in effects._asdict().items())
  lines = [
    f'{each["run"]} minus {each["against"]}, {of_patients["score"]}: standard deviations {spread}. '
    f'With {len(each["seeds"])} seeds and {patients} patients, {others["detectable"]:.4f} is detectable.',
    '',
    f'| seeds | detectable with {patients} patients | '
    + ' | '.join(f'patients needed for {difference:g}' for difference in differences)
    + ' |',
    '| ---: | ---: |' + ' ---: |' * len(differences),
  ]
  for count in seeds:
    needed = [crossed.patients_needed(effects, count, difference) for difference in differences]
    cells = [str(count), f'{crossed.detectable(effects, count, patients):.4f}']
    lines.append('| ' + ' | '.join([*cells, *('no number' if one is None else f'{one:,}' for one in needed)]) + ' |')
  return '\n'.join(lines)


if __name__ == '__main__':
  arguments.start(main)
