"""One module per public release or common layout, with `recognises(folder)` and `find(folder)`, a list of cases.

A cohort module only finds files and states what is known about them. Reading (data.read), checks and folds are shared.
"""

import pathlib
from collections.abc import Callable, Mapping
from typing import NamedTuple

from fusa_jax.scans import volume_files
from fusa_jax.system.errors import UserError


class Case(NamedTuple):
  """The unit of the folds: a scan and its lesion mask, or the pictures of a patient's slices and their masks.

  Attributes:
    patient: a name that is unique to this case.
    ct: the scan as a file, or a folder or .zip of DICOM; or pictures, in the order of the slices.
    mask: on the grid of the scan, or one per picture; `ct` itself if it also contains a DICOM SEG. None without a mask;
      `labels` then gives the slices with lesion, and without labels the case has no lesion.
    lesion_labels: mask values or segments that are lesion. () if the mask has only 0 and 1 (pictures: 0 and 255), or
      only one segment.
    intensity: 'hu' or 'grey', if the release states it; None uses the user's choice (`CohortOptions`).
    named: False if the patient is unknown; `patient` is then only the name of the slice.
    labels: per picture, 1 with lesion or 0 without; None if there are masks.
    slice: the index of this case in a volume of loose slices of many patients; None is the whole scan.
    windowed: True if HU above a window are known to be lost; other windowed scans are refused.
    owner: the person, if the release has several scans of one; these stay in one fold. '' is the same as `patient`.
  """

  patient: str
  ct: pathlib.Path | tuple[pathlib.Path, ...]
  mask: pathlib.Path | tuple[pathlib.Path, ...] | None
  lesion_labels: tuple[int, ...] = ()
  intensity: str | None = None
  named: bool = True
  labels: tuple[int, ...] | None = None
  slice: int | None = None
  windowed: bool = False
  owner: str = ''

  @property
  def files(self) -> list[pathlib.Path]:
    """All files, images before masks."""
    return [
      path
      for paths in (self.ct, self.mask)
      if paths is not None
      for path in (paths if isinstance(paths, tuple) else (paths,))
    ]


class CohortOptions(NamedTuple):
  """The user's options for a cohort: values of the config.data keys with the same names.

  Attributes:
    lesion_labels: mask values that are lesion; () keeps those of the cohort module.
    intensity: 'hu', or 'grey' for windowed 8-bit images. The two are never mixed.
    patients: 'named' uses only known patients; 'each_slice' treats each slice of an unknown patient as its own patient.
  """

  lesion_labels: tuple[int, ...] = ()
  intensity: str = 'hu'
  patients: str = 'named'


AS_RELEASED = CohortOptions()


def only_folder(folder: pathlib.Path) -> pathlib.Path:
  """Descends through folders that contain only one folder. Unpacked archives often have these."""
  while len(inside := [path for path in folder.iterdir() if not path.name.startswith('.')]) == 1 and inside[0].is_dir():
    folder = inside[0]
  return folder


def by_name(folder: pathlib.Path, ending: str = '') -> dict[str, pathlib.Path]:
  """The NIfTI files of a folder that have this ending, by their names without it."""
  paths = (
    path
    for path in sorted(folder.iterdir())
    if volume_files.is_volume(path) and volume_files.stem(path).endswith(ending)
  )
  return {volume_files.stem(path).removesuffix(ending): path for path in paths}


def paired(
  scans: Mapping[str, pathlib.Path],
  masks: Mapping[str, pathlib.Path],
  mask_name: Callable[[str], object],
  lesion_labels: tuple[int, ...] = (),
) -> list[Case]:
  """Makes cases of scans and their masks, sorted by patient.

  Args:
    scans, masks: paths by patient.
    mask_name: returns the expected name of a patient's mask, for messages.
    lesion_labels: the labels of all masks.

  Raises:
    UserError: scans without a mask, one line each.
  """
  refuse_lonely(scans, masks, lambda patient: f'the mask {mask_name(patient)} is missing; add it, or remove the scan')
  return [Case(patient, path, masks[patient], lesion_labels) for patient, path in sorted(scans.items())]


def refuse_lonely(
  paths: Mapping[str, pathlib.Path], partners: Mapping[str, pathlib.Path], problem: Callable[[str], str]
) -> None:
  """Raises a UserError if names of `paths` are missing in `partners`: a line for each, with its path and problem."""
  lonely = [f'{path}: {problem(name)}' for name, path in paths.items() if name not in partners]
  if lonely:
    raise UserError('\n'.join(lonely))
