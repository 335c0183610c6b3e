"""Tests that need a process of their own: Triton's interpreter, or a forced instruction set.

Both are chosen by the environment before anything is loaded, and hold for a whole process.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ISA_LEVELS = ("portable", "avx2", "avx512", "avx512_bf16", "emulated512")


class ChildTests(NamedTuple):
    """What a child's test run printed, and how many tests passed in it."""

    output: str
    passed: int


def run_under_interpreter(*files: str | Path) -> ChildTests:
    """Run test files again with ``TRITON_INTERPRET=1``; stops at the first failure.

    Args:
        files: Test files that define their tests only where :data:`INTERPRETED` is true.

    Raises:
        AssertionError: A test failed, or the run has no count of passed tests.
    """
    # The project's addopts are replaced: a second -q would drop the summary that is read here.
    command = [sys.executable, "-m", "pytest", "-o", "addopts=--import-mode=importlib"]
    child = subprocess.run(
        [
            *command,
            *("-q", "-x", "-p", "no:cacheprovider", "-p", "transfuse.testing.interpreter"),
            *(str(Path(file).resolve()) for file in files),
        ],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    passed = re.search(r"(\d+) passed", child.stdout)
    if child.returncode != 0 or passed is None:
        raise AssertionError(child.stdout[-8000:] + child.stderr[-4000:])
    return ChildTests(child.stdout, int(passed.group(1)))


def isa_supported(level: str) -> bool:
    """Whether the compiled kernels have a level and this processor runs it."""
    from transfuse import _C

    return any(row["name"] == level and row["supported"] for row in _C.isa_report())


def run_at_isa_level(level: str) -> str:
    """Try all CPU kernels with an instruction set forced (``transfuse.testing.levels``).

    Returns:
        What the child printed.

    Raises:
        AssertionError: A kernel differs from the oracle, or the child ran at another level.
    """
    child = subprocess.run(
        [sys.executable, "-m", "transfuse.testing.levels"],
        env={**os.environ, "TRANSFUSE_CPU_ISA": level},
        capture_output=True,
        text=True,
    )
    if child.returncode != 0 or not child.stdout.startswith(f"{level}: "):
        raise AssertionError(f"at {level}: {child.stdout[-1000:]}{child.stderr[-4000:]}")
    return child.stdout
