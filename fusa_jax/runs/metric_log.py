"""Logs scalars by step, in log.jsonl for programs and as TensorBoard files for people (by tensorboardX)."""

import json
import pathlib

from fusa_jax.system import hosts
from fusa_jax.system.files import replacing, writing


class MetricLog:
  """Appends to the log of a run, on process 0."""

  def __init__(self, workdir: pathlib.Path, step: int):
    """Opens the log of a run that starts or resumes at `step`; first removes the lines of later steps."""
    self._file = None
    if not hosts.is_main():
      return
    self._path = pathlib.Path(workdir) / 'log.jsonl'
    if self._path.exists():
      kept = [line for line in self._path.read_text().splitlines(keepends=True) if _step(line) <= step]
      with replacing(self._path) as partial:
        partial.write_text(''.join(kept))
    self._file = self._path.open('a')
    import tensorboardX  # only here: it imports PyTorch if that is installed, which takes more than a second

    folder = pathlib.Path(workdir) / 'tensorboard'
    self._board = tensorboardX.SummaryWriter(str(folder), purge_step=step + 1 if folder.exists() else None)

  def write(self, step: int, scalars: dict[str, float | int | None]) -> None:
    """Writes one line: a JSON object with the step and the scalars.

    None (undefined) becomes null in log.jsonl, and is left out of TensorBoard.
    """
    if self._file is None:
      return
    with writing(self._path):
      self._file.write(json.dumps({'step': step, **scalars}) + '\n')
      self._file.flush()
    for name, value in scalars.items():
      if value is not None:
        self._board.add_scalar(name, value, step)

  def close(self) -> None:
    if self._file is not None:
      self._file.close()
      self._board.close()


def _step(line):
  """Returns the step of a line; infinity if a crash cut the line off."""
  try:
    return json.loads(line)['step']
  except (json.JSONDecodeError, KeyError):
    return float('inf')
