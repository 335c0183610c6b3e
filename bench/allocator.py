"""Allocator settings of a timing run.

glibc returns large freed blocks to the system and takes page faults to get them back. Code that
allocates large temporaries on every call, as eager torch does, then spends much of its time in the
kernel; a fused op that allocates little looks several times faster than it is. Timing with both
thresholds raised keeps memory in the process for every candidate alike. What a user without these
settings sees is a different, legitimate figure: ``--allocator both`` records it beside the first.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Mapping, Sequence

SETTINGS = {
    "MALLOC_MMAP_THRESHOLD_": "1073741824",
    "MALLOC_TRIM_THRESHOLD_": "8589934592",
}
# Set in the second process so that it can never start a third.
RESTARTED = "TRANSFUSE_BENCH_RESTARTED"


def supported() -> bool:
    """Whether this C library reads the settings."""
    return platform.libc_ver()[0] == "glibc"


def state(variables: Mapping[str, str]) -> str:
    """What an environment asks of glibc: "warm" (freed memory is kept), "default", or "custom"."""
    values = {name: variables.get(name) for name in SETTINGS}
    if values == SETTINGS:
        return "warm"
    return "default" if set(values.values()) == {None} else "custom"


def state_now() -> str:
    """The allocator of this process; "system" where the C library has no such settings."""
    return state(os.environ) if supported() else "system"


def variables_for(wanted: str, variables: Mapping[str, str], threads: int | None) -> dict[str, str]:
    """The environment for a process with the wanted allocator ("warm" or "default") and threads."""
    result = {name: value for name, value in variables.items() if name not in SETTINGS}
    if wanted == "warm":
        result |= SETTINGS
    if threads is not None:
        result["OMP_NUM_THREADS"] = str(threads)
    result[RESTARTED] = "1"
    return result


def restart_if_needed(wanted: str, arguments: Sequence[str], threads: int | None) -> None:
    """Replace this process by one that has the wanted settings from its first allocation on.

    glibc reads them once, at start, so they cannot be changed in place. Does nothing when they are
    already right, when the C library has no such settings, or in a process that was itself
    restarted.
    """
    if not supported() or RESTARTED in os.environ:
        return
    ready = state(os.environ) == wanted
    if ready and (threads is None or os.environ.get("OMP_NUM_THREADS") == str(threads)):
        return
    sys.stdout.flush()
    sys.stderr.flush()
    command = [sys.executable, "-m", __package__, *arguments]
    os.execve(sys.executable, command, variables_for(wanted, os.environ, threads))
