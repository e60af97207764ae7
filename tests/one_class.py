"""The parts of a run that has one class."""

from fusa_jax.runs import operating_point, result_files
from fusa_jax.runs.split import TEST
from fusa_jax.scans.classes import LESION


def part(run, test=TEST):
  """Returns what the test of a run found (`results.Part`)."""
  return result_files.read_parts(run, LESION.names, test)['lesion']


def point(run):
  """Returns the operating point of a run."""
  return operating_point.load_points(run, LESION.names)['lesion']
