"""The files that a prediction writes for each input: their names, what they were made of, and their contents."""

import contextlib
import functools
import logging
import os
import pathlib
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fusa_jax import tasks
from fusa_jax.inference import explanation
from fusa_jax.inference.class_numbers import by_class
from fusa_jax.inference.predictor import Prediction, Predictor
from fusa_jax.scans import dicom_seg, nifti, pictures, volumes
from fusa_jax.scans.classes import file_name, label_file, labels_in
from fusa_jax.scans.formats import Refused, Source
from fusa_jax.system import own_files
from fusa_jax.system.errors import UserError
from fusa_jax.system.files import LONGEST_NAME, printable, replacing, sha256

# The label description of ITK-SNAP for the masks of several classes.
LABELS = 'labels.txt'
# Results that a DICOM SEG stores to say how its mask was made.
_ABOUT = ('model', 'step', 'threshold', 'temperature', 'flips', 'lungs', 'smallest_ml', 'context', 'context_mm')


class Outputs:
  """The result files of a prediction.

  Attributes:
    run: the predictor.
    folder: the folder that they are written to.
  """

  def __init__(
    self,
    run: Predictor,
    folder: pathlib.Path,
    of_inputs: pathlib.Path,
    probabilities: bool = False,
    as_dicom: bool = False,
    explain: str | None = None,
  ):
    """Chooses the files.

    Args:
      run: the predictor.
      folder: the output folder.
      of_inputs: the folder of the inputs.
      probabilities, as_dicom, explain: as in `predict.predict`.
    """
    self.run, self.folder, self._of_inputs = run, folder, of_inputs
    self._probabilities, self._as_dicom, self._explain = probabilities, as_dicom, explain
    self._has_masks = tasks.type_of(run.model.task).has_masks
    self._classes = run.model.classes
    self._has_values = self._has_masks and self._classes.are_given  # masks hold the values of data.classes
    # The ending of the name, as in `sources.RESULTS`, says that it is a result.
    names = self._classes.names
    self._of_classes = [f'_{file_name(name)}' for name in names] if len(names) > 1 else ['']
    self._of_probability = {f'{ending}_probability': number for number, ending in enumerate(self._of_classes)}
    self._of_picture = {f'{ending}_explanation.png': number for number, ending in enumerate(self._of_classes)}

  @functools.cached_property
  def run_sha256(self) -> str:
    return self.run.sha256()

  def paths(self, source: Source) -> tuple[pathlib.Path, list[pathlib.Path]]:
    """The JSON file of an input, and its other results."""
    names = []
    if self._has_masks:
      ending = '.png' if source.is_picture else '.nii.gz'
      probabilities = [f'{name}{ending}' for name in self._of_probability] if self._probabilities else []
      names += [f'_mask{ending}', *probabilities, *(['_mask.dcm'] if self._as_dicom else [])]
    if self._explain:
      names += self._of_picture
    if self._explain == explanation.VOLUMES:
      names += self._of_map
    return self.folder / f'{source.stem}.json', [self.folder / f'{source.stem}{name}' for name in names]

  @functools.cached_property
  def _of_map(self):
    """The map and the number of the class by the ending of a volume. A map that classes share is written once."""
    return {
      f'{ending}_{name}_explanation.nii.gz': (name, number)
      for name in self.run.map_names
      for number, ending in enumerate(self._of_classes if explanation.MAPS[name].of_class else [''])
    }

  @property
  def _label_file(self) -> pathlib.Path:
    return self.folder / LABELS

  def check_pictures(self, sources: Sequence[Source]) -> None:
    """Raises a UserError if the mask of a picture would need values above 255."""
    pictured = [source for source in sources if source.is_picture]
    if pictured and self._has_values and self._classes.written.max() > 255:
      raise UserError(
        f'{pictured[0]}: the mask of a picture holds values up to 255, but data.classes of the run has '
        f'{self._classes.written.max()}; give scans'
      )

  def check_names(self, sources: Sequence[Source]) -> None:
    """Raises a UserError if the name of a result is too long for file systems, or two inputs would have the same."""
    sources = [source for source in sources if not isinstance(source, Refused)]
    too_long, source_of = [], {}
    for source in sources:
      path, others = self.paths(source)
      excess = max(len(os.fsencode(each.name)) for each in (path, *others)) - LONGEST_NAME
      too_long += [(source, len(os.fsencode(source.stem)) - excess)] if excess > 0 else []
      for other in others:
        # Some file systems do not distinguish capitals, or forms of ü.
        first = source_of.setdefault(unicodedata.normalize('NFC', other.name).casefold(), source)
        if first is not source:
          raise UserError(
            f'input: {first} and {source} would have the same result, {other.name}, because of the names of the '
            'classes; rename one of the two'
          )
    if too_long:
      source, room = too_long[0]
      more = f' and {len(too_long) - 1} more' if len(too_long) > 1 else ''
      raise UserError(
        f'input: {source}{more}: the names of its results, with those of the classes, would be longer than '
        f'{LONGEST_NAME} bytes; give it a name of at most {room} bytes without the ending'
      )

  def check(self, sources: Sequence[Source]) -> None:
    """Raises a UserError if a result would replace a file of others, or that of another input with the same name."""
    own_files.refuse(path for source in sources for path in own_files.changed(*self.paths(source)))
    if self._has_values and self._label_file.exists():
      self._check_labels()
    lines = []
    for source in sources:
      path, _ = self.paths(source)
      made_of = (own_files.read_record(path) or {}).get('made_of', {})
      if made_of.get('path_sha256', self._path_sha256(source)) == self._path_sha256(source):
        continue
      with contextlib.suppress(OSError):
        if source.sha256() != made_of['input_sha256']:
          lines.append(f'{path}: the result of another {source.name}; give another folder, or add --overwrite')
    if lines:
      raise UserError('\n'.join(lines))

  def _check_labels(self):
    """Raises a UserError if the label description differs from what would be written. It has no record."""
    content = self._label_file.read_bytes() if self._label_file.is_file() else b''
    if content == self._labels:
      return
    theirs, own = (labels_in(text.decode(errors='replace')) for text in (content, self._labels))
    if theirs is None:
      own_files.refuse([self._label_file])
    in_words = lambda labels: ', '.join(f'{value} {name}' for value, name in labels.items()) or 'none'
    raise UserError(
      f'{self._label_file}: is for other classes ({in_words(theirs)}) than those of the run ({in_words(own)}); give '
      'another folder, or add --overwrite to replace it'
    )

  @property
  def _labels(self):
    return label_file(self._classes).encode()

  def write_labels(self) -> None:
    """Writes the label description of the masks if they have the values of data.classes."""
    if self._has_values:
      with replacing(self._label_file) as partial:
        partial.write_bytes(self._labels)

  def complete(self, source: Source, input_sha256: str) -> dict[str, Any] | None:
    """Returns the record of a complete result from the same bytes and run; None without one."""
    path, others = self.paths(source)
    record = own_files.read_record(path)
    made_of = self._made_of(source, input_sha256)
    # A moved input is the same input.
    if record is None or record.get('made_of', {}) | {'path_sha256': made_of['path_sha256']} != made_of:
      return None
    same = set(record['files']) == {other.name for other in others}
    return record if same and own_files.is_complete(self.folder, record) else None

  def _made_of(self, source, input_sha256):
    return {
      'input_sha256': input_sha256,
      'run_sha256': self.run_sha256,
      'path_sha256': self._path_sha256(source),
    }

  def _path_sha256(self, source):
    return sha256(os.fsencode(self._of_inputs.resolve() / source.place))

  def write(self, source: Source, input_sha256: str, image: volumes.Scan | np.ndarray, prediction: Prediction) -> None:
    """Writes the files of an input.

    Raises:
      UserError: a file cannot be written.
    """
    path, others = self.paths(source)
    earlier = own_files.read_record(path)
    kind = 'picture' if source.is_picture else 'scan'
    made_of = self._made_of(source, input_sha256)
    numbers = {kind: printable(source.name), **prediction.numbers, 'made_of': made_of}
    write = {other: functools.partial(self._write_file, other, source, image, prediction) for other in others}
    remove = [name for name in (earlier or {}).get('files', ()) if name.startswith(f'{source.stem}_')]
    own_files.write_together(path, numbers, write, remove)
    logging.info('%s: %s%s', source.title, _one_line(numbers), '; replaces an earlier result' if earlier else '')

  def _write_file(self, path, source, image, prediction, partial):
    if path.suffix == '.dcm':
      self._write_seg(partial, image, prediction)
      return
    ending, description = path.name.removeprefix(source.stem), ''
    if ending in self._of_picture:
      self._write_picture(partial, source, image, prediction, self._of_picture[ending])
      return
    is_mask, number = ending.startswith('_mask.'), self._of_probability.get(ending.partition('.')[0])
    if self._explain:
      name, number = self._of_map[ending]
      values = explanation.of_class(prediction.maps, number)[name]
      values = volumes.resize(values, image.values.shape[1:])
      description = explanation.description(name, self._class_name(number))
    elif is_mask:
      values = prediction.mask
    else:
      values = prediction.probability[..., number] if len(self._of_probability) > 1 else prediction.probability
    if source.is_picture:
      own_values = is_mask and self._has_values
      pictures.write_picture(partial, values if own_values else np.rint(values * 255).astype(np.uint8))
    else:
      with partial.open('wb') as file:
        nifti.write_volume_to(file, values, image, compressed=True, description=description)

  def _write_picture(self, path, source, image, prediction, number):
    """Draws the maps of class `number`."""
    numbers = {**prediction.numbers, **list(by_class(prediction.numbers).values())[number]}
    maps, shown = explanation.of_class(prediction.maps, number), self.run.model.explainer.black_and_white
    name = self._class_name(number)
    explanation.write_picture(path, printable(source.name), image, numbers, maps, shown, name)

  def _class_name(self, number):
    """The name of one class of several; '' if there is only one."""
    return self._classes.names[number] if len(self._of_classes) > 1 else ''

  def _write_seg(self, path, scan, prediction):
    """Writes a segment per class; that of the only class without a name is called Lesion."""
    label = lambda name: name if self._classes.are_given else 'Lesion'
    about = {}
    for name, numbers in by_class(prediction.numbers).items():
      every = {**prediction.numbers, **numbers}
      about[label(name)] = {key: every[key] for key in _ABOUT if key in every}
    dicom_seg.write_seg(path, {label(name): mask for name, mask in prediction.masks.items()}, scan, about)


def _one_line(result: Mapping[str, Any]) -> str:
  if 'predicted_class' in result:  # exclusive classes
    name = result['predicted_class']
    return f'{name} (probability {result["probabilities"][name]})'
  of_each = {name: _in_words({**result, **numbers}) for name, numbers in by_class(result).items()}
  if len(of_each) == 1:
    return next(iter(of_each.values()))
  return '; '.join(f'{name}: {words}' for name, words in of_each.items())


def _in_words(result):
  if 'picture' in result:
    pixels = f', {result["lesion_pixels"]} pixels' if 'lesion_pixels' in result else ''
    return f'{"lesion" if result["positive"] else "no lesion"} (score {result["score"]}){pixels}'
  volume = f'{result["lesion_ml"]:.1f} mL of lesion, ' if 'lesion_ml' in result else ''
  slices = f'{len(result["positive_slices"])} of {result["num_slices"]} slices positive'
  called = result['patient']['positive']
  return f'{volume}{slices}' + ('' if called is None else f', patient {"positive" if called else "negative"}')
