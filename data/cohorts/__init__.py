"""One module per public release or common layout, with `recognises(folder)` and `find(folder)`, a list of cases.

A cohort module only finds files and states what is known about them. Reading (data.read), checks and folds are shared.
"""

import pathlib
import unicodedata
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from fusa_jax.scans import volume_files
from fusa_jax.scans.archives import is_leftover
from fusa_jax.scans.classes import LESION, Classes
from fusa_jax.system.errors import UserError
from fusa_jax.system.files import printable

# Endings of the names of masks. The first two are those of `--mode=predict` for a scan X_ct.
MASKS = ('_ct_mask', '_ct_seg', '_mask', '_seg')


class Case(NamedTuple):
  """The unit of the folds: a scan and its lesion mask, or the pictures of a patient's slices and their masks.

  Attributes:
    patient: a name that is unique to this case.
    ct: the scan as a file, or a folder or .zip of DICOM; or pictures, in the order of the slices.
    mask: on the grid of the scan, or one per picture; `ct` itself if it also contains a DICOM SEG. None without a mask;
      `labels` then gives the slices with lesion, and without labels the case has no lesion.
    classes: the classes of its mask, with their values or segments; or the exclusive classes of slices or patients.
    intensity: 'hu' or 'grey', if the release states it; None uses the user's choice (`CohortOptions`).
    named: False if the patient is unknown; `patient` is then only the name of the slice.
    labels: per picture, 1 with lesion or 0 without, or the number of its exclusive class; None if there are masks.
    patient_label: the same of the patient of the scan, where labels are of patients: its slices inherit the label. None
      if there are masks or labels of slices.
    slice: the index of this case in a volume of loose slices of many patients; None is the whole scan.
    windowed: True if HU above a window are known to be lost; other windowed scans are refused.
    owner: the person, if the release has several scans of one; these stay in one fold. '' is the same as `patient`.
    coloured: what to do with its pictures in colour (`CohortOptions`).
    unused: why the case is not used, in two or three words for the log; '' if it is used.
  """

  patient: str
  ct: pathlib.Path | tuple[pathlib.Path, ...]
  mask: pathlib.Path | tuple[pathlib.Path, ...] | None
  classes: Classes = LESION
  intensity: str | None = None
  named: bool = True
  labels: tuple[int, ...] | None = None
  patient_label: int | None = None
  slice: int | None = None
  windowed: bool = False
  owner: str = ''
  coloured: str = 'refuse'
  unused: str = ''

  @property
  def has_labels(self) -> bool:
    """Whether its slices or its patient have a label in place of a mask."""
    return self.labels is not None or self.patient_label is not None

  @property
  def files(self) -> list[pathlib.Path]:
    """All files, images before masks; a header is followed by the files with its values."""
    return [
      file
      for paths in (self.ct, self.mask)
      if paths is not None
      for path in (paths if isinstance(paths, tuple) else (paths,))
      for file in (path, *(volume_files.data_files(path) if volume_files.is_volume(path) else ()))
    ]


class CohortOptions(NamedTuple):
  """The user's options for a cohort: values of the config.data keys with the same names.

  Attributes:
    lesion_labels: mask values of the only class; () keeps those of the cohort module.
    intensity: 'hu', or 'grey' for windowed 8-bit images. The two are never mixed.
    patients: 'named' uses only known patients; 'each_slice' treats each slice of an unknown patient as its own patient.
    coloured: 'refuse' refuses a cohort with pictures in colour; 'leave_out' leaves these out.
    classes: mask values by the name of the class (`classes.chosen`), or names of exclusive classes of slices
      (`classes.of_slices`). () is one class; 'auto' is what the cohort has (`labels.meaning`).
    ignore_label: the mask value of pixels that are left out; None: there is none.
  """

  lesion_labels: tuple[int, ...] = ()
  intensity: str = 'hu'
  patients: str = 'named'
  coloured: str = 'refuse'
  classes: tuple | Mapping | str = ()
  ignore_label: int | None = None


AS_RELEASED = CohortOptions()


def entries(folder: pathlib.Path | None) -> list[pathlib.Path]:
  """The files and folders in a folder, sorted, without what operating systems leave behind. [] for None."""
  return sorted(path for path in folder.iterdir() if not is_leftover(path.name)) if folder else []


def only_folder(folder: pathlib.Path) -> pathlib.Path:
  """Descends through folders that contain only one folder. Unpacked archives often have these."""
  while len(inside := entries(folder)) == 1 and inside[0].is_dir():
    folder = inside[0]
  return folder


def entry(folder: pathlib.Path | None, name: str) -> pathlib.Path | None:
  """The file or folder with this name, without regard to capitals; None if there is none.

  Raises:
    UserError: two have the name.
  """
  found = [path for path in entries(folder) if path.name.lower() == name.lower()]
  if len(found) > 1:
    raise UserError(f'{found[1]}: the same name as {found[0].name}; remove one of the two, or rename it')
  return found[0] if found else None


def subfolder(folder: pathlib.Path | None, name: str) -> pathlib.Path | None:
  """As `entry`, for a folder."""
  found = entry(folder, name)
  return found if found and found.is_dir() else None


def name_of(text: str) -> str:
  """A name as it is compared and stored: one form of ü (some systems write u and the dots apart), and no bare bytes."""
  return unicodedata.normalize('NFC', printable(text))


def with_ending(folder: pathlib.Path | None, *endings: str) -> list[tuple[str, pathlib.Path]]:
  """The volumes of a folder with one of these endings, with their names without it. Capitals do not matter.

  Args:
    folder: the folder; None has no volumes.
    endings: the endings, without that of the format. If a name has several of them, the first counts.
  """
  found = []
  for path in entries(folder):
    name = name_of(volume_files.stem(path))
    ending = next((one for one in endings if name.lower().endswith(one)), None)
    if ending is not None and volume_files.is_volume(path):
      found.append((name[: len(name) - len(ending)], path))
  return found


def by_name(folder: pathlib.Path | None, *endings: str) -> dict[str, pathlib.Path]:
  """The volumes of a folder with one of these endings (default: any), by their names without it.

  Raises:
    UserError: two files have the same name, for example X_seg.nii and X_seg.nii.gz, or X_seg and X_mask.
  """
  return unique(with_ending(folder, *endings or ('',)))


def unique(named: Iterable[tuple[str, pathlib.Path]]) -> dict[str, pathlib.Path]:
  """A dictionary of paths by name.

  Raises:
    UserError: several paths have the same name, one line for each but the first.
  """
  paths, lines = {}, []
  for name, path in named:
    first = paths.setdefault(name, path)
    if first != path:
      shown = first.name if first.parent == path.parent else first
      lines.append(f'{path}: same patient as {shown}; remove one of the two')
  refuse(lines)
  return paths


def paired(
  scans: Mapping[str, pathlib.Path],
  masks: Mapping[str, pathlib.Path],
  scan_name: str,
  mask_name: str,
  classes: Classes = LESION,
) -> list[Case]:
  """Makes cases of scans and their masks, sorted by patient.

  Args:
    scans, masks: paths by patient.
    scan_name, mask_name: the expected names of a patient's scan and mask, with {} for the patient, for messages.
    classes: the classes of all masks.

  Raises:
    UserError: scans without a mask, and masks without a scan, one line each.
  """
  lines = lonely(scans, masks, f'the mask {mask_name} is missing; add it, or remove the scan')
  refuse(lines + lonely(masks, scans, f'the scan {scan_name} is missing; add it, or remove the mask'))
  return [Case(patient, path, masks[patient], classes) for patient, path in sorted(scans.items())]


def lonely(paths: Mapping[str, pathlib.Path], partners: Mapping[str, pathlib.Path], problem: str) -> list[str]:
  """A line with the problem for each name of `paths` that `partners` lacks. {} in the problem stands for the name."""
  return [f'{path}: {problem.replace("{}", name)}' for name, path in paths.items() if name not in partners]


def refuse(lines: list[str]) -> None:
  """Raises a UserError of these lines, if there are any."""
  if lines:
    raise UserError('\n'.join(lines))
