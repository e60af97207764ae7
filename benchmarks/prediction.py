"""Times prediction for a folder of scans: reading, computing and writing separately, and everything together.

On a CPU, reading and writing take most of the first command's time, and computing most of the others' time:

  python -m benchmarks.prediction --image_size=96 --width=4 --probabilities
  python -m benchmarks.prediction --image_size=256 --width=16 --rounds=1
  python -m benchmarks.prediction --image_size=256 --width=16 --rounds=1 --bundle  (export first, then predict)

The command draws phantoms in a temporary folder; `--input` uses existing scans instead. It initialises a network, but
does not train it. The threshold is the 99th percentile of the first scan's probabilities, so masks are about as large
as lesions.

The time of `predict.predict` includes checks, weights, the compiled program (from the cache, after the first time),
masks and numbers. The stages are timed with the functions that it calls, one scan after the other. Each time is the
least of the rounds. Memory is the peak of the process after the first complete prediction.
"""

import collections
import datetime
import pathlib
import resource
import tempfile
import time

import jax
import numpy as np
from absl import app, flags, logging

from configs import seg
from data.cohorts import phantom
from fusa_jax import tasks
from fusa_jax.inference import bundle, export, predict, trained
from fusa_jax.inference.predictor import Predictor, load_predictor
from fusa_jax.runs import checkpoint, run_config
from fusa_jax.scans import nifti
from fusa_jax.scans.formats import Source
from fusa_jax.scans.sources import find_sources
from fusa_jax.system import meshes, provenance
from fusa_jax.training import optimizers, train

_INPUT = flags.DEFINE_string('input', None, 'folder of scans in HU, instead of phantoms')
_VOLUMES = flags.DEFINE_integer('volumes', 6, 'number of phantoms')
_SLICES = flags.DEFINE_integer('slices', 150, 'slices per phantom')
_SIZE = flags.DEFINE_integer('size', 512, 'rows and columns of each phantom')
_MODEL = flags.DEFINE_string('model', 'fusa_resunet', 'a segmentation model')
_WIDTH = flags.DEFINE_integer('width', 4, 'channels of the first level')
_IMAGE_SIZE = flags.DEFINE_integer('image_size', 96, 'side of the slices that the network sees')
_BATCH_SIZE = flags.DEFINE_integer('batch_size', 8, 'slices per batch')
_DTYPE = flags.DEFINE_string('dtype', 'auto', 'type of activations')
_BUNDLE = flags.DEFINE_bool('bundle', False, 'export the run and predict with the bundle; print seconds and sizes')
_PROBABILITIES = flags.DEFINE_bool('probabilities', False, 'also write probability volumes')
_ROUNDS = flags.DEFINE_integer('rounds', 3, 'number of rounds; the least time of each stage counts')


def make_run(workdir: pathlib.Path):
  """Writes a run without training steps into the folder; returns its config."""
  config = seg.get_config(_MODEL.value)
  config.model.update(width=_WIDTH.value, dtype=_DTYPE.value)
  config.data.image_size, config.train.batch_size = _IMAGE_SIZE.value, _BATCH_SIZE.value
  run_config.save_config(workdir, config)
  optimizer, _ = optimizers.make_optimizer(config)
  state = train.compile_init(tasks.create(config), optimizer, config, meshes.replicated(meshes.create_mesh()))()
  with checkpoint.Checkpoints(workdir) as checkpoints:
    checkpoints.save(0, **state.items(), score=None)
  return run_config.load_config(workdir)


def make_bundle(workdir: pathlib.Path) -> pathlib.Path:
  """Exports the run as a bundle, prints times and file sizes, and returns the bundle's folder."""
  folder = workdir.with_name('bundle')
  began = time.perf_counter()
  export.write_bundle([workdir], folder)
  exported = time.perf_counter()
  trained.load_model([workdir], meshes.create_mesh())
  loaded = time.perf_counter()
  bundle.load_bundle(folder, meshes.create_mesh())
  sizes = ', '.join(f'{path.name} {path.stat().st_size / 1e6:.3f} MB' for path in sorted(folder.iterdir()))
  print(
    f'exported in {exported - began:.1f} s: {sizes}; loading takes {loaded - exported:.1f} s for the run, '
    f'{time.perf_counter() - loaded:.1f} s for the bundle',
    flush=True,
  )
  return folder


def stages(run: Predictor, sources: list[Source], output: pathlib.Path) -> dict[str, float]:
  """Returns the seconds of each stage, over all scans."""
  took = collections.Counter()

  def timed(stage, function, *arguments):
    began = time.perf_counter()
    value = function(*arguments)
    took[stage] += time.perf_counter() - began
    return value

  for source in sources:
    scan = timed('read', source.read_image, 'hu')
    result = timed('compute', run, scan)
    for volume in ('mask', 'probability') if _PROBABILITIES.value else ('mask',):
      timed('write', nifti.write_volume, output / f'{source.stem}_{volume}.nii.gz', getattr(result, volume), scan)
  return took


def main(_):
  logging.set_verbosity(logging.ERROR)
  with tempfile.TemporaryDirectory() as folder:
    folder = pathlib.Path(folder)
    jax.config.update('jax_compilation_cache_dir', str(folder / 'compiled'))
    scans, workdir, output = pathlib.Path(_INPUT.value or folder / 'scans'), folder / 'run', folder / 'out'
    if _INPUT.value is None:
      phantom.write_phantoms(scans, patients=_VOLUMES.value, size=_SIZE.value, slices=_SLICES.value)
    sources, config = find_sources(scans, 'hu', folder / 'unpacked'), make_run(workdir)
    if _BUNDLE.value:
      workdir = make_bundle(workdir)
    threshold = float(np.quantile(load_predictor(workdir)(sources[0].read_image('hu')).probability[:, ::8, ::8], 0.99))
    run, rounds, peak = load_predictor(workdir, threshold=threshold), [], None
    run(sources[0].read_image('hu'))  # compiles
    for _ in range(_ROUNDS.value):
      began = time.perf_counter()
      predict.predict(load_predictor(workdir, threshold=threshold), scans, output, _PROBABILITIES.value)
      whole = time.perf_counter() - began
      peak = peak or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
      rounds.append({**stages(run, sources, output), 'predict': whole})
  least = {stage: min(each[stage] for each in rounds) for stage in rounds[0]}
  print(f'| {" | ".join(least)} | peak MB |\n|{" ---: |" * (len(least) + 1)}')
  print(f'| {" | ".join(f"{seconds:.2f}" for seconds in least.values())} | {peak:.0f} |')
  print(
    f'\n{len(sources)} scans, {_MODEL.value} of width {_WIDTH.value} on {_IMAGE_SIZE.value} x {_IMAGE_SIZE.value}, '
    f'batch {_BATCH_SIZE.value}, {config.model.dtype}{", probabilities" if _PROBABILITIES.value else ""}, seconds, '
    f'{jax.device_count()} x {jax.devices()[0].device_kind}, jax {jax.__version__}, '
    f'{datetime.date.today()}, commit {provenance.commit()}'
  )


if __name__ == '__main__':
  app.run(main)
