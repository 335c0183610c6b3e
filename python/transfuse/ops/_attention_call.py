"""What limits the attention kernel in CUDA C++ by the sizes of a call."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

# As in csrc/include/transfuse/attention.h and csrc/cuda/attention_hopper.cu.
SOURCES, HEAD_DIM, PIECE = 8, 128, 8
CAPABILITY = (9, 0)
FORWARD = "transfuse::attention_forward"


def hopper_limit(query: Tensor, *keys_and_values: Tensor) -> str | None:
    """Why the kernel does not take a call; None if it does.

    Args:
        query: of the call; what is not (B, H, N, D) says nothing.
        keys_and_values: key, value of each source, as many as are known.
    """
    # The compiler follows neither question; the kernel's launcher asks the first again.
    if query.is_cuda and not torch.compiler.is_compiling():
        capability = torch.cuda.get_device_capability(query.device)
        if capability != CAPABILITY:
            return (
                "the kernel is made for compute capability 9.0, and this device has "
                f"{capability[0]}.{capability[1]}"
            )
        if not torch._C._dispatch_has_kernel_for_dispatch_key(FORWARD, "CUDA"):
            return "the CUDA library was built without code for compute capability 9.0"
    widths = [t.shape[-1] for t in (query, *keys_and_values) if t.dim() == 4]
    return hopper_fits(widths, len(keys_and_values) // 2)


def hopper_fits(widths: Iterable[int], sources: int) -> str | None:
    """Why the kernel does not take such head dims and so many sources; None if it does."""
    if sources > SOURCES:
        return f"{sources} sources are more than {SOURCES}"
    for width in widths:
        if width % PIECE != 0 or width > HEAD_DIM:
            return f"a head dim of {width} is not a multiple of {PIECE} up to {HEAD_DIM}"
    return None
