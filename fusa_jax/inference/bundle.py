"""Loads a bundle, the output of --mode=export, as a model.

`predictor.load_predictor` takes a bundle in place of a run. A bundle also runs without this package, with jax only:
see its README.md and docs/bundles.md.
"""

import json
import pathlib

import jax
import safetensors.numpy
from jax import export as jax_export

from fusa_jax.inference import trained
from fusa_jax.runs import operating_point
from fusa_jax.scans.classes import LESION, Classes, chosen, of_slices
from fusa_jax.scans.neighbours import SLICE_ALONE, Context
from fusa_jax.system import meshes
from fusa_jax.system.errors import UserError, one_line
from fusa_jax.system.files import sha256

# Version 2 takes slices with their neighbours, and version 3 has named classes. A bundle has the lowest version that
# describes it, so that earlier releases can read it, or refuse it.
FORMAT, VERSION = 'fusa_jax bundle', 3
ABOUT, PROGRAM, WEIGHTS = 'bundle.json', 'model.stablehlo', 'weights.safetensors'
FILES = (PROGRAM, WEIGHTS, 'config.json', 'README.md', 'run.py')
# The fields of `trained.Model` that bundle.json holds, and all its fields that this module reads.
OF_MODEL = ('task', 'values', 'image_size', 'batch_size', 'name', 'step')
_NEEDED = {*OF_MODEL, 'operating_point', 'calling_convention_version', 'jax', 'sha256'}


def is_bundle(folder: pathlib.Path) -> bool:
  """Whether a folder is a bundle, even if it is damaged."""
  return any((folder / name).exists() for name in (ABOUT, PROGRAM))


def version_of(context: Context, classes: Classes) -> int:
  """The version of a bundle with these neighbours and classes."""
  if classes.are_given:
    return 3
  return 2 if context.slices else 1


def about_classes(classes: Classes, has_masks: bool) -> dict:
  """What bundle.json of version 3 says of classes.

  `mask_values`, of a model with masks, has the value of a pixel in a mask, by its bits (`Classes.written`): bit k is
  set if the probability of class k is at least the threshold of the class. Exclusive classes have no values.
  """
  about = {'classes': {name: list(values) for name, values in zip(classes.names, classes.values, strict=True)}}
  return about | ({'mask_values': classes.written.tolist()} if has_masks else {})


def _classes(named):
  return chosen(named, None) if any(named.values()) else of_slices(list(named))


def load_bundle(folder: pathlib.Path, mesh, flips: bool | None = None) -> tuple[trained.Model, operating_point.Points]:
  """Loads the model and the operating points of a bundle, as `trained.load_model` does for a run.

  Args:
    folder: folder of the bundle.
    mesh: mesh that holds the weights.
    flips: None, or the value that the bundle was exported with, because its program cannot change.

  Raises:
    UserError: the folder is not a bundle of fusa_jax; a file is missing or has changed since the export; the format is
      newer; this jax cannot read the program; or the bundle was exported with another value of `flips`.
  """
  about = _about(folder)
  content = {name: _content(folder / name, about['sha256'][name]) for name in FILES}
  points = about['operating_point']
  has_flips = operating_point.shared(points).flips
  if flips not in (None, has_flips):
    raise UserError(
      f'flips: {folder} was exported {"with" if has_flips else "without"} flips, and its program cannot change; '
      'leave this flag out, or export the run again with it'
    )
  exported = _program(folder / PROGRAM, content[PROGRAM], about)
  model = trained.Model(
    function=exported.call,
    variables=jax.device_put(safetensors.numpy.load(content[WEIGHTS]), meshes.replicated(mesh)),
    **{key: about[key] for key in OF_MODEL},
    context=about['context'],
    classes=about['classes'],
    sha256=sha256(json.dumps([about['sha256'][name] for name in (PROGRAM, WEIGHTS)]).encode()),
  )
  return model, points


def _program(path, content, about):
  """Reads the program. Its digest is already checked, so an error here means that the versions of jax do not fit."""
  version = about['calling_convention_version']
  first, last = (getattr(jax_export, f'{end}_supported_calling_convention_version') for end in ('minimum', 'maximum'))
  try:
    if not first <= version <= last:
      raise ValueError(f'calling convention {version}; this jax reads {first} to {last}')
    return jax_export.deserialize(bytearray(content))
  except Exception as error:
    reason = one_line(error, 200)
    raise UserError(
      f'{path}: written by jax {about["jax"]}, which jax {jax.__version__} cannot read ({reason}); install jax '
      f'{about["jax"]}, or export the run again with jax {jax.__version__}'
    ) from None


def _about(folder):
  """Reads bundle.json and checks that it is complete and of this version."""
  path = folder / ABOUT
  try:
    about = json.loads(path.read_text())
    name, version = about['format'], about['version']
  except FileNotFoundError:
    raise UserError(
      f'{path}: missing, so the folder is not a bundle of fusa_jax; give a folder that --mode=export wrote'
    ) from None
  except (OSError, ValueError, KeyError, TypeError):
    name = version = None
  if name != FORMAT:
    raise UserError(f'{path}: not from a bundle of fusa_jax; give a folder that --mode=export wrote')
  if isinstance(version, int) and version > VERSION:
    raise UserError(f'{path}: has format {version}, but this fusa_jax reads {VERSION}; install a newer fusa_jax')
  try:
    needed = _NEEDED | {2: {'context'}, 3: {'classes'}}.get(version, set())
    if version not in (1, 2, 3) or needed - about.keys() or set(FILES) - about['sha256'].keys():
      raise ValueError('parts are missing')
    # Version 3 has neighbours only if the model sees them.
    about['context'] = Context(**about['context']) if version > 1 and 'context' in about else SLICE_ALONE
    about['classes'] = _classes(about['classes']) if version == 3 else LESION
    about['operating_point'] = operating_point.from_about(about['operating_point'], about['classes'].names)
  except (AttributeError, KeyError, TypeError, ValueError, UserError) as error:
    raise UserError(f'{path}: damaged ({error}); copy the bundle again from its source') from None
  return about


def _content(path, digest):
  try:
    content = path.read_bytes()
  except OSError as error:
    raise UserError(f'{path}: cannot be read ({error.strerror}); copy the bundle again from its source') from None
  if sha256(content) != digest:
    raise UserError(f'{path}: changed since the export (its SHA-256 differs); copy the bundle again from its source')
  return content
