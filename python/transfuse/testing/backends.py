"""Where the backends of an op can be tested."""

from __future__ import annotations

import torch

from transfuse import _backend
from transfuse.testing.spec import OpSpec

ON_CUDA = ("triton", "cuda")


def device_of(backend: str) -> torch.device:
    """The kind of device a backend is tested on. Triton's interpreter has tests of its own."""
    return torch.device("cuda" if backend in ON_CUDA else "cpu")


def native(backend: str) -> bool:
    """Whether a backend is behind the registered C++ ops, whose kernel the device decides."""
    return backend in ("cpu", "cuda")


def unavailable(spec: OpSpec, backend: str, dtype: torch.dtype) -> str | None:
    """Why a backend cannot run here for a dtype; None if it can."""
    device = device_of(backend)
    if device.type == "cuda" and not torch.cuda.is_available():
        return "no CUDA device"
    name = spec.name if spec.declared_as is None else spec.declared_as
    if name not in _backend.declared():
        return None  # composed of other operations, so it runs wherever they do
    return _backend.why_not(name, backend, device, dtype)
