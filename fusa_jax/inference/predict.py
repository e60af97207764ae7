"""Predicts scans and pictures: writes a mask, on the grid of the input, and a JSON file with the results.

Several threads read the next inputs and one thread writes results while the devices compute. This works because gzip,
NumPy and Pillow release Python's global lock. Of several processes, each takes the next input that none has taken.

An input that cannot be used does not stop the others: predictions.csv has a row with the reason. The same command again
skips each input whose result is complete and was made from the same bytes by the same run.
"""

import collections
import contextlib
import dataclasses
import errno
import itertools
import json
import logging
import os
import pathlib
import time
from concurrent import futures
from typing import NamedTuple

import numpy as np

from fusa_jax import tasks
from fusa_jax.inference import explanation, manifest, outputs
from fusa_jax.inference.predictor import Predictor
from fusa_jax.scans import dicom_seg, volumes
from fusa_jax.scans.archives import unpacking
from fusa_jax.scans.formats import FileSource, Source
from fusa_jax.scans.sources import find_sources
from fusa_jax.system import hosts, preemption, progress
from fusa_jax.system.errors import HostLost, Terminated, UserError, one_line
from fusa_jax.system.files import printable, sha256
from fusa_jax.system.paths import exists

# Number of pictures that are predicted together.
_TOGETHER = 64
# Number of threads that read; each holds one file in memory.
_READERS = min(os.cpu_count() or 1, 4)
# Scans, or groups of pictures, that are read ahead. One more is computed and one written: at most four are in memory.
_AHEAD = 2


class Counts(NamedTuple):
  """The inputs of a prediction: predicted (now or earlier), refused, and failed for another reason."""

  predicted: int
  refused: int
  failed: int

  def __str__(self) -> str:
    words = [f'{count} {name}' for name, count in self._asdict().items() if count or name == 'predicted']
    return ', '.join(words)


def predict(
  run: Predictor,
  source: pathlib.Path,
  output: pathlib.Path,
  probabilities: bool = False,
  as_dicom: bool = False,
  overwrite: bool = False,
  strict: bool = False,
  explain: str | None = None,
) -> Counts:
  """Predicts one scan or picture, or all scans and pictures of a folder or archive.

  NAME is the stem of the input (`find_sources`). Complete results of an earlier prediction, from the same bytes and the
  same run, are kept.

  Scans: each model writes `NAME.json` with the positive slices, the slice scores, the answer for the patient and, if
  there is a mask, the lesion volume. A segmentation model also writes `NAME_mask.nii.gz`, on the scan's grid, with its
  affines and their codes. With `probabilities` it writes `NAME_probability.nii.gz` (float32).

  Pictures: only models trained on 8-bit images read them. `NAME.json` has the score, whether it is positive and, if
  there is a mask, the number of lesion pixels. The mask is `NAME_mask.png`, in the picture's size. With `probabilities`
  there is `NAME_probability.png`, of 0 to 255.

  DICOM series: the results are those of a scan, on the grid of the series. NAME is `dicom.Series.name`, which does not
  contain the patient's name. With `as_dicom` the mask is also written as a DICOM SEG, `NAME_mask.dcm`; this file does
  contain it.

  Masks hold the values of data.classes (`Classes.written`), and `labels.txt` names them for ITK-SNAP. Their type is
  uint8 if the values are below 256. If the run has no data.classes, masks of scans hold 0 and 1, and those of pictures
  0 and 255, without `labels.txt`.

  With several classes, `NAME.json` has the results of each class under `classes`, and there is one file of
  probabilities per class, `NAME_CLASS_probability.nii.gz` or `.png`. Of exclusive classes, it also has the class with
  the highest probability.

  With `explain` a classification model also writes class-activation maps (inference/explanation.py):
  `NAME_explanation.png` shows the positive slices with the highest scores. For scans, `NAME_gradcam_explanation.nii.gz`
  and, of models with FUSA, `NAME_fusa_explanation.nii.gz` (float32) hold the maps of all slices, on the scan's grid.
  With several classes, each has `NAME_CLASS_explanation.png` and `NAME_CLASS_gradcam_explanation.nii.gz`.

  `predictions.csv` has a row per input, also for the inputs of earlier predictions into the folder. It is not created
  for a single input that is refused or fails.

  Args:
    run: the predictor.
    source: a scan or picture; or a folder or .zip that holds these and DICOM series, at any depth (see `find_sources`).
    output: the folder for the results; it is created if it does not exist.
    probabilities: also write the probabilities of masks.
    as_dicom: also write masks as DICOM SEG.
    overwrite: replace files that this program did not write, that were changed since, or that are results of another
      input with the same name; and labels.txt and predictions.csv for other classes.
    strict: read all inputs first, and predict nothing if one is refused.
    explain: one of explanation.KINDS: only the pictures of maps, or also the volumes; None: neither.

  Returns:
    The counts of all processes. Some inputs may be refused or failed, but at least one is predicted.

  Raises:
    UserError: before anything is predicted: the source holds no scans; with `strict`, an input is refused; the output
      folder has files that only `overwrite` replaces, or another prediction writes to it, or the processes do not share
      it; names of results are too long, or the same for two inputs; probabilities or DICOM SEG are requested, but the
      model predicts no masks; DICOM SEG is requested, but an input is not a DICOM series, or highdicom is missing;
      `explain` is unknown, or the model has no maps, or
      volumes of them are requested and an input is a picture; the mask of a picture would need values above 255; or all
      inputs are pictures, but the model sees neighbouring slices. At the end: all inputs were refused or failed. At any
      time: a result cannot be written; earlier results remain.
    HostLost: another process was lost, and some inputs are left.
    Terminated: on SIGTERM, which stops all processes after the inputs at hand, if some inputs are left.
  """
  if explain:
    if explain not in explanation.KINDS:
      raise UserError(f'explain: {explain!r} is unknown; give one of {", ".join(explanation.KINDS)}')
    run.check_explains()
  if probabilities and not tasks.type_of(run.model.task).has_masks:
    raise UserError('probabilities: applies to masks only, and this model gives none; leave it out')
  with unpacking() as unpacked:
    sources = find_sources(source, run.model.values, unpacked)
    pictured = [source for source in sources if source.is_picture]
    if explain == explanation.VOLUMES and pictured:
      raise UserError(f'explain: {pictured[0]} is a picture and has no volume; give --explain={explanation.OVERLAYS}')
    if all(one.is_picture for one in sources):
      run.check_picture(sources[0])
    if as_dicom:
      if not tasks.type_of(run.model.task).has_masks:
        raise UserError('dicom: applies to masks only, and this model gives none; leave it out')
      dicom_seg.check_series(sources)
    of_inputs = source if source.is_dir() else source.parent
    files = outputs.Outputs(run, output, of_inputs, probabilities, as_dicom, explain)
    files.check_pictures(sources)
    files.check_names(sources)
    job = _Job(run, files, explain is not None, of_inputs, has_one_input=len(sources) == 1)
    with manifest.locked(output) if hosts.is_main() else contextlib.nullcontext():
      return _predict(job, sources, overwrite, strict)


def _predict(job, sources, overwrite, strict):
  output, model = job.files.folder, job.run.model
  columns = manifest.columns_of(model.classes, tasks.type_of(model.task).has_masks)
  rows = manifest.Manifest(output, hosts.number(), columns)

  def check():
    if strict:
      _check(sources, job.run)
    if not overwrite:
      rows.check_own()
      job.files.check(sources)
    rows.begin()

  def finish(lost):
    count, reasons = _count(rows, sources)
    if Counts(*count).predicted:
      job.files.write_labels()
    return count, reasons, lost, preemption.requested()

  hosts.check_shared(output, 'output', 'name a folder that all hosts share')
  listed = json.dumps([(source.place, source.stem) for source in sources])
  hosts.check_equal({'the inputs (SHA-256 of their names)': sha256(listed.encode())})
  hosts.on_main(check)
  try:
    with preemption.deferred(together=False):
      _run(job, sources, rows)
      rows.close()
      lost = hosts.wait_for_others()
      count, reasons, lost, stopped = hosts.on_main(lambda: finish(lost))
      counts, names = Counts(*count), ', '.join(map(str, lost))
      left = len(sources) - sum(counts)
      if left and stopped:
        raise Terminated(f'by SIGTERM, with {left} of {len(sources)} inputs left')
  finally:
    rows.close()
    rows.join()
  if left:
    raise HostLost(f'{left} inputs are left, because of lost processes ({names}); run it again')
  if not counts.predicted and len(sources) == 1:
    rows.remove_if_new()
    raise UserError(job.with_path(sources[0], reasons[0]))
  if not counts.predicted:
    raise UserError(f'input: all {len(sources)} inputs were refused or failed; see {output / manifest.NAME}')
  return counts


def _until_stopped(items):
  """Yields items until SIGTERM has reached any process of the run."""
  for item in items:
    if preemption.requested():
      return
    yield item


def _count(rows, sources):
  """The counts of all processes, and the reasons of inputs that were not predicted."""
  rows.join(at_end=True)
  known = [row for source in sources if (row := rows.new_rows.get(source.place))]
  statuses = collections.Counter(row['status'] for row in known)
  counts = [statuses[name] for name in (manifest.PREDICTED, manifest.REFUSED, manifest.FAILED)]
  return counts, [row['reason'] for row in known if row['reason']]


def _run(job, sources, rows):
  """Predicts the inputs that this process takes."""
  picture_sources = [source for source in sources if source.is_picture]
  # Each scan has its own batches; pictures share batches.
  parts = [[source] for source in sources if not source.is_picture]
  parts += [picture_sources[start : start + _TOGETHER] for start in range(0, len(picture_sources), _TOGETHER)]
  parts = list(zip(itertools.accumulate(map(len, parts)), parts, strict=True))
  began = time.monotonic()

  # The executor of the writer waits for a write that has begun, so no result is half-written.
  with futures.ThreadPoolExecutor(1) as writer, _readers() as reader:
    read = _overlapping(reader, lambda part: (part[0], job.read(part[1])), hosts.dealt(parts), _AHEAD + 1)
    computed = ((position, job.compute(inputs)) for position, inputs in _until_stopped(read))
    show = len(sources) > 1 and hosts.is_main()
    with progress.bar(total=len(sources), desc='Predicting', unit='inputs', show=show) as bar:
      for position, inputs in _overlapping(writer, lambda part: (part[0], job.write(part[1])), computed, 1):
        for one in inputs:
          rows.add(one.row)
        # Inputs are dealt in order, so other processes have taken all earlier ones that this one has not.
        bar.update(position - bar.n)
        bar.set_postfix_str(f'{3600 * position / (time.monotonic() - began):,.0f} per hour', refresh=False)


@dataclasses.dataclass
class _Input:
  """An input on its way.

  Attributes:
    source: where it is stored.
    sha256: the digest of its bytes; '' if they cannot be read.
    image: the scan or picture; None once `row` is known.
    prepared: the network's input, int16 [S, size, size].
    probability: the network's output for it.
    maps: the class-activation maps for it, or None.
    seconds: the time that was spent on it, without waiting.
    row: its row in predictions.csv, as soon as it is known.
  """

  source: Source
  sha256: str = ''
  image: volumes.Scan | np.ndarray | None = None
  prepared: np.ndarray | None = None
  probability: np.ndarray | None = None
  maps: dict[str, np.ndarray] | None = None
  seconds: float = 0.0
  row: dict | None = None

  def settle(self, status: str, run_sha256: str, reason: str = '', numbers: dict | None = None) -> None:
    """Sets the row, with some of the numbers of the result, and drops the arrays."""
    seconds = round(self.seconds, 2) or None
    self.row = manifest.row(self.source.place, self.sha256, status, reason, seconds, run_sha256, numbers)
    self.image = self.prepared = self.probability = self.maps = None


class _Job:
  """The steps of a prediction: `read`, `compute` and `write`. Each settles the inputs that cannot go on."""

  def __init__(
    self, run: Predictor, files: outputs.Outputs, explains: bool, of_inputs: pathlib.Path, has_one_input: bool
  ):
    self.run, self.files, self._explains, self._of_inputs = run, files, explains, of_inputs
    self._has_one_input = has_one_input

  def with_path(self, source: Source, reason: str) -> str:
    """A reason with the path of a file, as the user gave it, in place of its place in the input."""
    is_file = isinstance(source, FileSource) and source.path == self._of_inputs / source.place
    return reason.replace(source.place, str(source), 1) if is_file else reason

  def read(self, sources: list[Source]) -> list[_Input]:
    """Reads the inputs that have no complete result yet."""
    return [self._read(source) for source in sources]

  def _read(self, source):
    one = _Input(source)
    with self._on(one):
      try:
        one.sha256 = source.sha256()
      except OSError:
        source.read_image(self.run.model.values)  # raises an error with the reason
        raise
      if record := self.files.complete(source, one.sha256):
        one.seconds = 0.0
        one.settle(manifest.PREDICTED, self.files.run_sha256, numbers=record)
        return one
      if source.is_picture:
        self.run.check_picture(source)
      image = source.read_image(self.run.model.values)
      one.prepared, one.image = self.run.prepare([image]), image
    return one

  def compute(self, inputs: list[_Input]) -> list[_Input]:
    """Computes the probabilities of a scan, or of pictures together."""
    ready = [one for one in inputs if one.prepared is not None]
    if not ready:
      return inputs
    began = time.monotonic()
    try:
      is_scan = isinstance(ready[0].image, volumes.Scan)  # a scan is alone
      spacing = ready[0].image.spacing[0] if is_scan else None
      prepared = np.concatenate([one.prepared for one in ready])
      probability = self.run.probabilities(prepared, spacing)
      maps = self.run.maps(prepared, spacing) if self._explains else {}
      for k, one in enumerate(ready):
        one.probability, one.prepared = probability if is_scan else probability[k], None
        if self._explains:
          one.maps = {name: values if is_scan else values[k : k + 1] for name, values in maps.items()}
    except Exception as error:  # for example, the devices are out of memory
      for one in ready:
        self._fail(one, error)
    for one in ready:
      one.seconds += (time.monotonic() - began) / len(ready)
    return inputs

  def write(self, inputs: list[_Input]) -> list[_Input]:
    """Writes the results, and settles all inputs that are left.

    Raises:
      UserError: a result cannot be written.
    """
    for one in inputs:
      if one.row is not None:
        continue
      with self._on(one):
        prediction = self.run.result(one.image, one.probability, one.maps)
        self.files.write(one.source, one.sha256, one.image, prediction)
      if one.row is None:
        one.settle(manifest.PREDICTED, self.files.run_sha256, numbers=prediction.numbers)
    return inputs

  @contextlib.contextmanager
  def _on(self, one):
    """Measures the time spent on an input; an error inside settles it, except one of the output folder."""
    began, error = time.monotonic(), None
    try:
      yield
    except Exception as raised:
      error = raised
    one.seconds += time.monotonic() - began
    if error is None:
      return
    cause = error.__cause__
    if isinstance(cause, OSError) and cause.errno not in (errno.ENAMETOOLONG, errno.EISDIR):
      raise error  # a full disk: no other result can be written either
    self._fail(one, error)

  def _fail(self, one, error):
    """Settles an input as refused by a UserError, or as failed by another error."""
    source, details = one.source, None
    if isinstance(error, UserError):
      status, reason = manifest.REFUSED, ' '.join(str(error).split())
    elif source.hides_paths:
      status, reason = manifest.FAILED, f'{source}: {type(error).__name__}'
    else:
      status, reason = manifest.FAILED, f'{source}: {type(error).__name__}: {one_line(error, 200)}'
      details = None if isinstance(error, MemoryError | OSError) else error
    # The place is the same for all hosts, and without temporary folders of archives.
    reason = printable(reason.replace(str(source), source.place) if isinstance(source, FileSource) else reason)
    if exists(path := self.files.paths(source)[0]):
      reason += f' (an earlier result remains, {path.name})'
    # The error of a single input is the error of the command.
    logging.log(logging.DEBUG if self._has_one_input else logging.WARNING, '%s: %s', status, reason, exc_info=details)
    one.settle(status, self.files.run_sha256, reason=reason)


def _check(sources, run):
  """Reads all sources, several at a time, and checks that the model takes them.

  Raises:
    UserError: sources are refused; one line for each.
  """

  def problem(source):
    try:
      source.read_image(run.model.values)
      if source.is_picture:
        run.check_picture(source)
    except UserError as error:
      return str(error)
    except Exception as error:
      return f'{source}: {type(error).__name__}'

  with _readers() as reader:
    problems = [line for line in reader.map(problem, sources) if line]
  if problems:
    raise UserError('\n'.join(problems))


@contextlib.contextmanager
def _readers():
  """Reader threads. After an error or Ctrl-C the program does not wait for them, because reading changes nothing."""
  pool = futures.ThreadPoolExecutor(_READERS)
  try:
    yield pool
  finally:
    pool.shutdown(wait=False, cancel_futures=True)


def _overlapping(pool, function, items, at_once):
  """Yields function(item) for each item, in order; threads of the pool compute up to `at_once` results ahead.

  With `at_once` results pending, the next item starts only after the oldest result is complete and without error.
  """
  begun = collections.deque()
  try:
    for item in items:
      if len(begun) == at_once:
        yield begun.popleft().result()
      begun.append(pool.submit(function, item))
  except Exception as error:
    for earlier in begun:  # an earlier item that also failed is the error to report
      if earlier.exception() is not None:
        raise earlier.exception() from error
    raise
  while begun:
    yield begun.popleft().result()
