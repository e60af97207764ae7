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
from fusa_jax.scans.neighbours import SLICE_ALONE, Context
from fusa_jax.system import meshes
from fusa_jax.system.errors import UserError, one_line
from fusa_jax.system.files import sha256

# Version 2 takes slices with their neighbours; a bundle without neighbours is written in version 1.
FORMAT, VERSION = 'fusa_jax bundle', 2
ABOUT, PROGRAM, WEIGHTS = 'bundle.json', 'model.stablehlo', 'weights.safetensors'
FILES = (PROGRAM, WEIGHTS, 'config.json', 'README.md', 'run.py')
# The fields of `trained.Model` that bundle.json holds, and all its fields that this module reads.
OF_MODEL = ('task', 'values', 'image_size', 'batch_size', 'name', 'step')
_NEEDED = {*OF_MODEL, 'operating_point', 'calling_convention_version', 'jax', 'sha256'}


def is_bundle(folder: pathlib.Path) -> bool:
  """Whether a folder is a bundle, even if it is damaged."""
  return any((folder / name).exists() for name in (ABOUT, PROGRAM))


def load_bundle(
  folder: pathlib.Path, mesh, flips: bool | None = None
) -> tuple[trained.Model, operating_point.OperatingPoint]:
  """Loads the model and the operating point of a bundle, as `trained.load_model` does for a run.

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
  point = about['operating_point']
  if flips not in (None, point.flips):
    raise UserError(
      f'flips: {folder} was exported {"with" if point.flips else "without"} flips, and its program cannot change; '
      'leave this flag out, or export the run again with it'
    )
  exported = _program(folder / PROGRAM, content[PROGRAM], about)
  model = trained.Model(
    function=exported.call,
    variables=jax.device_put(safetensors.numpy.load(content[WEIGHTS]), meshes.replicated(mesh)),
    **{key: about[key] for key in OF_MODEL},
    context=about['context'],
    sha256=sha256(json.dumps([about['sha256'][name] for name in (PROGRAM, WEIGHTS)]).encode()),
  )
  return model, point


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
    needed = _NEEDED | {'context'} if version == VERSION else _NEEDED
    if version not in (1, VERSION) or needed - about.keys() or set(FILES) - about['sha256'].keys():
      raise ValueError('parts are missing')
    about['context'] = Context(**about['context']) if version == VERSION else SLICE_ALONE
    about['operating_point'] = operating_point.OperatingPoint(**about['operating_point'])
  except (AttributeError, TypeError, ValueError) as error:
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
