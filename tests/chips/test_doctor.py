"""What is wrong is found, named with what to do, and ends with exit code 2; where nothing is, the text says so."""

import pathlib

import jax
import jax.numpy as jnp
import pytest
from commands import launch

from configs import seg
from fusa_jax import fusa
from fusa_jax.chips import doctor
from fusa_jax.system.errors import UserError


def problems(part):
  return [problem for _, problem in part if problem]


def test_nothing_wrong_here(tmp_path):
  """As a user types it, in a folder of theirs and with a home of theirs."""
  result = launch('--mode=doctor', home=tmp_path, folder=tmp_path)
  assert result.returncode == 0, result.stderr
  lines = result.stdout.splitlines()
  assert [line for line in lines if not line.startswith(' ')] == [
    'versions:',
    'machine:',
    'devices:',
    'caches:',
    'self-check:',
    'nothing wrong was found',
  ]
  assert f'  jax {jax.__version__}' in lines
  assert str(tmp_path) not in result.stdout and '~/.cache/fusa_jax' in result.stdout


def test_requirements_are_those_of_the_file():
  lines = [line for line in pathlib.Path('requirements.txt').read_text().splitlines() if line[0] != '#']
  assert len(lines) == len(doctor.requirements()) > 15
  assert all(line.startswith(one.name) for line, one in zip(lines, doctor.requirements(), strict=True))


@pytest.mark.parametrize(
  ('line', 'problem'),
  [
    ('no-such-package>=1', "no-such-package is not installed; pip install 'no-such-package>=1'"),
    ('numpy>=1000', "is not one of >=1000; pip install 'numpy>=1000'"),
    ('numpy>=1', None),
  ],
)
def test_packages(monkeypatch, line, problem):
  monkeypatch.setattr(doctor, 'requirements', lambda: [doctor.Requirement(line)])
  found = problems(doctor.versions())
  assert len(found) == (problem is not None)
  assert not problem or problem in found[0]


def test_caches_that_cannot_be_written(tmp_path, monkeypatch):
  (tmp_path / 'file').touch()
  (found,) = problems(doctor.look_at_caches({'compiled': tmp_path / 'file' / 'compiled'}))
  assert 'cannot be written' in found and 'set HOME' in found
  assert not problems(doctor.look_at_caches({'compiled': tmp_path / 'a' / 'b'}))
  monkeypatch.setattr(doctor, '_FREE_GB', 1e9)
  assert 'GB free' in problems(doctor.look_at_caches({'compiled': tmp_path}))[0]


def test_a_wrong_fusa_is_found(monkeypatch, capsys):
  """One percent off, in the factored form alone; and what raises is a finding, not a traceback."""
  right = fusa.gate
  monkeypatch.setattr(fusa, 'gate', lambda *arguments: 1.01 * right(*arguments))
  monkeypatch.setattr(doctor, 'machine', lambda: 1 / 0)
  with pytest.raises(UserError) as error:
    doctor.doctor(seg.get_config('demo'), {})
  machine, check = str(error.value).splitlines()
  assert machine.startswith('machine: ZeroDivisionError: division by zero; ')
  assert check.startswith('self-check: FUSA differs from its literal form by ')
  assert 'nothing wrong' not in capsys.readouterr().out


def test_a_gradient_that_is_not_a_number_is_found(monkeypatch):
  """In one leaf, with all values right."""
  right = fusa.gate
  monkeypatch.setattr(fusa, 'gate', lambda x, *arguments: right(x, *arguments) + 0 * jnp.sqrt(0 * arguments[-1].sum()))
  _, problem = next(doctor.self_check(seg.get_config('demo')))
  assert problem.startswith('FUSA differs from its literal form by nan; ')
