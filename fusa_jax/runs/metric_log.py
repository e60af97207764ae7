"""Logs scalars by step, in log.jsonl for programs and as TensorBoard files for people (by tensorboardX)."""

import json
import pathlib
import tempfile
import time

from fusa_jax.system import hosts, paths
from fusa_jax.system.files import replacing, writing

# Seconds between copies of the log to a bucket: an object can only be written as a whole, and about once per second.
_COPY_EVERY = 30


class MetricLog:
  """Appends to the log of a run, on process 0."""

  def __init__(self, workdir: pathlib.Path, step: int):
    """Opens the log of a run that starts or resumes at `step`; first removes the lines of later steps."""
    self._file = None
    if not hosts.is_main():
      return
    path, folder, resumed = workdir / 'log.jsonl', workdir, (workdir / 'tensorboard').exists()
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    self._local = tempfile.TemporaryDirectory() if paths.in_bucket(workdir) else None
    if self._local:
      folder = pathlib.Path(self._local.name)
    self._workdir, self._folder, self._path, self._copied = workdir, folder, folder / path.name, time.monotonic()
    if lines:
      with replacing(self._path) as partial:
        partial.write_text(''.join(line for line in lines if _step(line) <= step))
    self._file = self._path.open('a')
    import tensorboardX  # only here: it imports PyTorch if that is installed, which takes more than a second

    self._board = tensorboardX.SummaryWriter(str(folder / 'tensorboard'), purge_step=step + 1 if resumed else None)

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
    if time.monotonic() > self._copied + _COPY_EVERY:
      self.copy()

  def copy(self) -> None:
    """Copies the log to the bucket of the run, if it is in one. Call it before each checkpoint."""
    if self._file is None or not self._local:
      return
    self._board.flush()
    for name in paths.files_under(self._folder):
      with replacing(self._workdir / name) as partial:
        partial.write_bytes((self._folder / name).read_bytes())
    self._copied = time.monotonic()

  def close(self) -> None:
    if self._file is not None:
      self._file.close()
      self._board.close()
      self.copy()


def _step(line):
  """Returns the step of a line; infinity if a crash cut the line off."""
  try:
    return json.loads(line)['step']
  except (json.JSONDecodeError, KeyError):
    return float('inf')
