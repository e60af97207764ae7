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
  results,
  run_config,
  split,
  starts,
  workdir_lock,
)
from fusa_jax.scans import volumes
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
  if not overwrite:
    hosts.on_main(lambda: results.check_own(workdir / name))
  task = tasks.create(config, jax.default_backend())
  step, variables = trained.load_best(config, task, workdir, mesh)
  weights = {'step': step, 'sha256': checkpoint.sha256_of_variables(variables)}
  made_of = _made_of(config, dataset, weights, is_own=name == split.TEST)
  _say_what_differs(workdir, name, made_of)
  test = _Test(config, workdir, workdir / name, dataset, task, mesh, step, variables, scans or {}, made_of, {})
  point, scorer = _choose_point(test)
  table, volumes_of_scans = _score(test, point, scorer)
  of_patients = _patients(test, point, table, volumes_of_scans)
  result = _numbers(test, point, table, volumes_of_scans, of_patients)
  if hosts.is_main():
    pictures = _pictures(test, table, point, volumes_of_scans)
    results.write_test(test.folder, table, result, volumes_of_scans, pictures, of_patients)
    if results.scores_slices(result):
      logging.info('test fold %s, step %d: %s', config.data.fold, step, results.one_line(task.type, result))
    logging.info('test fold %s, step %d, patients: %s', config.data.fold, step, results.patient_line(result))
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
  made_of = hosts.on_main(lambda: results.made_of(workdir / split.TEST))
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
  return hosts.on_main(
    lambda: (
      made_of == expected
      and _is_at_point_of_run(workdir)
      and (not wants_volumes or bool(results.read_volumes(workdir)))
    )
  )


def _is_at_point_of_run(workdir):
  """Whether test/ has the operating point that the run has: a killed evaluation leaves a new point and the old test."""
  tested = results.read_numbers(workdir)['operating_point']
  try:
    point = operating_point.load_point(workdir)
  except UserError:  # damaged: the next evaluation chooses it again
    return False
  return all(tested.get(name) == value for name, value in point.about().items())


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
  earlier = results.made_of(workdir / name) if hosts.is_main() else None
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

  def predictor(self, point: operating_point.OperatingPoint) -> predictor.Predictor:
    """Returns a predictor at an operating point. Those of the same temperature and flips share a compiled program."""
    program = point.temperature, point.flips
    if program not in self.predictors:
      network = trained.Network(self.config, self.step, self.variables, point.temperature)
      self.predictors[program] = predictor.Predictor(trained.create([network], point.flips), point, self.mesh)
    one = copy.copy(self.predictors[program])
    one.point = point
    return one

  def scanned(self, part: datasets.Split) -> list[str]:
    """Returns the patients of a split that have a scan, in its order. Pictures and single slices are not scans."""
    return [patient for patient in dict.fromkeys(part.patient.tolist()) if patient in self.scans]


def _choose_point(test):
  """Chooses the operating point on the validation fold and saves it; returns it with the scorer of slices.

  On other data than the run's own, it returns the run's operating point.
  """
  config, workdir, dataset = test.config, test.workdir, test.dataset
  # On the run's own data it is chosen again, so that a damaged file does not matter.
  point = operating_point.OperatingPoint() if test.is_own else operating_point.load_point(workdir)
  if point.step != test.step:
    point = operating_point.OperatingPoint(step=test.step)
  flips, lungs = (config.evaluate[key] if test.is_own else getattr(point, key) for key in ('flips', 'lungs'))
  scorer = Scorer(test.task, test.mesh, config.train.batch_size, flips, config.train.deterministic)
  if not test.is_own:
    return point, scorer
  validation = None
  if dataset.validation is not None:
    validation = scorer.table(test.variables, dataset.validation, stage='Validating')
  if dataset.patient_labels:
    point = dataclasses.replace(point, chosen_by=operating_point.NO_SLICE_LABELS)
  elif validation is not None:
    point = operating_point.choose(
      validation,
      step=test.step,
      score=test.task.type.overlap,
      target_sensitivity=config.evaluate.target_sensitivity,
      fit_temperature=config.evaluate.fit_temperature,
    )
  point = point.with_options(flips=flips, lungs=lungs)
  if config.evaluate.fit_smallest and dataset.validation is not None:
    validated = test.scanned(dataset.validation)
    check_scans(config, validated)
    run = test.predictor(point)
    point = operating_point.choose_smallest(point, [_true_volumes(run, test.scans[name]) for name in validated])
  point = dataclasses.replace(point, patient=_choose_rule(test, point, validation))
  if hosts.is_main():
    point.save(workdir)
  return point, scorer


def _choose_rule(test, point, validation):
  """Chooses the rule for patients on the validation fold; without a call if the patients of the slices are unknown.

  Args:
    test: the test.
    point: the operating point, which makes the masks.
    validation: the table of slices of the validation fold, or None.
  """
  dataset, has_masks = test.dataset, test.task.type.has_masks
  if not dataset.by_patient:
    return patient_rule.PatientRule('mean_of_highest').without_call(operating_point.UNKNOWN_PATIENTS)
  validated = dataset.test if dataset.validation is None else dataset.validation
  has_scans = has_masks and len(test.scanned(validated)) == len(validated.patients)
  score_name = test.config.evaluate.patient_score or ('lesion_ml' if has_scans else 'mean_of_highest')
  if score_name in patients.OF_MASKS and not has_scans:
    raise UserError(_needs_scans(score_name))
  if validation is None:
    return patient_rule.PatientRule(score_name)
  of_masks = {}
  if score_name in patients.OF_MASKS:
    of_masks[score_name] = _mask_scores(test, point, score_name, test.scanned(validated), 'Validating volumes')
  columns = validation | {'logit': validation['logit'] / point.temperature}
  return patient_rule.choose(columns, score_name, test.config.evaluate.target_sensitivity, of_masks)


def _mask_scores(test, point, score_name, scanned, stage):
  """Returns the score of the mask of each of these scans."""
  run, scores = test.predictor(point), {}
  for name in progress.bar(scanned, desc=stage, unit='scans'):
    scan, _ = test.scans[name]()
    scores[name] = postprocessing.score_of_mask(run(scan).mask, scan, score_name)
  return scores


def _patients(test, point, table, volumes_of_scans):
  """Returns the table of test patients; None if the operating point has no rule for patients.

  Args:
    test: the test.
    point: the operating point.
    table: the table of slices of the test fold.
    volumes_of_scans: the rows of volumes.csv, or None.
  """
  rule, of_masks = point.patient, {}
  if rule is None or not test.dataset.by_patient:
    return None
  if volumes_of_scans:
    of_masks['lesion_ml'] = {row['case']: row['predicted_ml'] for row in volumes_of_scans}
  if rule.score_name == 'lung_share':
    of_masks['lung_share'] = _mask_scores(test, point, 'lung_share', test.scanned(test.dataset.test), 'Testing volumes')
  columns = patients.table_of(table, rule.highest, of_masks)
  positive = rule.positive(columns[rule.score_name]) if rule.score_name in columns else None
  return patients.with_call(columns, rule.score_name, positive)


def _score(test, point, scorer):
  """Returns two tables of the test fold: one of its slices, and one of its scans, or None if no scan is available."""
  table = scorer.table(test.variables, test.dataset.test, point.temperature, stage='Testing', bin=point.bin)
  scanned = test.scanned(test.dataset.test)
  if not scanned or not test.task.type.has_masks:
    return table, None
  return table, score_volumes(test.predictor(point), test.scans, scanned)


def _numbers(test, point, table, volumes_of_scans, of_patients):
  """Returns the contents of metrics.json."""
  prevalences = test.config.evaluate.prevalences
  result = results.numbers(test.task.type, table, prevalences)
  if test.dataset.patient_labels:
    result = results.without_slices(result)
  if of_patients is not None:
    result['patient'] = results.patient_numbers(of_patients, point.patient.about(), prevalences)
  else:
    result['patient'] = results.no_patient_numbers(
      operating_point.NO_RULE_FOR_OTHER_DATA if test.dataset.by_patient else operating_point.UNKNOWN_PATIENTS
    )
  result['operating_point'] = point.about() | result['operating_point']
  result |= {
    'step': test.step,
    'parameters': sum(x.size for x in jax.tree.leaves(test.variables['params'])),
    'dataset': test.dataset.name,
    'values': test.dataset.intensity,
    'split': results.BY_PATIENT if test.dataset.by_patient else results.BY_SLICE,
    'commit': provenance.commit(),
    'made_of': test.made_of,
  }
  if volumes_of_scans:
    owners = results.owners_of(table, [row['case'] for row in volumes_of_scans])
    result['volumes'] = masks.summary(volumes_of_scans, owners)
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


def score_volumes(run: predictor.Predictor, scans, patients: list[str]) -> list[dict]:
  """Compares the run's mask with the reference mask: a row of `masks.volume` per patient."""
  rows = []
  for patient in progress.bar(patients, desc='Testing volumes', unit='scans'):
    scan, truth = scans[patient]()
    rows.append({'case': patient, **masks.volume(run(scan).mask, truth, scan)})
  return rows


def _true_volumes(run, read):
  scan, truth = read()
  return postprocessing.true_volumes(run(scan).mask, truth, scan.voxel_ml)


def _pictures(test, table, point, volumes_of_scans):
  """Returns functions that draw some slices to a path, by the names of the files.

  They compute on one device of this process alone: the other processes do not read them. Where labels are of patients,
  it is not known what a slice should show, and none is drawn.
  """
  if test.dataset.patient_labels:
    return {}
  config, task, dataset = test.config, test.task, test.dataset
  variables = jax.tree.map(lambda x: x.addressable_data(0), test.variables)
  options = point.temperature, point.flips
  probabilities = jax.jit(lambda variables, slices: task.probabilities(variables, slices, *options))
  shown = window.black_and_white(config.data.intensity, config.data.window)
  volumes = {row['case']: row for row in volumes_of_scans or []}

  @functools.cache
  def slice_and_predictions(row):
    example = dataset.test.source[row]
    predictions = {}
    if task.type.has_masks:
      predictions['run'] = np.asarray(probabilities(variables, example['image'][None])[0] >= point.threshold)
    return middle(example['image']), example['mask'] if dataset.masks else None, predictions

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
