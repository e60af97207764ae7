"""Training: `train` reads from top to bottom in the order in which things happen."""

import contextlib
import itertools
import logging
import pathlib
import time
from collections.abc import Callable
from typing import Any

import clu.parameter_overview
import flax
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from fusa_jax import tasks, torch_weights
from fusa_jax.measures import statistics
from fusa_jax.runs import checkpoint, config_checks, results, run_config, split, starts, workdir_lock
from fusa_jax.runs.metric_log import MetricLog
from fusa_jax.system import hosts, meshes, preemption, progress, provenance
from fusa_jax.system.errors import Terminated, UserError
from fusa_jax.training import augment, datasets, input_pipeline, length, optimizers, scorer


@flax.struct.dataclass
class TrainState:
  """Everything that a training step changes.

  Attributes:
    step: number of finished steps, int32 scalar. The optimizer has its own counters in `opt_state`.
    variables: {'params', 'batch_stats'} of the model.
    opt_state: state of the optimizer.
    average: with train.ema, the moving average of `variables`; otherwise None.
    heads: with train.deep_supervision, the variables of the heads of lower levels; otherwise None.
  """

  step: jax.Array
  variables: dict
  opt_state: optax.OptState
  average: dict | None = None
  heads: dict | None = None

  @property
  def tested(self) -> dict:
    """The variables to validate, to test and to export: the average, if there is one."""
    return self.variables if self.average is None else self.average

  def items(self) -> dict[str, Any]:
    """Returns the two items of a checkpoint: `variables` are those of `tested`, `optimizer` is the rest."""
    others = {'heads': self.heads, 'variables': None if self.average is None else self.variables}
    others = {name: value for name, value in others.items() if value is not None}
    optimizer = {'opt_state': self.opt_state, **others} if others else self.opt_state
    return {'variables': self.tested, 'optimizer': optimizer}

  def with_items(self, step: int, items: dict[str, Any]) -> 'TrainState':
    """Returns the state of a checkpoint: its step and its items. `self` gives the form: that of `items()`."""
    step, variables, optimizer = jnp.asarray(step, jnp.int32), items['variables'], items['optimizer']
    if self.average is None and self.heads is None:
      return TrainState(step, variables, optimizer)
    average = None if self.average is None else variables
    return TrainState(
      step, optimizer.get('variables', variables), optimizer['opt_state'], average, optimizer.get('heads')
    )

  @property
  def trained(self) -> dict:
    """The parameters that the optimizer updates."""
    return _trained(self.variables, self.heads)


@workdir_lock.alone_in_workdir
def train(config: ml_collections.ConfigDict, workdir: pathlib.Path, data_dir: pathlib.Path) -> None:
  """Trains to the end (`length.is_over`); resumes from the latest checkpoint in `workdir`, if there is one.

  Args:
    config: a config of configs/.
    workdir: folder of the run; the README lists its files.
    data_dir: folder of the prepared dataset.

  Raises:
    UserError: the config does not fit the data, the devices or the run in `workdir`; the data differ from those that
      the run was started with; another job works in `workdir`; a loss is not finite; or a checkpoint cannot be written.
    Terminated: on SIGTERM, after the state was saved.
  """
  # ---- devices, data, task, optimizer
  config_checks.check(config)
  mesh = meshes.create_mesh(config.mesh.data, config.mesh.space)
  meshes.check_divides(mesh, config.train.batch_size, config.data.image_size)
  dataset = datasets.load_dataset_for(config, data_dir)
  datasets.check_labels(config, dataset)
  datasets.check_trainable(config, dataset)
  planned = config
  config = length.with_steps(config, dataset)
  task = tasks.create(config, jax.default_backend())
  optimizer, learning_rate = optimizers.make_optimizer(config)
  code = provenance.code()
  facts = {'code (SHA-256)': code['sha256'], **code['libraries'], 'dtype': tasks.resolved_dtype(config)}
  hosts.check_equal(run_config.facts(config) | facts | {'data (SHA-256)': dataset.sha256})
  # ---- shapes before arrays
  shapes = state_shapes(task, optimizer, config, mesh)
  pretrained = None
  if config.model.init_from and not checkpoint.exists(workdir):
    pretrained, notes = torch_weights.initial(config.model.init_from, config.model.name, shapes.variables)
  # All checks of the config are done, so a refused config leaves no workdir behind.
  run_config.save_config(workdir, planned)
  split.save_split(workdir, dataset.description())
  report_parameters(shapes.variables)
  if config.data.context:
    datasets.say_which_are_near(dataset.train, task.context)

  with contextlib.ExitStack() as stack:
    # ---- the state: restored from a checkpoint, or initialised on the devices
    everywhere = meshes.replicated(mesh)
    checkpoints = checkpoint.Checkpoints(workdir)
    first_step = checkpoints.latest() or 0
    if first_step:
      state = shapes.with_items(first_step, checkpoints.restore(first_step, **shapes.items()))
      state = state.replace(step=jax.device_put(state.step, everywhere))
      logging.info('resuming %s at step %d of %d', workdir, first_step, config.train.steps)
    else:
      state = compile_init(task, optimizer, config, everywhere)()
      if pretrained:
        state = state.replace(variables=torch_weights.overlay(state.variables, pretrained))
        logging.info('\n'.join([f'weights from {config.model.init_from}', *(f'- {note}' for note in notes)]))
    if first_step and length.is_over(config, checkpoints, first_step):
      return
    starts.record_start(workdir, first_step, facts | {'devices': f'{mesh.size} x {mesh.devices.flat[0].device_kind}'})

    # ---- the step: compiled before the first batch is read
    step_function = compile_step(task, optimizer, config, mesh, shapes)
    validation = scorer.Scorer(task, mesh, config.train.batch_size, deterministic=config.train.deterministic)
    batches = input_pipeline.train_batches(
      dataset.train,
      mesh,
      batch_size=config.train.batch_size,
      seed=config.seed,
      first_step=first_step,
      last_step=config.train.steps,
      balanced=config.data.balanced,
    )
    # SIGTERM ends the run at once up to here, where there is nothing to save. From now on it waits for saves to finish.
    stack.enter_context(preemption.deferred(together=True))
    stack.enter_context(checkpoints)
    stack.enter_context(contextlib.closing(batches))
    log = stack.enter_context(contextlib.closing(MetricLog(workdir, first_step)))
    bar = stack.enter_context(
      progress.bar(
        desc='Training', unit='steps', total=config.train.steps, initial=first_step, smoothing=0.1, show=hosts.is_main()
      )
    )

    # ---- the loop
    pending, waited, began = [], 0.0, time.perf_counter()
    for step in itertools.islice(itertools.count(first_step + 1), config.train.steps - first_step):
      waiting_since = time.perf_counter()
      batch = next(batches)
      waited += time.perf_counter() - waiting_since
      # Forbid implicit transfers between host and devices: one here would stall every step.
      with jax.transfer_guard('disallow'):
        state, scalars = step_function(state, batch)
      pending.append(scalars)
      bar.update()

      evaluating = step % config.train.evaluate_every == 0 or step == config.train.steps
      stopping = preemption.reached()
      if evaluating or stopping or step % config.train.log_every == 0:
        means = finite_means(pending, step)
        checkpoints.check()
        elapsed = time.perf_counter() - began
        rate = len(pending) * config.train.batch_size / elapsed
        bar.set_postfix_str(f'{rate:.3g} slices/s, loss {means["loss"]:.4f}', refresh=False)
        log.write(
          step,
          {f'train/{name}': value for name, value in means.items()}
          | {
            'train/learning_rate': float(learning_rate(step - 1)),
            'train/slices_per_second': rate,
            'train/input_wait': waited / elapsed,
          },
        )
        pending, waited, began = [], 0.0, time.perf_counter()

      if evaluating:
        score = None
        if dataset.validation is not None:
          tables = validation.tables(state.tested, dataset.validation)
          if dataset.patient_labels:
            summary, selection = results.patient_summary(tables), results.PATIENT_SELECTION
            shown = f'{selection} {statistics.shown(summary[selection])}'
          else:
            summary, selection = results.summary(task.type, tables, task.exclusive), task.type.selection
            shown = results.one_line(task.type, summary)
          score = summary[selection]
          log.write(step, {f'validation/{name}': value for name, value in summary.items()})
          if hosts.is_main():
            bar.write(f'step {step}: validation {shown}')
        log.copy()
        checkpoints.save(step, **state.items(), score=score)
        began = time.perf_counter()
      elif stopping:
        log.copy()
        checkpoints.save(step, **state.items(), score=None)
      if stopping:
        raise Terminated(f'by SIGTERM at step {step}, which is saved')
      if evaluating and step < config.train.steps and length.is_over(config, checkpoints, step):
        best, unit = checkpoints.best(), 'validation' if config.train.patience == 1 else 'validations'
        logging.info(
          'stopped at step %d of %d: the best score is that of step %d, %d %s ago (train.patience)',
          *(step, config.train.steps, best, config.train.patience, unit),
        )
        break


def initial_state(task: tasks.Task, optimizer: optax.GradientTransformation, config) -> TrainState:
  """Returns the train state of step 0, with random parameters from config.seed."""
  key, size = jax.random.key(config.seed), config.data.image_size
  variables = task.init(key, size)
  heads = task.init_heads(jax.random.fold_in(key, 1), variables, size)
  average = jax.tree.map(jnp.zeros_like, variables) if config.train.ema else None  # the first step replaces it
  return TrainState(jnp.zeros((), jnp.int32), variables, optimizer.init(_trained(variables, heads)), average, heads)


def _trained(variables, heads):
  return variables['params'] if heads is None else {'model': variables['params'], 'heads': heads['params']}


def state_shapes(
  task: tasks.Task, optimizer: optax.GradientTransformation, config, mesh: jax.sharding.Mesh
) -> TrainState:
  """Returns shapes and dtypes of the train state, replicated over the mesh, without creating an array."""
  return meshes.replicated_shapes(lambda: initial_state(task, optimizer, config), mesh)


def compile_init(
  task: tasks.Task, optimizer: optax.GradientTransformation, config, sharding: jax.sharding.Sharding | None
) -> Callable[[], TrainState]:
  """Returns a jitted initialiser of the train state; all its arrays get the given sharding."""
  init = lambda: initial_state(task, optimizer, config)
  return jax.jit(init, out_shardings=sharding, compiler_options=options_to_run_once())


def options_to_run_once() -> dict | None:
  """Returns compiler options for a program that runs once: no optimisation on a CPU.

  Optimising the initialisation of each parameter takes most of a minute there.
  """
  return {'xla_backend_optimization_level': 0} if jax.default_backend() == 'cpu' else None


def train_step(
  state: TrainState,
  batch: dict[str, jax.Array],
  *,
  task: tasks.Task,
  optimizer: optax.GradientTransformation,
  augmentation: augment.Augmentation,
  seed: int,
  ema: float = 0.0,
) -> tuple[TrainState, dict[str, jax.Array]]:
  """One update from a batch {'image' int16 [B, H, W], 'mask' [B, H, W], 'label' [B]}.

  With data.context, 'image' is [B, H, W, C]; 'mask' and 'label' are those of the middle slice.

  Args:
    state: the train state.
    batch: the batch.
    task, optimizer: those of the config.
    augmentation: the augmentation of the batch.
    seed: the seed of augmentation and dropout.
    ema: the decay of the moving average, train.ema; 0 if the state has none.

  Returns:
    (new state, {'loss', 'gradient_norm'}); the norm is that before clipping.
  """
  augment_key, dropout_key = jax.random.split(jax.random.fold_in(jax.random.key(seed), state.step))
  image, mask = meshes.split_images(*augment.augment(augment_key, batch['image'], batch['mask'], augmentation))

  def parts(trained):
    return (trained, None) if state.heads is None else (trained['model'], {'params': trained['heads']})

  def loss_of(trained):
    params, heads = parts(trained)
    truth = task.type.truth({**batch, 'mask': mask})
    return task.train_loss({**state.variables, 'params': params}, heads, image, truth, dropout_key)

  (loss, batch_stats), gradients = jax.value_and_grad(loss_of, has_aux=True)(state.trained)
  updates, opt_state = optimizer.update(gradients, state.opt_state, state.trained)
  params, heads = parts(optax.apply_updates(state.trained, updates))
  variables = {'params': params, 'batch_stats': batch_stats}
  scalars = {'loss': loss, 'gradient_norm': optax.tree.norm(gradients)}
  average = None if state.average is None else moving_average(state.average, variables, state.step, ema)
  return TrainState(state.step + 1, variables, opt_state, average, heads), scalars


def moving_average(average: dict, variables: dict, step: jax.Array, decay: float) -> dict:
  """Returns the exponential moving average of the model's variables after `step` + 1 steps.

  average = d * average + (1 - d) * variables, where d is the smaller of `decay` and step / (step + 10). So the average
  covers at most the latest tenth of the steps, roughly, and a short run does not average its first weights. The first
  step replaces the average.

  The running statistics of norms are averaged as the weights are: the current ones fit the latest weights only.
  """
  decay = jnp.minimum(decay, step / (step + 10))
  return optax.incremental_update(variables, average, 1 - decay)


def lower_step(task, optimizer, config, mesh, shapes: TrainState, platform: str | None = None) -> jax.stages.Lowered:
  """Returns the training step, lowered for the devices of the mesh and ready to compile. It donates the state.

  Args:
    task, optimizer, config, mesh: as in `train`.
    shapes: the train state's shapes from `state_shapes`.
    platform: lowers the forms of another platform, 'cuda' or 'tpu', to count its work; None: those of the mesh.
  """
  step = lambda state, batch: train_step(
    state,
    batch,
    task=task,
    optimizer=optimizer,
    augmentation=augment.create(config),
    seed=config.seed,
    ema=config.train.ema,
  )
  everywhere, size, count = meshes.replicated(mesh), config.data.image_size, config.train.batch_size
  array = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype, sharding=meshes.batched(mesh, len(shape)))
  batch = {
    'image': array(np.int16, count, *task.context.shape(size)),
    'mask': array(np.uint8, count, size, size),
    'label': array(np.int32, count),
    'index': array(np.int32, count),
  }
  options = meshes.compiler_options(mesh, config.train.deterministic)
  with jax.set_mesh(mesh):
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(everywhere, everywhere), compiler_options=options)
    return jitted.trace(shapes, batch).lower(lowering_platforms=None if platform is None else (platform,))


def compile_step(task, optimizer, config, mesh, shapes: TrainState) -> jax.stages.Compiled:
  """Compiles the step of `lower_step` and logs its FLOPs and memory."""
  began = time.perf_counter()
  compiled = hosts.compile_together(lower_step(task, optimizer, config, mesh, shapes))
  memory, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}
  logging.info(
    'compiled the training step in %.1f s: %.1f GFLOP and %.0f MB of temporaries per device and step',
    time.perf_counter() - began,
    cost.get('flops', float('nan')) / 1e9,
    getattr(memory, 'temp_size_in_bytes', float('nan')) / 1e6,
  )
  return compiled


def finite_means(pending: list[dict[str, jax.Array]], step: int) -> dict[str, float]:
  """Returns the means of the scalars of the latest steps, up to `step`. It waits for the devices.

  Raises:
    UserError: a loss is not finite; the message names its step. The loop calls this before it saves.
  """
  values = jax.device_get(pending)
  for number, scalars in enumerate(values, start=step - len(values) + 1):
    if not np.isfinite(scalars['loss']):
      raise UserError(
        f'train: the loss is {scalars["loss"]} at step {number}; lower train.learning_rate, or check the data'
      )
  return {name: float(np.mean([scalars[name] for scalars in values])) for name in values[0]}


def report_parameters(variables: dict) -> None:
  """Logs the number of parameters per block and, with --verbose, the name, shape and size of each parameter."""
  blocks = {name: jax.tree.leaves(block) for name, block in variables['params'].items()}
  sizes = {name: sum(leaf.size for leaf in leaves) for name, leaves in blocks.items()}
  width = max(map(len, [*sizes, 'parameters']))
  lines = [f'  {name:{width}}{size:14,}' for name, size in sizes.items()]
  logging.info('\n'.join([*lines, f'  {"parameters":{width}}{sum(sizes.values()):14,}']))
  table = clu.parameter_overview.get_parameter_overview(variables['params'], include_stats=False)
  logging.getLogger(__name__).debug('%s', table)
