"""Peak memory of one call, measured in a fresh process.

The call runs once so that threads, code and library state exist, everything is freed, and the peak
of a second call is taken over the memory in use right before it. The result of the call counts. The
allocator is told to return freed blocks at once, or memory kept from the first call would hide the
second.

Linux: the peak is the kernel's per-process high-water mark (VmHWM), reset before the call.
``ru_maxrss`` is the fallback elsewhere; it cannot be reset and, worse, a child starts with its
parent's value, so a small call after a large one reads zero there and is reported as unknown.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from .cases import DTYPES, Unavailable

TIMEOUT = 900.0
RETURN_AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def peak_of_call(call: Callable[[], object], device: torch.device) -> int:
    """Bytes by which the second of two calls raises this process's memory at its peak.

    Raises:
        Unavailable: the platform cannot tell.
    """
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = call()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device) - before
        del result
        return peak
    gc.collect()
    _trim()
    reset = _reset_high_water()
    before = _status("VmRSS") if reset else _maxrss()
    result = call()
    peak = _status("VmHWM") if reset else _maxrss()
    del result
    if not reset and peak <= before:
        raise Unavailable(
            "peak memory: below what this process had already used, cannot be told here"
        )
    return max(peak - before, 0)


def measure_in_child(
    *, op: str, case: str, dtype: str, mode: str, candidate: str, device: str, threads: int
) -> int:
    """Peak bytes of one candidate, from a process that has done nothing else.

    Raises:
        Unavailable: the child failed; the message is its own.
    """
    values = {
        "op": op,
        "case": case,
        "dtype": dtype,
        "mode": mode,
        "candidate": candidate,
        "device": device,
        "threads": str(threads),
    }
    command = [sys.executable, "-m", __name__]
    for name, value in values.items():
        command += [f"--{name}", value]
    variables = os.environ | RETURN_AT_ONCE | {"OMP_NUM_THREADS": str(threads)}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, env=variables, timeout=TIMEOUT, check=False
        )
    except subprocess.TimeoutExpired:
        raise Unavailable(f"peak memory: no answer within {TIMEOUT:g} s") from None
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        why = lines[-1] if lines else f"child ended with {done.returncode}"
        raise Unavailable(f"peak memory: {why}"[:200])
    return int(json.loads(done.stdout.strip().splitlines()[-1])["peak_bytes"])


def main(arguments: list[str] | None = None) -> int:
    """The child: build the case, run one candidate, print its peak as JSON."""
    from .harness import find_case, prepare_call

    parser = argparse.ArgumentParser(prog=f"python -m {__name__}")
    for name in ("op", "case", "dtype", "mode", "candidate", "device"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--threads", type=int, required=True)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    call = prepare_call(
        find_case(options.op, options.case),
        dtype=DTYPES[options.dtype],
        mode=options.mode,
        candidate=options.candidate,
        device=device,
    )
    print(json.dumps({"peak_bytes": peak_of_call(call, device)}))
    return 0


def _trim() -> None:
    """Ask glibc to give free memory back; other C libraries have nothing to ask."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError):
        return


def _reset_high_water() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return int(value.split()[0]) * 1024
    raise Unavailable(f"peak memory: this kernel reports no {key}")


def _maxrss() -> int:
    # Not on Windows, where this module must still import.
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Bytes on macOS, KiB elsewhere.
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    sys.exit(main())
