"""`pip install .` installs everything but the dependencies, and the program then runs in any folder."""

import os
import pathlib
import subprocess
import sys
import venv

import pytest

ROOT = pathlib.Path(__file__).parents[1]


@pytest.mark.slow
def test_installed_in_a_fresh_environment(tmp_path):
  environment = tmp_path / 'venv'
  venv.create(environment, with_pip=False, symlinks=True)
  (site,) = environment.glob('lib/python*/site-packages')
  # The packages of this environment serve as the dependencies; the installed package takes precedence.
  (site / 'dependencies.pth').write_text('\n'.join(path for path in sys.path if path.endswith('-packages')))
  # pip builds inside the source folder; a copy keeps the repository unchanged.
  source = tmp_path / 'source'
  files = subprocess.run(['git', 'ls-files'], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
  for file in files:
    (source / file).parent.mkdir(parents=True, exist_ok=True)
    (source / file).write_bytes((ROOT / file).read_bytes())
  pip = [sys.executable, '-m', 'pip', '--python', str(environment / 'bin' / 'python'), 'install', '--no-deps', '-q']
  subprocess.run([*pip, str(source)], check=True)

  tops = {path.name for path in site.iterdir() if 'dist-info' not in path.name and path.suffix != '.pth'}
  assert tops == {'fusa_jax'}
  modules = lambda root, *tops: {
    str(path.relative_to(root)) for top in tops for path in (root / top).rglob('*') if '__pycache__' not in path.parts
  }
  home = pathlib.Path('fusa_jax', 'home')
  installed = {path for path in modules(site, 'fusa_jax') if not pathlib.Path(path).is_relative_to(home)}
  assert installed == modules(source, 'fusa_jax')
  assert modules(site / home, 'configs', 'data') == modules(source, 'configs', 'data')

  work = tmp_path / 'work'
  work.mkdir()
  settings = {key: value for key, value in os.environ.items() if key != 'PYTHONPATH'} | {'HOME': str(tmp_path)}
  run = lambda *arguments: subprocess.run(
    [str(environment / 'bin' / 'fusa-jax'), *arguments], cwd=work, env=settings, capture_output=True, text=True
  )
  doctor = run('--mode=doctor')
  assert doctor.returncode == 0, doctor.stderr
  assert f'in {site}'.replace(str(tmp_path), '~') in doctor.stdout
  refused = run('--config=configs/cls.py:huge')
  assert refused.returncode == 2 and "configs/cls.py has no preset 'huge'" in refused.stderr
