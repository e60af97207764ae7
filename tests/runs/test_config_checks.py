"""Values out of range are refused in one place, before anything else happens; the presets are accepted."""

import pytest
from conftest import tiny

from configs import base, cls, seg
from fusa_jax.runs import config_checks, run_config
from fusa_jax.system.errors import UserError


@pytest.mark.parametrize(
  ('key', 'value', 'reason'),
  [
    ('seed', -1, 'must be at least 0'),
    ('train.evaluate_every', 0, 'must be at least 1'),
    ('train.log_every', 0, 'must be at least 1'),
    ('train.batch_size', 0, 'must be at least 1'),
    ('train.steps', 0, 'must be at least 1'),
    ('train.warmup_steps', -1, 'must be at least 0'),
    ('train.learning_rate', 0.0, 'must be above 0'),
    ('train.learning_rate', float('nan'), 'must be above 0'),
    ('train.weight_decay', float('inf'), 'must be at least 0'),
    ('train.epochs', 0.0, 'must be above 0'),
    ('train.patience', 0, 'must be at least 1'),
    ('train.ema', 1.0, 'must be at least 0 and below 1'),
    ('train.clip_norm', 0.0, 'must be above 0'),
    ('augment.crop_fractions', (), r'must be a list of numbers, each above 0 and at most 1; give \(0.5, 0.25\)'),
    ('augment.crop_fractions', (2.0,), 'each above 0 and at most 1'),
    ('augment.crop_probability', 1.5, 'must be at least 0 and at most 1'),
    ('augment.hu_scale', 1.0, 'must be at least 0 and below 1'),
    ('augment.affine_probability', 2.0, 'must be at least 0 and at most 1'),
    ('augment.scaling', (1.2, 0.8), r'must be two numbers, the lower one first, each at least 0.5 and at most 2; give'),
    ('augment.scaling', (0.1, 1.0), 'each at least 0.5 and at most 2'),
    ('augment.blur', (0.5, 1.0, 2.0), 'must be two numbers'),
    ('augment.rotation', -5.0, 'must be at least 0 and at most 180'),
    ('augment.noise', -1.0, 'must be at least 0'),
    ('augment.gamma', (0.0, 1.0), 'each above 0'),
    ('data.context', -1, 'must be a whole number from 0 to 10'),
    ('data.context', 11, 'must be a whole number from 0 to 10'),
    ('data.context_mm', 0.0, 'must be above 0'),
    ('data.window', (100.0, 100.0), 'must be two numbers in HU, the lower one first'),
    ('data.window', (1.0, 2.0, 3.0), 'must be two numbers'),
    ('data.image_size', 0, 'must be at least 1'),
    ('data.fold', -1, "must be a fold, from 0, or 'all'"),
    ('data.fold', 'some', "must be a fold, from 0, or 'all'"),
    ('data.phantom.slices', 8, 'must be at least 16'),
    ('model.width', 0, 'must be at least 1'),
    ('model.multiples', (), 'must be a list of whole numbers above 0'),
    ('model.multiples', (1.5, 2), 'must be a list of whole numbers above 0'),
    ('model.dtype', 'float16', "must be 'auto', 'float32' or 'bfloat16'"),
    ('evaluate.num_overlays', -1, 'must be at least 0'),
    ('evaluate.target_sensitivity', 95.0, 'must be above 0 and at most 1'),
    ('evaluate.prevalences', (0.1, 5.0), 'each above 0 and below 1'),
    ('mesh.data', 0, 'must be -1 or at least 1'),
    ('mesh.space', 0, 'must be at least 1'),
  ],
)
def test_values_out_of_range_are_refused(key, value, reason):
  with pytest.raises(UserError, match=rf'^{key}: .* {reason}'):
    config_checks.check(tiny(**{key: value}))


def test_all_wrong_values_are_named_at_once():
  with pytest.raises(UserError) as caught:
    config_checks.check(tiny(**{'train.steps': 0, 'mesh.space': 0}))
  assert [line.partition(':')[0] for line in str(caught.value).splitlines()] == ['train.steps', 'mesh.space']


@pytest.mark.parametrize('module', [seg, cls])
@pytest.mark.parametrize('preset', ['paper', 'demo', 'strong', 'demo-strong'])
def test_presets_are_accepted(module, preset):
  config_checks.check(module.get_config(preset))


@pytest.mark.parametrize(
  ('options', 'reason'),
  [
    ({'classes': (('a', (1,)), ('b', ()))}, r"data.classes: 'b' has \(\), but needs a name and values"),
    ({'classes': (('a', (1, 2)), ('b', (2, 1)))}, "data.classes: 'a' and 'b' have the same mask values"),
    ({'classes': (('a b', (1,)), ('A_b', (2,)))}, r"'a b' and 'A_b' would have the same files \(a_b\); rename"),
    ({'classes': (('Background', (1,)),)}, "'background' and 'Background' would have the same files"),
    ({'classes': (('../a', (1,)),)}, "data.classes: '../a' is not a name for files; begin it with a letter or digit"),
    ({'classes': (('a' * 65, (1,)),)}, 'use at most 64 characters'),
    ({'classes': (('a', (1, 9)),), 'ignore_label': 9}, "data.ignore_label: 9 belongs to the class 'a'"),
    ({'ignore_label': 9}, 'data.ignore_label: needs data.classes'),
    ({'classes': (('a', (1,)),), 'lesion_labels': (1,)}, 'data.classes and data.lesion_labels: both name mask values'),
    ({'classes': 'lesion'}, "data.classes: 'lesion' are not mask values by name"),
  ],
)
def test_wrong_classes_are_refused(options, reason):
  config = tiny()
  config.data.update(options)
  with pytest.raises(UserError, match=reason):
    config_checks.check(config)


def test_classes_are_a_preset_of_segmentation():
  config_checks.check(seg.get_config('demo-classes'))
  with pytest.raises(ValueError, match=r"^configs/cls.py has no preset 'demo-classes'"):
    cls.get_config('demo-classes')


def test_the_names_of_presets():
  read = lambda preset: base.read_preset(preset, 'configs/seg.py', ('resunet', 'linknet'), classes=True)
  assert read('paper') == (False, False, False, None)
  assert read('resunet') == (False, False, False, 'resunet')
  assert read('demo-linknet') == (True, False, False, 'linknet')
  assert read('strong-resunet') == (False, True, False, 'resunet')
  assert read('demo-strong-resunet') == (True, True, False, 'resunet')
  assert read('demo-classes') == (True, False, True, None)
  for preset in ('', 'huge', 'paper-resunet', 'strong-demo', 'demo-', 'resunet-linknet', 'demo-demo', 'classes'):
    with pytest.raises(ValueError, match=rf"^configs/seg.py has no preset '{preset}'; give paper, demo, strong,"):
      read(preset)


@pytest.mark.parametrize('module', [seg, cls])
def test_strong_keeps_network_data_and_length(module):
  """Only the recipe differs: what `base.strong` and the presets change. The demo of segmentation trains for longer."""
  flat = lambda preset: run_config._flat(run_config.plain(module.get_config(preset)).to_dict())
  for size in ('', 'demo-'):
    paper, strong = flat('demo' if size else 'paper'), flat(size + 'strong')
    differ = {key for key in paper if paper[key] != strong[key]} - (
      {'train.steps'} if size and module is seg else set()
    )
    allowed = ('augment.', 'train.clip_norm', 'train.ema', 'train.deep_supervision')
    assert differ and all(key.startswith(allowed) for key in differ)
  assert module.get_config('strong-linknet' if module is seg else 'strong').train.deep_supervision is False


@pytest.mark.parametrize(
  ('task', 'values', 'option', 'reason'),
  [
    ('cls', 'hu', 'lungs', r'evaluate.lungs: applies to masks only, and classification gives none'),
    ('cls', 'hu', 'fit_smallest', r'evaluate.fit_smallest: applies to masks only'),
    ('seg', 'grey', 'lungs', r'evaluate.lungs: needs HU to find the lungs'),
  ],
)
def test_options_that_do_not_apply_are_refused(task, values, option, reason):
  config = tiny({'cls': cls, 'seg': seg}[task], **{f'evaluate.{option}': True})
  config.data.intensity = values
  with pytest.raises(UserError, match=reason):
    config_checks.check(config)
