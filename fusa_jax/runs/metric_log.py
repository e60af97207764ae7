"""Scalars by step: log.jsonl for programs, TensorBoard files for eyes (written by tensorboardX, without TensorFlow)."""

import json
import pathlib

from fusa_jax.system import hosts
from fusa_jax.system.files import replacing, writing


class MetricLog:
  """Appends to a run's log, on process 0. Resumed at a step, it first drops what a lost stretch wrote after that."""

  def __init__(self, workdir: pathlib.Path, step: int):
    self._file = None
    if not hosts.is_main():
      return
    self._path = pathlib.Path(workdir) / 'log.jsonl'
    if self._path.exists():
      kept = [line for line in self._path.read_text().splitlines(keepends=True) if _step(line) <= step]
      with replacing(self._path) as partial:
        partial.write_text(''.join(kept))
    self._file = self._path.open('a')
    import tensorboardX  # with it comes PyTorch, where that is installed: more than a second, for this alone

    folder = pathlib.Path(workdir) / 'tensorboard'
    self._board = tensorboardX.SummaryWriter(str(folder), purge_step=step + 1 if folder.exists() else None)

  def write(self, step: int, scalars: dict[str, float | int | None]) -> None:
    """One object a line: the step and the scalars; None (undefined) is null here and left out of TensorBoard."""
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
  """The step of a line; beyond any for a line that a crash cut off."""
  try:
    return json.loads(line)['step']
  except (json.JSONDecodeError, KeyError):
    return float('inf')
