"""Makes sure that a name means one patient, and that one patient is in one fold."""

import logging
import os
import pathlib
import re
import unicodedata
from collections import defaultdict
from collections.abc import Sequence

from data.cohorts import Case, entry, lists, name_of, refuse
from fusa_jax.scans import volume_files

LIST = 'patients.csv'


def identified(cases: Sequence[Case], folder: pathlib.Path, quiet: bool = False) -> list[Case]:
  """The cases with names of their own, and with the owners that keep the scans of one person in one fold.

  Scans of the same name get the part of their paths that differs as well. `patients.csv` (scan,patient) in the folder
  names the owner of each scan. Names that differ only in capitals, leading zeros, blanks or the form of letters (P1,
  p1, P01) may belong to one patient. Their scans get the same owner, and a warning.

  Args:
    cases: the cases that a cohort module found.
    folder: the folder of the cohort.
    quiet: do not warn.

  Raises:
    UserError: two scans cannot be told apart; patients.csv cannot be read, or does not fit the scans. One line each.
  """
  cases = _with_own_names(cases, folder)
  listed = entry(folder, LIST)
  return _with_twins(_with_owners(cases, folder, listed) if listed else cases, quiet)


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
