"""Makes the pictures of the README and the docs: `python -m benchmarks.images --workdir=runs/seg-demo`.

It needs the run of the segmentation demo and Chromium, which takes the screenshots. It writes docs/images:

- overlay.png: a slice of a test phantom, and its mask in the paper's colours
- attention.png: the attention maps of three FUSA modules for that slice
- report.png, viewer.png: the report page of the run and the viewer page of a phantom
- house.svg: the packages and the direction of their imports, as pyproject.toml declares them
"""

import html
import importlib
import pathlib
import shutil
import subprocess
import sys
import tempfile
import tomllib

import jax
import matplotlib
import numpy as np
from absl import flags
from matplotlib.figure import Figure
from PIL import Image

import fusa_jax
from data.cohorts import phantom
from fusa_jax import tasks
from fusa_jax.inference import predict, trained, viewer
from fusa_jax.runs import arguments, figures, result_files, run_config
from fusa_jax.scans import volumes
from fusa_jax.scans.classes import LESION
from fusa_jax.system import meshes, program
from fusa_jax.system.errors import UserError
from fusa_jax.tasks import window

FLAGS = flags.FLAGS
IMAGES = pathlib.Path('docs/images')
MOST_BYTES = 200_000
# The run's test patients are drawn again at this size: the same anatomy in finer pixels.
SIZE, SLICES = 320, 32


def main(_) -> None:
  program.start_logging()
  workdir = arguments.path_flag('workdir')
  chromium = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
  if chromium is None:
    raise UserError('chromium: not found; install Chromium or Chrome, which takes the screenshots')
  config, run = run_config.load_config(workdir), fusa_jax.load(workdir)
  IMAGES.mkdir(parents=True, exist_ok=True)
  number = _median_patient(workdir)
  hu, mask, _ = phantom.patient(config.data.phantom.seed, number, size=SIZE, slices=SLICES)
  predicted = run(hu).mask
  k = int(mask.sum((1, 2)).argmax())
  _draw_overlay(hu[k], mask[k], predicted[k], config)
  _draw_attention(hu[k], config, workdir)
  _shoot(chromium, workdir / 'test' / 'report.html', IMAGES / 'report.png', (1100, 1150))
  with tempfile.TemporaryDirectory() as folder:
    masks = pathlib.Path(folder) / 'masks'
    scan = phantom.write_patient(pathlib.Path(folder), number, config.data.phantom.seed, SIZE, SLICES)
    predict.predict(run, scan, masks, False, False)
    (page,) = viewer.view(scan, masks)
    _shoot(chromium, page, IMAGES / 'viewer.png', (1000, 680))
  _draw_house(IMAGES / 'house.svg')
  for path in sorted(IMAGES.iterdir()):
    assert path.stat().st_size <= MOST_BYTES, f'{path} has {path.stat().st_size} bytes'
    print(path)


def _median_patient(workdir):
  """Returns the number of the test phantom with the median Dice of those with lesion."""
  table = result_files.read_parts(workdir, LESION.names)[LESION.names[0]].table
  row = next(row for title, row in figures.typical_slices(table).items() if title.startswith('median'))
  return int(table['patient'][row].rsplit('-', 1)[-1])


def _draw_overlay(hu, mask, predicted, config):
  path = IMAGES / 'overlay.png'
  shown = window.black_and_white('hu', config.data.window)
  figures.write_overlay(
    path, hu, mask, {'run': predicted.astype(bool)}, shown, 'hu', 'A test phantom, slice and result'
  )
  _quantise(path)


def _draw_attention(hu, config, workdir):
  """The mean over the channels of A, for three modules."""
  task = tasks.create(config)
  _, variables = trained.load_best(config, task, workdir, meshes.create_mesh())
  slices = volumes.network_slices(hu[None], config.data.image_size)
  _, sown = task.model.apply(variables, task.inputs(slices), train=False, mutable=['intermediates'])
  maps = {
    path[0].key: np.asarray(leaf)[0].mean(-1)
    for path, leaf in jax.tree_util.tree_leaves_with_path(sown['intermediates'])
    if any(getattr(part, 'key', '') == 'attention' for part in path)
  }
  names = ['down1', 'up2', 'up1']
  figure = Figure(figsize=(10, 2.9), layout='constrained', facecolor='white')
  axes = figure.subplots(1, 1 + len(names))
  low, high = config.data.window
  axes[0].imshow(hu, cmap='gray', vmin=low, vmax=high)
  axes[0].set_title('slice', fontsize=9)
  for one, name in zip(axes[1:], names, strict=True):
    shown = one.imshow(maps[name], cmap='viridis', interpolation='none')
    one.set_title(f'attention of {name}, {maps[name].shape[0]} x {maps[name].shape[1]}', fontsize=9)
    figure.colorbar(shown, ax=one, shrink=0.75).ax.tick_params(labelsize=7)
  for one in axes:
    one.set_axis_off()
  path = IMAGES / 'attention.png'
  figure.savefig(path, dpi=100)
  _quantise(path)


def _shoot(chromium, page, path, size):
  """Takes a screenshot of the upper part of a page."""
  with tempfile.TemporaryDirectory() as profile:
    command = [chromium, '--headless=new', '--no-sandbox', '--hide-scrollbars', '--force-color-profile=srgb']
    command += ['--use-gl=angle', '--use-angle=swiftshader', '--enable-unsafe-swiftshader', '--disable-dev-shm-usage']
    command += [f'--user-data-dir={profile}', f'--window-size={size[0]},{size[1]}', '--virtual-time-budget=30000']
    command += [f'--screenshot={path.resolve()}', page.resolve().as_uri()]
    subprocess.run(command, check=True, capture_output=True, timeout=180)
  _quantise(path)


def _quantise(path):
  """Reduces a PNG to 256 colours, a third of its size."""
  Image.open(path).convert('RGB').quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


def _draw_house(path):
  """Draws a row per layer of the import contract, the importing layers above, with what each package says of itself."""
  contracts = tomllib.loads(pathlib.Path('pyproject.toml').read_text())['tool']['importlinter']['contracts']
  layers = next(one['layers'] for one in contracts if 'containers' not in one and 'benchmarks' in one['layers'])
  width, height, gap, top = 900, 44, 8, 40
  rows = [[name.strip() for name in layer.split('|')] for layer in layers]
  parts = [
    f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {top + len(rows) * (height + gap)}" role="img" '
    'aria-label="The packages of fusa_jax, each above the packages that it may import" '
    'font-family="system-ui, sans-serif">',
    '<rect width="100%" height="100%" fill="#ffffff"/>',
    '<text x="12" y="24" font-size="13" fill="#565f6d">A package imports only from rows below it.</text>',
  ]
  for k, row in enumerate(rows):
    each = (width - 24 - gap * (len(row) - 1)) / len(row)
    for j, name in enumerate(row):
      x, y = 12 + j * (each + gap), top + k * (height + gap)
      text = _first_sentence(name)
      fits = text if len(text) < each / 6.3 else text[: int(each / 6.3)].rsplit(' ', 1)[0] + ' ...'
      parts += [
        f'<rect x="{x:.0f}" y="{y}" width="{each:.0f}" height="{height}" rx="6" fill="#eef3fa" stroke="#2a62ad"/>',
        f'<text x="{x + 10:.0f}" y="{y + 18}" font-size="13" font-weight="600" fill="#1c2330">{name}</text>',
        f'<text x="{x + 10:.0f}" y="{y + 35}" font-size="11" fill="#565f6d">{html.escape(fits)}</text>',
      ]
  path.write_text('\n'.join([*parts, '</svg>', '']))


def _first_sentence(name):
  texts = {
    'benchmarks': 'Measurements, and the tables of the paper.',
    'configs': 'The experiments and their presets.',
    'data': 'Conversion of cohorts to prepared datasets.',
    'fusa_jax.fusa': 'Full scale attention, the module of the paper.',
    'fusa_jax.scans': 'Reads and writes scans: NIfTI, DICOM, pictures.',
    'fusa_jax.torch_weights': 'Converts PyTorch weights.',
  }
  return texts.get(name) or importlib.import_module(name).__doc__.split('. ')[0].split('.\n')[0].rstrip('.') + '.'


if __name__ == '__main__':
  matplotlib.use('Agg')
  flags.DEFINE_string('workdir', 'runs/seg-demo', 'folder of the run of the segmentation demo')
  sys.exit(arguments.start(main))
