"""Makes sure that a name means one patient, and that one patient is in one fold."""

import hashlib
import logging
import os
import pathlib
import re
import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from concurrent import futures

from data.cohorts import Case, entry, lists, name_of, refuse
from fusa_jax.scans import dicom_files, volume_files
from fusa_jax.scans.archives import is_archive

LIST = 'patients.csv'

# A public constant, so that all machines agree. It makes prepared tables of hashes useless, but hides no ID from
# somebody who can try all possible IDs (docs/data.md).
_SALT = b'fusa_jax: owner of a scan'
# What anonymisers write instead of a PatientID, after `_simplified`.
_PLACEHOLDER = re.compile(
  r'\W*|0|(.)\1{3,}|anon(ym(ous|i[sz]ed)?)?|(no|un)-?(name|known|id|patient-?id)|none|null|nil|n/?a|nan|empty|removed|'
  r'redacted|hidden|de-?identified|(patient|subject|case)[-_]?(id|name|identifier)?|id|test'
)
# If one PatientID is in more folders than this, and in more than half of all, it is taken for a placeholder.
_MANY = 10
# A point in time after a stem. A bare number is not a point in time: case_1 and case_2 are two patients. After a stem
# without a number a date is not one either: scan_20200401 and scan_20200402 are two patients.
_FOLLOW_UP = re.compile(
  r'(?P<stem>.*[^\W_].*?)[-_. ]('
  r'(t|tp|time|timepoint|visit|ses|session|day|week|month|year|fu|follow[-_]?up)[-_. ]?\d{1,3}|'
  r'baseline|base|bl|initial|follow[-_]?up|fu|pre|post|prior|current|before|after|'
  r'(?P<date>(19|20)\d\d[-_]?(0[1-9]|1[0-2])[-_]?([0-2]\d|3[01])))',
  re.IGNORECASE,
)
_LISTED = 6
_THREADS = min(os.cpu_count() or 1, 16)


def identified(cases: Sequence[Case], folder: pathlib.Path, quiet: bool = False) -> list[Case]:
  """The cases with names of their own, and with the owners that keep the scans of one person in one fold.

  Scans of the same name get the part of their paths that differs as well. `patients.csv` (scan,patient) in the folder
  names the owner of each scan. Without it, the owner of DICOM is a hash of its PatientID, and a warning lists names
  that look like several scans of one person. Names that differ only in capitals, leading zeros, blanks or the form of
  letters (P1, p1, P01) may belong to one patient. Their scans get the same owner, and a warning.

  Args:
    cases: the cases that a cohort module found.
    folder: the folder of the cohort.
    quiet: do not warn.

  Raises:
    UserError: two scans cannot be told apart; patients.csv cannot be read, or does not fit the scans (one line each);
      or there are DICOM files, but pydicom is not installed.
  """
  cases = _with_own_names(cases, folder)
  listed = entry(folder, LIST)
  if listed:
    return _with_twins(_with_owners(cases, folder, listed), quiet)
  cases = _with_patient_ids(cases, folder, quiet)
  if not quiet:
    _warn_of_follow_ups(cases, folder)
  return _with_twins(cases, quiet)


def _with_own_names(cases, folder):
  by_name = defaultdict(list)
  for case in cases:
    by_name[case.patient].append(case)
  own = [_apart(group, folder) if len(group) > 1 else group for group in by_name.values()]
  first, lines = {}, []
  for case in (case for group in own for case in group):
    if first.setdefault(case.patient, case) is not case:
      other = first[case.patient]
      lines.append(f'{case.files[0]}: the same name ({case.patient}) as {other.files[0]}; rename one, or remove one')
  refuse(lines)
  return list(first.values())


def _apart(group, folder):
  """The cases with the first parts of their paths that differ in front of their names: siteA/P1 becomes siteA_P1."""
  paths = [_within(case.files[0], folder).parts[:-1] for case in group]
  common = 0
  while len({path[common : common + 1] for path in paths}) == 1 and any(path[common:] for path in paths):
    common += 1
  names = [
    '_'.join([*map(name_of, path[common : common + 1]), case.patient]) for path, case in zip(paths, group, strict=True)
  ]
  return [case._replace(patient=name) for case, name in zip(group, names, strict=True)]


def _within(path, folder):
  """The path from the folder; dataset.json may also list files outside it."""
  return pathlib.Path(os.path.relpath(path, folder))


def _with_owners(cases, folder, path):
  """The cases with the owners in patients.csv. Its names are those of scans, with or without folder and ending."""
  known = defaultdict(list)
  for number, case in enumerate(cases):
    for name in _names(case, folder):
      known[name].append(number)
  owners, lines = {}, []
  for line, (scan, owner) in lists.read(path, ('scan', 'patient')):
    numbers = known[scan.replace('\\', '/')]
    where = f'{path}: line {line}: '
    if len(numbers) != 1:
      count = 'no scan' if not numbers else f'{len(numbers)} scans'
      lines.append(f'{where}{count} with the name {scan!r}; correct it, and add the folder if two scans share it')
    elif not owner:
      lines.append(f'{where}{scan!r} has no patient; add the patient')
    elif owners.setdefault(numbers[0], owner) != owner:
      lines.append(f'{where}{scan!r} has another patient in a line above; correct one of the two')
  lines += [
    f'{case.files[0]}: is not in {LIST}; add it with its patient'
    for number, case in enumerate(cases)
    if case.named and number not in owners
  ]
  refuse(lines)
  return [
    case._replace(owner=owners[number], named=True) if number in owners else case for number, case in enumerate(cases)
  ]


def _names(case, folder):
  names = {case.patient}
  if case.slice is None and not isinstance(case.ct, tuple):
    path = _within(case.ct, folder)
    for one in (path, path.with_name(volume_files.stem(path))):
      names |= {name_of(one.name), name_of(one.as_posix())}
  return names


def _with_patient_ids(cases, folder, quiet):
  """Gives the DICOM cases with a usable PatientID an owner: its hash. All other cases stay as they are."""
  is_dicom = [not isinstance(case.ct, tuple) and (case.ct.is_dir() or is_archive(case.ct)) for case in cases]
  if not any(is_dicom):
    return cases
  with futures.ThreadPoolExecutor(_THREADS) as pool:
    read = lambda pair: _simplified(dicom_files.find_patient_id(pair[0].ct)[0]) if pair[1] else ''
    ids = list(pool.map(read, zip(cases, is_dicom, strict=True)))
  scans = defaultdict(list)
  for case, one in zip(cases, ids, strict=True):
    scans[one].append(case.patient)
  folders = sum(is_dicom)
  shared = lambda names: len(names) > 1 and (len(names) == folders or len(names) > max(_MANY, folders / 2))
  unknown = {one for one, names in scans.items() if _PLACEHOLDER.fullmatch(one) or shared(names)}
  if not quiet:
    _log_patient_ids(folder, folders, scans, unknown)
  owner = {one: _owner(one) for one in scans if one not in unknown}
  return [case._replace(owner=owner.get(one, case.owner)) for case, one in zip(cases, ids, strict=True)]


def _log_patient_ids(folder, folders, scans, unknown):
  nameless = sum(len(scans[one]) for one in unknown)
  if nameless:
    logging.warning(
      '%s: PatientID is empty, a placeholder, or the same for most in %d of %d folders, so each of these counts as one '
      'patient; if some show the same patient, list all in %s (scan,patient)',
      folder,
      nameless,
      folders,
      LIST,
    )
  several = [' + '.join(names) for one, names in scans.items() if one not in unknown and len(names) > 1]
  if several:
    logging.info(
      '%s: patients with several folders, by PatientID: %s; %s (scan,patient) overrides this',
      folder,
      _listed(several),
      LIST,
    )


def _owner(patient_id):
  """A hash of a PatientID that is the same on all machines. It takes 3 ms, so that guessing IDs takes long."""
  return 'id-' + hashlib.scrypt(patient_id.encode(), salt=_SALT, n=1024, r=8, p=1, dklen=8).hex()


def _warn_of_follow_ups(cases, folder):
  """Warns of names of one stem with different points in time: P1_t0 and P1_t1, or P1_baseline and P1_followup."""
  scans = defaultdict(list)
  for case in cases:
    match = _FOLLOW_UP.fullmatch(case.patient)
    if match and case.named and not case.owner and (not match['date'] or re.search(r'\d', match['stem'])):
      scans[_simplified(match['stem'])].append(case.patient)
  groups = [' + '.join(names) for names in scans.values() if len(names) > 1]
  if groups:
    logging.warning(
      '%s: names like several scans of one patient, but each counts as one patient: %s; if they are of one patient, '
      'list all scans in %s (scan,patient)',
      folder,
      _listed(groups),
      LIST,
    )


def _listed(groups):
  more = len(groups) - _LISTED
  return ', '.join(groups[:_LISTED]) + (f' and {more} more' if more > 0 else '')


def _with_twins(cases, quiet):
  twins = defaultdict(set)
  for case in cases:
    if case.named:
      name = case.owner or case.patient
      twins[_simplified(name)].add(name)
  owners = {}
  for names in twins.values():
    if len(names) > 1:
      owners |= dict.fromkeys(names, min(names))
      if not quiet:
        logging.warning(
          '%s: names that differ only in capitals, zeros, blanks or forms of letters, so perhaps one patient: they are '
          'kept in one fold; give one patient one name, and others names that differ in more',
          ', '.join(sorted(names)),
        )
  return [case._replace(owner=owners.get(case.owner or case.patient, case.owner)) for case in cases]


def _simplified(name):
  text = re.sub(r'\s+', '', unicodedata.normalize('NFKC', name).casefold())
  return re.sub(r'(?<!\d)0+(?=\d)', '', text)
