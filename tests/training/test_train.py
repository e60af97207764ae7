"""The training loop: the same result on any devices, with and without resuming; and errors that stop it."""

import dataclasses
import json
import math
import pathlib

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import SIZE, final_state, tiny

from configs import cls, seg
from data import prepare
from fusa_jax import tasks
from fusa_jax.chips import hlo
from fusa_jax.inference import trained
from fusa_jax.runs import checkpoint, results, run_config
from fusa_jax.system import meshes
from fusa_jax.system.errors import UserError
from fusa_jax.training import augment, datasets, evaluate, input_pipeline, length, optimizers, scorer, train


def log_of(workdir: pathlib.Path) -> list[dict]:
  return [json.loads(line) for line in (workdir / 'log.jsonl').read_text().splitlines()]


class Stop(Exception):
  pass


def stop_at(monkeypatch, step):
  """Makes the loop fail at the batch after `step`, as a crash would."""
  original = input_pipeline.train_batches

  class Batches:
    def __init__(self, *args, **options):
      self.batches, self.step = original(*args, **options), options['first_step']

    def __next__(self):
      if self.step == step:
        raise Stop
      self.step += 1
      return next(self.batches)

    def close(self):
      self.batches.close()

  monkeypatch.setattr(input_pipeline, 'train_batches', Batches)


def test_a_stopped_run_resumes_bit_exactly(runs, data_dir, tmp_path, monkeypatch):
  """The run stops after step 3; its last checkpoint is of step 2. `runs` holds the uninterrupted run."""
  config = tiny()
  with monkeypatch.context() as patch:
    stop_at(patch, 3)
    with pytest.raises(Stop):
      train.train(config, tmp_path, data_dir)
  assert log_of(tmp_path)[-1]['step'] == 3
  train.train(config, tmp_path, data_dir)
  (step, whole), (again, resumed) = (final_state(config, workdir) for workdir in (runs['seg'], tmp_path))
  assert step == again == 4
  assert jax.tree.structure(whole) == jax.tree.structure(resumed)
  jax.tree.map(np.testing.assert_array_equal, whole, resumed)
  # The log also equals that of an uninterrupted run: each step once, with the same losses.
  losses = [[(e['step'], e['train/loss']) for e in log_of(w) if 'train/loss' in e] for w in (runs['seg'], tmp_path)]
  assert losses[0] == losses[1]
  assert [step for step, _ in losses[0]] == [1, 2, 3, 4]


def test_a_finished_run_is_not_changed(runs, data_dir):
  before = (runs['seg'] / 'log.jsonl').read_bytes()
  train.train(tiny(), runs['seg'], data_dir)
  assert (runs['seg'] / 'log.jsonl').read_bytes() == before


def test_workdir_has_the_documented_files(runs):
  for workdir in runs.values():
    names = {path.name for path in workdir.iterdir() if path.name != '.run.lock'}
    assert names == {
      'config.json',
      'log.jsonl',
      'tensorboard',
      'checkpoints',
      'operating_point.json',
      'split.json',
      'starts.json',
      'test',
    }
    entries = log_of(workdir)
    assert [e['step'] for e in entries if 'train/loss' in e] == [1, 2, 3, 4]
    assert [e['step'] for e in entries if any(key.startswith('validation/') for key in e)] == [2, 4]
    assert list((workdir / 'tensorboard').glob('events.out.tfevents.*'))
  assert run_config.load_config(runs['seg']).model.name == 'fusa_resunet'


def test_loss_that_is_not_finite_stops_with_its_step(data_dir, tmp_path):
  config = tiny(cls, **{'train.learning_rate': 1e30, 'train.warmup_steps': 0, 'train.log_every': 3})
  with pytest.raises(UserError, match=r'train: the loss is (nan|inf) at step (2|3); lower train.learning_rate'):
    train.train(config, tmp_path / 'run', data_dir)
  assert not checkpoint.exists(tmp_path / 'run')


def test_a_config_that_would_change_the_result_is_refused(runs, data_dir):
  harmless = tiny(**{'train.log_every': 2, 'data.raw_dir': 'elsewhere'})
  run_config.save_config(runs['seg'], harmless)
  run_config.save_config(runs['seg'], tiny())
  # With named data no phantom is drawn, so its options may change. Without data, other phantoms would be used.
  other = {'data.phantom.patients': 7}
  run_config.save_config(runs['seg'], tiny(**other, **{'data.dir': 'elsewhere'}))
  run_config.save_config(runs['seg'], tiny())
  with pytest.raises(UserError, match=r'data.phantom.patients \(120 -> 7\)'):
    run_config.save_config(runs['seg'], tiny(**other))
  changed = tiny(**{'train.learning_rate': 0.5, 'seed': 3})
  with pytest.raises(
    UserError,
    match=r'seed \(0 -> 3\), train.learning_rate \(0.003 -> 0.5\); undo these changes, or name another --workdir',
  ):
    train.train(changed, runs['seg'], data_dir)
  with pytest.raises(
    UserError, match=r'a run of 4 steps: train.steps cannot change, because the .*; name another --workdir'
  ):
    train.train(tiny(**{'train.steps': 8}), runs['seg'], data_dir)


@pytest.mark.parametrize(
  ('overrides', 'reason'),
  [
    ({'train.batch_size': 6}, 'train.batch_size: 6 must be a multiple of mesh.data=8; give 8'),
    ({'train.steps': 0}, 'train.steps: 0 must be at least 1'),
    ({'model.name': 'resnet18'}, 'resnet18 is not for segmentation; give one of deeplabv3'),
    ({'model.name': 'unet'}, "'unet' is unknown"),
    ({'task': 'detection'}, "'detection' is unknown"),
    ({'train.loss': 'x'}, "train.loss: 'x' is unknown; give one of cross_entropy, cross_entropy_dice, dice, focal, "),
    ({'train.optimizer': 'x'}, "train.optimizer: 'x' is unknown; give one of adamw, sgd"),
    ({'train.schedule': 'x'}, "train.schedule: 'x' is unknown; give one of warmup_cosine, polynomial, constant"),
    (
      {'train.deep_supervision': True},
      'train.deep_supervision: needs resunet or fusa_resunet with at least three levels, but the model is fusa_resunet',
    ),
    ({'train.deep_supervision': True, 'model.name': 'linknet'}, 'needs resunet .* but the model is linknet; leave'),
    ({'mesh.data': 3}, 'does not match the 8 devices'),
    ({'data.image_size': 40, 'model.multiples': None}, '40 must be a multiple of 16 for ResUNet; give 48'),
    ({'model.multiples': ()}, r'model.multiples: \(\) must be a list of whole numbers above 0; give'),
    ({'model.stage_sizes': (1,)}, r'fusa_resunet does not accept .*stage_sizes'),
  ],
)
def test_bad_configs_are_refused_before_anything_is_written(raw_dir, data_dir, tmp_path, overrides, reason):
  if 'data.image_size' in overrides:
    data_dir = prepare.prepare(str(raw_dir), str(tmp_path / 'prepared'), overrides['data.image_size'])
  with pytest.raises(UserError, match=reason):
    train.train(tiny(**overrides), tmp_path / 'run', data_dir)
  assert not (tmp_path / 'run').exists()


@pytest.fixture(scope='module')
def losses_on_one_device(data_dir):
  return losses(tiny(**{'train.steps': 20}), meshes.create_mesh(1, 1, jax.devices()[:1]), data_dir)


@pytest.mark.slow
@pytest.mark.parametrize(('data', 'space'), [(8, 1), (4, 2)])
def test_loss_curve_does_not_depend_on_the_devices(data_dir, losses_on_one_device, data, space):
  """The losses of 20 steps agree with one device within 1e-4; float32 sums have another order."""
  curve = losses(tiny(**{'train.steps': 20}), meshes.create_mesh(data, space), data_dir)
  assert np.ptp(curve) > 0.05
  np.testing.assert_allclose(curve, losses_on_one_device, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize('module', [seg, cls])
def test_devices_that_share_an_image_share_its_work(module):
  """A quarter of 4 images needs little more arithmetic than one image: only the rows at the borders are shared.

  XLA counts the arithmetic of one device's program. The crop mixes the rows of an image, and once made all later layers
  process whole images on each of the devices that share them.
  """

  def flops(data, space):
    config = tiny(module, **{'data.image_size': 64, 'augment.crop_probability': 0.5})
    mesh, task = meshes.create_mesh(data, space), tasks.create(config)
    optimizer, _ = optimizers.make_optimizer(config)
    shapes = train.state_shapes(task, optimizer, config, mesh)
    return train.lower_step(task, optimizer, config, mesh, shapes).compile().cost_analysis()['flops']

  assert flops(2, 4) < 1.5 * flops(8, 1)


@pytest.mark.slow
def test_dense_kernels_of_fusa_are_not_summed_over_the_devices():
  """The last stage of FUSA-ResNet-18 has 512 channels. The byte count shows that all other gradients are summed."""
  config = tiny(cls, **{'model.width': 64, 'model.stage_sizes': None})
  mesh, task = meshes.create_mesh(8, 1), tasks.create(config)
  optimizer, _ = optimizers.make_optimizer(config)
  shapes = train.state_shapes(task, optimizer, config, mesh)
  program = train.lower_step(task, optimizer, config, mesh, shapes).compile().as_text()
  sent = sum(c.nbytes for c in hlo.collectives(program, 8))
  leaves = flax.traverse_util.flatten_dict(shapes.variables['params'], sep='/')
  kept = sum(p.size for name, p in leaves.items() if '/attention/' in name and p.ndim > 1 and p.shape[-1] == 512)
  total = sum(p.size for p in leaves.values())
  assert kept == 2 * 4 * 512**2
  # The ratio is not exactly 1. Half of each fusion kernel has the same gradient in every row and is sent once. On CPUs
  # the gradient of a strided kernel is summed before its unused part is cut off. With dense kernels it would be 1.2.
  assert 0.95 < sent / (4 * (total - kept)) < 1.1


def test_step_and_scores_are_compiled_with_the_options_of_train_deterministic(monkeypatch, data_dir):
  """XLA refuses an option that it does not know, so the error shows that the program was compiled with it."""
  config = tiny(**{'train.deterministic': True})
  monkeypatch.setattr(meshes, 'compiler_options', lambda _, deterministic: {'xla_unknown': 1} if deterministic else {})
  mesh, task = meshes.create_mesh(8, 1), tasks.create(config)
  optimizer, _ = optimizers.make_optimizer(config)
  shapes = train.state_shapes(task, optimizer, config, mesh)
  with pytest.raises(jax.errors.JaxRuntimeError, match='No such compile option'):
    train.lower_step(task, optimizer, config, mesh, shapes).compile()
  split = datasets.load_dataset(data_dir, config.data.fold, SIZE).test
  with pytest.raises(jax.errors.JaxRuntimeError, match='No such compile option'):
    scorer.Scorer(task, mesh, 8, deterministic=True).tables(
      train.initial_state(task, optimizer, config).variables, split
    )


def losses(config, mesh, data_dir):
  """Runs the parts of the loop on the given mesh and returns the losses."""
  return np.array([float(scalars['loss']) for _, scalars in steps(config, mesh, data_dir)])


def steps(config, mesh, data_dir):
  """Runs the parts of the loop on the given mesh; yields (state, scalars) after each step, on the host."""
  task = tasks.create(config)
  optimizer, _ = optimizers.make_optimizer(config)
  step = train.compile_step(task, optimizer, config, mesh, train.state_shapes(task, optimizer, config, mesh))
  state = train.compile_init(task, optimizer, config, meshes.replicated(mesh))()
  dataset = datasets.load_dataset(data_dir, config.data.fold, SIZE)
  for batch in input_pipeline.train_batches(
    dataset.train, mesh, batch_size=8, seed=0, first_step=0, last_step=config.train.steps, balanced=True
  ):
    state, scalars = step(state, batch)
    yield jax.device_get((state, scalars))


def test_epochs_are_converted_to_steps(runs, data_dir, tmp_path):
  """Half an epoch: the run is that of as many steps, and is finished. Its config.json keeps the epochs."""
  dataset = datasets.load_dataset(data_dir, 0, SIZE)
  wanted = 4 * 8 / len(dataset.train)
  config = tiny(**{'train.epochs': wanted, 'train.steps': 999})
  assert length.with_steps(config, dataset).train.steps == 4
  assert length.with_steps(tiny(**{'train.epochs': 2.0}), dataset).train.steps == math.ceil(2 * len(dataset.train) / 8)
  train.train(config, tmp_path, data_dir)
  (step, state), (_, expected) = final_state(config, tmp_path), final_state(tiny(), runs['seg'])
  assert step == 4
  jax.tree.map(np.testing.assert_array_equal, state, expected)
  assert run_config.load_config(tmp_path).train.epochs == wanted
  evaluate.evaluate(config, tmp_path, data_dir)
  assert evaluate.is_finished(config, tmp_path, data_dir)


class Scores:
  """Replaces the summary of a validation: each call gives the next Dice. With fewer scores it fails."""

  def __init__(self, monkeypatch, scores):
    self.left, original = list(scores), results.summary
    monkeypatch.setattr(results, 'summary', lambda *args: original(*args) | {'dice': self.left.pop(0)})


PATIENCE = {'train.patience': 2, 'train.steps': 40, 'train.evaluate_every': 1}


def test_training_ends_when_the_score_stops_rising(data_dir, tmp_path, monkeypatch):
  """It ends two validations after the best one; of equal scores the later is the best. A score can be undefined."""
  scores = (0.3, 0.5, None, 0.5, 0.1, 0.2)
  Scores(monkeypatch, scores)
  config, best = tiny(**PATIENCE), len(scores) - 2
  train.train(config, tmp_path, data_dir)
  entries = log_of(tmp_path)
  assert [e['validation/dice'] for e in entries if 'validation/dice' in e] == list(scores)
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.latest() == len(scores) and checkpoints.best() == best
    assert length.is_over(config, checkpoints, len(scores))
  train.train(config, tmp_path, data_dir)  # it is over: no further score is computed
  monkeypatch.undo()
  assert not evaluate.is_finished(config, tmp_path, data_dir)
  evaluate.evaluate(config, tmp_path, data_dir)
  assert evaluate.is_finished(config, tmp_path, data_dir)


def test_a_resumed_run_ends_at_the_same_step(data_dir, tmp_path, monkeypatch):
  """The run stops twice: after the best validation, and after the first one that is not better."""
  Scores(monkeypatch, (0.3, 0.5, 0.4, 0.1))
  for step in (2, 3):
    with monkeypatch.context() as patch:
      stop_at(patch, step)
      with pytest.raises(Stop):
        train.train(tiny(**PATIENCE), tmp_path, data_dir)
  train.train(tiny(**PATIENCE), tmp_path, data_dir)
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.latest() == 4


def test_patience_needs_a_validation_fold(data_dir, tmp_path, monkeypatch):
  dataset = dataclasses.replace(datasets.load_dataset(data_dir, 0, SIZE), validation=None)
  monkeypatch.setattr(datasets, 'load_dataset_for', lambda *_: dataset)
  with pytest.raises(UserError, match=r'^train.patience: needs a validation fold'):
    train.train(tiny(**PATIENCE), tmp_path / 'run', data_dir)
  assert not (tmp_path / 'run').exists()


# Everything that adds to the train state, and the parts of the augmentation.
RECIPE = {
  **{'train.ema': 0.15, 'train.clip_norm': 1.0, 'train.deep_supervision': True, 'model.multiples': (1, 1, 2)},
  **{f'augment.{part}_probability': 0.5 for part in ('affine', 'noise')},
}


@pytest.fixture(scope='module')
def averaged(data_dir, tmp_path_factory):
  """The workdir of a run with an average of the weights and with heads."""
  workdir = tmp_path_factory.mktemp('averaged')
  train.train(tiny(**RECIPE), workdir, data_dir)
  return workdir


def test_the_saved_average_equals_numpys(averaged, data_dir):
  """Averages the variables after each step in float64. Weights and running statistics are averaged alike."""
  config, average = tiny(**RECIPE), None
  for number, (state, _) in enumerate(steps(config, meshes.create_mesh(), data_dir)):
    decay = min(0.15, number / (number + 10))
    wide = jax.tree.map(lambda leaf: leaf.astype(np.float64), state.variables)
    average = wide if not number else jax.tree.map(lambda a, b, d=decay: d * a + (1 - d) * b, average, wide)
  step, items = final_state(config, averaged)
  assert step == 4
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), items['variables'], average)
  jax.tree.map(np.testing.assert_array_equal, items['optimizer']['variables'], state.variables)
  apart = [np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, (average, state.variables)), strict=True)]
  assert max(apart) > 1e-3


def test_checkpoints_hold_the_heads_only_for_training(averaged):
  """Evaluation, prediction and export read the item `variables`: the model's own parameters."""
  _, items = final_state(tiny(**RECIPE), averaged)
  (head,) = items['optimizer']['heads']['params'].values()
  assert head['kernel'].shape == (1, 1, 4, 1)
  plain = jax.eval_shape(lambda: tasks.create(tiny(**{'model.multiples': (1, 1, 2)})).init(jax.random.key(0), SIZE))
  assert jax.tree.structure(plain) == jax.tree.structure(items['variables'])


def test_the_average_is_validated_and_tested(averaged, data_dir):
  config, mesh = tiny(**RECIPE), meshes.create_mesh()
  _, items = final_state(config, averaged)
  task = tasks.create(config)
  validation = datasets.load_dataset(data_dir, config.data.fold, SIZE).validation
  score = scorer.Scorer(task, mesh, 8)
  of = lambda variables: results.summary(task.type, score.tables(variables, validation))['dice']
  logged = {e['step']: e['validation/dice'] for e in log_of(averaged) if 'validation/dice' in e}
  assert logged[4] == of(items['variables']) != of(items['optimizer']['variables'])
  step, best = trained.load_best(config, task, averaged, mesh)
  assert of(best) == logged[step] == max(logged.values())


def test_a_stopped_run_with_average_and_heads_resumes_bit_exactly(averaged, data_dir, tmp_path, monkeypatch):
  with monkeypatch.context() as patch:
    stop_at(patch, 3)
    with pytest.raises(Stop):
      train.train(tiny(**RECIPE), tmp_path, data_dir)
  train.train(tiny(**RECIPE), tmp_path, data_dir)
  whole, resumed = (final_state(tiny(**RECIPE), workdir) for workdir in (averaged, tmp_path))
  assert jax.tree.structure(whole) == jax.tree.structure(resumed)
  jax.tree.map(np.testing.assert_array_equal, whole, resumed)


def test_a_step_equals_loss_and_optimizer_by_hand():
  """Compares one update with the same update written with optax and NumPy."""
  config = tiny(
    cls, **{'augment.flip': False, 'augment.hu_shift': 0.0, 'augment.hu_scale': 0.0, 'train.warmup_steps': 0}
  )
  task = tasks.create(config)
  optimizer, schedule = optimizers.make_optimizer(config)
  state = train.compile_init(task, optimizer, config, None)()
  rng = np.random.default_rng(0)
  batch = {
    'image': jnp.asarray(rng.integers(-1000, 200, (8, SIZE, SIZE)), jnp.int16),
    'mask': jnp.zeros((8, SIZE, SIZE), jnp.uint8),
    'label': jnp.asarray(rng.integers(0, 2, 8), jnp.int32),
  }
  options = augment.create(config)
  run = jax.jit(lambda s, b: train.train_step(s, b, task=task, optimizer=optimizer, augmentation=options, seed=0))
  new, scalars = run(state, batch)

  inputs = (np.clip(np.asarray(batch['image'], np.float32), -1000, 300) + 350)[..., None] / 650

  def loss_of(params):
    logits, updates = task.model.apply(
      {**state.variables, 'params': params}, jnp.asarray(inputs), train=True, mutable=['batch_stats']
    )
    label = batch['label']
    return jnp.mean(jnp.logaddexp(0, logits[:, 0]) - label * logits[:, 0]), updates['batch_stats']

  (loss, batch_stats), gradient = jax.jit(jax.value_and_grad(loss_of, has_aux=True))(state.variables['params'])
  np.testing.assert_allclose(scalars['loss'], loss, rtol=1e-5)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), new.variables['batch_stats'], batch_stats
  )
  # Adam's first step is the sign of the gradient where it is well above epsilon; kernels also decay.
  rate = float(schedule(0))
  for (path, before), after, g in zip(
    jax.tree.leaves_with_path(state.variables['params']),
    jax.tree.leaves(new.variables['params']),
    jax.tree.leaves(gradient),
    strict=True,
  ):
    clear = np.abs(g) > 1e-5
    decay = config.train.weight_decay * before if before.ndim > 1 else 0 * before
    expected = before - rate * (np.sign(g) + decay)
    np.testing.assert_allclose(after[clear], expected[clear], rtol=1e-2, atol=2e-2 * rate, err_msg=str(path))
  assert optax.tree.norm(gradient) == pytest.approx(float(scalars['gradient_norm']), rel=1e-4)
