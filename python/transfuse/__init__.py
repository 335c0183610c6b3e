"""Fused attention-injection kernels for PyTorch, and published methods written on them.

``transfuse.ops`` holds the ops, ``transfuse.methods`` the methods, ``transfuse.integrations`` the
one-line swap-ins for model libraries. Importing this package loads none of them.
"""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("transfuse")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0.0.0+uninstalled"

_LAZY = ("bench", "info", "integrations", "methods", "ops", "testing", "triton_kernels")
__all__ = ["__version__", "explain", *_LAZY]


def __getattr__(name: str):
    if name in _LAZY:
        return importlib.import_module(f"{__name__}.{name}")
    if name == "explain":
        from transfuse._backend import explain

        return explain
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
