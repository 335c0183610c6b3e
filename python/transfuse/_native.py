"""Loading of the compiled libraries: once, with one clear message when that fails.

``transfuse.ops`` triggers it on import, so that ``torch.compile`` finds a finished answer. The CUDA
library is opened when a call on CUDA tensors first asks for it.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import NamedTuple

import torch

REBUILD = (
    "Rebuild it with `pip install --no-build-isolation --force-reinstall --no-deps .` in a "
    "checkout of transfuse (or reinstall the wheel)."
)


class NativeStatus(NamedTuple):
    """Whether the compiled CPU library is in use, and if not, why."""

    loaded: bool
    reason: str | None
    path: str | None


class NativeUnavailableError(RuntimeError):
    """The compiled library was asked for and cannot be used."""


_status: NativeStatus | None = None
_cuda_status: NativeStatus | None = None


def status() -> NativeStatus:
    """Load ``transfuse._C`` and the op library once; never raises."""
    global _status
    if _status is None:
        _status = _load()
    return _status


def _load() -> NativeStatus:
    try:
        module = importlib.import_module("transfuse._C")
    except ModuleNotFoundError:
        return NativeStatus(False, f"the compiled library is not installed. {REBUILD}", None)
    except ImportError as error:
        return NativeStatus(False, f"transfuse._C cannot be loaded ({error}). {REBUILD}", None)
    from transfuse import __version__

    built = module.build_info()["version"]
    path = Path(module.__file__).with_name("_ops.so")
    if built != __version__:
        reason = (
            f"the compiled library is version {built}, the Python package {__version__}. {REBUILD}"
        )
        return NativeStatus(False, reason, str(path))
    try:
        # Also resolves TRANSFUSE_CPU_ISA, so that a level that cannot run is reported here.
        module.isa_in_use()
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        reason = (
            f"{path.name} does not fit torch {torch.__version__} or this machine ({error}). "
            f"{REBUILD}"
        )
        return NativeStatus(False, reason, str(path))
    return NativeStatus(True, None, str(path))


def cuda_status() -> NativeStatus:
    """Load the CUDA op library once, if torch has CUDA and a device; never raises."""
    global _cuda_status
    if _cuda_status is None:
        _cuda_status = _load_cuda()
    return _cuda_status


def _load_cuda() -> NativeStatus:
    state = status()
    if not state.loaded:  # the schemas are in the CPU library
        return NativeStatus(False, state.reason, None)
    path = Path(state.path).with_name("_cuda.so")
    if not torch.cuda.is_available():
        return NativeStatus(False, "torch finds no CUDA device", str(path))
    if not path.is_file():
        reason = f"this build has no CUDA library (no nvcc was found when it was built). {REBUILD}"
        return NativeStatus(False, reason, str(path))
    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        reason = f"{path.name} does not fit torch {torch.__version__} ({error}). {REBUILD}"
        return NativeStatus(False, reason, str(path))
    return NativeStatus(True, None, str(path))


def require() -> None:
    """Raise the one error that names the reason and the rebuild command."""
    state = status()
    if not state.loaded:
        raise NativeUnavailableError(f"transfuse's CPU kernels are unavailable: {state.reason}")
