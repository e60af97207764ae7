"""Many inputs: bad ones are named, a killed prediction resumes, processes share, and the files of others stay."""

import collections
import csv
import itertools
import json
import os
import pathlib
import random
import re
import shutil
import signal
import time
import zipfile

import nibabel as nib
import numpy as np
import pytest
import several_hosts

from fusa_jax.inference import manifest, predict, predictor, viewer
from fusa_jax.scans import nifti, volume_files
from fusa_jax.system import files, own_files
from fusa_jax.system.errors import UserError


@pytest.fixture
def scan(raw_dir):
  return raw_dir / 'volume-phantom-A-0001_ct.nii.gz'


def rows(folder):
  with (folder / 'predictions.csv').open(newline='') as file:
    return {row['input']: row for row in csv.DictReader(file)}


def seven_bad(folder, scan):
  """Writes seven inputs that cannot be predicted, each for another reason; returns their names."""
  content, image = scan.read_bytes(), nib.load(scan)
  hu = np.asarray(image.dataobj)
  save = lambda name, values: nib.save(nib.Nifti1Image(values, image.affine), folder / name)
  (folder / 'bad1.nii.gz').write_bytes(content[:-100])
  (folder / 'bad2.nii.gz').write_bytes(b'')
  (folder / 'bad3.nii.gz').symlink_to(folder / 'nowhere')
  save('bad4.nii.gz', np.clip(hu, -160, 240))
  save('bad5.nii.gz', np.where(hu == hu.max(), np.nan, hu).astype(np.float32))
  save('bad6.nii.gz', hu[:, :, :1])
  (folder / 'bad7.zip').write_bytes(b'PK no archive')
  return {f'bad{k}.nii.gz' for k in range(1, 7)} | {'bad7.zip'}


def test_bad_inputs_are_named_and_the_others_predicted(predictors, scan, tmp_path, caplog):
  folder, out = tmp_path / 'in', tmp_path / 'out'
  folder.mkdir()
  bad = seven_bad(folder, scan)
  for name in 'ab':
    (folder / f'{name}.nii.gz').symlink_to(scan)
  assert predict.predict(predictors['seg'], folder, out) == predict.Counts(2, 7, 0)
  of_all = rows(out)
  assert of_all.keys() == bad | {'a.nii.gz', 'b.nii.gz'}
  for name, row in of_all.items():
    assert row['status'] == ('refused' if name in bad else 'predicted')
    assert bool(row['reason']) == (name in bad) and (name.partition('.')[0] in row['reason'] or name not in bad)
  result = json.loads((out / 'a.json').read_text())
  assert float(of_all['a.nii.gz']['lesion_ml']) == result['lesion_ml']
  assert of_all['a.nii.gz']['input_sha256'] == files.sha256_of(scan) == result['made_of']['input_sha256']
  assert len({row['run_sha256'] for row in of_all.values()}) == 1
  patient = result['patient']
  assert float(of_all['a.nii.gz']['patient_score']) == patient['score'] == result['lesion_ml']
  assert of_all['a.nii.gz']['patient_positive'] == str(int(patient['positive']))
  assert of_all['bad1.nii.gz']['patient_score'] == of_all['bad1.nii.gz']['patient_positive'] == ''
  assert sorted(path.name for path in out.iterdir()) == sorted(
    [*(f'{name}{kind}' for name in 'ab' for kind in ('.json', '_mask.nii.gz')), 'predictions.csv', '.predictions.lock']
  )
  pages = viewer.view(folder, out)
  assert [page.name for page in pages] == ['view.html', 'a.html', 'b.html']
  assert 'left out: 7 files (bad1.nii.gz, bad2.nii.gz' in caplog.text


def test_all_refused_is_an_error(predictors, scan, tmp_path):
  (tmp_path / 'in').mkdir()
  seven_bad(tmp_path / 'in', scan)
  with pytest.raises(UserError, match=r'^input: all 7 inputs were refused or failed; see .*predictions.csv$'):
    predict.predict(predictors['seg'], tmp_path / 'in', tmp_path / 'out')
  assert len(rows(tmp_path / 'out')) == 7
  with pytest.raises(UserError, match=r'bad2.nii.gz: '):
    predict.predict(predictors['seg'], tmp_path / 'in' / 'bad2.nii.gz', tmp_path / 'single')
  assert not (tmp_path / 'single').exists()


def test_an_error_that_is_no_users_is_a_failure_of_its_input_only(predictors, scan, tmp_path, monkeypatch):
  for name in 'abc':
    (tmp_path / f'{name}.nii.gz').symlink_to(scan)
  read = volume_files.VolumeFile.read_image

  def reading(source, values):
    if source.stem == 'b':
      raise MemoryError('too large')
    return read(source, values)

  monkeypatch.setattr(volume_files.VolumeFile, 'read_image', reading)
  assert predict.predict(predictors['seg'], tmp_path, tmp_path / 'out') == predict.Counts(2, 0, 1)
  assert rows(tmp_path / 'out')['b.nii.gz']['reason'].endswith('b.nii.gz: MemoryError: too large')


@pytest.fixture
def counted_reads(monkeypatch):
  """Counts the scans that are read for prediction, by stem."""
  read, counts = volume_files.VolumeFile.read_image, collections.Counter()

  def reading(source, values):
    counts[source.stem] += 1
    return read(source, values)

  monkeypatch.setattr(volume_files.VolumeFile, 'read_image', reading)
  return counts


def test_only_what_changed_is_predicted_again(predictors, runs, scan, tmp_path, counted_reads):
  """The input's bytes, the run, the operating point, the results and their kinds all count; times and order do not."""
  folder, out = tmp_path / 'in', tmp_path / 'out'
  folder.mkdir()
  for name in 'abc':
    shutil.copy(scan, folder / f'{name}.nii.gz')
  again = lambda run=predictors['seg'], **options: (
    counted_reads.clear(),
    predict.predict(run, folder, out, **options),
    ''.join(sorted(counted_reads)),
  )[-1]
  assert again() == 'abc'
  table = (out / 'predictions.csv').read_bytes()
  assert again() == '' and (out / 'predictions.csv').read_bytes() == table
  os.utime(folder / 'a.nii.gz', (1, 1))
  assert again() == ''
  content = (folder / 'b.nii.gz').read_bytes()
  (folder / 'b.nii.gz').write_bytes(content + b'\0' * 4)  # gzip ignores zeros at the end
  assert again() == 'b'
  (out / 'c_mask.nii.gz').unlink()
  assert again() == 'c' and again() == ''
  assert again(predictor.load_predictor(runs['seg'], threshold=0.11)) == 'abc'
  assert again(predictor.load_predictor(runs['seg'], threshold=0.11)) == ''
  assert again(probabilities=True) == 'abc' and again(probabilities=True) == ''
  assert again() == 'abc' and not list(out.glob('*_probability*'))  # those of the earlier prediction would be stale
  (folder / 'a.nii.gz').unlink()
  assert again() == '' and rows(out).keys() == {f'{name}.nii.gz' for name in 'abc'}


@pytest.mark.parametrize('file', ['a_mask.nii.gz', 'a.json', 'predictions.csv', 'a_probability.nii.gz'])
@pytest.mark.parametrize('earlier', [False, True], ids=['before', 'after'])
def test_files_of_others_are_never_replaced(predictors, scan, tmp_path, file, earlier, counted_reads):
  """A mask drawn or corrected by hand, a sidecar, a table: before or after a prediction into the folder."""
  folder = tmp_path / 'in'
  folder.mkdir()
  shutil.copy(scan, folder / 'a.nii.gz')
  options = {'probabilities': 'probability' in file}
  if earlier:
    predict.predict(predictors['seg'], folder, folder, **options)
  theirs = b'{"KVP": 120}' if file.endswith('.json') else b'drawn by hand'
  (folder / file).write_bytes(theirs)
  counted_reads.clear()
  with pytest.raises(UserError, match=rf'{file}: exists, and this program did not write it, or it was changed since; '):
    predict.predict(predictors['seg'], folder, folder, **options)
  assert (folder / file).read_bytes() == theirs and not counted_reads
  predict.predict(predictors['seg'], folder, folder, overwrite=True, **options)
  assert (folder / file).read_bytes() != theirs
  assert predict.predict(predictors['seg'], folder, folder, **options) == predict.Counts(1, 0, 0)


def test_results_of_other_inputs_are_never_replaced(predictors, raw_dir, tmp_path):
  """Two patients' scans of one name, one after the other. The same scan from another place is the same input."""
  for number, name in ((1, 'a'), (2, 'b'), (1, 'c')):
    (tmp_path / name).mkdir()
    shutil.copy(raw_dir / f'volume-phantom-A-000{number}_ct.nii.gz', tmp_path / name / 'ct.nii.gz')
  run = lambda name, **options: predict.predict(predictors['seg'], tmp_path / name, tmp_path / 'out', **options)
  assert run('a').predicted == 1
  with pytest.raises(UserError, match=r'ct.json: the result of another ct.nii.gz; give another folder, or add --overw'):
    run('b/ct.nii.gz')
  with pytest.raises(UserError, match=r'ct.json: was made from another ct.nii.gz; run --mode=predict'):
    viewer.view(tmp_path / 'b', tmp_path / 'out')
  before = (tmp_path / 'out' / 'ct.json').stat().st_mtime_ns
  assert run('c').predicted == 1 and (tmp_path / 'out' / 'ct.json').stat().st_mtime_ns == before
  assert run('b', overwrite=True).predicted == 1


def test_a_corrected_file_that_is_not_asked_for_stays(predictors, scan, tmp_path):
  predict.predict(predictors['seg'], scan, tmp_path, probabilities=True)
  (corrected,) = tmp_path.glob('*_probability.nii.gz')
  corrected.write_bytes(b'mine')
  with pytest.raises(UserError, match=r'_probability.nii.gz: exists, and this program did not'):
    predict.predict(predictors['seg'], scan, tmp_path)
  assert corrected.read_bytes() == b'mine'


def test_a_record_of_files_elsewhere_is_not_one(tmp_path):
  own_files.write_record(tmp_path / 'a.json', {}, {'../b': 'x'})
  assert own_files.read_record(tmp_path / 'a.json') is None


def test_the_page_of_a_corrected_mask_shows_its_volume(predictors, scan, tmp_path):
  predict.predict(predictors['seg'], scan, tmp_path)
  (path,) = tmp_path.glob('*_mask.nii.gz')
  image = nib.load(path)
  corrected = np.zeros(image.shape, np.uint8)
  corrected[4:8, 4:8, 3] = 1
  nib.save(nib.Nifti1Image(corrected, None, image.header), path)
  (page,) = viewer.view(scan, tmp_path)
  ml = 16 * np.prod(image.header.get_zooms()) / 1000
  assert f'<b>{ml:.1f} mL</b> of lesion, <b>1 of ' in page.read_text()


def test_rows_of_earlier_predictions_stay(predictors, scan, tmp_path):
  """Also while a new prediction is under way, and if a single input is refused later."""
  folder, out = tmp_path / 'in', tmp_path / 'out'
  folder.mkdir()
  for name in 'ab':
    shutil.copy(scan, folder / f'{name}.nii.gz')
  predict.predict(predictors['seg'], folder, out)
  (folder / 'a.nii.gz').write_bytes(b'')
  with pytest.raises(UserError, match=r'a.nii.gz: .* \(an earlier result remains, a.json\)$'):
    predict.predict(predictors['seg'], folder / 'a.nii.gz', out)
  assert {name: row['status'] for name, row in rows(out).items()} == {'a.nii.gz': 'refused', 'b.nii.gz': 'predicted'}
  one = manifest.Manifest(out, 0)
  one.begin()
  one.join()
  assert len(rows(out)) == 2


def test_a_table_of_an_earlier_version_is_continued(predictors, scan, tmp_path):
  """Without the columns of patients, as versions before them wrote it; its rows stay, with empty cells."""
  old = 'input,input_sha256,status,reason,lesion_ml,seconds,run_sha256'
  (tmp_path / 'predictions.csv').write_text(f'{old}\nz.nii.gz,00,predicted,,1.5,0.5,11\n')
  predict.predict(predictors['seg'], scan, tmp_path)
  got = rows(tmp_path)
  assert list(got) == [scan.name, 'z.nii.gz'] and got[scan.name]['patient_score']
  assert got['z.nii.gz'] | {'patient_score': '', 'patient_positive': '', 'run_sha256': '11'} == got['z.nii.gz']


@pytest.mark.parametrize('content', [b'\xf6', b'a;b\n', b'sum,,,,,,\n'], ids=['latin-1', 'semicolons', 'sum'])
def test_a_table_that_was_changed_is_not_replaced(predictors, scan, tmp_path, content):
  predict.predict(predictors['seg'], scan, tmp_path)
  with (tmp_path / 'predictions.csv').open('ab') as file:
    file.write(content)
  before = (tmp_path / 'predictions.csv').read_bytes()
  with pytest.raises(UserError, match=r'predictions.csv: exists, and this program did not write it'):
    predict.predict(predictors['seg'], scan, tmp_path)
  assert (tmp_path / 'predictions.csv').read_bytes() == before
  predict.predict(predictors['seg'], scan, tmp_path, overwrite=True)
  assert len(rows(tmp_path)) == 1


def test_an_error_while_writing_is_a_failure_of_its_input_only(predictors, scan, tmp_path, monkeypatch):
  for name in 'abc':
    shutil.copy(scan, tmp_path / f'{name}.nii.gz')
  write, count = nifti.write_volume_to, itertools.count(1)

  def writing(*arguments, **options):
    if next(count) == 2:
      raise ValueError('a bug')
    write(*arguments, **options)

  monkeypatch.setattr(nifti, 'write_volume_to', writing)
  assert predict.predict(predictors['seg'], tmp_path, tmp_path / 'out') == predict.Counts(2, 0, 1)
  assert rows(tmp_path / 'out')['b.nii.gz']['reason'] == 'b.nii.gz: ValueError: a bug'


def test_archives_of_one_name_and_their_reasons(predictors, scan, tmp_path):
  """Inputs are named by their whole path, also in archives; no temporary folder appears in a reason."""
  content = scan.read_bytes()
  for name, good in (('a/P.zip', True), ('b/P.zip', True), ('c/P.zip', False)):
    (tmp_path / 'in' / name).parent.mkdir(parents=True)
    with zipfile.ZipFile(tmp_path / 'in' / name, 'w') as packed:
      packed.writestr('ct.nii.gz', content if good else content[:-50])
  (tmp_path / 'in' / 'd').mkdir()
  (tmp_path / 'in' / 'd' / 'P.zip').write_bytes(b'no archive')
  assert predict.predict(predictors['seg'], tmp_path / 'in', tmp_path / 'out') == predict.Counts(2, 2, 0)
  table = rows(tmp_path / 'out')
  assert list(table) == ['a/P.zip/ct.nii.gz', 'b/P.zip/ct.nii.gz', 'c/P.zip/ct.nii.gz', 'd/P.zip']
  assert table['c/P.zip/ct.nii.gz']['reason'].startswith('c/P.zip/ct.nii.gz: truncated')
  assert {path.name for path in (tmp_path / 'out').glob('*.json')} == {'a.json', 'b.json'}


def test_temporary_files_of_killed_processes_are_removed(predictors, scan, tmp_path):
  left = [tmp_path / f'.12345.{"0123456789abcdef"}{ending}' for ending in ('.nii.gz', '.json', '')]
  others = [tmp_path / '.12345.mine', tmp_path / '.hidden']
  for path in [*left, *others]:
    path.touch()
  predict.predict(predictors['seg'], scan, tmp_path)
  assert not any(path.exists() for path in left) and all(path.exists() for path in others)


def test_pages_of_others_are_never_replaced(predictors, scan, tmp_path):
  predict.predict(predictors['seg'], scan, tmp_path)
  (page,) = viewer.view(scan, tmp_path)
  assert viewer.view(scan, tmp_path) == [page]  # its own
  page.write_text(page.read_text().replace('<h1', '<p>a note</p><h1', 1))
  noted = page.read_bytes()
  with pytest.raises(UserError, match=r'\.html: exists, and this program did not write it'):
    viewer.view(scan, tmp_path)
  assert page.read_bytes() == noted
  viewer.view(scan, tmp_path, overwrite=True)
  assert b'a note' not in page.read_bytes()


def test_one_prediction_at_a_time_writes_to_a_folder(predictors, scan, tmp_path):
  with (
    manifest.locked(tmp_path / 'out'),
    pytest.raises(UserError, match=r'another prediction writes to .*out now; wait until it ends'),
  ):
    predict.predict(predictors['seg'], scan, tmp_path / 'out')
  assert not (tmp_path / 'out').exists()
  assert predict.predict(predictors['seg'], scan, tmp_path / 'out').predicted == 1


def test_rows_that_were_not_written_to_their_end_are_left_out(tmp_path):
  """A killed process may leave half a row; rows of others follow it."""
  row = dict(zip(manifest.COLUMNS, ('a, "b"', '0', 'refused', 'x, y', None, 1.5, '1', None, None), strict=True))
  (tmp_path / '.predictions.1.csv').write_text('\na.nii,0,predicted,,3')
  one = manifest.Manifest(tmp_path, 0)
  one.add(row)
  one.add(row | {'input': 'c'})
  one.join(at_end=True)
  assert list(rows(tmp_path)) == ['a, "b"', 'c'] and rows(tmp_path)['a, "b"']['reason'] == 'x, y'
  assert [path.name for path in tmp_path.iterdir()] == ['predictions.csv']


@pytest.fixture
def many(scan, tmp_path):
  """A folder of 200 small scans of which 7 are bad: (folder, names of all, names of the bad ones)."""
  folder = tmp_path / 'in'
  folder.mkdir()
  bad = seven_bad(folder, scan)
  image = nib.load(scan)
  hu = np.asarray(image.dataobj)
  for k in range(193):
    nib.save(nib.Nifti1Image(np.roll(hu, k % 13, 0)[:, :, : 4 + k % 5], image.affine), folder / f's{k:03}.nii.gz')
  return folder, bad | {f's{k:03}.nii.gz' for k in range(193)}, bad


@pytest.mark.slow
@pytest.mark.parametrize('processes', [1, 2])
def test_killed_and_resumed_each_scan_is_computed_once(runs, many, tmp_path, processes):
  """Stopped three times at random: each time the files are whole, and the results are those of an undisturbed run.

  SIGTERM on one process lets all finish the scan at hand; a kill leaves it.
  """
  folder, names, bad = many
  out, draws = tmp_path / 'out', random.Random(0)
  command = ['--mode=predict', f'--workdir={runs["seg"]}', f'--input={folder}', f'--output={out}']
  results = lambda place: {path.name: path.stat().st_mtime_ns for path in place.glob('[!.]*.json')}
  known = {}
  for turn in range(3):
    with several_hosts.Hosts(processes, 1, command, tmp_path / str(turn)) as several:
      aim, until = len(known) + draws.randint(3, 30), time.monotonic() + 120
      while len(results(out)) < aim and time.monotonic() < until:
        assert all(process.poll() is None for process in several.processes), several.log(0)
        time.sleep(0.01)
      if turn == 1:
        several.processes[-1].send_signal(signal.SIGTERM)
        assert several.wait(60) == [143] * processes, several.log(0)
        left = re.search(r'stopped by SIGTERM, with (\d+) of 200 inputs left; rerun', several.log(processes - 1))
        # A row of an earlier prediction may be for an input that is left.
        assert 0 < 200 - len(rows(out)) <= int(left[1])
        assert not list(out.glob('.predictions.*.csv')) and not list(out.glob('.[0-9]*'))
      for process in several.processes:
        process.send_signal(signal.SIGKILL)
    assert all(results(out)[name] == at for name, at in known.items())  # nothing was computed twice
    known = {name: at for name, at in results(out).items() if complete(out, name)}
    assert len(known) >= aim - 2 * processes
  with several_hosts.Hosts(processes, 1, command, tmp_path / 'last') as several:
    assert several.wait() == [4] * processes, several.log(0)
  assert '193 predicted, 7 refused' in several.log(0).splitlines()[-1]
  assert all(results(out)[name] == at for name, at in known.items())
  table = rows(out)
  assert table.keys() == names and {name for name, row in table.items() if row['status'] == 'refused'} == bad
  assert all(complete(out, f'{name[:-7]}.json') for name in names - bad)
  assert not list(out.glob('.predictions.*.csv')) and not list(out.glob('.[0-9]*'))


def complete(folder: pathlib.Path, name: str) -> bool:
  record = own_files.read_record(folder / name)
  return record is not None and own_files.is_complete(folder, record)


@pytest.mark.slow
def test_a_lost_process_costs_only_the_inputs_at_hand(runs, many, tmp_path):
  """The other process predicts the rest; exit code 1 says that some inputs are left, and the next run takes them."""
  folder, names, _ = many
  out = tmp_path / 'out'
  command = ['--mode=predict', f'--workdir={runs["seg"]}', f'--input={folder}', f'--output={out}']
  command.append('--heartbeat_timeout=10')
  with several_hosts.Hosts(2, 1, command, tmp_path / 'first') as two:
    until = time.monotonic() + 120
    while len(list(out.glob('*.json'))) < 10 and time.monotonic() < until:
      time.sleep(0.02)
    two.processes[1].kill()
    assert two.processes[0].wait(120) == 1, two.log(0)
  assert 'inputs are left, because of lost processes (1); run it again' in two.log(0)
  # Two are read ahead, one is computed, one is written, and the row of one may be missing.
  assert len(names) - 5 <= len(rows(out)) < len(names)
  with several_hosts.Hosts(1, 1, command, tmp_path / 'second') as one:
    assert one.wait() == [4], one.log(0)
  assert rows(out).keys() == names
