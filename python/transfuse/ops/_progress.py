"""Progress of long work: a callback of the user's, or one line on the standard error stream."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from transfuse import _checks

Progress = bool | Callable[[str, int, int | None], None]
_INTERVAL = 0.2  # seconds between two writes of the line


def reporter(progress: Progress, task: str, total: int | None) -> Callable[[int], None]:
    """``report(done)`` for one piece of work.

    Args:
        progress: False for silence, True for a line on stderr, or a callable that is given
            (task, done, total); total is None where it is not known.
        task: what is being done.
        total: number of steps.

    Raises:
        TypeError: progress is neither a bool nor callable.
    """
    if progress is False:
        return lambda done: None
    if progress is True:
        return _line(task, total)
    if not callable(progress):
        raise TypeError(
            f"progress: expected a bool or a callable of (task, done, total), "
            f"got {_checks.describe(progress)}"
        )
    return lambda done: progress(task, done, total)


def _line(task: str, total: int | None) -> Callable[[int], None]:
    written = [-_INTERVAL]

    def report(done: int) -> None:
        now, last = time.monotonic(), done == total
        if not last and now - written[0] < _INTERVAL:
            return
        written[0] = now
        text = f"{done}" if total is None else f"{done}/{total}"
        sys.stderr.write(f"\r{task} {text}" + ("\n" if last else ""))
        sys.stderr.flush()

    return report
