"""Saves the patients of a run in split.json, with digests of their scans and lesion masks; finds leaks with them.

A description of data, as split.json holds it, is a dictionary:
  dataset: the name of the prepared dataset.
  sha256: the digest of all of its data (`training.datasets.Dataset.sha256`).
  train, validation, test: the names of the patients of each part.
  patients: by name, {'owner', 'images', 'truth'}: the person, the digests of the scan or pictures, and of the masks.
"""

import logging
import pathlib
import re

from fusa_jax.system import hosts
from fusa_jax.system.errors import UserError
from fusa_jax.system.files import printable, read_json, write_json

PARTS = ('train', 'validation', 'test')
# The folder of a test on the run's own data.
TEST = 'test'
# Characters of a folder's name that are kept in the name of a test.
_UNUSUAL = re.compile(r'[^\w.-]+')


def save_split(workdir: pathlib.Path, data: dict) -> None:
  """Writes split.json on process 0, or compares the data with the split.json that a run already has.

  Args:
    workdir: the folder of the run.
    data: describes the data that the run is about to use.

  Raises:
    UserError: the run was started with other data. Files were added to the cohort, removed or changed.
  """
  hosts.on_main(lambda: _save(workdir, data))


def _save(workdir, data):
  before = load_split(workdir)
  if before is None:
    write_json(workdir / 'split.json', data)
    return
  advice = 'restore the old files, or train in another --workdir'
  if any(before[part] != data[part] for part in PARTS):
    raise UserError(
      f'{workdir}: the run was started with other patients in its folds (files were added to the cohort or removed); '
      f'{advice}'
    )
  if 'patients' not in before:
    logging.warning('%s: an earlier version wrote split.json without digests, so changed data are not noticed', workdir)
  elif changes := _changes(before, data):
    raise UserError(f'{workdir}: since the run was started, {changes}; {advice}')


def _changes(before, now):
  """Returns how two descriptions of data with the same patients differ, in words; '' if they are equal."""
  changes = []
  for key, words in (('images', 'the scans'), ('truth', 'the lesion masks or labels'), ('owner', 'the persons')):
    names = [name for name, one in now['patients'].items() if one[key] != before['patients'][name][key]]
    if names:
      more = f' and {len(names) - 1} more' if len(names) > 1 else ''
      changes.append(f'{words} of {printable(names[0])}{more} changed')
  if not changes and before['sha256'] != now['sha256']:
    changes.append(f'the dataset was prepared in another way ({before["dataset"]}, now {now["dataset"]})')
  return ' and '.join(changes)


def load_split(workdir: pathlib.Path) -> dict | None:
  """Returns the data of a run, as `save_split` wrote them; None if the run has no split.json.

  Raises:
    UserError: the file is damaged.
  """
  path, advice = workdir / 'split.json', 'restore it, or train again in another --workdir'
  if not path.exists():
    return None
  data = read_json(path, advice)
  if not isinstance(data, dict) or not data.keys() >= set(PARTS):
    raise UserError(f'{path}: damaged (it does not list the patients of the run); {advice}')
  return data


def test_name(workdir: pathlib.Path, data: dict, source: str) -> str:
  """Returns the name of the folder in `workdir` for the test of a run on some data.

  The test on the run's own data is in `test`. The tests on other data, or on changed masks, have folders of their own.

  Args:
    workdir: the folder of the run.
    data: describes the data of the test.
    source: the name of the folder of these data.
  """
  own = load_split(workdir) or data
  # Without digests, which an earlier version did not write, only the names can be compared.
  if all(own[part] == data[part] for part in PARTS) and own.get('sha256', data['sha256']) == data['sha256']:
    return TEST
  return f'{TEST}-{_UNUSUAL.sub("_", printable(source)) or "data"}-{data["sha256"][:8]}'


def check_unseen(workdir: pathlib.Path, data: dict) -> None:
  """Compares test data with the training and validation data of a run, by names, persons and digests of scans.

  Args:
    workdir: the folder of the run.
    data: describes the data of the test.

  Raises:
    UserError: the run was trained or validated on a test patient. The files of the cohort changed, or a scan has
      another name in the test data.
  """
  own = load_split(workdir)
  if own is None:
    logging.warning('%s: split.json is missing, so it is unknown whether the run was trained on test patients', workdir)
    return
  names = [*own['train'], *own['validation']]
  seen = sorted(set(data['test']) & set(names))
  if seen:
    raise UserError(
      f'{workdir}: the run was trained or validated on {len(seen)} of the test patients (for example {seen[0]}), '
      'because files were added to the cohort or removed; restore the files, or train again (if this is another cohort '
      'with the same names, rename its files)'
    )
  if 'patients' not in own:
    return
  of_image = {image: name for name in names for image in own['patients'][name]['images'] if image}
  of_owner = {own['patients'][name]['owner']: name for name in names}
  copies, same_person = [], []
  for name in data['test']:
    one = data['patients'][name]
    copies += [(name, of_image[image]) for image in one['images'] if image in of_image][:1]
    same_person += [(name, of_owner[one['owner']])] if one['owner'] in of_owner else []
  for pairs, what in ((copies, 'has the same images as'), (same_person, 'is of the same person as')):
    if pairs:
      name, other = map(printable, pairs[0])
      more = f', and {len(pairs) - 1} more' if len(pairs) > 1 else ''
      raise UserError(
        f'{workdir}: test patient {name} {what} {other}, which the run was trained or validated on{more}; remove these '
        'patients from the test data'
      )
