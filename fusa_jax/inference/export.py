"""Exports a model as a bundle: a folder with the program, the weights and a model card, without other data of the run.

The program is StableHLO from `jax.export`. Its inputs are weights and slices as in a scan, with their neighbours as
channels if the model sees these. Its output is probabilities on the same grid, with a last axis for several classes.
It includes the window, resizing, networks, flips, temperature and mean. To run it, a user needs jax but not this
package.

It computes in float32 at the highest precision on every device, so results match the model card.
"""

import contextlib
import pathlib
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import traverse_util
from jax import export as jax_export

from fusa_jax import tasks
from fusa_jax.inference import bundle, trained
from fusa_jax.measures import statistics
from fusa_jax.runs import operating_point, result_files, results, split
from fusa_jax.scans import volumes
from fusa_jax.system import meshes, pages, provenance
from fusa_jax.system.errors import UserError
from fusa_jax.system.files import new_folder, sha256, write_json
from fusa_jax.tasks import window

NO_LICENCE = 'not stated; state one before you pass this bundle on'
_PLATFORMS = ('cpu', 'cuda', 'tpu')
_TEXTS = pages.TEMPLATES / 'bundle'
# Config keys that hold paths of the exporting machine.
_PLACES = (('data', 'raw_dir'), ('data', 'dir'), ('model', 'init_from'))


def write_bundle(
  workdirs: Sequence[pathlib.Path],
  folder: pathlib.Path,
  *,
  threshold: float | Mapping[str, float] | None = None,
  flips: bool | None = None,
  lungs: bool | None = None,
  smallest_ml: float | Mapping[str, float] | None = None,
  licence: str = NO_LICENCE,
) -> None:
  """Writes a run, or the mean of several runs, as a bundle.

  Args:
    workdirs: folders of trained runs; the folder of a cross-validation stands for all of its folds.
    folder: the new folder for the bundle. An error leaves no incomplete bundle.
    threshold, flips, lungs, smallest_ml: settings of the bundle's operating points, as in `predictor.load_predictor`.
      None: as in the runs.
    licence: text for the model card.

  Raises:
    UserError: as `trained.load_networks` and `operating_point.for_model`; a workdir is a bundle; or the folder is not
      empty or cannot be written.
  """
  for workdir in workdirs:
    if bundle.is_bundle(workdir):
      raise UserError(f'workdir: {workdir} is already a bundle; copy it, or export its run')
  networks, points = trained.load_networks(workdirs, meshes.create_mesh(), flips, lungs)
  flips = operating_point.shared(points).flips
  model = trained.create(networks, flips)
  points = operating_point.for_model(
    points, model.task, model.values, threshold=threshold, lungs=lungs, smallest_ml=smallest_ml
  )
  exported = program(networks, flips)
  context, classes, has_masks = model.context, model.classes, tasks.type_of(model.task).has_masks
  about = {
    'format': bundle.FORMAT,
    'version': bundle.version_of(context, classes),
    **{key: getattr(model, key) for key in bundle.OF_MODEL},
    **({'context': context._asdict()} if context.slices else {}),
    **(bundle.about_classes(classes, has_masks) if classes.are_given else {}),
    'operating_point': operating_point.about(points),
    'dtype': 'float32',
    'inputs': {
      'weights': f'{bundle.WEIGHTS}: a dict of arrays by name',
      'slices': _input('batch, height, width', model.values)
      if not context.slices
      else _input(f'batch, height, width, {context.channels}', model.values)
      + '; the last axis holds a slice in the middle, and its neighbours from inferior to superior',
    },
    'output': _output(tasks.type_of(model.task), classes),
    'platforms': list(exported.platforms),
    'calling_convention_version': exported.calling_convention_version,
    'jax': jax.__version__,
    'fusa_jax': provenance.version(),
    'commit': provenance.commit(),
    'licence': licence,
  }
  card = _card(about, workdirs, networks, points)
  with new_folder(folder) as partial:
    (partial / bundle.PROGRAM).write_bytes(exported.serialize())
    (partial / bundle.WEIGHTS).write_bytes(safetensors.numpy.save(weights_of(networks)))
    write_json(partial / 'config.json', [_without_places(network.config) for network in networks])
    arguments = [*(['MM'] if context.slices else []), *(['MASK.npy'] if 'mask_values' in about else [])]
    script = pages.fill('bundle/run.py', context=context, has_values='mask_values' in about, arguments=arguments)
    (partial / 'run.py').write_text(script)
    card |= {'arguments': arguments, 'is_exclusive': classes.exclusive, 'script': script}
    pages.write_page(partial / 'README.md', 'bundle/card.md', **card)
    digests = {name: sha256((partial / name).read_bytes()) for name in bundle.FILES}
    write_json(partial / bundle.ABOUT, about | {'sha256': digests})


_VALUES = {'hu': 'Hounsfield units', 'grey': '8-bit grey values, 0 to 255'}


def _input(axes, values):
  return (
    f'int16 [{axes}] of any size, {_VALUES[values]}; rows run from the front of the chest to the back, columns from '
    "the patient's right to the left"
  )


def _output(task_type, classes):
  if len(classes.names) == 1:
    return 'float32 probability of lesion ' + task_type.output
  adding = ', which add up to 1' if classes.exclusive else ''
  axes = task_type.output.replace(']', f', {len(classes.names)}]')
  return f'float32 probability of each class ({", ".join(classes.names)}), the last axis{adding}, {axes}'


def program(networks: Sequence[trained.Network], flips: bool) -> jax_export.Exported:
  """Exports (weights by name, slices int16 [batch, height, width]) -> probability as StableHLO, for slices of any size.

  With neighbours, slices are [batch, height, width, C]. Probabilities of several classes have a last axis for these.

  Args:
    networks: the networks of the mean. Only the shapes of their variables are used.
    flips: whether to use the mean probability of each slice and its mirror image.
  """
  config = networks[0].config
  size, is_hu, gives_masks = config.data.image_size, config.data.intensity == 'hu', tasks.type_of(config.task).has_masks
  context = tasks.context_of(config)
  channels = (context.channels,) if context.slices else ()
  has_classes = len(tasks.classes_of(config).names) > 1
  networks = [network._replace(config=_in_float32(network.config)) for network in networks]

  def lesion_probability(weights, slices):
    trees = traverse_util.unflatten_dict(weights, sep='/')
    each = [trees[str(number)] for number in range(len(networks))] if len(networks) > 1 else [trees]
    model = trained.create([network._replace(variables=v) for network, v in zip(networks, each, strict=True)], flips)
    values = jnp.maximum(slices, volumes.AIR) if is_hu else slices  # as in `volume_files.read_scan`
    resized = _resize_each(values, size, size, has_axis=bool(channels))
    probability = model.function(model.variables, jnp.rint(resized).astype(jnp.int16))
    return _resize_each(probability, *slices.shape[1:3], has_axis=has_classes) if gives_masks else probability

  shapes = {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in weights_of(networks).items()}
  shape = (*jax_export.symbolic_shape('batch, height, width'), *channels)
  slices = jax.ShapeDtypeStruct(shape, jnp.int16)
  # Without 'highest', a GPU multiplies with 10 of float32's 23 mantissa bits, and a TPU with 7.
  with jax.default_matmul_precision('highest'), _without_sources():
    return jax_export.export(jax.jit(lesion_probability), platforms=_PLATFORMS)(shapes, slices)


@contextlib.contextmanager
def _without_sources():
  """Keeps source locations out of the program, because they would show folder names of this machine."""
  key = 'jax_traceback_in_locations_limit'
  before = getattr(jax.config, key)
  jax.config.update(key, 0)
  try:
    yield
  finally:
    jax.config.update(key, before)


def resize(images: jax.Array, height: int, width: int) -> jax.Array:
  """Images [B, H, W] -> float32 [B, height, width], as `volumes.resize`; images of this size stay unchanged."""
  product = lambda how, *arrays: jnp.einsum(how, *arrays, precision=jax.lax.Precision.HIGHEST)
  rows, columns = _hats(images.shape[1], height), _hats(images.shape[2], width)
  across = product('bhw,jw->bhj', images.astype(jnp.float32), columns)
  return product('ih,bhj->bij', rows, across)


def _resize_each(images, height, width, has_axis):
  """As `resize`, for images with a last axis of channels or classes if `has_axis`."""
  to_size = lambda images: resize(images, height, width)
  return jax.vmap(to_size, -1, -1)(images) if has_axis else to_size(images)


def _hats(source, target):
  """The matrix [target, source] of Pillow's BILINEAR along an axis: one hat function per target pixel.

  A hat is as wide as the axis shrinks. Positions are whole numbers, in units of 1 / (2 source target) of the axis, so
  that rounding errors do not depend on the position.
  """
  at = (2 * jnp.arange(target) + 1)[:, None] * source
  apart = jnp.abs(at - (2 * jnp.arange(source) + 1) * target)
  hats = jnp.maximum(jnp.maximum(2 * source - apart, 2 * target - apart), 0).astype(jnp.float32)
  return hats / hats.sum(axis=1, keepdims=True)


def weights_of(networks: Sequence[trained.Network]) -> dict[str, np.ndarray]:
  """Arrays by name, for example `params/head/bias`; with several networks, each name starts with a network's number."""
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


def _card(about, workdirs, networks, points):
  """Collects the values for the model card: the model, its training data and its test results."""
  patients, tests = [], []
  for workdir in workdirs:
    first, runs = len(patients), trained.runs(workdir)
    for run in runs:
      data = split.load_split(run) or {}
      patients.append({part: len(data[part]) if data else 'not known' for part in split.PARTS})
    last, pooled = len(patients) - 1, runs != [workdir]
    steps = [network.step for network in networks[first : last + 1]]
    of = f'{first} to {last}, each patient by the network that had not seen it' if pooled else str(first)
    of_classes = _tests(workdir, steps if pooled else steps[0], list(points))
    tests += [{'of': of, 'pooled': pooled, 'class': '', **test} for test in of_classes]
  datasets = sorted({test['dataset'] for test in tests if 'dataset' in test})
  return {
    'about': about,
    'points': points,
    'shared': operating_point.shared(points),
    'values': _VALUES[about['values']],
    'window': window.black_and_white(about['values'], networks[0].config.data.window),
    'context': tasks.context_of(networks[0].config),
    'parameters': sum(x.size for network in networks for x in jax.tree.leaves(network.variables['params'])),
    'networks': list(zip(networks, patients, strict=True)),
    'tests': tests,
    'datasets': datasets,
    'is_phantom': any('phantom' in dataset for dataset in datasets),
    'names': tasks.type_of(about['task']).shown,
  }


def _tests(workdir, step, classes):
  """Test results, for each class, of a run's checkpoint at `step`, or of a cross-validation's at its steps.

  [{}] if it was not tested.
  """
  if not result_files.is_complete(workdir / split.TEST):
    return [{}]
  result = result_files.read_numbers(workdir)
  if result['step'] != step:
    return [{}]
  of_classes = results.by_class(result, classes)
  return [{'class': name if len(classes) > 1 else '', **_test(numbers)} for name, numbers in of_classes.items()]


def _test(result):
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
    'labels': result.get('labels', ''),
    'patient': results.patient_line(result) if 'patient' in result else '',
  }
