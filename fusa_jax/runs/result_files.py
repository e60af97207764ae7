"""The files in test/ of a run, as the evaluation writes them and later commands read them.

The files of a run of several classes are in a folder per class below test/, with the name of the class; metrics.json
and the report of all classes are in test/ itself.
"""

import csv
import io
import pathlib
import zipfile
import zlib
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from fusa_jax.measures import metrics, patients
from fusa_jax.runs import figures, results
from fusa_jax.runs.split import TEST
from fusa_jax.scans.classes import LESION, file_name
from fusa_jax.system import own_files, paths
from fusa_jax.system.errors import UserError
from fusa_jax.system.files import remove_partials, write_csv

COLUMNS = ('patient', 'slice', 'label', 'score', *metrics.COUNTS, 'owner')
TABLE, NUMBERS, REPORT, VOLUMES = 'table.npz', 'metrics.json', 'report.html', 'volumes.csv'
PATIENTS = 'patients.npz'
_FILES = (TABLE, 'slices.csv', 'patients.csv', PATIENTS, VOLUMES)


def folder_of(folder: pathlib.Path, name: str, classes: Sequence[str]) -> pathlib.Path:
  """Returns the folder of the files of a class in the folder of a test: this folder itself if there is one class."""
  return folder / file_name(name) if len(classes) > 1 else folder


def check_own(folder: pathlib.Path, classes: Sequence[str] = LESION.names) -> None:
  """Checks that a new test would replace only files of an earlier test that have not changed since.

  If metrics.json is missing, the earlier test was not complete, or somebody deleted the file to test again. Then the
  check allows to replace the other files.

  Args:
    folder: the folder of the test.
    classes: the names of the classes of the run.

  Raises:
    UserError: other files would be replaced, one line each. A file is in the place of the folder.
  """
  if paths.exists(folder) and not folder.is_dir():
    raise UserError(f'{folder}: is not a folder; move it away, or rename it')
  folders = {folder, *(folder_of(folder, name, classes) for name in classes)}
  others = [one / name for one in sorted(folders) for name in (*_FILES, REPORT)] if (folder / NUMBERS).exists() else []
  own_files.refuse(own_files.changed(folder / NUMBERS, others))


def write_test(folder: pathlib.Path, result: dict, parts: Mapping[str, results.Part]) -> None:
  """Writes the files of a test in place of those of an earlier one; metrics.json states the digest of each.

  Args:
    folder: the folder of the test.
    result: the content of metrics.json.
    parts: what was found for each class.
  """
  files = {}
  for name, numbers in results.by_class(result, list(parts)).items():
    of_class = folder_of(folder, name, list(parts))
    for each in (of_class, of_class / 'figures'):
      remove_partials(each)
    files |= {of_class / file: write for file, write in _writers(numbers, parts[name]).items()}
  for counted, figure in confusion_matrices(result).items():
    files[folder / 'figures' / f'confusion_matrix_of_{counted}.png'] = figures.writer(figure)
  own_files.write_together(folder / NUMBERS, result, files, _old_files(folder))


def confusion_matrices(result: dict) -> dict[str, Figure]:
  """Draws the confusion matrices of exclusive classes, by what they count: 'slices' or 'patients'."""
  return {
    counted: figures.confusion_matrix(numbers['confusion'], numbers['classes'], f'{counted}, highest probability')
    for counted, numbers in results.called(result).items()
  }


def _writers(result, part):
  """Returns functions that write the files of a class, by their paths from its folder."""
  table, of_patients = part.table, part.patients
  unknown = () if results.scores_slices(result) else ('label', *metrics.COUNTS)
  slices = zip(*([None] * len(table[key]) if key in unknown else table[key] for key in COLUMNS), strict=True)
  half, chosen = metrics.by_patient(table), metrics.by_patient(table, '_chosen')
  rows = metrics.patient_rows(half)
  for row, other, num_scans in zip(rows, metrics.patient_rows(chosen), half.num_scans.tolist(), strict=True):
    row |= {'dice_at_operating_point': other['dice'], 'num_scans': num_scans}
  if not results.scores_slices(result):
    rows = [{key: row[key] for key in ('patient', 'num_slices', 'num_scans')} for row in rows]
  if of_patients is not None:
    for row, columns in zip(rows, _patient_columns(of_patients, result['patient']['score_name']), strict=True):
      row |= columns
  writers = {
    'slices.csv': lambda path: write_csv(path, (dict(zip(COLUMNS, row, strict=True)) for row in slices)),
    'patients.csv': lambda path: write_csv(path, rows),
    TABLE: lambda path: np.savez_compressed(path, **table),
  }
  if part.volumes:
    writers[VOLUMES] = lambda path: write_csv(path, part.volumes)
  if of_patients is not None:
    writers[PATIENTS] = lambda path: np.savez_compressed(path, **of_patients)
  pictures = {**part.pictures, **figures.chart_writers(table, result, of_patients)}
  return writers | {f'figures/{name}': write for name, write in pictures.items()}


def _patient_columns(of_patients, score_name):
  """The columns that a table of patients adds to patients.csv, by row; scores of slices as probabilities."""
  names = [name for name in (*patients.OF_SLICES, *patients.OF_MASKS) if name in of_patients]
  columns = {'label': of_patients['label'].tolist()}
  columns['score'] = patients.shown(score_name, of_patients['score']).tolist()
  columns['positive'] = [int(value) if np.isfinite(value) else None for value in of_patients['positive'].tolist()]
  columns |= {name: patients.shown(name, of_patients[name]).tolist() for name in names}
  return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _old_files(folder):
  """Returns the paths, from the folder, of the files of an earlier test and of comparisons that used it."""
  names = [*_FILES, REPORT, *own_files.files_of(folder / NUMBERS)]
  names += [f'{pathlib.PurePosixPath(name).parent}/{REPORT}' for name in names if name.endswith(f'/{TABLE}')]
  for path in folder.glob('against-*.json'):
    record = own_files.read_record(path)
    if record and not own_files.changed(path, ()):
      names += [*record['files'], path.name]
  return names


def made_of(folder: pathlib.Path) -> dict | None:
  """Returns `made_of` of the metrics.json in a folder; None if the test in it is not complete."""
  return (_complete(folder) or {}).get('made_of')


def is_complete(folder: pathlib.Path) -> bool:
  """Whether the folder of a test has all of its files, and the tables of slices are those that metrics.json states."""
  return _complete(folder) is not None


def _complete(folder):
  """Returns the metrics.json of a complete test, else None."""
  record = own_files.read_record(folder / NUMBERS)
  if record is None:
    return None
  names = list(record.get(results.CLASSES, LESION.names))
  tables = [(folder_of(folder, name, names) / TABLE).relative_to(folder).as_posix() for name in names]
  if not set(tables) <= record['files'].keys() or not all((folder / name).is_file() for name in record['files']):
    return None
  return None if any(own_files.has_changed(folder / name, record['files'][name]) for name in tables) else record


def read_numbers(workdir: pathlib.Path, test: str = TEST) -> dict:
  """Returns metrics.json of an evaluated run.

  Args:
    workdir: the folder of the run.
    test: the name of the folder of the test in it.

  Raises:
    UserError: the run was not evaluated, or its last evaluation was interrupted, or its files were changed.
  """
  record = _complete(workdir / test)
  if record is None:
    raise UserError(
      f'{workdir / test}: the run was not evaluated, or its evaluation was interrupted, or {TABLE} or {NUMBERS} was '
      f'changed or written by another version; evaluate the run with --mode=evaluate --workdir={workdir}'
    )
  return record


def read_parts(workdir: pathlib.Path, classes: Sequence[str], test: str = TEST) -> dict[str, results.Part]:
  """Returns what the test of a run found for each class, without pictures.

  Args:
    workdir: the folder of the run.
    classes: the names of its classes.
    test: the name of the folder of the test in it.

  Raises:
    UserError: as `read_numbers`, a file was changed since the test, or is from another version.
  """
  record = read_numbers(workdir, test)
  if results.CLASSES in record and list(record[results.CLASSES]) != list(classes):
    tested, own = (', '.join(names) for names in (record[results.CLASSES], classes))
    raise UserError(
      f'{workdir / test}: the test has the classes {tested}, the run {own}; evaluate it again with --mode=evaluate '
      f'--workdir={workdir}'
    )
  parts = {}
  for name in classes:
    folder = folder_of(workdir / test, name, classes)
    prefix = '' if folder == workdir / test else f'{folder.name}/'
    stated = lambda file, prefix=prefix: record['files'].get(prefix + file)
    parts[name] = results.Part(
      _read_table(folder / TABLE, workdir),
      _read_volumes(folder / VOLUMES, stated(VOLUMES), workdir),
      _read_patients(folder / PATIENTS, stated(PATIENTS), workdir),
    )
  return parts


def _read_volumes(path, digest, workdir):
  """Returns the rows of volumes.csv; [] if the evaluation had no scans and wrote none."""
  if not path.exists():
    return []
  _check_unchanged(path, digest, workdir)
  rows = list(csv.DictReader(io.StringIO(path.read_text())))
  number = lambda text: int(text) if text.isdigit() else float(text or 'nan')
  return [{key: value if key == 'case' else number(value) for key, value in row.items()} for row in rows]


def _read_table(path, workdir):
  try:
    with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as archive:
      table = dict(archive)
    missing = {
      *COLUMNS,
      *(f'{key}_chosen' for key in metrics.COUNTS),
      'logit',
      'histogram',
      'reliability',
    } - table.keys()
    if missing:
      raise ValueError(f'it lacks {", ".join(sorted(missing))}')
    return table
  except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
    raise UserError(
      f'{path}: damaged, or from another version ({error}); write it again with --mode=evaluate --workdir={workdir}'
    ) from None


def _read_patients(path, digest, workdir):
  """Returns the table of patients that the evaluation of a run saved; None if it saved none."""
  if digest is None:
    return None
  _check_unchanged(path, digest, workdir)
  with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as archive:
    return dict(archive)


def _check_unchanged(path, digest, workdir):
  if own_files.has_changed(path, digest):
    raise UserError(
      f'{path}: was changed since the test; restore it, or replace it with --mode=evaluate --workdir={workdir} '
      '--overwrite'
    )
