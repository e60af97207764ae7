"""The loop: the same run on any devices, resumed or not; what stops it."""

import json
import pathlib

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import SIZE, final_state, tiny

from configs import cls
from data import prepare
from fusa_jax import tasks
from fusa_jax.chips import tpu
from fusa_jax.runs import checkpoint, run_config
from fusa_jax.system import meshes
from fusa_jax.system.errors import UserError
from fusa_jax.training import augment, datasets, input_pipeline, optimizers, train


def log_of(workdir: pathlib.Path) -> list[dict]:
  return [json.loads(line) for line in (workdir / 'log.jsonl').read_text().splitlines()]


class Stop(Exception):
  pass


def stop_at(monkeypatch, step):
  """Makes the loop fail when it asks for the batch after `step`, as a crash there would."""
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
  """Stopped after step 3, of which step 2 was saved; `runs` holds the one that was never stopped."""
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
  # The log, too, is that of one run: each step once, the same losses.
  losses = [[(e['step'], e['train/loss']) for e in log_of(w) if 'train/loss' in e] for w in (runs['seg'], tmp_path)]
  assert losses[0] == losses[1]
  assert [step for step, _ in losses[0]] == [1, 2, 3, 4]


def test_a_finished_run_is_left_alone(runs, data_dir):
  before = (runs['seg'] / 'log.jsonl').read_bytes()
  train.train(tiny(), runs['seg'], data_dir)
  assert (runs['seg'] / 'log.jsonl').read_bytes() == before


def test_workdir_has_what_was_agreed(runs):
  for workdir in runs.values():
    names = {path.name for path in workdir.iterdir()}
    assert names == {
      'config.json',
      'log.jsonl',
      'tensorboard',
      'checkpoints',
      'operating_point.json',
      'split.json',
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
  # No phantom is drawn where data are named; where none are, others would be trained on.
  other = {'data.phantom.patients': 7}
  run_config.save_config(runs['seg'], tiny(**other, **{'data.dir': 'elsewhere'}))
  run_config.save_config(runs['seg'], tiny())
  with pytest.raises(UserError, match=r'data.phantom.patients \(100 -> 7\)'):
    run_config.save_config(runs['seg'], tiny(**other))
  changed = tiny(**{'train.learning_rate': 0.5, 'seed': 3})
  with pytest.raises(UserError, match=r'seed \(0 -> 3\), train.learning_rate \(0.003 -> 0.5\); name another --workdir'):
    train.train(changed, runs['seg'], data_dir)
  with pytest.raises(
    UserError, match=r'a run of 4 steps, over which .*: it cannot be made longer or shorter; name anoth'
  ):
    train.train(tiny(**{'train.steps': 8}), runs['seg'], data_dir)


@pytest.mark.parametrize(
  ('overrides', 'reason'),
  [
    ({'train.batch_size': 6}, 'train.batch_size: 6 does not divide'),
    ({'train.warmup_steps': -1}, 'train: 4 steps, of which -1 to warm up; train.steps is at least 1'),
    ({'train.steps': 0}, 'train: 0 steps'),
    ({'model.name': 'resnet18'}, 'resnet18 is not for segmentation; one of deeplabv3'),
    ({'model.name': 'unet'}, "there is no 'unet'"),
    ({'task': 'detection'}, "there is no 'detection'"),
    ({'train.loss': 'x'}, "train.loss: there is no 'x'; one of cross_entropy, cross_entropy_dice, dice, focal"),
    ({'train.optimizer': 'x'}, "train.optimizer: there is no 'x'; one of adamw, sgd"),
    ({'train.schedule': 'x'}, "train.schedule: there is no 'x'; one of warmup_cosine, polynomial, constant"),
    ({'data.window': (100.0, 100.0)}, 'data.window: 100.0 is not below 100.0'),
    ({'mesh.data': 3}, 'is not the 8 devices'),
    ({'data.image_size': 40, 'model.multiples': None}, 'multiples of 16: 40 is not, 48 is'),
    ({'model.multiples': ()}, r'model.multiples: \(\) is no list of whole numbers from 1 on; give'),
    ({'model.multiples': (1, 0)}, r'model.multiples: \(1, 0\) is no list'),
    ({'model.multiples': (1.5, 2)}, r'model.multiples: \(1.5, 2\) is no list'),
    ({'model.stage_sizes': (1,)}, r'fusa_resunet cannot take .*stage_sizes'),
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
  """20 steps, within 1e-4 of those on one device (float32 sums in another order)."""
  curve = losses(tiny(**{'train.steps': 20}), meshes.create_mesh(data, space), data_dir)
  assert np.ptp(curve) > 0.05
  np.testing.assert_allclose(curve, losses_on_one_device, rtol=1e-4)


@pytest.mark.slow
def test_dense_kernels_of_fusa_are_not_summed_over_the_devices():
  """FUSA-ResNet-18's last stage has 512 channels; all other gradients are summed, as the count of the others shows."""
  config = tiny(cls, **{'model.width': 64, 'model.stage_sizes': None})
  mesh, task = meshes.create_mesh(8, 1), tasks.create(config)
  optimizer, _ = optimizers.make_optimizer(config)
  shapes = train.state_shapes(task, optimizer, config, mesh)
  program = train.lower_step(task, optimizer, config, mesh, shapes).compile().as_text()
  sent = sum(c.nbytes for c in tpu.collectives(program, 8))
  leaves = flax.traverse_util.flatten_dict(shapes.variables['params'], sep='/')
  kept = sum(p.size for name, p in leaves.items() if '/attention/' in name and p.ndim > 1 and p.shape[-1] == 512)
  total = sum(p.size for p in leaves.values())
  assert kept == 2 * 4 * 512**2
  # Half of each fusion's kernel has one gradient for each column; on CPUs the gradient of a strided convolution's is
  # summed before what its stride leaves over is cut off. With the dense kernels it would be 1.2.
  assert 0.95 < sent / (4 * (total - kept)) < 1.1


def losses(config, mesh, data_dir):
  """The loop's own parts, on a mesh of some of the devices."""
  task = tasks.create(config)
  optimizer, _ = optimizers.make_optimizer(config)
  step = train.compile_step(task, optimizer, config, mesh, train.state_shapes(task, optimizer, config, mesh))
  state, out = train.compile_init(task, optimizer, config, meshes.replicated(mesh))(), []
  dataset = datasets.load_dataset(data_dir, config.data.fold, SIZE)
  for batch in input_pipeline.train_batches(
    dataset.train, mesh, batch_size=8, seed=0, first_step=0, last_step=config.train.steps, balanced=True
  ):
    state, scalars = step(state, batch)
    out.append(float(scalars['loss']))
  return np.array(out)


def test_a_step_is_what_optax_and_the_loss_say():
  """One update, written out by hand from public pieces."""
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
    logits, changed = task.model.apply(
      {**state.variables, 'params': params}, jnp.asarray(inputs), train=True, mutable=['batch_stats']
    )
    label = batch['label']
    return jnp.mean(jnp.logaddexp(0, logits[:, 0]) - label * logits[:, 0]), changed['batch_stats']

  (loss, batch_stats), gradient = jax.jit(jax.value_and_grad(loss_of, has_aux=True))(state.variables['params'])
  np.testing.assert_allclose(scalars['loss'], loss, rtol=1e-5)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), new.variables['batch_stats'], batch_stats
  )
  # Adam's first step is the sign of the gradient, wherever that is well above epsilon; kernels decay.
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
