"""A file per public release, or per naming that many use: `recognises(folder)` and `find(folder)`, a list of cases.

A cohort only finds its files, and says what is known of them; reading (data.read), checks and folds are shared.
"""

import pathlib
from collections.abc import Callable, Mapping
from typing import NamedTuple

from fusa_jax.scans import nifti
from fusa_jax.system.errors import UserError


class Case(NamedTuple):
  """What is dealt into folds as one: a scan and its lesion mask, or pictures of a patient's slices and theirs.

  Attributes:
    patient: a name, of this case alone.
    ct: the scan, a file, or a folder or .zip of DICOM; or the pictures, in the order in which slices are counted.
    mask: on the grid of the scan, or one for each picture; `ct` itself where that holds a DICOM SEG, too; None where
      there is none: the release says that there is no lesion or, with `labels`, only on which slices.
    lesion_labels: values of the mask, or segments, that are lesion; () where it holds 0 and 1 (pictures: 0 and 255), or
      one segment, only.
    intensity: 'hu' or 'grey', where the release says which; None: what the user says (`CohortOptions`) is tried.
    named: False where nobody knows whose slice it is, and `patient` is only the slice's name.
    labels: of each picture, 1 with lesion or 0 without; None where masks say so.
    slice: the one of a volume of loose slices, of many patients, that this case is; None: all of the scan.
    windowed: whether HU are known to have lost what lay above a window; elsewhere such are refused.
    owner: who was scanned, where the release has several scans of one; they are never dealt apart. '': as `patient`.
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
    """All of them, images before masks."""
    return [
      path
      for paths in (self.ct, self.mask)
      if paths is not None
      for path in (paths if isinstance(paths, tuple) else (paths,))
    ]


class CohortOptions(NamedTuple):
  """What a user says of a cohort, in the keys of config.data of the same names.

  Attributes:
    lesion_labels: values of the masks that are lesion; () leaves what the cohort says.
    intensity: 'hu', or 'grey' for images of 0 to 255 that were windowed before: the two are never mixed.
    patients: 'named'; or 'each_slice', so that slices of which nobody knows whose they are may be dealt one by one.
  """

  lesion_labels: tuple[int, ...] = ()
  intensity: str = 'hu'
  patients: str = 'named'


AS_RELEASED = CohortOptions()


def only_folder(folder: pathlib.Path) -> pathlib.Path:
  """What archives often are unpacked into: follows folders that hold nothing but one folder."""
  while len(inside := [path for path in folder.iterdir() if not path.name.startswith('.')]) == 1 and inside[0].is_dir():
    folder = inside[0]
  return folder


def by_name(folder: pathlib.Path, ending: str = '') -> dict[str, pathlib.Path]:
  """The NIfTI files of a folder whose names end so, by what is before that."""
  paths = (path for path in sorted(folder.iterdir()) if nifti.is_nifti(path) and nifti.stem(path).endswith(ending))
  return {nifti.stem(path).removesuffix(ending): path for path in paths}


def paired(
  scans: Mapping[str, pathlib.Path],
  masks: Mapping[str, pathlib.Path],
  mask_name: Callable[[str], object],
  lesion_labels: tuple[int, ...] = (),
) -> list[Case]:
  """Cases in order of their patients.

  Args:
    scans, masks: by patient.
    mask_name: what a patient's mask should be called.
    lesion_labels: of all the masks.

  Raises:
    UserError: scans without a mask, a line each.
  """
  refuse_lonely(scans, masks, lambda patient: f'its mask {mask_name(patient)} is missing; add it, or take the scan out')
  return [Case(patient, path, masks[patient], lesion_labels) for patient, path in sorted(scans.items())]


def refuse_lonely(
  paths: Mapping[str, pathlib.Path], partners: Mapping[str, pathlib.Path], problem: Callable[[str], str]
) -> None:
  """Raises a UserError where names of `paths` are not among `partners`: of each its path and its problem, a line."""
  lonely = [f'{path}: {problem(name)}' for name, path in paths.items() if name not in partners]
  if lonely:
    raise UserError('\n'.join(lonely))
