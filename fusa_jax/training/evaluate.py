"""The protocol of a test: choose the operating point on validation patients, score the test fold, write test/."""

import copy
import dataclasses
import functools
import logging
import pathlib
from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

import jax
import ml_collections
import numpy as np

from fusa_jax import tasks
from fusa_jax.inference import postprocessing, predictor, trained
from fusa_jax.measures import masks, patients
from fusa_jax.runs import (
  checkpoint,
  config_checks,
  figures,
  operating_point,
  patient_rule,
  result_files,
  results,
  run_config,
  split,
  starts,
  workdir_lock,
)
from fusa_jax.scans import volumes
from fusa_jax.scans.classes import is_ignored, of_class
from fusa_jax.scans.neighbours import middle
from fusa_jax.system import hosts, meshes, progress, provenance
from fusa_jax.system.errors import UserError
from fusa_jax.tasks import window
from fusa_jax.training import datasets, length
from fusa_jax.training.scorer import Scorer

# The options that choose the operating point.
_OF_POINT = ('target_sensitivity', 'fit_temperature', 'flips', 'lungs', 'fit_smallest', 'patient_score')


@workdir_lock.alone_in_workdir
def evaluate(
  config: ml_collections.ConfigDict,
  workdir: pathlib.Path,
  data_dir: pathlib.Path,
  scans: Mapping[str, Callable[[], tuple[volumes.Scan, np.ndarray]]] | None = None,
  overwrite: bool = False,
) -> dict:
  """Tests a run's best checkpoint on its test fold; returns the contents of metrics.json. Process 0 writes the files.

  It first chooses the operating point on the validation fold and saves it; only then does it read the test fold. On
  other data than the run's own it keeps the run's operating point, and writes to another folder (`split.test_name`).

  Args:
    config: config of the run.
    workdir: folder of the run.
    data_dir: folder of the prepared dataset.
    scans: functions by patient that read the released scan and its reference mask. With them, the masks of a
      segmentation model are also compared as volumes on each scan's own grid. Only for a run of one process.
    overwrite: replace files of an earlier test that were changed since, or that this program did not write.

  Raises:
    UserError: the config does not fit the data or the devices. Every checkpoint is missing or damaged. The run was
      trained or validated on a test patient. Other data are given with options that choose the operating point. A
      logit is not finite. A file that this program did not write, or that was changed, would be replaced. Another job
      works in `workdir`.
  """
  config_checks.check(config)
  mesh = meshes.create_mesh(config.mesh.data, config.mesh.space)
  batch_size = meshes.fitting_batch(mesh, config.train.batch_size)
  meshes.check_divides(mesh, batch_size, config.data.image_size)
  dataset = datasets.load_dataset_for(config, data_dir)
  data = dataset.description()
  split.check_unseen(workdir, data)
  name = split.test_name(workdir, data, _source(config, data_dir))
  if name != split.TEST:
    _check_point_is_kept(config, workdir, name)
  else:
    datasets.check_labels(config, dataset)
  task = tasks.create(config, jax.default_backend())
  if not overwrite:
    hosts.on_main(lambda: result_files.check_own(workdir / name, task.classes))
  step, variables = trained.load_best(config, task, workdir, mesh)
  weights = {'step': step, 'sha256': checkpoint.sha256_of_variables(variables)}
  made_of = _made_of(config, dataset, weights, is_own=name == split.TEST)
  _say_what_differs(workdir, name, made_of)
  test = _Test(config, workdir, workdir / name, dataset, task, mesh, step, variables, scans or {}, made_of, {})
  points, scorer = _choose_points(test)
  parts = _score(test, points, scorer)
  result = _numbers(test, points, parts)
  if hosts.is_main():
    result_files.write_test(test.folder, result, _with_pictures(test, points, parts))
    for what, line in results.lines(task.type, result):
      logging.info('test fold %s, step %d%s: %s', config.data.fold, step, f', {what}' if what else '', line)
  return result


def test_name(workdir: pathlib.Path, config: ml_collections.ConfigDict, data_dir: pathlib.Path) -> str:
  """Returns the name of the folder that `evaluate` writes to, for the same arguments."""
  data = datasets.load_dataset_for(config, data_dir).description()
  return split.test_name(workdir, data, _source(config, data_dir))


def _source(config, data_dir):
  """Returns the name of the folder of the data, without its path."""
  return pathlib.Path(config.data.raw_dir or config.data.dir or data_dir).expanduser().resolve().name


def is_finished(
  config: ml_collections.ConfigDict,
  workdir: pathlib.Path,
  data_dir: pathlib.Path,
  scans: Collection[str] | None = None,
  platform: str | None = None,
) -> bool:
  """Whether a run has finished training, and test/ holds what `evaluate` would write. All processes must call it.

  Args:
    config, workdir, data_dir, scans: as in `evaluate`.
    platform: the devices that would compute it; None: those of this process.
  """
  made_of = hosts.on_main(lambda: result_files.made_of(workdir / split.TEST))
  if made_of is None:
    return False
  dataset = datasets.load_dataset_for(config, data_dir)
  if split.test_name(workdir, dataset.description(), '') != split.TEST:
    return False
  with checkpoint.Checkpoints(workdir) as checkpoints:
    latest = checkpoints.latest()
    if latest is None or not length.is_over(length.with_steps(config, dataset), checkpoints, latest):
      return False
    step = checkpoints.best()
    weights = {'step': step, 'sha256': checkpoints.digest(step)}
  expected = _made_of(config, dataset, weights, platform=platform)
  wants_volumes = tasks.type_of(config.task).has_masks and not set(dataset.test.patients).isdisjoint(scans or ())
  classes = tasks.classes_of(config).names
  return hosts.on_main(
    lambda: (
      made_of == expected
      and _is_at_points_of_run(workdir, classes)
      and (not wants_volumes or all(part.volumes for part in result_files.read_parts(workdir, classes).values()))
    )
  )


def _is_at_points_of_run(workdir, classes):
  """Whether test/ has the operating points of the run: a killed evaluation leaves new points and the old test."""
  tested = results.by_class(result_files.read_numbers(workdir), classes)
  try:
    points = operating_point.load_points(workdir, classes)
  except UserError:  # damaged: the next evaluation chooses it again
    return False
  return all(
    tested[class_name]['operating_point'].get(name) == value
    for class_name, point in points.items()
    for name, value in point.about().items()
  )


def _made_of(config, dataset, weights, is_own=True, platform=None):
  """Returns `made_of` of a test, for metrics.json.

  Args:
    config: the config of the test.
    dataset: its data.
    weights: the step of the checkpoint, and the digest of its variables.
    is_own: whether the data are those of the run. Otherwise the options that choose the operating point have no effect
      and are left out.
    platform: the devices that compute it; None: those of this process.
  """
  truth = {name: one.truth for name, one in dataset.test.patients.items()}
  options = {key: value for key, value in run_config.plain(config).evaluate.items() if is_own or key not in _OF_POINT}
  return {
    'data': {'name': dataset.name, 'sha256': dataset.sha256, 'truth_sha256': datasets.truth_sha256(truth)},
    'checkpoint': weights,
    'options': {'fold': config.data.fold, 'dtype': tasks.resolved_dtype(config, platform), **options},
    'code': provenance.code(),
  }


def _check_point_is_kept(config, workdir, name):
  """Raises a UserError if an option asks to choose the operating point on data that are not the run's own."""
  own = run_config.load_config(workdir).evaluate
  for key in _OF_POINT:
    if config.evaluate[key] != own[key]:
      raise UserError(
        f'evaluate.{key}: the operating point is chosen on the validation patients of the run, but these are other '
        f'data ({name}); leave it out, or evaluate on the data of the run with it first'
      )


def _say_what_differs(workdir, name, made_of):
  """Logs if a test is on other data, replaces a test with another `made_of`, or has another dtype than the training."""
  if name != split.TEST:
    logging.info('%s: the run was trained for other data, so this test is in %s', workdir, workdir / name)
  earlier = result_files.made_of(workdir / name) if hosts.is_main() else None
  changed = [key for key in made_of if earlier and earlier.get(key) != made_of[key]]
  if changed:
    options = [key for key, value in made_of['options'].items() if earlier['options'].get(key) != value]
    details = f' ({", ".join(options)})' if options else ''
    what = ' and '.join(changed) + details
    logging.info('%s: this test replaces one that was made of other %s', workdir / name, what)
  dtype, trained_in = made_of['options']['dtype'], [start['dtype'] for start in starts.load_starts(workdir)]
  if trained_in and trained_in[-1] != dtype:
    logging.warning('%s: the run was trained in %s, but this test is in %s', workdir, trained_in[-1], dtype)


class _Test(NamedTuple):
  """The run, its data and its devices; the folder to write to; and what the test is made of."""

  config: ml_collections.ConfigDict
  workdir: pathlib.Path
  folder: pathlib.Path
  dataset: datasets.Dataset
  task: tasks.Task
  mesh: jax.sharding.Mesh
  step: int
  variables: dict
  scans: Mapping[str, Callable]
  made_of: dict
  predictors: dict

  @property
  def is_own(self) -> bool:
    """Whether the data are those that the run was trained for."""
    return self.folder.name == split.TEST

  def predictor(self, points: operating_point.Points) -> predictor.Predictor:
    """Returns a predictor at operating points. Those of the same temperatures and flips share a compiled program."""
    temperatures = tuple(point.temperature for point in points.values())
    flips = operating_point.shared(points).flips
    program = temperatures, flips
    if program not in self.predictors:
      network = trained.Network(self.config, self.step, self.variables, temperatures)
      self.predictors[program] = predictor.Predictor(trained.create([network], flips), points, self.mesh)
    one = copy.copy(self.predictors[program])
    one.points = points
    return one

  def scanned(self, part: datasets.Split) -> list[str]:
    """Returns the patients of a split that have a scan, in its order. Pictures and single slices are not scans."""
    return [patient for patient in dict.fromkeys(part.patient.tolist()) if patient in self.scans]


def _choose_points(test):
  """Chooses the operating points on the validation fold and saves them; returns them with the scorer of slices.

  On other data than the run's own, it returns the run's operating points.
  """
  config, workdir, dataset, classes = test.config, test.workdir, test.dataset, test.task.classes
  # On the run's own data they are chosen again, so that a damaged file does not matter.
  points = {} if test.is_own else operating_point.load_points(workdir, classes)
  if any(point.step != test.step for point in points.values()) or not points:
    points = {name: operating_point.OperatingPoint(step=test.step) for name in classes}
  same = operating_point.shared(points)
  flips, lungs = (config.evaluate[key] if test.is_own else getattr(same, key) for key in ('flips', 'lungs'))
  scorer = Scorer(test.task, test.mesh, config.train.batch_size, flips, config.train.deterministic)
  if not test.is_own:
    return points, scorer
  validation = None
  if dataset.validation is not None:
    validation = scorer.tables(test.variables, dataset.validation, stage='Validating')
  for name in classes:
    if dataset.patient_labels:
      points[name] = dataclasses.replace(points[name], chosen_by=operating_point.NO_SLICE_LABELS)
    elif validation is not None:
      points[name] = operating_point.choose(
        validation[name],
        step=test.step,
        score=test.task.type.overlap,
        target_sensitivity=config.evaluate.target_sensitivity,
        fit_temperature=config.evaluate.fit_temperature,
      )
  points = operating_point.with_options(points, flips=flips, lungs=lungs)
  if config.evaluate.fit_smallest and dataset.validation is not None:
    points = _choose_smallest(test, points)
  rules = _choose_rules(test, points, validation)
  points = {name: dataclasses.replace(point, patient=rules[name]) for name, point in points.items()}
  if hosts.is_main():
    operating_point.save_points(workdir, points)
  return points, scorer


def _choose_smallest(test, points):
  """Returns the points with the smallest lesion of each class, chosen on the scans of the validation fold."""
  validated = test.scanned(test.dataset.validation)
  check_scans(test.config, validated)
  run, of_scans = test.predictor(points), {name: [] for name in points}
  for scan_name in validated:
    scan, truth = test.scans[scan_name]()
    for name, (mask, true_mask) in _masks(run(scan), truth).items():
      of_scans[name].append(postprocessing.true_volumes(mask, true_mask, scan.voxel_ml))
  return {name: operating_point.choose_smallest(point, of_scans[name]) for name, point in points.items()}


def _choose_rules(test, points, validation):
  """Chooses the rule for patients of each class on the validation fold; no call if the slices' patients are unknown.

  Args:
    test: the test.
    points: the operating points, which make the masks.
    validation: the tables of slices of the validation fold, or None.
  """
  dataset, has_masks = test.dataset, test.task.type.has_masks
  if not dataset.by_patient:
    rule = patient_rule.PatientRule('mean_of_highest').without_call(operating_point.UNKNOWN_PATIENTS)
    return dict.fromkeys(points, rule)
  validated = dataset.test if dataset.validation is None else dataset.validation
  has_scans = has_masks and len(test.scanned(validated)) == len(validated.patients)
  score_name = test.config.evaluate.patient_score or ('lesion_ml' if has_scans else 'mean_of_highest')
  if score_name in patients.OF_MASKS and not has_scans:
    raise UserError(_needs_scans(score_name))
  if validation is None:
    return dict.fromkeys(points, patient_rule.PatientRule(score_name))
  scores = {}
  if score_name in patients.OF_MASKS:
    scores = _mask_scores(test, points, score_name, test.scanned(validated), 'Validating volumes')
  rules = {}
  for name, point in points.items():
    columns = validation[name] | {'logit': validation[name]['logit'] / point.temperature}
    of_masks = {score_name: scores[name]} if scores else {}
    rules[name] = patient_rule.choose(columns, score_name, test.config.evaluate.target_sensitivity, of_masks)
  return rules


def _mask_scores(test, points, score_name, scanned, stage):
  """Returns the score of the mask of each of these scans, by class."""
  run, scores = test.predictor(points), {name: {} for name in points}
  for scan_name in progress.bar(scanned, desc=stage, unit='scans'):
    scan, _ = test.scans[scan_name]()
    for name, mask in run(scan).masks.items():
      scores[name][scan_name] = postprocessing.score_of_mask(mask, scan, score_name)
  return scores


def _score(test, points, scorer):
  """Returns, for each class, the tables of slices and patients of the test fold, and the rows of its scans."""
  temperatures, bins = ({name: getattr(p, key) for name, p in points.items()} for key in ('temperature', 'bin'))
  tables = scorer.tables(test.variables, test.dataset.test, temperatures, stage='Testing', bins=bins)
  scanned, volumes_of = test.scanned(test.dataset.test), {}
  if scanned and test.task.type.has_masks:
    volumes_of = score_volumes(test.predictor(points), test.scans, scanned)
  lung_shares = {}
  if any(point.patient is not None and point.patient.score_name == 'lung_share' for point in points.values()):
    lung_shares = _mask_scores(test, points, 'lung_share', scanned, 'Testing volumes')
  return {
    name: results.Part(table, rows, _patients(test, points[name], table, rows, lung_shares.get(name)))
    for name, table, rows in ((name, table, volumes_of.get(name)) for name, table in tables.items())
  }


def _patients(test, point, table, rows, lung_shares):
  """Returns the table of test patients of a class; None if the operating point has no rule for patients.

  Args:
    test: the test.
    point: the operating point.
    table: the table of slices of the test fold.
    rows: the rows of volumes.csv, or None.
    lung_shares: the share of the lungs by scan, or None.
  """
  rule, of_masks = point.patient, {}
  if rule is None or not test.dataset.by_patient:
    return None
  if rows:
    of_masks['lesion_ml'] = {row['case']: row['predicted_ml'] for row in rows}
  if lung_shares is not None and rule.score_name == 'lung_share':
    of_masks['lung_share'] = lung_shares
  columns = patients.table_of(table, rule.highest, of_masks)
  positive = rule.positive(columns[rule.score_name]) if rule.score_name in columns else None
  return patients.with_call(columns, rule.score_name, positive)


def _numbers(test, points, parts):
  """Returns the contents of metrics.json."""
  of_classes = {name: _numbers_of_class(test, points[name], part) for name, part in parts.items()}
  tables = {name: part.table for name, part in parts.items()}
  result = results.with_classes(test.task.type, of_classes, tables, test.task.exclusive)
  result |= {
    'step': test.step,
    'parameters': sum(x.size for x in jax.tree.leaves(test.variables['params'])),
    'dataset': test.dataset.name,
    'values': test.dataset.intensity,
    'split': results.BY_PATIENT if test.dataset.by_patient else results.BY_SLICE,
    'commit': provenance.commit(),
    'made_of': test.made_of,
  }
  return results.with_volumes(result, parts)


def _numbers_of_class(test, point, part):
  prevalences = test.config.evaluate.prevalences
  result = results.numbers(test.task.type, part.table, prevalences)
  if test.dataset.patient_labels:
    result = results.without_slices(result)
  if part.patients is not None:
    result['patient'] = results.patient_numbers(part.patients, point.patient.about(), prevalences)
  else:
    result['patient'] = results.no_patient_numbers(
      operating_point.NO_RULE_FOR_OTHER_DATA if test.dataset.by_patient else operating_point.UNKNOWN_PATIENTS
    )
  result['operating_point'] = point.about() | result['operating_point']
  return result


def check_scans(config: ml_collections.ConfigDict, scans: Collection[str] | None) -> None:
  """Raises a UserError if a key of config.evaluate needs scans and there are none."""
  if config.evaluate.fit_smallest and not scans:
    raise UserError(
      'evaluate.fit_smallest: needs the released scans and masks as volumes, on one host; give data.raw_dir, or leave '
      'evaluate.fit_smallest out'
    )
  if config.evaluate.patient_score in patients.OF_MASKS and not scans:
    raise UserError(_needs_scans(config.evaluate.patient_score))


def _needs_scans(score_name):
  return (
    f'evaluate.patient_score: {score_name} needs the released scans and masks as volumes, on one host; give '
    f'data.raw_dir, or give one of {", ".join(patients.OF_SLICES)}'
  )


def score_volumes(run: predictor.Predictor, scans, patients: list[str]) -> dict[str, list[dict]]:
  """Compares the run's masks with the reference masks: for each class, a row of `masks.volume` per patient."""
  rows = {name: [] for name in run.points}
  for patient in progress.bar(patients, desc='Testing volumes', unit='scans'):
    scan, truth = scans[patient]()
    for name, (mask, true_mask) in _masks(run(scan), truth).items():
      rows[name].append({'case': patient, **masks.volume(mask, true_mask, scan)})
  return rows


def _masks(prediction, truth):
  """Returns the predicted and the true mask {0, 1} of each class, without the pixels whose truth is unknown.

  Args:
    prediction: of a scan.
    truth: the reference mask of the scan, as bits (`scans.classes`).
  """
  known = ~is_ignored(truth)
  return {name: (mask * known, of_class(truth, number)) for number, (name, mask) in enumerate(prediction.masks.items())}


def _with_pictures(test, points, parts):
  """Returns the parts with functions that draw some slices to a path, by the names of the files.

  They compute on one device of this process alone: the other processes do not read them. Where labels are of patients,
  it is not known what a slice should show, and none is drawn.
  """
  if test.dataset.patient_labels:
    return parts
  variables = jax.tree.map(lambda x: x.addressable_data(0), test.variables)
  temperatures = np.array([point.temperature for point in points.values()], np.float32)
  flips = operating_point.shared(points).flips
  compute = jax.jit(lambda variables, slices: test.task.probabilities(variables, slices, temperatures, flips))

  @functools.cache
  def slice_and_probabilities(row):
    example = test.dataset.test.source[row]
    probability = np.asarray(compute(variables, example['image'][None])[0]) if test.task.type.has_masks else None
    return middle(example['image']), example['mask'] if test.dataset.masks else None, probability

  return {
    name: part._replace(pictures=_pictures(test, points[name], part, number, slice_and_probabilities))
    for number, (name, part) in enumerate(parts.items())
  }


def _pictures(test, point, part, number, slice_and_probabilities):
  """Returns functions that draw slices with the mask of class `number`.

  Args:
    test: the test.
    point, part: the operating point of the class, and what was found for it.
    number: the number of the class.
    slice_and_probabilities: returns a row's slice, its reference mask and its probabilities, or None for each of these.
  """
  config, task, table = test.config, test.task, part.table
  shown = window.black_and_white(config.data.intensity, config.data.window)
  volumes = {row['case']: row for row in part.volumes or []}

  def slice_and_predictions(row):
    values, mask, probability = slice_and_probabilities(row)
    predictions = {} if probability is None else {'run': probability[..., number] >= point.threshold}
    return values, None if mask is None else of_class(mask, number), predictions

  def overlay(row, path):
    values, mask, predictions = slice_and_predictions(row)
    title = f'{results.overlay_title(task.type, table, row, volumes)}, threshold {point.threshold:.3f}'
    figures.write_overlay(path, values, mask, predictions, shown, config.data.intensity, title)

  def overview(path):
    panels = [(title, *slice_and_predictions(row)) for title, row in typical.items()]
    figures.write_overview(path, panels, shown)

  rows, typical = figures.telling_slices(table, config.evaluate.num_overlays), figures.typical_slices(table)
  pictures = {results.overlay_name(table, row): functools.partial(overlay, row) for row in rows}
  return pictures | ({'overview.png': overview} if typical else {})
