"""Runs docs/tutorial.ipynb from its first cell to its last, at a small size."""

import os
import pathlib
import sys

import pytest

SMALL = (
  "PATIENTS, SIZE, FLAGS = 6, 32, '--config.data.image_size=32 --config.train.steps=4 --config.train.evaluate_every=4'"
)


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, monkeypatch):
  nbformat, nbclient = pytest.importorskip('nbformat'), pytest.importorskip('nbclient')
  for name in ('HOME', 'TMPDIR', 'JUPYTER_RUNTIME_DIR', 'IPYTHONDIR'):
    monkeypatch.setenv(name, str(tmp_path))
  docs = pathlib.Path(__file__).parents[1] / 'docs'
  notebook = nbformat.read(docs / 'tutorial.ipynb', as_version=4)
  (parameters,) = (cell for cell in notebook.cells if 'parameters' in cell.metadata.get('tags', []))
  assert "PATIENTS, SIZE, FLAGS = 40, 128, ''" in parameters.source
  parameters.source = parameters.source.replace("PATIENTS, SIZE, FLAGS = 40, 128, ''", SMALL)
  monkeypatch.delenv('XLA_FLAGS', raising=False)  # one device, as for a user
  # The kernel of this environment, whatever is installed for the user.
  monkeypatch.setenv('PATH', f'{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}')
  nbclient.NotebookClient(
    notebook, timeout=600, kernel_name='python3', resources={'metadata': {'path': docs}}
  ).execute()
  outputs = [output for cell in notebook.cells for output in cell.get('outputs', [])]
  assert 'error:' not in ''.join(output.get('text', '') for output in outputs)
  listed = ''.join(output['data']['text/plain'] for output in outputs if 'data' in output)
  assert all(f'volume-phantom-A-0001_ct{end}' in listed for end in ('.html', '.json', '_mask.nii.gz'))
