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
  """One kind of map.

  Attributes:
    title: its name in pictures and headers.
    unit: the unit of its values.
    limits: the whole range of the unit.
    of_class: whether each class has its own map. Otherwise all classes have the same.
  """

  title: str
  unit: str
  limits: tuple[float, float | None]
  of_class: bool


MAPS = {
  'gradcam': Map('Grad-CAM', 'logit per cell', (0.0, None), of_class=True),
  'fusa': Map('attention of the last FUSA module', 'mean over channels', (0.0, 1.0), of_class=False),
}
# The most characters, all ASCII, of a description in the header of a volume.
_LONGEST = 79


class Explainer(NamedTuple):
  """Computes the maps of a model, and draws slices as the model sees them.

  Attributes:
    function: (variables, slices [B, size, size]) -> {name of MAPS: float32 [B, h, w]}; of several classes, 'gradcam'
      is [B, h, w, classes]. 'fusa' is missing if a network has no FUSA.
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
) -> dict[str, jax.Array]:
  """Returns {name of MAPS: float32 [B, h, w]} for slices [B, H, W] (or with their neighbours), from one classifier.

  'gradcam': Grad-CAM (Selvaraju et al., ICCV 2017) for the logit of lesion. For features F [h, w, C] of the last level
  (`models.layers.last_level`), the weight of channel c is the mean over space of d logit / d F[..., c], and the map is
  relu(sum over c of weight[c] * F[..., c]). It is divided by the temperature, as the logit is. If the head is a mean
  over space and a dense layer (all models but vgg16), the sum of the map over its cells, without relu, is the logit
  minus the bias of the head.

  Of several classes it is [B, h, w, classes]: a map for the logit of each class. Of exclusive classes this is the logit
  before the softmax, the score that the paper uses.

  'fusa', for models with FUSA: the attention A of the last FUSA module, mean over the channels. It says how much of
  its input the module lets through, from 0 to 1, in a slice with or without lesion. It is the same for all classes.

  Args:
    task: the task of the network.
    variables: {'params', 'batch_stats'} of the network.
    slices: the slices, as `task.inputs` takes them.
    temperature: the divisor of the logits; of several classes, one for each class.
    flips: whether the score is that of the slice and its mirror image. Each map is then the mean of both, too.
  """
  maps = functools.partial(_maps, task, variables, temperature=temperature)
  if not flips:
    return maps(slices)
  both = jax.lax.map(maps, jnp.stack([slices, slices[:, :, ::-1]]))
  return {name: (plain + mirrored[:, :, ::-1]) / 2 for name, (plain, mirrored) in both.items()}


def _maps(task, variables, slices, temperature):
  images, modules = task.inputs(slices), []
  apply = functools.partial(task.model.apply, images=images, train=False)
  shapes = jax.eval_shape(lambda: apply(variables, mutable=[_PERTURBATIONS])[1])
  zeros = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)

  def note(method, arguments, options, context):
    if isinstance(context.module, FUSA):
      modules.append(context.module.path)
    return method(*arguments, **options)

  def logits_of(perturbations):
    with nn.intercept_methods(note):
      logits, stored = apply({**variables, **perturbations}, mutable=[_INTERMEDIATES])
    return logits, stored[_INTERMEDIATES]

  logits, gradients_of, stored = jax.vjp(logits_of, zeros, has_aux=True)
  # For each class, the gradient of the sum over slices: the logit of a slice depends on its own features only.
  one_hot = jnp.eye(logits.shape[-1], dtype=logits.dtype)[:, None]
  (gradients,) = jax.lax.map(gradients_of, jnp.broadcast_to(one_hot, (logits.shape[-1], *logits.shape)))
  (features,), gradient = stored['last_level'], gradients[_PERTURBATIONS]['last_level']
  weights = wide(gradient).mean((2, 3))
  gradcam = jnp.einsum('bhwc,kbc->bhwk', wide(features), weights, precision=HIGHEST)
  maps = {'gradcam': nn.relu(gradcam if gradcam.shape[-1] > 1 else gradcam[..., 0]) / temperature}
  if modules:  # in the order of their calls
    (attention,) = functools.reduce(operator.getitem, modules[-1], stored)['attention']
    maps['fusa'] = wide(attention).mean(-1)
  return maps


def mean_of_networks(maps: Sequence[Mapping[str, jax.Array]]) -> dict[str, jax.Array]:
  """Returns the mean maps of several networks, as their score is a mean of theirs.

  Networks of lower resolution are resized to the highest one. A map that not all networks have is left out.

  Args:
    maps: per group of networks with the same architecture: {name of MAPS: [networks, B, h, w] or with classes}.
  """
  out = {}
  for name in MAPS:
    if not all(name in each for each in maps):
      continue
    height, width = (max(each[name].shape[axis] for each in maps) for axis in (2, 3))
    resized = [
      jax.image.resize(x, (*x.shape[:2], height, width, *x.shape[4:]), 'bilinear', antialias=False)
      for x in (each[name] for each in maps)
    ]
    out[name] = jnp.concatenate(resized).mean(0)
  return out


def of_class(maps: Mapping[str, np.ndarray], number: int) -> dict[str, np.ndarray]:
  """Returns the maps of class `number`, {name of MAPS: [S, h, w]}, from those of all classes."""
  return {name: values[..., number] if values.ndim == 4 else values for name, values in maps.items()}


def about(maps: Mapping[str, np.ndarray], scores: np.ndarray, positive: np.ndarray) -> dict:
  """Returns what the JSON file of a prediction says of the maps of a class.

  `slices` are those to draw with their maps: of the positive slices, the SHOWN with the highest scores, highest first.
  A negative slice is not drawn with a map, because its colours would suggest a lesion. `limits` are the values at the
  ends of the colours, equal for all slices of a scan: scaled by itself, each slice would have a bright spot.

  Args:
    maps: {name of MAPS: [S, h, w]} of all slices of a scan, or of a picture.
    scores: the scores of the slices [S].
    positive: whether each slice is positive [S]; of exclusive classes, whether it is called this class.
  """
  best = [int(index) for index in np.argsort(-scores, kind='stable') if positive[index]]
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
    'slices': best[:SHOWN],
    'maps': of_maps,
  }


def description(name: str, class_name: str = '') -> str:
  """The text in the header of a volume: the map, its class if there are several, and that it is not a mask."""
  if not (class_name and MAPS[name].of_class):
    return f'{MAPS[name].title}: {MEANING}'
  before, after = f'{MAPS[name].title} of ', f': {MEANING}'
  in_ascii, room = class_name.encode('ascii', 'replace').decode(), _LONGEST - len(before) - len(after)
  return before + (in_ascii if len(in_ascii) <= room else f'{in_ascii[: room - 3]}...') + after


def write_picture(
  path: pathlib.Path,
  title: str,
  image: volumes.Scan | np.ndarray,
  numbers: Mapping[str, Any],
  maps: Mapping[str, np.ndarray],
  black_and_white: tuple[float, float],
  class_name: str = '',
) -> None:
  """Draws the positive slices with the highest scores, each beside itself with its maps; see `about`.

  If no slice is positive, it draws the slice with the highest score, without a map.

  Args:
    path: the PNG file.
    title: the name of the scan or picture.
    image: the scan or picture [H, W].
    numbers: the results for the image, and those of the class, with those of `about`.
    maps: {name of MAPS: [S, h, w]} of the class.
    black_and_white: of `Explainer`.
    class_name: the class, if there are several.
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
    called = numbers['slice_classes'][highest] if 'slice_classes' in numbers else numbers.get('predicted_class')
    reason = f'called {called}' if called else 'below the threshold'
    rows.append((f'{named(highest)}: {reason}', slices[highest], []))
  unit = {'hu': 'HU', 'grey': 'grey'}[numbers['values']]
  black, white = black_and_white
  height, width = next(iter(drawn['maps'].values()))['cells']
  of_several = f', {class_name}' if class_name else ''
  text = (
    f'{title}{of_several}: {MEANING}\n{_which(numbers, class_name, is_scan)}; '
    f'{f"maps of {height} x {width} cells, interpolated" if drawn["slices"] else "no map"}\n'
    f'{unit} {black:g} (black) to {white:g} (white)'
  )
  scales = [(f'{one["map"]}, {one["unit"]}', one['limits']) for one in drawn['maps'].values() if drawn['slices']]
  figures.write_explanation(path, text, rows, scales, black_and_white)


def _which(numbers, class_name, is_scan):
  """Says which slices are drawn with maps."""
  drawn = len(numbers['explanation']['slices'])
  if 'predicted_class' in numbers:  # exclusive classes have no threshold
    if not is_scan:
      return f'called {numbers["predicted_class"]}'
    total = numbers['slice_classes'].count(class_name)
    return f'{drawn} of {total} slices called {class_name}' if total else f'no slice called {class_name}'
  count, threshold = '', f'threshold {numbers["threshold"]:.3f}'
  if is_scan:
    total = len(numbers['positive_slices'])
    count = f'{drawn} of {total} positive slices, ' if total else 'no positive slice, '
  return f'{count}{threshold}'
