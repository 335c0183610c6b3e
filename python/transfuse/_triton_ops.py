"""Triton kernels as ops of torch, which is how ``torch.compile`` can call them.

The compiler does not look into such an op: fake kernels say what it returns, and its derivative is
that which is registered for it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch

# The backend of a call inside torch.compile that names Triton.
COMPILED = "triton op"


def traced(backend: str) -> str:
    """The backend a call goes on with: that of the ops where ``torch.compile`` traces Triton."""
    return COMPILED if backend == "triton" and torch.compiler.is_compiling() else backend


def raw_ops(module: str, backend: str, *names: str) -> tuple[Callable, ...]:
    """The raw ops of a backend by their names in the C++ library.

    Args:
        module: where the Triton kernels' functions of these names are.
    """
    if backend == "triton":
        return tuple(kernel(module, name) for name in names)
    suffix = "_triton" if backend == COMPILED else ""
    return tuple(getattr(torch.ops.transfuse, name + suffix) for name in names)


def kernel(module: str, name: str) -> Callable:
    """A function of ``transfuse.triton_kernels``, which is imported when it is first needed."""
    return getattr(importlib.import_module(f"transfuse.triton_kernels.{module}"), name)


def define(module: str, name: str, signature: str, *, recorded: bool) -> None:
    """Make the function ``name`` of a module of Triton kernels the op ``transfuse::name_triton``.

    Args:
        signature: its arguments and results, as in a schema. Results are new tensors.
        recorded: whether the compiler may record a call in a CUDA graph: not where tables are
            copied to the device, or made there by the first call and kept.
    """
    wrap(name, lambda *given: kernel(module, name)(*given), signature, recorded=recorded)


def wrap(name: str, launch: Callable, signature: str, *, recorded: bool) -> None:
    """As :func:`define`, for a function that does not take what the op does."""
    torch.library.custom_op(
        f"transfuse::{name}_triton",
        launch,
        mutates_args=(),
        schema=signature,
        tags=() if recorded else (torch.Tag.cudagraph_unsafe,),
    )
