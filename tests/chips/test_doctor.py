"""The doctor finds each problem, says what to do, and ends with exit code 2. Without problems it says so."""

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


@pytest.mark.slow
def test_no_problem_on_this_machine(tmp_path):
  """Runs the command as a user does, in another folder and with another home."""
  result = launch('--mode=doctor', home=tmp_path, folder=tmp_path)
  assert result.returncode == 0, result.stderr
  lines = result.stdout.splitlines()
  assert [line for line in lines if not line.startswith(' ')] == [
    'versions:',
    'machine:',
    'devices:',
    'caches:',
    'self-check:',
    'compilers for other chips:',
    'no problems found',
  ]
  assert f'  jax {jax.__version__}' in lines
  assert str(tmp_path) not in result.stdout and '~/.cache/fusa_jax' in result.stdout


def test_requirements_match_the_file():
  lines = [line for line in pathlib.Path('requirements.txt').read_text().splitlines() if line[0] != '#']
  assert len(lines) == len(doctor.requirements()) > 15
  assert all(line.startswith(one.name) for line, one in zip(lines, doctor.requirements(), strict=True))


@pytest.mark.parametrize(
  ('line', 'problem'),
  [
    ('no-such-package>=1', "no-such-package is not installed; pip install 'no-such-package>=1'"),
    ('numpy>=1000', "does not meet >=1000; pip install 'numpy>=1000'"),
    ('numpy>=1', None),
  ],
)
def test_packages(monkeypatch, line, problem):
  monkeypatch.setattr(doctor, 'requirements', lambda: [doctor.Requirement(line)])
  reported = problems(doctor.versions())
  assert len(reported) == (problem is not None)
  assert not problem or problem in reported[0]


def test_a_missing_compiler_is_no_problem(monkeypatch):
  monkeypatch.setattr(doctor.provenance, 'version', lambda name: None)
  tpus, gpus = doctor.compilers()
  need = 'is not installed; for --mode=aot --topology='
  assert tpus == (f'TPUs: libtpu {need}v4:2x2x2: pip install -r requirements-aot.txt', None)
  assert gpus == (f'NVIDIA GPUs: jax-cuda12-pjrt {need}a100:1: pip install -r requirements-aot-gpu.txt', None)


def test_a_compiler_of_another_release_is_a_problem(monkeypatch):
  """libtpu does not belong to jax; the GPU compiler does, but a library is missing, and it rejects the B200."""
  needed = {
    'tpu': [doctor.Requirement('libtpu==0.0.42.*')],
    'cuda12': [doctor.Requirement('jax-cuda12-pjrt==0.10.2'), doctor.Requirement('nvidia-cudnn-cu12<10')],
  }
  monkeypatch.setattr(doctor, '_of_extra', lambda package, extra: needed[extra])
  versions = {'libtpu': '0.0.40', 'jax-cuda12-pjrt': '0.10.2'}
  monkeypatch.setattr(doctor.provenance, 'version', versions.get)

  def compile_for(topology):
    if topology.kind == 'b200':
      raise UserError('b200:1: the compiler fails (no PTX)')

  monkeypatch.setattr(doctor, '_compile_for', compile_for)
  (tpus, of_tpus), (gpus, of_gpus) = doctor.compilers()
  assert tpus == 'TPUs: libtpu 0.0.40 compiles for v4, v5e, v5p, v6e'
  assert of_tpus == 'TPUs: libtpu 0.0.40 does not meet ==0.0.42.*; pip install -r requirements-aot.txt'
  assert gpus == 'NVIDIA GPUs: jax-cuda12-pjrt 0.10.2 compiles for a100, h100; nvidia-cudnn-cu12 not installed'
  assert of_gpus == 'NVIDIA GPUs: b200:1: the compiler fails (no PTX); pip install -r requirements-aot-gpu.txt'


def test_requirements_of_an_extra_include_those_of_its_packages(monkeypatch):
  """As in the metadata of jax 0.10.2, shortened."""
  metadata = {
    'jax': ['numpy>=2', 'jax-cuda12-plugin[with-cuda]==0.10.2; extra == "cuda12"', 'libtpu==0.0.42.*; extra == "tpu"'],
    'jax-cuda12-plugin': ['jax-cuda12-pjrt==0.10.2', 'nvidia-cudnn-cu12<10.0,>=9.8; extra == "with-cuda"'],
  }
  monkeypatch.setattr(doctor.importlib.metadata, 'requires', metadata.get)
  assert [one.name for one in doctor._of_extra('jax', 'cuda12')] == [
    'jax-cuda12-plugin',
    'jax-cuda12-pjrt',
    'nvidia-cudnn-cu12',
  ]
  assert [one.name for one in doctor._of_extra('jax', 'tpu')] == ['libtpu']


def test_unwritable_caches(tmp_path, monkeypatch):
  (tmp_path / 'file').touch()
  (problem,) = problems(doctor.look_at_caches({'compiled': tmp_path / 'file' / 'compiled'}))
  assert 'cannot be written' in problem and 'set HOME' in problem
  assert not problems(doctor.look_at_caches({'compiled': tmp_path / 'a' / 'b'}))
  monkeypatch.setattr(doctor, '_FREE_GB', 1e9)
  assert 'GB free' in problems(doctor.look_at_caches({'compiled': tmp_path}))[0]


def test_a_wrong_fusa_is_found(monkeypatch, capsys):
  """The factored form is one percent off. A check that raises is reported as a problem, without a traceback."""
  right = fusa.gate
  monkeypatch.setattr(fusa, 'gate', lambda *arguments: 1.01 * right(*arguments))
  monkeypatch.setattr(doctor, 'machine', lambda: 1 / 0)
  with pytest.raises(UserError) as error:
    doctor.doctor(seg.get_config('demo'), {})
  machine, check = str(error.value).splitlines()
  assert machine.startswith('machine: ZeroDivisionError: division by zero; ')
  assert check.startswith('self-check: FUSA differs from its literal form by ')
  assert 'no problems' not in capsys.readouterr().out


def test_a_gradient_that_is_not_a_number_is_found(monkeypatch):
  """One leaf of the gradients is NaN; all values are correct."""
  right = fusa.gate
  monkeypatch.setattr(fusa, 'gate', lambda x, *arguments: right(x, *arguments) + 0 * jnp.sqrt(0 * arguments[2].sum()))
  _, problem = next(doctor.self_check(seg.get_config('demo')))
  assert problem.startswith('FUSA differs from its literal form by nan; ')
