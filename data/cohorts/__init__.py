"""A file per public release, or per naming that many use: `recognises(folder)` and `find(folder)`, a list of cases.

A cohort only finds its files, and says which labels of its masks are lesion; reading, checks and folds are shared.
"""

import pathlib
from collections.abc import Callable, Mapping
from typing import NamedTuple

from fusa_jax import ct
from fusa_jax.errors import UserError


class Case(NamedTuple):
  """A scan and its lesion mask.

  Attributes:
    patient: a name, of this case alone.
    ct: the scan.
    mask: on the grid of the scan; None where the release says that there is no lesion.
    lesion_labels: values of the mask that are lesion; () where it holds 0 and 1 only.
  """

  patient: str
  ct: pathlib.Path
  mask: pathlib.Path | None
  lesion_labels: tuple[int, ...] = ()


def by_name(folder: pathlib.Path, ending: str = '') -> dict[str, pathlib.Path]:
  """The NIfTI files of a folder whose names end so, by what is before that."""
  paths = (path for path in sorted(folder.iterdir()) if ct.is_nifti(path) and ct.stem(path).endswith(ending))
  return {ct.stem(path).removesuffix(ending): path for path in paths}


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
