"""A model to pass on: a folder with the program, the weights and what there is to know of them, and nothing of the run.

The program is StableHLO by `jax.export`: weights and slices as a scan has them in, probabilities on the same grid out,
so that window, resizing, networks, flips, temperature and mean are within. Who runs it needs jax and none of this
package.

It computes in float32 at the highest precision, wherever it runs: whoever gets it should find what its card says.
"""

import contextlib
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import traverse_util
from jax import export as jax_export

from fusa_jax import tasks
from fusa_jax.inference import bundle, trained
from fusa_jax.measures import statistics
from fusa_jax.runs import results, run_config
from fusa_jax.scans import volumes
from fusa_jax.system import meshes, pages, provenance
from fusa_jax.system.errors import UserError
from fusa_jax.system.files import new_folder, sha256, write_json
from fusa_jax.tasks import window

NO_LICENCE = 'not stated: whoever passes it on names it'
_PLATFORMS = ('cpu', 'cuda', 'tpu')
_TEXTS = pages.TEMPLATES / 'bundle'
# Keys of a config that say where something lay.
_PLACES = (('data', 'raw_dir'), ('data', 'dir'), ('model', 'init_from'))


def write_bundle(
  workdirs: Sequence[pathlib.Path],
  folder: pathlib.Path,
  *,
  threshold: float | None = None,
  flips: bool | None = None,
  lungs: bool | None = None,
  smallest_ml: float | None = None,
  licence: str = NO_LICENCE,
) -> None:
  """Writes a run, or the mean of several, as a bundle.

  Args:
    workdirs: of trained runs; of a cross-validation, for all of its folds.
    folder: of the bundle, which appears whole or not at all.
    threshold, flips, lungs, smallest_ml: of the bundle's operating point; None: as the runs' own say.
    licence: for its card.

  Raises:
    UserError: as `trained.load_networks` and `OperatingPoint.for_model`; a bundle instead of a run; a folder that
      is not empty; the system refuses to write there.
  """
  for workdir in workdirs:
    if bundle.is_bundle(workdir):
      raise UserError(f'workdir: {workdir} is a bundle already; copy it, or export the run it was made of')
  networks, point = trained.load_networks(workdirs, meshes.create_mesh(), flips, lungs)
  model = trained.create(networks, point.flips)
  point = point.for_model(model.task, model.values, threshold=threshold, lungs=lungs, smallest_ml=smallest_ml)
  exported = program(networks, point.flips)
  about = {
    'format': bundle.FORMAT,
    'version': bundle.VERSION,
    **{key: getattr(model, key) for key in bundle.OF_MODEL},
    'operating_point': point.about(),
    'dtype': 'float32',
    'inputs': {
      'weights': f'{bundle.WEIGHTS}: a dict of its arrays by their names',
      'slices': f'int16 [batch, height, width], {_VALUES[model.values]}; rows from the front of the chest to the '
      "back, columns from the patient's right to the left; any batch, height and width",
    },
    'output': 'float32 probability of lesion, ' + tasks.type_of(model.task).output,
    'platforms': list(exported.platforms),
    'calling_convention_version': exported.calling_convention_version,
    'jax': jax.__version__,
    'fusa_jax': provenance.version(),
    'commit': provenance.commit(),
    'licence': licence,
  }
  card = _card(about, workdirs, networks)
  with new_folder(folder) as partial:
    (partial / bundle.PROGRAM).write_bytes(exported.serialize())
    (partial / bundle.WEIGHTS).write_bytes(safetensors.numpy.save(weights_of(networks)))
    write_json(partial / 'config.json', [_without_places(network.config) for network in networks])
    script = (_TEXTS / 'run.py').read_text()
    (partial / 'run.py').write_text(script)
    pages.write_page(partial / 'README.md', 'bundle/card.md', **card, script=script)
    digests = {name: sha256((partial / name).read_bytes()) for name in bundle.FILES}
    write_json(partial / bundle.ABOUT, about | {'sha256': digests})


_VALUES = {'hu': 'Hounsfield units', 'grey': 'grey of 0 to 255'}


def program(networks: Sequence[trained.Network], flips: bool) -> jax_export.Exported:
  """(weights by name, slices int16 [batch, height, width]) -> probability, as StableHLO for any of these three sizes.

  Args:
    networks: whose mean is taken; of their variables, the shapes.
    flips: whether slices are also taken mirrored, and the mean of both.
  """
  config = networks[0].config
  size, is_hu, gives_masks = config.data.image_size, config.data.intensity == 'hu', tasks.type_of(config.task).has_masks
  networks = [network._replace(config=_in_float32(network.config)) for network in networks]

  def lesion_probability(weights, slices):
    trees = traverse_util.unflatten_dict(weights, sep='/')
    each = [trees[str(number)] for number in range(len(networks))] if len(networks) > 1 else [trees]
    model = trained.create([network._replace(variables=v) for network, v in zip(networks, each, strict=True)], flips)
    values = jnp.maximum(slices, volumes.AIR) if is_hu else slices  # as `nifti.read_scan` has it
    found = model.function(model.variables, jnp.rint(resize(values, size, size)).astype(jnp.int16))
    return resize(found, *slices.shape[1:]) if gives_masks else found

  shapes = {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in weights_of(networks).items()}
  slices = jax.ShapeDtypeStruct(jax_export.symbolic_shape('batch, height, width'), jnp.int16)
  # Without, a GPU takes 10 of float32's 23 bits into a product, and a TPU 7.
  with jax.default_matmul_precision('highest'), _without_sources():
    return jax_export.export(jax.jit(lesion_probability), platforms=_PLATFORMS)(shapes, slices)


@contextlib.contextmanager
def _without_sources():
  """Otherwise a program names the file and line that each operation comes from, and so the folders of this machine."""
  key = 'jax_traceback_in_locations_limit'
  before = getattr(jax.config, key)
  jax.config.update(key, 0)
  try:
    yield
  finally:
    jax.config.update(key, before)


def resize(images: jax.Array, height: int, width: int) -> jax.Array:
  """Images [B, H, W] -> float32 [B, height, width] as `volumes.resize` has it; to their own size, as they are."""
  product = lambda how, *arrays: jnp.einsum(how, *arrays, precision=jax.lax.Precision.HIGHEST)
  rows, columns = _hats(images.shape[1], height), _hats(images.shape[2], width)
  across = product('bhw,jw->bhj', images.astype(jnp.float32), columns)
  return product('ih,bhj->bij', rows, across)


def _hats(source, target):
  """The matrix [target, source] of Pillow's BILINEAR along an axis: a hat over each target, as wide as it shrinks.

  In whole numbers, of 1 / (2 source target) of the axis, so that no pixel's weight depends on how far along it is.
  """
  at = (2 * jnp.arange(target) + 1)[:, None] * source
  apart = jnp.abs(at - (2 * jnp.arange(source) + 1) * target)
  hats = jnp.maximum(jnp.maximum(2 * source - apart, 2 * target - apart), 0).astype(jnp.float32)
  return hats / hats.sum(axis=1, keepdims=True)


def weights_of(networks: Sequence[trained.Network]) -> dict[str, np.ndarray]:
  """Arrays by name, as `params/head/bias`; of several networks with their number in front."""
  if len(networks) == 1:
    tree = networks[0].variables
  else:
    tree = {str(number): network.variables for number, network in enumerate(networks)}
  return {name: np.asarray(array) for name, array in traverse_util.flatten_dict(tree, sep='/').items()}


def _in_float32(config):
  config = config.copy_and_resolve_references()
  config.model.dtype = 'float32'
  return config


def _without_places(config):
  values = config.to_dict()
  for section, key in _PLACES:
    values[section][key] = ''
  return values


def _card(about, workdirs, networks):
  """What README.md says: what it is, what it was trained on, how good it was found."""
  patients, tests = [], []
  for workdir in workdirs:
    first, runs = len(patients), trained.runs(workdir)
    for run in runs:
      split = run_config.load_split(run) or {}
      patients.append({part: len(split[part]) if split else 'not known' for part in ('train', 'validation', 'test')})
    last, pooled = len(patients) - 1, runs != [workdir]
    steps = [network.step for network in networks[first : last + 1]]
    of = f'{first} to {last}, each patient by the one that had not seen it' if pooled else str(first)
    tests.append({'of': of, 'pooled': pooled, **_test(workdir, steps if pooled else steps[0])})
  datasets = sorted({test['dataset'] for test in tests if 'dataset' in test})
  return {
    'about': about,
    'values': _VALUES[about['values']],
    'window': window.black_and_white(about['values'], networks[0].config.data.window),
    'parameters': sum(x.size for network in networks for x in jax.tree.leaves(network.variables['params'])),
    'networks': list(zip(networks, patients, strict=True)),
    'tests': tests,
    'datasets': datasets,
    'is_phantom': any('phantom' in dataset for dataset in datasets),
    'names': tasks.type_of(about['task']).shown,
  }


def _test(workdir, step):
  """What a run's test says of its checkpoint at `step`, a cross-validation's of those of its folds; {} without one."""
  if not results.is_complete(workdir) or results.read_numbers(workdir)['step'] != step:
    return {}
  result = results.read_numbers(workdir)
  point = result['operating_point']
  shown = lambda at: {
    name: statistics.shown(at[name], interval) for name, interval in at['intervals'].items() if name in at
  }
  thresholds = point['threshold'] if isinstance(point['threshold'], list) else [point['threshold']]
  return {
    'dataset': result['dataset'],
    'patients': result['num_patients'],
    'slices': result['num_slices'],
    'caveat': results.caveat(result),
    'flips': any(np.atleast_1d(point.get('flips', False))),
    'at': [('0.5', shown(result)), (', '.join(f'{threshold:.4g}' for threshold in thresholds), shown(point))],
  }
