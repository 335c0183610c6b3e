"""Inputs that catch kernels reading or keeping what is not theirs.

* :func:`framed`: the same numbers inside a larger buffer of NaN, so that one element read
  outside shows in the result.
* :func:`strided`: the same numbers behind other strides.
* :func:`poisoned`: memory that a kernel receives uninitialised is NaN, so that one element left
unwritten
  shows in the result.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

FRAMES = ("surrounded", "flat")
STRIDES = ("transposed", "heads_last", "sliced", "offset", "expanded")


def filler(dtype: torch.dtype) -> object:
    """A value that spoils a result it leaks into: NaN; True for masks; 0 for indices.

    An index out of range would end the process instead of failing the test.
    """
    if dtype.is_floating_point:
        return float("nan")
    return dtype == torch.bool


def framed(tensor: Tensor, kind: str = "surrounded") -> Tensor:
    """The tensor as a view into a larger buffer that holds :func:`filler` everywhere else.

    ``"surrounded"`` leaves a margin on both sides of every dimension; ``"flat"`` keeps the tensor
    contiguous, with a margin before and after it and its start off any vector alignment.
    """
    if kind == "surrounded":
        # Odd margins on the last axis, so that rows are not aligned either.
        before = [1] * (tensor.dim() - 1) + [3] * min(tensor.dim(), 1)
        shape = [n + b + 1 + b for n, b in zip(tensor.shape, before, strict=True)]
        buffer = torch.full(shape, filler(tensor.dtype), dtype=tensor.dtype, device=tensor.device)
        view = buffer
        for dim, (size, start) in enumerate(zip(tensor.shape, before, strict=True)):
            view = view.narrow(dim, start, size)
    elif kind == "flat":
        margin = 67
        buffer = torch.full(
            (tensor.numel() + 2 * margin,),
            filler(tensor.dtype),
            dtype=tensor.dtype,
            device=tensor.device,
        )
        view = buffer[margin : margin + tensor.numel()].view(tensor.shape)
    else:
        raise ValueError(f"kind: expected one of {FRAMES}, got {kind!r}")
    view.copy_(tensor)
    return view


def strided(tensor: Tensor, kind: str) -> Tensor:
    """The tensor with other strides; ``"expanded"`` also changes its numbers.

    ``"transposed"``: the last axis is not the fastest. ``"heads_last"``: axes 1 and 2 swapped in
    memory, as projections leave them. ``"sliced"``: every second entry along each axis of a larger
    tensor. ``"offset"``: contiguous, starting one element into its storage. ``"expanded"``: the
    first entry of the first axis longer than 1 for all of them, with stride 0.
    """
    if kind == "transposed":
        if tensor.dim() < 2:
            return tensor
        return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)
    if kind == "heads_last":
        if tensor.dim() != 4:
            return tensor
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    if kind == "sliced":
        buffer = torch.full(
            [2 * n for n in tensor.shape],
            filler(tensor.dtype),
            dtype=tensor.dtype,
            device=tensor.device,
        )
        view = buffer[tuple(slice(1, None, 2) for _ in tensor.shape)]
        return view.copy_(tensor)
    if kind == "offset":
        buffer = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=tensor.device)
        return buffer[1:].view(tensor.shape).copy_(tensor)
    if kind == "expanded":
        for dim, n in enumerate(tensor.shape):
            if n > 1:
                return tensor.narrow(dim, 0, 1).contiguous().expand(tensor.shape)
        return tensor
    raise ValueError(f"kind: expected one of {STRIDES}, got {kind!r}")


def packed(*tensors: Tensor) -> tuple[Tensor, ...]:
    """(B, H, N, D) tensors of one shape as views into one (B, N, count, H, D) buffer, as a fused
    query-key-value projection leaves them."""
    buffer = torch.stack([t.transpose(1, 2) for t in tensors], dim=2).contiguous()
    return tuple(buffer[:, :, i].transpose(1, 2) for i in range(len(tensors)))


@contextmanager
def poisoned(device: torch.device | str = "cpu") -> Iterator[None]:
    """While active, tensors that torch hands out uninitialised are filled with NaN.

    torch does that in deterministic mode; blocks released just before are NaN as well, for memory a
    kernel takes from elsewhere.
    """
    from torch.utils import deterministic

    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    deterministic.fill_uninitialized_memory = True
    try:
        # Sizes up to what a small test allocates; freed at once, so the allocator hands them out
        # again.
        blocks = [
            torch.full((1 << power,), float("nan"), device=device)
            for power in range(4, 18)
            for _ in range(4)
        ]
        del blocks
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        deterministic.fill_uninitialized_memory = fill
