"""Peers from other packages. None is a dependency; each is used when it happens to be installed."""

from __future__ import annotations

import torch

from ..cases import Expression, Unavailable
from . import Peer
from .torch_peers import as_written


def needs_cuda(expression: Expression, device: torch.device, mode: str) -> Expression:
    """Run as written, on a GPU only."""
    if device.type != "cuda":
        raise Unavailable("this package computes on CUDA devices only")
    return expression


def no_adapter(expression: Expression, device: torch.device, mode: str) -> Expression:
    """A package whose call this suite does not know yet."""
    raise Unavailable("installed, but this suite has no call for it yet")


# A peer whose kind no case defines says so in its row once the package is installed.
PEERS = (
    Peer(name="natten", kind="natten", title="NATTEN neighbourhood attention", package="natten",
         prepare=no_adapter),
    Peer(name="xformers", kind="xformers", title="xFormers memory-efficient attention",
         package="xformers.ops", prepare=needs_cuda),
    Peer(name="flash-attn", kind="flash-attn", title="flash-attn", package="flash_attn",
         prepare=needs_cuda),
    Peer(name="jvp-flash-attention", kind="jvp-flash-attention", title="jvp-flash-attention",
         package="jvp_flash_attention", prepare=no_adapter),
    Peer(name="tomesd", kind="tomesd", title="tomesd token merging", package="tomesd",
         prepare=as_written),
    Peer(name="torchjd", kind="torchjd", title="torchjd, one problem after the other",
         package="torchjd.aggregation", prepare=as_written),
    Peer(name="scipy", kind="scipy", title="scipy.optimize, one problem after the other",
         package="scipy.optimize", prepare=as_written),
)  # fmt: skip
