"""Which checkpoints are kept, how damage is found, and the errors of a failed save."""

import errno
import json
import os
import resource
import shutil
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fusa_jax.runs import checkpoint
from fusa_jax.system import meshes
from fusa_jax.system.errors import UserError

VARIABLES, OPTIMIZER = {'w': jnp.arange(4.0)}, {'m': jnp.zeros(4)}


def save(workdir, scores):
  """Saves a checkpoint per score at steps 1, 2, ...; all elements of `w` equal the step."""
  with checkpoint.Checkpoints(workdir) as checkpoints:
    for step, score in enumerate(scores, start=1):
      checkpoints.save(step, jax.tree.map(lambda x, s=step: 0 * x + s, VARIABLES), OPTIMIZER, score)


def saved(workdir):
  return sorted(int(path.name) for path in (workdir / 'checkpoints').iterdir() if path.name.isdigit())


def restored(checkpoints, step):
  shapes = meshes.replicated_shapes(lambda: VARIABLES, meshes.create_mesh())
  return checkpoints.restore(step, variables=shapes)['variables']['w']


def test_latest_two_and_best_are_kept(tmp_path):
  with checkpoint.Checkpoints(tmp_path) as checkpoints, pytest.raises(UserError, match='no checkpoint in it'):
    checkpoints.best()
  save(tmp_path, [0.1, 0.7, None, 0.3, 0.2])
  assert saved(tmp_path) == [2, 4, 5]
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    assert (checkpoints.best(), checkpoints.latest()) == (2, 5)
    np.testing.assert_array_equal(restored(checkpoints, 2), np.full(4, 2.0))


def test_without_scores_the_latest_is_the_best(tmp_path):
  save(tmp_path, [None, None, None])
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.best() == checkpoints.latest() == 3


def test_of_equal_scores_the_best_is_kept(tmp_path):
  save(tmp_path, [0.5, 0.5, 0.1, 0.1])
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.best() in saved(tmp_path)
    assert len(saved(tmp_path)) == 3


def truncate(path):
  with path.open('r+b') as file:
    file.truncate(path.stat().st_size // 2)


def flip(path):
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 4
  path.write_bytes(data)


def files_of(folder):
  return sorted(path for path in folder.rglob('*') if path.is_file())


@pytest.mark.parametrize('damage', [truncate, flip, os.remove])
def test_damage_is_reported_and_the_previous_checkpoint_is_used(tmp_path, damage, caplog):
  """Damages each file of the newest checkpoint in turn. Damage to Orbax's own metadata files does not matter."""
  save(tmp_path / 'whole', [0.1, 0.2, 0.3])
  newest = tmp_path / 'whole' / 'checkpoints' / '3'
  tried = 0
  for path in files_of(newest):
    name = path.relative_to(newest)
    shutil.rmtree(tmp_path / 'run', ignore_errors=True)
    shutil.copytree(tmp_path / 'whole', tmp_path / 'run')
    damage(tmp_path / 'run' / 'checkpoints' / '3' / name)
    caplog.clear()
    with checkpoint.Checkpoints(tmp_path / 'run') as checkpoints:
      if len(name.parts) == 1 and name.name != 'sha256.json':
        assert checkpoints.latest() == checkpoints.best() == 3
        np.testing.assert_array_equal(restored(checkpoints, 3), np.full(4, 3.0))
        checkpoints.save(4, VARIABLES, OPTIMIZER, None)
        continue
      tried += 1
      assert checkpoints.latest() == checkpoints.best() == 2, name
      np.testing.assert_array_equal(restored(checkpoints, 2), np.full(4, 2.0))
    (message,) = [record.message for record in caplog.records if 'damaged' in record.message]
    assert 'checkpoints/3 is damaged and not used' in message
    assert str(name) in message or name.name == 'sha256.json'
  assert tried > 8


def test_damage_to_the_digests_is_detected(tmp_path):
  """A flipped bit in the file of digests is always detected, unless its content stays the same."""
  save(tmp_path, [None])
  path = tmp_path / 'checkpoints' / '1' / 'sha256.json'
  text = path.read_bytes()
  for place in range(0, len(text), 7):
    for bit in (1, 4):
      data = bytearray(text)
      data[place] ^= bit
      path.write_bytes(data)
      same = json.loads(text) == _parsed(data)
      assert same or checkpoint._damage(path.parent), (place, bit)
  path.write_bytes(text)
  assert checkpoint._damage(path.parent) is None


def _parsed(data):
  try:
    return json.loads(data)
  except ValueError:
    return None


def test_damaged_checkpoints_are_moved_when_training_resumes(tmp_path):
  save(tmp_path, [0.1, 0.2, 0.3])
  flip(tmp_path / 'checkpoints' / '3' / 'sha256.json')
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.latest() == 2
    assert saved(tmp_path) == [2, 3]  # reading changes nothing
    checkpoints.save(3, VARIABLES, OPTIMIZER, 0.4)
  assert (tmp_path / 'checkpoints' / 'damaged' / '3').is_dir()
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.latest() == checkpoints.best() == 3
    np.testing.assert_array_equal(restored(checkpoints, 3), np.arange(4.0))


def test_no_undamaged_checkpoint_is_an_error(tmp_path):
  save(tmp_path, [0.1, 0.2])
  for step in (1, 2):
    os.remove(tmp_path / 'checkpoints' / str(step) / 'variables' / 'manifest.ocdbt')
  with pytest.raises(
    UserError, match=r'all checkpoints are damaged \(variables/manifest.ocdbt is missing; .*restore one'
  ):
    checkpoint.Checkpoints(tmp_path).best()
  with pytest.raises(UserError, match='all checkpoints are damaged'):
    checkpoint.Checkpoints(tmp_path).latest()
  assert saved(tmp_path) == [1, 2]


def test_only_the_files_that_will_be_read_are_hashed(tmp_path, monkeypatch):
  """The best checkpoint is step 2. Evaluation reads its variables, and resuming reads all of step 4."""
  save(tmp_path, [0.1, 0.7, 0.3, 0.2])
  read = []
  of = checkpoint.sha256_of
  monkeypatch.setattr(checkpoint, 'sha256_of', lambda path: read.append(path) or of(path))

  def arrays_read():
    names = [path.relative_to(tmp_path / 'checkpoints').as_posix() for path in read]
    read.clear()
    return sorted(name for name in names if '/metrics/' not in name)

  def arrays_of(*items):
    folder = tmp_path / 'checkpoints'
    return sorted(path.relative_to(folder).as_posix() for item in items for path in files_of(folder / item))

  assert saved(tmp_path) == [2, 3, 4]
  assert checkpoint.Checkpoints(tmp_path).best() == 2
  assert arrays_read() == arrays_of('2/variables')
  checkpoints = checkpoint.Checkpoints(tmp_path)
  assert arrays_read() == []
  assert checkpoints.latest() == checkpoints.latest() == 4
  assert arrays_read() == arrays_of('4/variables', '4/optimizer')


def test_damage_to_the_optimizer_does_not_matter_for_evaluation(tmp_path):
  save(tmp_path, [0.1, 0.7])
  flip(tmp_path / 'checkpoints' / '2' / 'optimizer' / 'manifest.ocdbt')
  checkpoints = checkpoint.Checkpoints(tmp_path)
  assert (checkpoints.best(), checkpoints.latest(), checkpoints.best()) == (2, 1, 1)


def test_a_damaged_best_checkpoint_is_replaced_by_the_next_best(tmp_path):
  """When training continues, Orbax must not keep the damaged one in place of the next best."""
  save(tmp_path, [0.7, 0.6, 0.1])
  flip(tmp_path / 'checkpoints' / '1' / 'variables' / 'manifest.ocdbt')
  assert checkpoint.Checkpoints(tmp_path).best() == 2
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.latest() == 3
    for step in (4, 5):
      checkpoints.save(step, VARIABLES, OPTIMIZER, 0.2)
  assert saved(tmp_path) == [2, 4, 5]
  assert checkpoint.Checkpoints(tmp_path).best() == 2


def test_the_digest_is_that_of_the_values_of_the_variables(tmp_path):
  """Equal values have equal digests, in another folder too; Orbax gives its files random names."""
  save(tmp_path / 'a', [0.1, 0.2])
  save(tmp_path / 'b', [0.3, 0.4])
  one, other = (checkpoint.Checkpoints(tmp_path / name) for name in 'ab')
  assert [one.digest(step) for step in (1, 2)] == [other.digest(step) for step in (1, 2)]
  assert one.digest(1) != one.digest(2)
  folder = tmp_path / 'a' / 'checkpoints' / '1'
  (folder / 'variables.sha256').unlink()
  assert one.digest(1) is None


BIG = {'w': jnp.asarray(np.random.default_rng(0).standard_normal(1_000_000), jnp.float32)}


@pytest.mark.parametrize('when', ['next save', 'check', 'leaving'])
def test_a_full_disk_stops_with_the_reason(tmp_path, when):
  """The system refuses files over 1 MB. The arrays are 4 MB and random: they cannot be compressed."""

  def fill():
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
      checkpoints.save(1, BIG, OPTIMIZER, None)
      if when == 'next save':
        checkpoints.save(2, BIG, OPTIMIZER, None)
      while when == 'check':
        checkpoints.check()

  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
  try:
    with pytest.raises(UserError, match=r'checkpoints: a checkpoint could not be saved \(.*too large.*free space'):
      fill()
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  assert saved(tmp_path) == []


@pytest.mark.slow
def test_a_really_full_disk(tmp_path):
  """Uses a file system of 1 MB; the test needs the right to mount it."""
  mounted = subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=1m', 'none', str(tmp_path)], capture_output=True)
  if mounted.returncode:
    pytest.skip('this user may not mount a file system')
  try:
    with (
      pytest.raises(UserError, match=r'could not be saved \(.*No space left on device.*free space there'),
      checkpoint.Checkpoints(tmp_path) as checkpoints,
    ):
      checkpoints.save(1, BIG, OPTIMIZER, None)
  finally:
    subprocess.run(['umount', '-l', str(tmp_path)], check=True)


def test_a_folder_lost_during_a_save_stops_with_the_reason(tmp_path, monkeypatch):
  """The folder is removed after all files are written, before it is renamed."""
  write = checkpoint._write_digests

  def lose(folder, digests):
    write(folder, digests)
    shutil.rmtree(folder)

  monkeypatch.setattr(checkpoint, '_write_digests', lose)
  with (
    pytest.raises(UserError, match=r'checkpoints: a checkpoint could not be saved \(.*move the run'),
    checkpoint.Checkpoints(tmp_path) as checkpoints,
  ):
    checkpoints.save(1, VARIABLES, OPTIMIZER, None)


def test_a_folder_lost_between_saves_stops_with_the_reason(tmp_path):
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, VARIABLES, OPTIMIZER, None)
    while saved(tmp_path) != [1]:
      pass
    shutil.rmtree(tmp_path)
    with pytest.raises(UserError, match=r'checkpoints: the folder disappeared during training'):
      checkpoints.save(2, VARIABLES, OPTIMIZER, None)


def test_other_errors_are_not_reported_as_a_full_disk(tmp_path, monkeypatch):
  def broken(folder, _):
    raise ZeroDivisionError('a bug')

  monkeypatch.setattr(checkpoint, '_write_digests', broken)
  with pytest.raises(ZeroDivisionError), checkpoint.Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, VARIABLES, OPTIMIZER, None)


def test_out_of_space_while_digests_are_written(tmp_path, monkeypatch):
  def full(folder, _):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  monkeypatch.setattr(checkpoint, '_write_digests', full)
  with (
    pytest.raises(UserError, match='No space left on device'),
    checkpoint.Checkpoints(tmp_path) as checkpoints,
  ):
    checkpoints.save(1, VARIABLES, OPTIMIZER, None)
