"""Peers that torch itself offers: eager, compiled, FlexAttention."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..cases import Expression, Tensors, Unavailable
from . import Peer


def as_written(expression: Expression, device: torch.device, mode: str) -> Expression:
    """Run the expression eagerly."""
    return expression


def compiled(expression: Expression, device: torch.device, mode: str) -> Expression:
    """Run the expression under torch.compile, specialised to its shapes."""
    # Graphs of earlier cases would count against the recompile limit of this one.
    torch._dynamo.reset()
    # Timing the backward alone runs one graph's backward many times; torch frees its buffers after
    # the first unless told not to.
    torch._functorch.config.donated_buffer = mode != "backward"
    # Second derivatives are taken inside the expression; tracing them is off by default.
    if hasattr(torch._dynamo.config, "trace_autograd_ops"):
        torch._dynamo.config.trace_autograd_ops = mode == "hvp"
    return torch.compile(expression, fullgraph=True, dynamic=False)


def compiled_flex(expression: Expression, device: torch.device, mode: str) -> Expression:
    """FlexAttention under torch.compile; on the CPU torch offers its forward only."""
    if device.type == "cpu" and mode != "forward":
        raise Unavailable("compiled FlexAttention has no backward on the CPU")
    return compiled(expression, device, mode)


def compiled_parts(expression: Expression, device: torch.device, mode: str) -> Expression:
    """An eager expression that holds compiled FlexAttention calls; the same limits apply."""
    compiled_flex(expression, device, mode)
    return expression


def by_backend(backend: SDPBackend) -> Callable[[Expression, torch.device, str], Expression]:
    """How to run an SDPA expression by one of torch's CUDA kernels, whichever it would choose."""

    def prepare(expression: Expression, device: torch.device, mode: str) -> Expression:
        if device.type != "cuda":
            raise Unavailable(f"torch has {backend.name} for CUDA devices only")

        def call(tensors: Tensors) -> torch.Tensor:
            with sdpa_kernel(backend):
                return expression(tensors)

        return call

    return prepare


PEERS = (
    Peer(name="sdpa", kind="sdpa", title="torch SDPA, eager", prepare=as_written),
    Peer(name="sdpa-compile", kind="sdpa", title="torch.compile of the SDPA expression",
         prepare=compiled, compiles=True),
    Peer(name="sdpa-flash", kind="sdpa", title="torch SDPA, its FlashAttention",
         prepare=by_backend(SDPBackend.FLASH_ATTENTION)),
    Peer(name="sdpa-cudnn", kind="sdpa", title="torch SDPA, cuDNN",
         prepare=by_backend(SDPBackend.CUDNN_ATTENTION)),
    Peer(name="sdpa-efficient", kind="sdpa", title="torch SDPA, memory-efficient attention",
         prepare=by_backend(SDPBackend.EFFICIENT_ATTENTION)),
    Peer(name="sdpa-bias", kind="sdpa-bias", title="torch SDPA with a prepared additive mask",
         prepare=as_written),
    Peer(name="sdpa-math", kind="sdpa-math", title="torch SDPA, math backend", prepare=as_written),
    Peer(name="explicit", kind="explicit", title="explicit softmax, eager", prepare=as_written),
    Peer(name="explicit-compile", kind="explicit", title="torch.compile of explicit softmax",
         prepare=compiled, compiles=True),
    Peer(name="explicit-jvp", kind="explicit-jvp",
         title="explicit softmax, forward over reverse (torch.func)", prepare=as_written),
    Peer(name="explicit-jvp-compile", kind="explicit-jvp",
         title="torch.compile of explicit softmax, forward over reverse", prepare=compiled,
         compiles=True),
    Peer(name="flex", kind="flex", title="FlexAttention, eager", prepare=as_written),
    Peer(name="flex-compile", kind="flex", title="FlexAttention under torch.compile",
         prepare=compiled_flex, compiles=True),
    Peer(name="flex-parts", kind="flex-parts", prepare=compiled_parts, compiles=True,
         title="FlexAttention compiled by itself, eager code around it"),
    Peer(name="official", kind="official", title="the official formulation of a method, eager",
         prepare=as_written),
    Peer(name="dense", kind="dense", title="dense matrices, eager", prepare=as_written),
    Peer(name="eager", kind="eager", title="eager torch", prepare=as_written),
    Peer(name="foreach", kind="foreach", title="torch._foreach, one list after the other",
         prepare=as_written),
    Peer(name="stack", kind="stack", title="eager torch on stacked tensors", prepare=as_written),
    Peer(name="batches", kind="batches", title="eager torch, noise drawn in batches",
         prepare=as_written),
    Peer(name="batches-compile", kind="batches", title="torch.compile of noise drawn in batches",
         prepare=compiled, compiles=True),
    Peer(name="separate", kind="separate", title="eager torch, as published code writes it",
         prepare=as_written),
    Peer(name="separate-compile", kind="separate",
         title="torch.compile of the published expression", prepare=compiled, compiles=True),
    Peer(name="eager-compile", kind="eager", title="torch.compile of the eager expression",
         prepare=compiled, compiles=True),
)  # fmt: skip
