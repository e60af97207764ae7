"""A run's config.json can be loaded as a config: the same experiment, with the type of every key."""

import json

import pytest

from configs import cls, seg
from fusa_jax.runs import arguments, experiment, run_config
from fusa_jax.system.errors import UserError


@pytest.mark.parametrize(
  ('module', 'preset', 'given'),
  [
    (seg, 'paper', {}),
    (seg, 'demo', {'data.fold': 3}),
    (seg, 'demo', {'data.fold': 'all', 'model.multiples': (1, 2)}),
    (cls, 'densenet121', {'seed': 1}),
    (seg, 'demo', {'data.phantom.patients': 7}),
    (cls, 'demo', {'data.dir': 'a', 'data.intensity': 'grey', 'data.phantom.patients': 7}),
    (seg, 'paper', {'data.raw_dir': 'a b', 'evaluate.prevalences': (0.5,), 'data.lesion_labels': (1, 3)}),
  ],
)
def test_a_run_is_repeated_from_its_config(module, preset, given, tmp_path):
  config = module.get_config(preset)
  config.update_from_flattened_dict(given)
  run_config.save_config(tmp_path, config)
  again = run_config.load_config(tmp_path)
  assert again.to_dict() == config.to_dict()
  run_config.save_config(tmp_path, again)  # the same config: not refused
  for key, value in {'model.width': 12, 'evaluate.target_sensitivity': 0.9, 'data.lesion_labels': (2,)}.items():
    again.update_from_flattened_dict({key: value})
  with pytest.raises(TypeError):
    again.train.steps = 'three'


def change(path, **values):
  path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
  ('damage', 'reason'),
  [
    (lambda path: path.unlink(), r'no run in it \(config.json is missing\); name the folder of a trained run'),
    (lambda path: path.write_text('{'), r'config.json: damaged \(Expecting .*\); restore it, or train again'),
    (
      lambda path: path.write_text('[{"dtype": 1}]'),
      'config.json: not the config of a run, but perhaps of a bundle; name',
    ),
    (lambda path: change(path, more=1), r'config.json: from another version \(the keys more differ\); train again'),
    (lambda path: change(path, train={}), r'config.json: from another version \(the keys train.batch_size, '),
  ],
)
def test_files_of_no_run_are_refused(damage, reason, tmp_path):
  run_config.save_config(tmp_path, seg.get_config('demo'))
  damage(tmp_path / 'config.json')
  with pytest.raises(UserError, match=reason):
    run_config.load_config(tmp_path)


def test_configs_of_older_runs_lack_keys_that_were_added(tmp_path):
  """The default of an added key does what older runs did."""
  run_config.save_config(tmp_path, seg.get_config('demo'))
  saved = json.loads((tmp_path / 'config.json').read_text())
  del saved['data']['coloured'], saved['train']['deterministic'], saved['train']['remat']
  (tmp_path / 'config.json').write_text(json.dumps(saved))
  assert run_config.load_config(tmp_path).data.coloured == 'refuse'
  assert run_config.load_config(tmp_path).train.deterministic is False
  assert run_config.load_config(tmp_path).train.remat is False
  run_config.save_config(tmp_path, seg.get_config('demo'))  # resumed: not refused


def test_without_data_the_demo_is_used():
  for preset, expected in (
    ('paper', 'seg-demo'),
    ('resunet', 'seg-demo-resunet'),
    ('demo-linknet', 'seg-demo-linknet'),
  ):
    config = seg.get_config(preset)
    resolved = experiment.resolve(config, 'configs/seg.py', preset, {'train.steps': 7})
    assert (resolved.name, resolved.is_demo, resolved.config.train.steps) == (expected, True, 7)
  config = seg.get_config('paper')
  config.data.raw_dir = 'scans'
  assert experiment.resolve(config, 'configs/seg.py', 'paper', {}) == (config, 'seg-paper', False)


def test_evaluation_may_change_only_some_keys():
  config = seg.get_config('demo')
  with pytest.raises(
    UserError, match=r'--config.train.steps: this mode takes it from the run and lets you change only eval'
  ):
    experiment.check_changes({'train.steps': 3}, ('evaluate.', 'data.dir'))
  experiment.check_changes({'evaluate.flips': True, 'data.dir': 'x'}, ('evaluate.', 'data.dir'))
  assert experiment.to_evaluate(config, None).mesh.to_dict() == {'data': -1, 'space': 1}


def test_evaluation_may_change_the_mask_values_of_classes_but_not_the_classes():
  """Another cohort may mark the same classes with other values."""

  def changed(classes):
    config, other = seg.get_config('demo-classes'), seg.get_config('demo')
    overrides = {'data.classes': classes, 'data.ignore_label': 9}
    other.update_from_flattened_dict(overrides)
    return experiment.to_evaluate(config, arguments.Named(other, 'configs/seg.py', 'demo', overrides))

  config = changed((('ground glass', (3,)), ('consolidation', (4, 5))))
  assert tuple(config.data.classes) == (('ground glass', (3,)), ('consolidation', (4, 5)))
  assert config.data.ignore_label == 9
  for classes in ((('consolidation', (2,)), ('ground glass', (1,))), (('ground glass', (1,)),)):
    with pytest.raises(UserError, match='but the run has ground glass, consolidation; give other mask values of t'):
      changed(classes)


@pytest.mark.parametrize('name', ['test', 'log.jsonl', 'checkpoints'])
def test_a_folder_with_files_of_others_is_refused(tmp_path, name):
  (tmp_path / name).mkdir()
  with pytest.raises(UserError, match=rf'{name} exists, but .* holds no run \(config.json is missing\); name another'):
    run_config.save_config(tmp_path, seg.get_config('demo'))
  assert [path.name for path in tmp_path.iterdir()] == [name]
