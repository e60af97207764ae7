"""A bundle, as --mode=export wrote it, loaded as the model that predicts.

To `predictor.load_predictor` a bundle is what a run is. Who runs one without this package needs jax alone: README.md in
it, and docs/bundles.md.
"""

import json
import pathlib

import jax
import safetensors.numpy
from jax import export as jax_export

from fusa_jax.inference import trained
from fusa_jax.runs import operating_point
from fusa_jax.system import meshes
from fusa_jax.system.errors import UserError, one_line
from fusa_jax.system.files import sha256

FORMAT, VERSION = 'fusa_jax bundle', 1
ABOUT, PROGRAM, WEIGHTS = 'bundle.json', 'model.stablehlo', 'weights.safetensors'
FILES = (PROGRAM, WEIGHTS, 'config.json', 'README.md', 'run.py')
# What bundle.json has of the model, and what else is read from it.
OF_MODEL = ('task', 'values', 'image_size', 'batch_size', 'name', 'step')
_NEEDED = {*OF_MODEL, 'operating_point', 'calling_convention_version', 'jax', 'sha256'}


def is_bundle(folder: pathlib.Path) -> bool:
  """Whether a folder is meant to be a bundle, be it a damaged one."""
  return any((folder / name).exists() for name in (ABOUT, PROGRAM))


def load_bundle(
  folder: pathlib.Path, mesh, flips: bool | None = None
) -> tuple[trained.Model, operating_point.OperatingPoint]:
  """The model of a bundle, and the point that it is used at: as `trained.load_model` gives those of a run.

  Args:
    folder: of the bundle.
    mesh: for the weights.
    flips: None, or as the bundle was exported; its program cannot be changed.

  Raises:
    UserError: no bundle of ours; a file that is missing or not as it was exported; a newer format; a jax that cannot
      read the program; other flips than those it was exported with.
  """
  about = _about(folder)
  content = {name: _content(folder / name, about['sha256'][name]) for name in FILES}
  point = about['operating_point']
  if flips not in (None, point.flips):
    raise UserError(
      f'flips: {folder} was exported {"with" if point.flips else "without"} flips, which '
      'its program holds; leave the flag out, or export the run again with it'
    )
  exported = _program(folder / PROGRAM, content[PROGRAM], about)
  model = trained.Model(
    function=exported.call,
    variables=jax.device_put(safetensors.numpy.load(content[WEIGHTS]), meshes.replicated(mesh)),
    **{key: about[key] for key in OF_MODEL},
  )
  return model, point


def _program(path, content, about):
  """The program, which is as it was exported: what jax cannot read of it is a matter of versions."""
  version = about['calling_convention_version']
  least, most = (getattr(jax_export, f'{end}_supported_calling_convention_version') for end in ('minimum', 'maximum'))
  try:
    if not least <= version <= most:
      raise ValueError(f'calling convention {version}, known are {least} to {most}')
    return jax_export.deserialize(bytearray(content))
  except Exception as error:
    reason = one_line(error, 200)
    raise UserError(
      f'{path}: written by jax {about["jax"]}, and jax {jax.__version__} here does not read it ({reason}); install '
      'that release, or have the run exported again with this one'
    ) from None


def _about(folder):
  """What bundle.json holds, which is a bundle's of this version."""
  path = folder / ABOUT
  try:
    about = json.loads(path.read_text())
    found = about['format'], about['version']
  except FileNotFoundError:
    raise UserError(
      f'{path}: missing, so this is no bundle of fusa_jax; give the folder that --mode=export wrote'
    ) from None
  except (OSError, ValueError, KeyError, TypeError):
    found = None
  if not found or found[0] != FORMAT:
    raise UserError(f'{path}: not of a bundle of fusa_jax; give the folder that --mode=export wrote')
  if isinstance(found[1], int) and found[1] > VERSION:
    raise UserError(f'{path}: of format {found[1]}, and this fusa_jax knows {VERSION}; install a newer one')
  try:
    if found[1] != VERSION or _NEEDED - about.keys() or set(FILES) - about['sha256'].keys():
      raise ValueError('parts of it are missing')
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
    raise UserError(f'{path}: not as it was exported (its SHA-256 differs); copy the bundle again from its source')
  return content
