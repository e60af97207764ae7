"""Shared fixtures: a small cohort, its prepared dataset, and two runs trained on it.

The tests see eight CPU devices. A test can therefore compare one device with eight.
"""

import concurrent.futures
import os
import pathlib

# Most tests spend most of their time on compilation, and run the program for only a few steps on small shapes.
# Optimization level 0 compiles faster.
_FLAGS = '--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0'
os.environ['XLA_FLAGS'] = f'{_FLAGS} {os.environ.get("XLA_FLAGS", "")}'
os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['GLIBC_TUNABLES'] = ''  # otherwise each command that a test starts would restart itself after its imports

import jax
import ml_collections
import pytest

from configs import cls, seg
from data import prepare, workers
from data.cohorts import phantom
from fusa_jax.system import meshes

SIZE, SLICES, PATIENTS = 32, 16, 10

# Later runs of the tests, and parallel workers, reuse compiled programs.
jax.config.update('jax_compilation_cache_dir', str(pathlib.Path('~/.cache/fusa_jax/compiled').expanduser()))
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.1)


def tiny(module=seg, **overrides) -> ml_collections.ConfigDict:
  """Returns the demo config of configs/seg.py or configs/cls.py, reduced to test size, on all eight devices."""
  config = module.get_config('demo')
  config.data.image_size = SIZE
  config.model.width = 4
  config.train.update(steps=4, batch_size=8, warmup_steps=1, log_every=1, evaluate_every=2)
  config.evaluate.num_overlays = 2
  config.mesh.data = 8
  # Two levels or one stage: the duration of most tests depends on the number of layers to trace and compile.
  name = overrides.get('model.name', config.model.name).removeprefix('fusa_')
  config.model.update({'resunet': {'multiples': (1, 2)}, 'resnet18': {'stage_sizes': (1,)}}.get(name, {}))
  config.update_from_flattened_dict(overrides)
  return config


@pytest.fixture(scope='session', autouse=True)
def processes():
  """Returns the data path's real process pool. Other tests get one thread instead: processes take seconds to start."""
  with pytest.MonkeyPatch.context() as patch:
    real = workers.ProcessPoolExecutor
    patch.setattr(workers, 'ProcessPoolExecutor', lambda *_: concurrent.futures.ThreadPoolExecutor(1))
    yield real


@pytest.fixture(scope='session', autouse=True)
def cache(tmp_path_factory):
  """Keeps what the tests of this process prepare out of the user's cache."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(prepare, 'CACHE', tmp_path_factory.mktemp('cache'))
    yield


@pytest.fixture(scope='session')
def raw_dir(tmp_path_factory) -> pathlib.Path:
  """Ten phantoms as NIfTI files, each 16 slices of 32 x 32."""
  folder = tmp_path_factory.mktemp('raw')
  phantom.write_phantoms(folder, patients=PATIENTS, size=SIZE, slices=SLICES, seed=0)
  return folder


@pytest.fixture(scope='session')
def data_dir(raw_dir, tmp_path_factory) -> pathlib.Path:
  """The prepared dataset of `raw_dir`."""
  return prepare.prepare(str(raw_dir), str(tmp_path_factory.mktemp('prepared')), SIZE)


@pytest.fixture(scope='session')
def runs(raw_dir, data_dir, tmp_path_factory) -> dict[str, pathlib.Path]:
  """{'seg': workdir, 'cls': workdir} of a segmentation and a classification run of four steps, both evaluated."""
  from fusa_jax.training import evaluate, train

  workdirs = {}
  for name, module in (('seg', seg), ('cls', cls)):
    workdirs[name] = tmp_path_factory.mktemp('runs') / name
    config = tiny(module)
    train.train(config, workdirs[name], data_dir)
    evaluate.evaluate(config, workdirs[name], data_dir, prepare.scans(raw_dir))
  return workdirs


@pytest.fixture(scope='session')
def predictors(runs):
  """A predictor for each of `runs`, compiled once."""
  from fusa_jax.inference import predictor

  return {name: predictor.load_predictor(workdir) for name, workdir in runs.items()}


def final_state(config, workdir):
  """Returns (step, items) of a run's latest checkpoint, on the host."""
  from fusa_jax import tasks
  from fusa_jax.runs import checkpoint
  from fusa_jax.training import optimizers, train

  task = tasks.create(config)
  optimizer, _ = optimizers.make_optimizer(config)
  shapes = train.state_shapes(task, optimizer, config, meshes.create_mesh())
  with checkpoint.Checkpoints(workdir) as checkpoints:
    step = checkpoints.latest()
    return step, jax.device_get(checkpoints.restore(step, **shapes.items()))
