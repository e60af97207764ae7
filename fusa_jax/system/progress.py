"""Progress bars on standard error: one per stage, with the time left."""

import sys
from collections.abc import Iterable
from typing import Any

import tqdm

_FORMAT = (
  '{desc:<17} {percentage:3.0f}% |{bar:20}| {n_fmt} of {total_fmt} {unit}, {elapsed} passed, {remaining} left{postfix}'
)
# A log file gets a line's worth of progress per half minute, not ten per second.
_SECONDS_IN_A_FILE = 30.0


def bar(items: Iterable | None = None, *, desc: str, unit: str, show: bool = True, **options: Any) -> tqdm.tqdm:
  """Returns tqdm's bar in the style of this program; it wraps `items`, or the caller updates it.

  Args:
    items: what to count; None if the caller calls `update`.
    desc: the stage, at most 17 characters.
    unit: what is counted, in the plural.
    show: whether to show the bar at all.
    **options: of tqdm, for example total.
  """
  return tqdm.tqdm(
    items,
    desc=desc,
    unit=unit,
    disable=not show,
    bar_format=_FORMAT,
    mininterval=0.2 if sys.stderr.isatty() else _SECONDS_IN_A_FILE,
    dynamic_ncols=True,
    **options,
  )
