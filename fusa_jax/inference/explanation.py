"""Class-activation maps of classifiers: where in a slice a score comes from. They explain a score; they are no masks.

`MAPS` describes the maps. Both have the resolution of the last level of the network, which is coarse: one cell per 32 x
32 pixels of the network's input (vgg16: 16 x 16).
"""

import functools
import operator
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from fusa_jax import tasks
from fusa_jax.fusa import FUSA
from fusa_jax.models.precision import HIGHEST, wide
from fusa_jax.runs import figures
from fusa_jax.scans import volumes

# The values of `explain` in `predict.predict`: pictures of some slices; or these, and volumes of all slices.
OVERLAYS, VOLUMES = KINDS = ('overlays', 'volumes')
# What each picture and JSON file says, and the header of each volume.
MEANING = 'an explanation of the score, not a mask'
# At most this many slices of a scan are drawn.
SHOWN = 4
_PERTURBATIONS, _INTERMEDIATES = 'perturbations', 'intermediates'


class Map(NamedTuple):
  """One kind of map: its title in pictures and headers, the unit of its values, and the unit's whole range."""

  title: str
  unit: str
  limits: tuple[float, float | None]


MAPS = {
  'gradcam': Map('Grad-CAM', 'logit per cell', (0.0, None)),
  'fusa': Map('attention of the last FUSA module', 'mean over channels', (0.0, 1.0)),
}


class Explainer(NamedTuple):
  """Computes the maps of a model, and draws slices as the model sees them.

  Attributes:
    function: (variables, slices [B, size, size]) -> {name of MAPS: float32 [B, h, w]}. 'fusa' is missing if a network
      has no FUSA.
    black_and_white: the values of a slice that are drawn black and white: those that the network clips to.
  """

  function: Callable[[Any, jax.Array], dict[str, jax.Array]]
  black_and_white: tuple[float, float]


def activation_maps(
  task: tasks.Task,
  variables: dict,
  slices: jax.Array,
  temperature: float | jax.Array = 1.0,
  flips: bool = False,
  number: int = 0,
) -> dict[str, jax.Array]:
  """Returns {name of MAPS: float32 [B, h, w]} for slices [B, H, W] (or with their neighbours), from one classifier.

  'gradcam': Grad-CAM (Selvaraju et al., ICCV 2017) for the logit of lesion. For features F [h, w, C] of the last level
  (`models.layers.last_level`), the weight of channel c is the mean over space of d logit / d F[..., c], and the map is
  relu(sum over c of weight[c] * F[..., c]). It is divided by the temperature, as the logit is. If the head is a mean
  over space and a dense layer (all models but vgg16), the sum of the map over its cells, without relu, is the logit
  minus the bias of the head.

  'fusa', for models with FUSA: the attention A of the last FUSA module, mean over the channels. It says how much of
  its input the module lets through, from 0 to 1, in a slice with or without lesion.

  Args:
    task: the task of the network.
    variables: {'params', 'batch_stats'} of the network.
    slices: the slices, as `task.inputs` takes them.
    temperature: the divisor of the logits.
    flips: whether the score is that of the slice and its mirror image. Each map is then the mean of both, too.
    number: of the logit in the network's output.
  """
  maps = functools.partial(_maps, task, variables, temperature=temperature, number=number)
  if not flips:
    return maps(slices)
  both = jax.lax.map(maps, jnp.stack([slices, slices[:, :, ::-1]]))
  return {name: (plain + mirrored[..., ::-1]) / 2 for name, (plain, mirrored) in both.items()}


def _maps(task, variables, slices, temperature, number):
  images, modules = task.inputs(slices), []
  apply = functools.partial(task.model.apply, images=images, train=False)
  shapes = jax.eval_shape(lambda: apply(variables, mutable=[_PERTURBATIONS])[1])
  zeros = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)

  def note(method, arguments, options, context):
    if isinstance(context.module, FUSA):
      modules.append(context.module.path)
    return method(*arguments, **options)

  def logit(perturbations):
    with nn.intercept_methods(note):
      logits, stored = apply({**variables, **perturbations}, mutable=[_INTERMEDIATES])
    # The sum over slices: the logit of a slice depends on its own features only.
    return logits[:, number].sum(), stored[_INTERMEDIATES]

  gradients, stored = jax.grad(logit, has_aux=True)(zeros)
  (features,), gradient = stored['last_level'], gradients[_PERTURBATIONS]['last_level']
  weights = wide(gradient).mean((1, 2))
  gradcam = jnp.einsum('bhwc,bc->bhw', wide(features), weights, precision=HIGHEST)
  maps = {'gradcam': nn.relu(gradcam) / temperature}
  if modules:  # in the order of their calls
    (attention,) = functools.reduce(operator.getitem, modules[-1], stored)['attention']
    maps['fusa'] = wide(attention).mean(-1)
  return maps


def mean_of_networks(maps: Sequence[Mapping[str, jax.Array]]) -> dict[str, jax.Array]:
  """Returns the mean maps [B, h, w] of several networks, as their score is a mean of theirs.

  Networks of lower resolution are resized to the highest one. A map that not all networks have is left out.

  Args:
    maps: per group of networks with the same architecture: {name of MAPS: [networks, B, h, w]}.
  """
  out = {}
  for name in MAPS:
    if not all(name in each for each in maps):
      continue
    height, width = (max(each[name].shape[axis] for each in maps) for axis in (2, 3))
    resize = lambda x, shape=(height, width): jax.image.resize(x, (*x.shape[:2], *shape), 'bilinear', antialias=False)
    out[name] = jnp.concatenate([resize(each[name]) for each in maps]).mean(0)
  return out


def about(maps: Mapping[str, np.ndarray], scores: np.ndarray, threshold: float) -> dict:
  """Returns what the JSON file of a prediction says of its maps.

  `slices` are those to draw with their maps: of the positive slices, the SHOWN with the highest scores, highest first.
  A negative slice is not drawn with a map, because its colours would suggest a lesion. `limits` are the values at the
  ends of the colours, equal for all slices of a scan: scaled by itself, each slice would have a bright spot.

  Args:
    maps: {name of MAPS: [S, h, w]} of all slices of a scan, or of a picture.
    scores: the scores of the slices [S].
    threshold: the lowest score of a positive slice.
  """
  best = np.argsort(-scores, kind='stable')[:SHOWN]
  of_maps = {}
  for name, values in maps.items():
    low, high = MAPS[name].limits
    of_maps[name] = {
      'map': MAPS[name].title,
      'unit': MAPS[name].unit,
      'cells': list(values.shape[1:]),
      'limits': [low, high or float(values.max()) or 1.0],  # 1 if the map is 0 everywhere
    }
  return {
    'meaning': MEANING,
    'slices': [int(index) for index in best if scores[index] >= threshold],
    'maps': of_maps,
  }


def description(name: str) -> str:
  """What the header of a volume says: the map, and that it is no mask; at most 79 characters."""
  return f'{MAPS[name].title}: {MEANING}'


def write_picture(
  path: pathlib.Path,
  title: str,
  image: volumes.Scan | np.ndarray,
  numbers: Mapping[str, Any],
  maps: Mapping[str, np.ndarray],
  black_and_white: tuple[float, float],
) -> None:
  """Draws the positive slices with the highest scores, each beside itself with its maps; see `about`.

  If no slice is positive, it draws the slice with the highest score, without a map.

  Args:
    path: the PNG file.
    title: the name of the scan or picture.
    image: the scan or picture [H, W].
    numbers: the results for the image, with those of `about`.
    maps: {name of MAPS: [S, h, w]}.
    black_and_white: of `Explainer`.
  """
  is_scan, drawn = isinstance(image, volumes.Scan), numbers['explanation']
  slices, scores = (image.values, numbers['slice_scores']) if is_scan else ([image], [numbers['score']])
  named = lambda index: f'slice {index}, score {scores[index]:.3f}' if is_scan else f'score {scores[index]:.3f}'
  rows = []
  for index in drawn['slices']:
    resized = [volumes.resize(values[[index]], slices[index].shape)[0] for values in maps.values()]
    rows.append((named(index), slices[index], resized))
  if not rows:
    highest = int(np.argmax(scores))
    rows.append((f'{named(highest)}: below the threshold', slices[highest], []))
  count = ''
  if is_scan:
    total = len(numbers['positive_slices'])
    count = f'{len(drawn["slices"])} of {total} positive slices, ' if total else 'no positive slice, '
  unit = {'hu': 'HU', 'grey': 'grey'}[numbers['values']]
  black, white = black_and_white
  height, width = next(iter(drawn['maps'].values()))['cells']
  text = (
    f'{title}: {MEANING}\n{count}threshold {numbers["threshold"]:.3f}; '
    f'{f"maps of {height} x {width} cells, interpolated" if drawn["slices"] else "no map"}\n'
    f'{unit} {black:g} (black) to {white:g} (white)'
  )
  scales = [(f'{one["map"]}, {one["unit"]}', one['limits']) for one in drawn['maps'].values() if drawn['slices']]
  figures.write_explanation(path, text, rows, scales, black_and_white)
