"""Running Python in a fresh process, where imports and environment variables count anew."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import transfuse

TIMEOUT = 240  # seconds; importing torch on a loaded machine takes a while


@pytest.fixture
def run_python(tmp_path) -> Callable[..., subprocess.CompletedProcess]:
    """``run_python(*arguments, **variables)``: as ``python *arguments``, away from any checkout."""

    def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess:
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith("TRANSFUSE_")
        }
        return subprocess.run(
            [sys.executable, *arguments],
            env=environment | {"OMP_NUM_THREADS": "2"} | variables,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
            check=False,
        )

    return run


@pytest.fixture
def run_code(run_python) -> Callable[..., str]:
    """``run_code(code, **variables)``: what a program prints; fails the test if it fails."""

    def run(code: str, **variables: str) -> str:
        done = run_python("-c", code, **variables)
        if done.returncode != 0:
            pytest.fail(f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done.stdout

    return run


@pytest.fixture
def bare_package(tmp_path) -> Path:
    """A folder for PYTHONPATH that holds the package without its compiled libraries."""
    folder = tmp_path / "bare"
    shutil.copytree(
        Path(transfuse.__file__).parent,
        folder / "transfuse",
        ignore=shutil.ignore_patterns("*.so", "*.dylib", "*.pyd", "__pycache__", "*.png"),
    )
    return folder
